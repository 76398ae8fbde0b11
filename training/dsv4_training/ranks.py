"""Training on several processes: batches and sequences divided, gradients summed, Muon's matrices each stepped by one.

Owns who steps which matrix and the trainer's communication; the forward pass of a divided sequence is
context_parallel.py's.  A matrix is orthogonalised whole, so it cannot be divided like AdamW's state: whole matrices go
to processes by balanced load, and their new values to all.  What AdamW steps is small and is stepped everywhere alike.
The state on disk is that of one process: a run may go on with another number of them.
Source: report, on Muon with divided optimiser states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4_engine.errors import InputError
from dsv4_engine.ranks import join, launched

from . import losses, state
from .context_parallel import RankedNetwork, World
from .layout import BLOCK
from .model import Network
from .optimizer import FAST, STABILISING, Optimizer, is_matrix
from .packing import Batch
from .recipe import Optimiser as Settings
from .recipe import Recipe
from .trainer import MEASURES, Form, Trainer

T = TypeVar("T")
BUCKET = 1 << 26  # elements that are sent at once
MEANS = ("recall", "mass")  # measures of which every process has one of its own


# Who steps which matrix ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """The ``index``-th matrix of a parameter: experts are stacked, wo_a's groups lie one below the other."""

    name: str
    index: int
    rows: int
    columns: int

    @property
    def key(self) -> str:
        return f"{self.name}#{self.index}"

    @property
    def load(self) -> int:
        """Multiplications of its Newton-Schulz iteration: two products n x n x m and one n x n x n a step, n <= m."""
        n, m = sorted((self.rows, self.columns))
        return len(FAST + STABILISING) * (2 * n * n * m + n**3)


