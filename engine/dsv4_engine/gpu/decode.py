"""One token at a time: recorded once as CUDA graphs, then replayed.

Owns the one place in memory that recorded steps work on, and who has it: a sequence that takes a step moves in, and the
one before moves out to memory of its own.  A step is repeatable (state.py), so it is run once to compile its kernels,
then recorded and replayed, all from the same state.  How much of the grid the longest context needs is fixed in a
recording; there is one for every power of `_GROWTH`, whose results have the same bits.  And because a step is
repeatable, one may be run before it is known whether it is wanted.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device_sampling import Draw
from .beside import Beside
from .chunk import Chunk
from .layer import Chosen, Likely
from .stage import Stage, on
from .state import GpuState

_GROWTH = 4
_FIRST = 2048  # tokens; with fewer, V4-Flash's indexers have nothing to choose


@dataclass
class _Recorded:
    """A stage's step: graphs, and between them what has to happen on the host; ``out``: the streams behind it."""

    pieces: list[Callable[[], None]] = field(default_factory=list)
    out: Tensor | None = None

    def replay(self) -> None:
        for piece in self.pieces:
            piece()


@dataclass(frozen=True)
class _Begun:
    """A step that was run ahead of its token's being known."""

    draw: Draw
    state: weakref.ref[GpuState]
    position: int
    streams: Tensor

    def is_for(self, token: int, state: GpuState) -> bool:
        return self.draw.known == token and self.state() is state and self.position == state.position


