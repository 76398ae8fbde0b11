"""One sequence spread over several processes: each has a run of its blocks and computes them as if it had all.

Owns the two stages of the report: a process sends the last rows that are not compressed yet (the window's tail, and
the last block of overlapping compressors) to the next one, then all gather the compressed entries and index keys.
Gradients go back the same ways.  Parts are whole blocks of 128, so that no block is open between two processes, and may
differ by a block; the later ones see more entries.  Knows no optimiser.
Letters: B sequences, S positions, N = B*S of this process, M entries, C channels, Q queries for the indexer's loss.
Source: report, on context parallelism in two stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import InputError
from dsv4_engine.ranks import ALONE, Ranks

from .layers import NEG_INF
from .layout import BLOCK, Layout
from .model import Mode, Network, Output

CSA = 4


@dataclass(frozen=True)
class World:
    """ranks: all processes; every ``context`` of them in a row share their sequences, and ``line`` is their group."""

    ranks: Ranks = ALONE
    context: int = 1
    line: Any = None

    @property
    def place(self) -> Ranks:
        """This process among those that share its sequences."""
        return Ranks(self.ranks.rank % self.context, self.context)

    @property
    def share(self) -> Ranks:
        """Which part of a batch's sequences this process sees."""
        return Ranks(self.ranks.rank // self.context, self.ranks.count // self.context)

    @classmethod
    def of(cls, ranks: Ranks, context: int = 1) -> World:
        """To be called by every process, connected.  Raises InputError when the processes do not divide."""
        if context < 1 or ranks.count % context:
            raise InputError(
                f"{ranks.count} processes are not whole lines of {context}",
                "The number of processes must be a multiple of --context.",
            )
        line = None
        for first in range(0, ranks.count if context > 1 else 0, context):
            members = list(range(first, first + context))
            group = dist.new_group(members)
            line = group if ranks.rank in members else line
        return cls(ranks, context, line)

    def span(self, length: int) -> tuple[int, int]:
        """[start, end) of this process' positions."""
        return self.place.share(length, BLOCK)

    def sizes(self, length: int) -> list[int]:
        spans = (Ranks(i, self.context).share(length, BLOCK) for i in range(self.context))
        return [end - start for start, end in spans]

    def shift(self, x: Tensor, by: int) -> Tensor:
        """What the process ``by`` (1 or -1) places before this one has as x; zeros where there is none."""
        out = torch.zeros_like(x)
        to, source = self.place.rank + by, self.place.rank - by
        first = self.ranks.rank - self.place.rank
        x = x.contiguous()
        operations = []
        if 0 <= to < self.context:
            operations.append(dist.P2POp(dist.isend, x, first + to, self.line))
        if 0 <= source < self.context:
            operations.append(dist.P2POp(dist.irecv, out, first + source, self.line))
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        return out


class _FromBefore(torch.autograd.Function):
    """Stage one: the rows of the process before; their gradient goes back to it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.shift(rows, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.world.shift(grads[0], -1), None


class _Gathered(torch.autograd.Function):
    """Stage two: x [B, m, C] of every process one behind the other; gradients are summed where they came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], world: World) -> Tensor:
        ctx.sizes, ctx.world = sizes, world
        padded = F.pad(x, (0, 0, 0, max(sizes) - x.shape[1])).contiguous()  # all of one size; cut off again below
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=world.line)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # In float32, for many queries' gradients meet here.
        grad = grads[0].float().contiguous()
        dist.all_reduce(grad, group=ctx.world.line)
        return grad.split(ctx.sizes, 1)[ctx.world.place.rank].to(grads[0].dtype), None, None