def matrices(parameters: Mapping[str, Tensor], groups: int) -> Iterator[Matrix]:
    """What Muon steps, matrix by matrix."""
    for name, p in parameters.items():
        if p.requires_grad and is_matrix(name, p):
            rows = p.shape[-2] // (groups if name.endswith("wo_a.weight") else 1)
            for index in range(p.numel() // (rows * p.shape[-1])):
                yield Matrix(name, index, rows, p.shape[-1])


def assign(loads: Sequence[int], ranks: int) -> list[int]:
    """A rank for each load, the largest first to whoever has least: at most 4/3 of the best possible largest sum.

    Source: R. L. Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969).
    """
    sums, owners = [0] * ranks, [0] * len(loads)
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        owner = min(range(ranks), key=lambda r: (sums[r], r))
        owners[item], sums[owner] = owner, sums[owner] + loads[item]
    return owners


def view(p: Tensor, matrix: Matrix) -> Tensor:
    """The matrix as a part of its parameter's storage."""
    return p.view(-1, matrix.rows, matrix.columns)[matrix.index]


class SharedOptimizer(Optimizer):
    """Muon's matrices stepped where they belong and then sent to all; gradients must be the same everywhere."""

    def __init__(self, parameters: Mapping[str, Tensor], groups: int, settings: Settings, world: World) -> None:
        self._parameters, self._world = dict(parameters), world
        every = list(matrices(parameters, groups)) if settings.kind == "muon" else []
        owners = assign([m.load for m in every], world.ranks.count)
        self.owned: list[list[Matrix]] = [[] for _ in range(world.ranks.count)]
        for matrix, owner in zip(every, owners, strict=True):
            self.owned[owner].append(matrix)
        divided = {m.name for m in every}
        rest = {n: p for n, p in parameters.items() if n not in divided}
        self._own = {m.key: (m, view(parameters[m.name].detach(), m).requires_grad_()) for m in self._mine()}
        super().__init__({**rest, **{key: value for key, (_, value) in self._own.items()}}, 1, settings)

    def _mine(self) -> list[Matrix]:
        return self.owned[self._world.ranks.rank]

    def step(self) -> None:
        for matrix, value in self._own.values():
            grad = self._parameters[matrix.name].grad
            value.grad = None if grad is None else view(grad.contiguous(), matrix)
        super().step()
        with torch.no_grad():
            for rank, members in enumerate(self.owned):
                self._send(rank, [view(self._parameters[m.name].detach(), m) for m in members])

    def _send(self, rank: int, values: list[Tensor]) -> None:
        for part in buckets(values):
            flat = torch.cat([v.flatten() for v in part])
            dist.broadcast(flat, src=rank)
            if rank != self._world.ranks.rank:
                scatter(flat, part)

    def zero_grad(self) -> None:
        super().zero_grad()
        for p in self._parameters.values():
            p.grad = None

    def whole(self) -> dict[str, Tensor]:
        """The state as one process' Optimizer has it: momenta by parameter.  To be called by every process."""
        out = {name: value for name, value in self.state().items() if "#" not in name}
        momenta = {f"first.{m.name}": torch.zeros_like(self._parameters[m.name]) for part in self.owned for m in part}
        for key, (matrix, _) in self._own.items():
            view(momenta[f"first.{matrix.name}"], matrix).copy_(self.state()[f"first.{key}"])
        add_up(list(momenta.values()))
        return out | momenta

    @torch.no_grad()
    def take(self, whole: Mapping[str, Tensor]) -> None:
        """Fills the state from what `whole` gave, on any number of processes."""
        for name, value in self.state().items():
            if "#" not in name:
                value.copy_(whole[name])
        for key, (matrix, _) in self._own.items():
            self.state()[f"first.{key}"].copy_(view(whole[f"first.{matrix.name}"], matrix))


# What travels --------------------------------------------------------------------------------------------------------


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, as many at a time as have BUCKET elements."""
    part, size = list[Tensor](), 0
    for x in tensors:
        if part and size + x.numel() > BUCKET:
            yield part
            part, size = [], 0
        part.append(x)
        size += x.numel()
    if part:
        yield part


def scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for own, new in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        own.copy_(new.view_as(own))


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces each by its sum over all processes."""
    for part in buckets(tensors):
        flat = torch.cat([x.flatten() for x in part])
        dist.all_reduce(flat)
        scatter(flat, part)


# The run -------------------------------------------------------------------------------------------------------------


class RankedTrainer(Trainer):
    """A Trainer's part on one process.  Every process is given the same batches and the same calls.

    Its losses are those of the whole batch.  The leader alone writes the state.
    """

    def __init__(
        self,
        recipe: Recipe,
        parameters: dict[str, Tensor],
        device: torch.device,
        world: World,
        compiled: bool = False,
    ) -> None:
        """Raises InputError when a stage cannot be divided so."""
        check(recipe, world)
        self.world = world
        with torch.no_grad():
            for p in parameters.values():
                world.ranks.tensor_from_leader(p)
        # One clock: the processes must agree when to write the state, and when to stop.
        super().__init__(recipe, parameters, device, compiled, lambda: float(world.ranks.from_leader(time.monotonic())))
        self._compiled = False  # operations are compiled, but what the processes send is not captured

    def _make_network(self, compiled: bool) -> Network:
        return RankedNetwork(self.config, self.world, compiled)

    def _make_optimizer(self) -> Optimizer:
        return SharedOptimizer(self.parameters, self.config.o_groups, self.recipe.optimiser, self.world)

    def step(self, batch: Batch, form: Form, scale: float) -> Tensor:
        """batch: the whole one."""
        start, end = self.world.share.share(batch.ids.shape[0])
        own = (x[start:end] for x in (batch.ids, batch.classes, batch.start, batch.place, batch.rows))
        return super().step(Batch(*own), form, scale)

    def save(self, path: Path) -> None:
        tensors, facts = self.whole_state()
        if self.world.ranks.rank == 0:
            state.save(path, tensors, facts)
        self.world.ranks.from_leader(None)  # nobody goes on before it is written

    def _optimizer_to_save(self) -> dict[str, Tensor]:
        return {f"optimiser.{name}": value for name, value in self._shared_optimizer().whole().items()}

    def _take_optimizer(self, saved: dict[str, Tensor]) -> None:
        self._shared_optimizer().take({name.removeprefix("optimiser."): value for name, value in saved.items()})

    def _shared_optimizer(self) -> SharedOptimizer:
        assert isinstance(self.optimizer, SharedOptimizer), "made above"
        return self.optimizer

    def _own(self, x_BS: Tensor) -> Tensor:
        start, end = self.world.span(x_BS.shape[1])
        return x_BS[:, start:end].flatten()

    def _next_choice(self, best_N: Tensor, ids_BS: Tensor) -> Tensor:
        best = best_N.unflatten(0, (ids_BS.shape[0], -1))
        later = losses.ahead(best, 1, -1)
        following = self.world.shift(best[:, :1], -1)
        if self.world.place.rank + 1 < self.world.context:
            later[:, -1:] = following
        return later.flatten()

    def _share_gradients(self) -> None:
        add_up([p.grad for p in self.parameters.values() if p.grad is not None])

    def _shared(self, measures: Tensor) -> Tensor:
        """Parts are summed; recall is the processes' mean; the gradient's norm is the same everywhere."""
        count = self.world.ranks.count
        parts = dict.fromkeys((*MEANS, "grad_norm"), 1 / count)
        weights = torch.tensor([parts.get(name, 1.0) for name in MEASURES], device=measures.device)
        return self.world.ranks.sum(measures * weights)


def enter(context: int) -> World:
    """This process' place: alone, or as torchrun says.  Raises InputError when the processes do not divide."""
    ranks = launched()
    if ranks.count % max(1, context) == 0:
        join(ranks)
    return World.of(ranks, context)


def leader_first(world: World, make: Callable[[], T]) -> T:
    """Made by the leader, who may write files, before the others make it too."""
    made = make() if world.ranks.rank == 0 else None
    world.ranks.from_leader(None)
    return made if made is not None else make()


def device_of(world: World, device: torch.device) -> torch.device:
    """The GPU of this process' number, where there are several."""
    own = torch.device(world.ranks.device(device.type))
    if own.type == "cuda" and own.index is not None:
        torch.cuda.set_device(own)
    return own


def trainer(
    recipe: Recipe, parameters: dict[str, Tensor], device: torch.device, world: World, compiled: bool
) -> Trainer:
    if world.ranks.count == 1:
        return Trainer(recipe, parameters, device, compiled)
    return RankedTrainer(recipe, parameters, device, world, compiled)


def check(recipe: Recipe, world: World) -> None:
    """Raises InputError when a stage's batch cannot be divided among the processes."""
    lines = world.share.count
    for stage in recipe.stages:
        if stage.batch % lines:
            raise InputError(
                f"stage {stage.name!r}: {stage.batch} sequences a step cannot be divided among {lines} parts",
                "Change its tokens, or how many processes share a sequence (--context).",
            )
        if stage.length // BLOCK < world.context:
            raise InputError(
                f"stage {stage.name!r}: {stage.length} tokens are less than a block of {BLOCK} for each of "
                f"{world.context} processes",
                "Use fewer processes for a sequence (--context).",
            )
