"""The model on GPUs, with the interface of dsv4_engine.model.Model: sessions, the prefix cache and evaluations see no
difference but that results depend on no chunk boundary.

Owns the stages and the order of their work.  Every launch is asynchronous, so while one device runs a chunk the one
before it has begun the next.  Letters: S tokens, J streams, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from dsv4_kernels.backend import Backend

from ..config import ModelConfig
from ..device_map import AUTO, Limits
from ..device_sampling import Draw
from ..errors import CheckpointError, InputError
from ..model import Model
from ..offload.disk import ExpertFiles
from ..offload.store import ExpertStore
from ..placement import MemoryPlan
from ..ranks import ALONE
from ..state import SequenceState, new_layer_state
from ..weights import Weights
from .apart import EXACT_BINADES, Residency, with_pools
from .apart_plan import planned
from .chunk import Chunk
from .decode import Steps
from .layer import Chosen, GpuBlock
from .plan import GpuPlan
from .stage import Stage, on
from .state import GpuState, LayerBuffers, Part
from .weights import CheckpointSource, PackedSource


class GpuModel:
    """All layers, spread over several devices.  row_invariant: see Model."""

    row_invariant = True
    kv_dtype: Literal["mixed"] = "mixed"
    dtype = torch.bfloat16
    mtp = None
    ranks = ALONE

    def __init__(
        self,
        sources: Sequence[PackedSource],
        config: ModelConfig,
        ranges: Sequence[tuple[int, int]] | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        """sources: of each device's weights; ranges: its layers, first and last + 1 (None: one device has all).

        chosen: called between each layer's routing and its experts (layer.py).  Raises ValueError for shapes or values
        that no kernel takes.
        """
        self.config, self.chosen = config, chosen
        ranges = ranges or [(0, config.num_hidden_layers)]
        self.stages = [Stage(source, config, *part) for source, part in zip(sources, ranges, strict=True)]
        self.blocks: list[GpuBlock] = [block for stage in self.stages for block in stage.blocks]
        self.devices = [stage.device for stage in self.stages]
        self.device = self.devices[-1]  # where logits are made
        # Whether a step is nothing but what is launched.
        self._recorded = chosen is None or (isinstance(chosen, Residency) and chosen.recorded)
        self._steps = Steps(self.stages, chosen, self._recorded)
        self._done: list[torch.cuda.Event] = []
        self._nowhere: list[Part] | None = None

    def new_state(self) -> GpuState:
        """The state before the first token."""
        return GpuState.empty([stage.layout for stage in self.stages], self.config)

    def blank_state(self) -> SequenceState:
        """See Model.blank_state."""
        return SequenceState([new_layer_state(self.config, ratio, "mixed") for ratio in self.config.compress_ratios])

    def adopted(self, state: SequenceState) -> GpuState:
        """See Model.adopted."""
        return GpuState.adopted(state, [stage.layout for stage in self.stages], self.config)

    def forward(self, token_ids_S: Tensor, state: GpuState) -> Tensor:
        """Run int64 ids [S] after ``state.position`` tokens; advances the state; returns streams [S, J, D].

        The ids may lie on the host.  Returns before the work is done (see `wait`); the streams of a single token are
        good until the next one.
        """
        tokens = token_ids_S.shape[0]
        self._begin(token_ids_S)
        if tokens == 1 and state.known <= state.position:
            x_SJD = self._steps.step(int(token_ids_S), state)
        else:
            x_SJD = self._prefill(token_ids_S, state)
        state.position += tokens
        return x_SJD

    def ahead(self, draw: Draw, state: GpuState) -> None:
        """See Model.ahead.  A step leaves no trace that the next one there does not write over (state.py), but in which
        experts are held where they are apart.
        """
        if self._recorded and state.known <= state.position:
            self._begin(draw.token)
            self._steps.ahead(draw, state)

    def _begin(self, token_ids_S: Tensor) -> None:
        if isinstance(self.chosen, Residency):
            self.chosen.begin(token_ids_S)

    def _prefill(self, token_ids_S: Tensor, state: GpuState) -> Tensor:
        self._steps.forget()
        end = state.position + token_ids_S.shape[0]
        state.backup()
        state.reserve(end)
        known = state.known > state.position
        assert not known or state.known >= end, "known rows end within a chunk"
        x_SJD: Tensor | None = None
        for number, (stage, part) in enumerate(zip(self.stages, state.parts, strict=True)):
            with on(stage.device):
                chunk = Chunk.at(token_ids_S.to(stage.device, non_blocking=True), state.position, stage.freqs)
                x_SJD = None if x_SJD is None else x_SJD.to(stage.device, non_blocking=True)
                written = self._unread()[number] if known else part.buffers
                x_SJD = stage.forward(x_SJD, chunk, part.buffers, written, self.chosen)
        assert x_SJD is not None
        return x_SJD

    def logits(self, x_SJD: Tensor) -> Tensor:
        """Streams [S, J, D] -> float32 [S, V], on the last device."""
        stage = self.stages[-1]
        with on(stage.device):
            return stage.logits(x_SJD)

    def mtp_logits(self, next_ids_S: Tensor, x_SJD: Tensor, position: int, state: object) -> Tensor:
        """The MTP block is not loaded here."""
        raise ValueError("the MTP block does not run on this backend; use dtype='float32'")

    def wait(self, last: bool = True) -> None:
        """Return once all work handed to the devices is done; with ``last`` false, all but the latest chunk, so that
        no device waits for the host between chunks.
        """
        if self.device.type != "cuda":
            return
        with on(self.device):
            event = torch.cuda.Event()
            event.record()
        self._done.append(event)
        while len(self._done) > (0 if last else 1):
            self._done.pop(0).synchronize()

    def _unread(self) -> list[list[LayerBuffers]]:
        """Buffers whose tables point to room that nobody reads, for rows that are known."""
        if self._nowhere is None:
            self._nowhere = [Part.unread(stage.layout) for stage in self.stages]
        return [part.buffers for part in self._nowhere]


def gpu_model(
    weights: Weights,
    config: ModelConfig,
    backend: Backend,
    ctx: int,
    seen: Callable[[int], object] | None,
    limits: Limits = Limits(),  # noqa: B008  # frozen
    device_map: str | Path = AUTO,
) -> tuple[Model, MemoryPlan]:
    """The model of a checkpoint on the backend's devices, and the plan for ``ctx`` tokens (see Engine.load).

    Raises MemoryPlanError before anything is allocated, and CheckpointError for values that the kernels cannot hold.
    """
    found = planned(config, weights.specs, weights.forms.__getitem__, backend, ctx, limits, device_map)
    plan, apart = found.plan, found.plan.device_map.apart()
    complete = plan.slots == plan.experts  # then memory holds all that the GPUs do not
    weights.check_values(seen, apart, read=bool(apart) and complete)
    devices = [torch.device(name) for name in plan.device_map.devices]
    sources = [CheckpointSource(weights, device, seen) for device in devices]
    if not apart:
        return as_model(sources, config, found)
    store = ExpertStore(ExpertFiles(weights, EXACT_BINADES, mtp=False), config, plan.slots, apart, pinned=True)
    if store.complete:
        store.fill(seen)
    return as_model(sources, config, found, with_pools(sources, config, found.ranges, apart, plan.gpu_slots, store))


def as_model(
    sources: Sequence[PackedSource], config: ModelConfig, plan: GpuPlan, chosen: Chosen | None = None
) -> tuple[Model, MemoryPlan]:
    """The model over these weights as Engine and Session take it.  Raises CheckpointError as above."""
    try:
        with torch.inference_mode():
            model = GpuModel(sources, config, plan.ranges, chosen)
    except InputError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error), "Use --dtype float32, which runs on torch's own operations.") from error
    return cast(Model, model), plan.plan