@dataclass(frozen=True)
class Part(Layout):
    """The layout of one process' positions: ``length`` from first_position on, of the sequence's ``full_length``.

    Entries are counted from the sequence's start.
    """

    first_position: int
    full_length: int

    @classmethod
    def cut(cls, layout: Layout, world: World) -> Part:
        start, end = world.span(layout.length)

        def own(x: Tensor, each: int) -> Tensor:
            """x: flat over sequences, one row for ``each`` tokens."""
            return x.unflatten(0, (layout.batch, -1))[:, start // each : end // each].flatten(0, 1)

        def turns(pair: tuple[Tensor, Tensor], each: int) -> tuple[Tensor, Tensor]:
            return own(pair[0], each), own(pair[1], each)

        values = {f.name: getattr(layout, f.name) for f in fields(Layout)} | {
            "length": end - start,
            "window": turns(layout.window, 1),
            "compressed": turns(layout.compressed, 1),
            "entries": {ratio: turns(pair, ratio) for ratio, pair in layout.entries.items()},
            "opens": own(layout.opens, BLOCK),
            "first_entry": own(layout.first_entry, CSA),
            "jump": turns(layout.jump, BLOCK),
            "still": turns(layout.still, BLOCK),
            "low": {ratio: low[:, start:end] for ratio, low in layout.low.items()},
            "high": {ratio: high[start:end] for ratio, high in layout.high.items()},
        }
        return cls(**values, first_position=start, full_length=layout.length)


class RankedNetwork(Network):
    """The forward pass of this process' part of a batch.

    It is given its sequences whole and gives back the hidden states of its positions; the losses are such that the
    processes' sum is what one process would have, and the loads are that sum.  index_rows: of the whole sequences too.
    """

    def __init__(self, config: ModelConfig, world: World, compiled: bool = False) -> None:
        super().__init__(config, compiled)
        self.world = world

    def forward(
        self,
        w: dict[str, Tensor],
        ids_BS: Tensor,
        mode: Mode,
        index_rows_BQ: Tensor | None = None,
        layout: Layout | None = None,
        routes: Mapping[str, Tensor] | None = None,
    ) -> Output:
        """Raises InputError when there are fewer blocks than processes in the line."""
        batch, length = ids_BS.shape
        if length // BLOCK < self.world.context:
            raise InputError(
                f"{length} tokens are fewer than one block of {BLOCK} for each of {self.world.context} processes",
                "Use longer sequences or a smaller --context.",
            )
        if layout is None:
            layout = Layout.whole(batch, length, self.frequencies(ids_BS.device))
        part = Part.cut(layout, self.world)
        start, end = part.first_position, part.first_position + part.length
        if index_rows_BQ is not None:
            # Other processes' rows stand for the place behind the last, which sees nothing.
            here = (index_rows_BQ >= start) & (index_rows_BQ < end)
            index_rows_BQ = torch.where(here, index_rows_BQ - start, part.length)
        return super().forward(w, ids_BS[:, start:end], mode, index_rows_BQ, part, routes)

    def total(self, x: Tensor) -> Tensor:
        return self.world.ranks.sum(x.detach().clone())

    def _block_before(self, kv: Tensor, layout: Layout) -> Tensor:
        if self.world.context == 1:
            return super()._block_before(kv, layout)
        rows = kv.unflatten(0, (layout.batch, -1))
        before: Tensor = _FromBefore.apply(rows[:, -BLOCK:], self.world)
        return torch.cat([before, rows[:, :-BLOCK]], 1).flatten(0, 1)

    def _earlier_halves(self, kv: Tensor, gate: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        if self.world.context == 1:
            return super()._earlier_halves(kv, gate, layout)
        channels, opens = kv.shape[-1] // 2, layout.first_entry[:, None, None]
        rows = torch.cat([kv[..., :channels], gate[..., :channels]], -1).unflatten(0, (layout.batch, -1))
        before: Tensor = _FromBefore.apply(rows[:, -1:], self.world)
        kv, gate = torch.cat([before, rows[:, :-1]], 1).flatten(0, 1).split(channels, -1)
        return kv.masked_fill(opens, 0.0), gate.masked_fill(opens, NEG_INF)

    def _everywhere(self, entries_BMC: Tensor, ratio: int, layout: Layout) -> Tensor:
        if self.world.context == 1:
            return entries_BMC
        assert isinstance(layout, Part), "forward makes it so"
        sizes = [size // ratio for size in self.world.sizes(layout.full_length)]
        every: Tensor = _Gathered.apply(entries_BMC, sizes, self.world)
        return every[:, : (layout.first_position + layout.length) // ratio]

    def _next_tokens(self, ids_BS: Tensor) -> Tensor:
        return torch.cat([ids_BS[:, 1:], self.world.shift(ids_BS[:, :1], -1)], 1)

    def _balance(self, served: Tensor, shares: Tensor, layout: Layout) -> Tensor:
        sequences, part = layout.batch, self._part(layout)
        f = served.unflatten(0, (sequences, -1)).mean(1) * part
        if self.world.context > 1:
            dist.all_reduce(f, group=self.world.line)
        own = shares.unflatten(0, (sequences, -1)).mean(1) * part
        scale = served.shape[1] / self.config.num_experts_per_tok
        return (f * own).sum(-1).mean() * scale / self.world.share.count

    def _load(self, served: Tensor, layout: Layout) -> Tensor:
        return self.total(served.mean(0) * self._part(layout) / self.world.share.count)

    def _part(self, layout: Layout) -> float:
        assert isinstance(layout, Part), "forward makes it so"
        return layout.length / layout.full_length

    def _teach(
        self,
        rows_BQ: Tensor,
        q: Tensor,
        base: Tensor,
        entries: Tensor,
        index: tuple[Tensor, Tensor, Tensor],
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        if self.world.context == 1:
            return super()._teach(rows_BQ, q, base, entries, index, layout)

        def longer(x: Tensor, value: int = 0) -> Tensor:
            return torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), value)], 1)

        nothing = entries.shape[1]
        values = {f.name: getattr(layout, f.name) for f in fields(Part)}
        values["low"] = {**layout.low, CSA: longer(layout.low[CSA], nothing)}
        values["high"] = {**layout.high, CSA: F.pad(layout.high[CSA], (0, 1))}
        index = (longer(index[0]), longer(index[1]), index[2])
        return super()._teach(rows_BQ, longer(q), longer(base), entries, index, Part(**values))
