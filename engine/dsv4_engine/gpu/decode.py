"""One token at a time: recorded once as CUDA graphs, then replayed.

Owns the one place in memory that recorded steps work on, and who has it: a sequence that takes a step moves in, and the
one before moves out to memory of its own.  A step is repeatable (state.py), so it is run once to compile its kernels,
then recorded and replayed, all from the same state.  How much of the grid the longest context needs is fixed in a
recording; there is one for every power of `_GROWTH`, whose results have the same bits.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .chunk import Chunk
from .layer import Chosen
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


class Steps:
    """Single tokens of a model's states."""

    def __init__(self, stages: Sequence[Stage], chosen: Chosen | None = None) -> None:
        """chosen: called between each layer's routing and its experts; then a step is a graph for every part of a
        layer, and without it one for all layers of a device.
        """
        self._stages, self._chosen = stages, chosen
        self._recording = all(stage.device.type == "cuda" for stage in stages)
        self._owner: weakref.ref[GpuState] | None = None
        self._flats: list[Tensor] = []
        self._inputs = [torch.zeros(2, dtype=torch.int64, device=stage.device) for stage in stages]
        self._streams: list[Tensor] = []  # what each stage but the first begins with
        self._recorded: dict[int, list[_Recorded]] = {}
        self._pools: list[Any] = []

    def step(self, token_1: Tensor, state: GpuState) -> Tensor:
        """Run one id, int64 [1], after ``state.position`` tokens: streams [1, J, D], good until the next step."""
        state.reserve(state.position + 1)
        record = self._recording and not state.watched
        if record:
            self._take(state)
        for inputs in self._inputs:
            inputs[:1].copy_(token_1, non_blocking=True)
            inputs[1:].fill_(state.position)
        ctx = _FIRST
        while ctx < state.position + 1:
            ctx *= _GROWTH
        if not record:
            return self._run(state, ctx)
        if ctx not in self._recorded:
            self._run(state, ctx)
            self._recorded[ctx] = self._record(state, ctx)
        out: Tensor | None = None
        for number, recorded in enumerate(self._recorded[ctx]):
            if out is not None:
                self._streams[number].copy_(out, non_blocking=True)
            with torch.cuda.device(self._stages[number].device):
                recorded.replay()
            out = recorded.out
        assert out is not None
        return out

    def _take(self, state: GpuState) -> None:
        """Let ``state`` lie where recorded steps work."""
        if not self._flats:
            self._flats = [stage.layout.empty() for stage in self._stages]
            self._pools = []
            for stage in self._stages:
                with torch.cuda.device(stage.device):
                    self._pools.append(torch.cuda.graph_pool_handle())
            shape = (1, self._stages[0].config.hc_mult, self._stages[0].config.hidden_size)
            self._streams = [torch.empty(shape, dtype=torch.bfloat16, device=stage.device) for stage in self._stages]
        owner = self._owner() if self._owner is not None else None
        if owner is state:
            return
        if owner is not None:
            for part in owner.parts:
                part.flat = part.flat.clone()
        for part, flat in zip(state.parts, self._flats, strict=True):
            flat.copy_(part.flat)
            part.flat = flat
        self._owner = weakref.ref(state)

    def _stage(self, number: int, x_SJD: Tensor | None, state: GpuState, ctx: int, chosen: Chosen | None) -> Tensor:
        stage, part, inputs = self._stages[number], state.parts[number], self._inputs[number]
        chunk = Chunk.step(inputs[:1], inputs[1:], stage.freqs, min(ctx, stage.config.max_position_embeddings))
        return stage.forward(x_SJD, chunk, part.buffers, part.buffers, chosen)

    def _run(self, state: GpuState, ctx: int) -> Tensor:
        """The step, launch by launch."""
        x_SJD: Tensor | None = None
        for number, stage in enumerate(self._stages):
            if x_SJD is not None:
                x_SJD = x_SJD.to(stage.device, non_blocking=True)
            with on(stage.device):
                x_SJD = self._stage(number, x_SJD, state, ctx, self._chosen)
        assert x_SJD is not None
        return x_SJD

    def _record(self, state: GpuState, ctx: int) -> list[_Recorded]:
        found = []
        for number, stage in enumerate(self._stages):
            recorded = _Recorded()
            gc.collect()  # nothing may be freed on the device while it is recorded
            with torch.cuda.device(stage.device):
                torch.cuda.synchronize()
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    recorder = _Recorder(self._pools[number], recorded)
                    chosen = None if self._chosen is None else _cutting(recorder, self._chosen)
                    recorded.out = self._stage(number, self._streams[number] if number else None, state, ctx, chosen)
                    recorder.end()
                torch.cuda.current_stream().wait_stream(side)
            found.append(recorded)
        return found


def _cutting(recorder: _Recorder, chosen: Chosen) -> Chosen:
    """Ends the graph where ``chosen`` is to be called, and begins the next behind it."""

    def cut(layer: int, chosen_SK: Tensor) -> None:
        recorder.cut(lambda: chosen(layer, chosen_SK))

    return cut