class _Recorder:
    """Records a stage's step in pieces, each a graph, with host code between them."""

    def __init__(self, pool: Any, recorded: _Recorded) -> None:
        self._pool, self._recorded = pool, recorded
        self._graph = self._begin()

    def _begin(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph

    def cut(self, between: Callable[[], None]) -> None:
        self.end()
        self._recorded.pieces.append(between)
        self._graph = self._begin()

    def end(self) -> None:
        self._graph.capture_end()
        self._recorded.pieces.append(self._graph.replay)

    def drop(self) -> None:
        """End what is not whole."""
        with suppress(RuntimeError):  # which says so
            self._graph.capture_end()


class Steps:
    """Single tokens of a model's states."""

    def __init__(self, stages: Sequence[Stage], chosen: Chosen | None = None, recorded: bool = False) -> None:
        """chosen: called between each layer's routing and its experts.  recorded: what it launches is recorded too;
        else it has to be called each time, and a step is a graph for every part of a layer, not one for all of them.
        """
        self._stages, self._chosen, self._cuts = stages, chosen, chosen is not None and not recorded
        self._recording = all(stage.device.type == "cuda" for stage in stages)
        self._owner: weakref.ref[GpuState] | None = None
        self._begun: _Begun | None = None
        self._flats: list[Tensor] = []
        self._inputs = [torch.zeros(2, dtype=torch.int64, device=stage.device) for stage in stages]
        self._streams: list[Tensor] = []  # what each stage but the first begins with
        self._recorded: dict[int, list[_Recorded]] = {}
        self._pools: dict[int, Any] = {}

    def step(self, token: int, state: GpuState) -> Tensor:
        """Run one id after ``state.position`` tokens: streams [1, J, D], good until the next step."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.is_for(token, state):
            return begun.streams
        given = torch.tensor([token, state.position])
        ctx = self._bucket(state)
        if not self._recording or state.watched:
            return self._run(given, state, ctx)
        self._take(state)
        if ctx not in self._recorded:
            self._run(given, state, ctx)
            self._recorded[ctx] = self._record(state, ctx)
        return self._replay(given, self._recorded[ctx])

    def ahead(self, draw: Draw, state: GpuState) -> None:
        """Run the step behind the token that is being drawn, if it was recorded; `step` with that token returns it."""
        self._begun = None
        recorded = self._recorded.get(self._bucket(state))
        if recorded is None or state.watched:
            return
        self._take(state)
        position = torch.tensor([state.position]).to(draw.token.device, non_blocking=True)
        streams = self._replay(torch.cat([draw.token, position]), recorded)
        self._begun = _Begun(draw, weakref.ref(state), state.position, streams)

    def forget(self) -> None:
        """What was begun is not what comes next."""
        self._begun = None

    @staticmethod
    def _bucket(state: GpuState) -> int:
        """Make room for one more token; how many the recording for it goes up to."""
        state.reserve(state.position + 1)
        ctx = _FIRST
        while ctx < state.position + 1:
            ctx *= _GROWTH
        return ctx

    def _replay(self, given: Tensor, stages: Sequence[_Recorded]) -> Tensor:
        """given: token and position, int64 [2]."""
        out: Tensor | None = None
        for number, recorded in enumerate(stages):
            with on(self._stages[number].device):
                self._inputs[number].copy_(given, non_blocking=True)
                if out is not None:
                    self._streams[number].copy_(out, non_blocking=True)
                recorded.replay()
            out = recorded.out
        assert out is not None
        return out

    def _take(self, state: GpuState) -> None:
        """Let ``state`` lie where recorded steps work."""
        if not self._flats:
            self._flats = [stage.layout.empty() for stage in self._stages]
            shape = (1, self._stages[0].config.hc_mult, self._stages[0].config.hidden_size)
            self._streams = [torch.empty(shape, dtype=torch.bfloat16, device=stage.device) for stage in self._stages]
        # Part by part, so that a move that is interrupted (no memory, Ctrl-C) can go on, or the other way.
        owner = self._owner() if self._owner is not None else None
        if owner is not None and owner is not state:
            for part, flat in zip(owner.parts, self._flats, strict=True):
                if part.flat is flat:
                    part.flat = flat.clone()
        self._owner = weakref.ref(state)
        for part, flat in zip(state.parts, self._flats, strict=True):
            if part.flat is not flat:
                flat.copy_(part.flat)
                part.flat = flat

    def _stage(self, number: int, x_SJD: Tensor | None, state: GpuState, ctx: int, chosen: Chosen | None) -> Tensor:
        stage, part, inputs = self._stages[number], state.parts[number], self._inputs[number]
        chunk = Chunk.step(inputs[:1], inputs[1:], stage.freqs, min(ctx, stage.config.max_position_embeddings))
        return stage.forward(x_SJD, chunk, part.buffers, part.buffers, chosen)

    def _run(self, given: Tensor, state: GpuState, ctx: int) -> Tensor:
        """The step, launch by launch."""
        x_SJD: Tensor | None = None
        for number, stage in enumerate(self._stages):
            if x_SJD is not None:
                x_SJD = x_SJD.to(stage.device, non_blocking=True)
            with on(stage.device):
                self._inputs[number].copy_(given, non_blocking=True)
                x_SJD = self._stage(number, x_SJD, state, ctx, self._chosen)
        assert x_SJD is not None
        return x_SJD

    def _record(self, state: GpuState, ctx: int) -> list[_Recorded]:
        found = []
        for number, stage in enumerate(self._stages):
            recorded = _Recorded()
            gc.collect()  # nothing may be freed on the device while it is recorded
            with torch.cuda.device(stage.device):
                if number not in self._pools:
                    self._pools[number] = torch.cuda.graph_pool_handle()
                torch.cuda.synchronize()
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    recorder = _Recorder(self._pools[number], recorded)
                    chosen = _cutting(recorder, stage.beside, self._chosen) if self._cuts else self._chosen
                    x_SJD = self._streams[number] if number else None
                    try:
                        recorded.out = self._stage(number, x_SJD, state, ctx, chosen)
                        recorder.end()
                    except BaseException:  # also Ctrl-C: nothing else can be recorded before it has ended
                        recorder.drop()
                        raise
                torch.cuda.current_stream().wait_stream(side)
            found.append(recorded)
        return found


def _cutting(recorder: _Recorder, beside: Beside, chosen: Chosen | None) -> Chosen:
    """Ends the graph where ``chosen`` is to be called, and begins the next behind it."""
    assert chosen is not None

    def cut(layer: int, chosen_SK: Tensor, likely: Likely) -> None:
        beside.join()  # a graph has no end but one
        recorder.cut(lambda: chosen(layer, chosen_SK, None))

    return cut
