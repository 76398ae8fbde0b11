"""Random inputs of the sparse attention on packed rows, and what it must give, query by query in float64.

Bytes that no query may see are set to patterns that read as NaN in every field.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_engine.formats import pack_rows, row_bytes, unpack_rows
from dsv4_kernels.triton.rows import (
    ROPE,
    SEGMENT_ROWS,
    EntryRows,
    WindowRows,
    from_block,
    segment_table,
    to_block,
)

POISON = 0xFF


@dataclass
class SparseCase:
    """Arguments of `sparse_attention`, and the packed rows behind them by sequence."""

    q: Tensor
    position: Tensor
    window_rows: WindowRows
    entries: EntryRows | None
    sink: Tensor
    phases: Tensor
    window: int
    stored: list[list[Tensor]]  # the segments of each sequence; the table holds their addresses

    def rows(self, sequence: int) -> Tensor:
        """A sequence's packed entries, row by row."""
        return torch.cat([from_block(segment, self.q.shape[2]) for segment in self.stored[sequence]])

    def reference(self, t: int) -> Tensor:
        """Output of query ``t``: float64 [H, C]."""
        channels = self.q.shape[2]
        position = int(self.position[t])
        seen = torch.arange(max(0, position - self.window + 1), position + 1, device=self.q.device)
        ring = self.window_rows.ring
        near = from_block(self.window_rows.block, channels)[
            int(self.window_rows.base_S[t]) + (seen % ring if ring else seen)
        ]
        keys = [unpack_rows(near, channels, ROPE)]
        if self.entries is not None:
            visible = (position + 1) // self.entries.ratio
            rows = self.rows(t if len(self.stored) > 1 else 0)
            if self.entries.selected_SK is None:
                keys.append(unpack_rows(rows[:visible], channels, ROPE))
            else:
                chosen = self.entries.selected_SK[t]
                keys.append(unpack_rows(rows[chosen[chosen >= 0].long()], channels, ROPE))
        k = torch.cat(keys).double()
        logits = self.q[t].double() @ k.t() * channels**-0.5
        weights = torch.cat([logits, self.sink.double()[:, None]], 1).softmax(1)[:, :-1]
        out = (weights @ k).unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(out[:, -ROPE // 2 :].contiguous()) * self.phases[t].to(torch.complex128).conj()
        out[:, -ROPE // 2 :] = torch.view_as_real(turned)
        return out.flatten(1)


def random_rows(count: int, channels: int, device: str) -> Tensor:
    """Packed rows of about unit variance, with scales that differ by row and block."""
    x = torch.randn(count, channels, device=device) * torch.rand(count, 1, device=device).mul(2).exp2()
    return pack_rows(x, ROPE)


def poisoned(count: int, channels: int, device: str) -> Tensor:
    return torch.full((count, row_bytes(channels, ROPE)), POISON, dtype=torch.uint8, device=device)


def random_segments(count: int, channels: int, device: str) -> list[Tensor]:
    """``count`` rows in segments that lie apart; the last one has room behind its rows, poisoned."""
    segments = []
    for start in range(0, max(count, 1), SEGMENT_ROWS):
        rows = poisoned(SEGMENT_ROWS, channels, device)
        rows[: count - start] = random_rows(min(SEGMENT_ROWS, count - start), channels, device)
        segments.append(to_block(rows, channels))
    return segments


def random_choice(visible: Tensor, most: int, chosen: int) -> Tensor:
    """For each query ``chosen`` of its visible entries, rising, then -1: int32 [S, K]."""
    score = torch.rand(visible.shape[0], max(most, chosen), device=visible.device)
    hidden = torch.arange(score.shape[1], device=visible.device) >= visible[:, None]
    picked = score.masked_fill_(hidden, -1.0).topk(chosen, 1).indices
    picked = torch.where(picked < visible[:, None], picked, score.shape[1]).sort(1).values
    return torch.where(picked < score.shape[1], picked, -1).to(torch.int32)


def prefill_case(
    first: int, queries: int, heads: int, channels: int, ratio: int, chosen: int | None, device: str, window: int = 128
) -> SparseCase:
    """Queries at positions first .. first + queries - 1 of one sequence.  ratio 0: window only."""
    position = torch.arange(first, first + queries, device=device)
    oldest = max(0, first - window + 1)
    rows = poisoned(first + queries - oldest + 3, channels, device)
    rows[: first + queries - oldest] = random_rows(first + queries - oldest, channels, device)
    window_rows = WindowRows(to_block(rows, channels), torch.full((queries,), -oldest, device=device))
    entries, stored = None, [[]]
    if ratio:
        most = (first + queries) // ratio
        stored = [random_segments(most, channels, device)]
        selected = random_choice((position + 1) // ratio, most, chosen) if chosen else None
        entries = EntryRows(segment_table(stored[0]), ratio, most, selected)
    return _case(position, heads, channels, window_rows, entries, window, stored)


def decode_case(
    positions: list[int], heads: int, channels: int, ratio: int, chosen: int | None, device: str, window: int = 128
) -> SparseCase:
    """One query each of as many sequences, whose windows are rings of ``window`` rows."""
    position = torch.tensor(positions, device=device)
    rows = random_rows(len(positions) * window, channels, device)
    for t, p in enumerate(positions):
        rows[t * window + min(p + 1, window) : (t + 1) * window] = POISON
    window_rows = WindowRows(
        to_block(rows, channels), torch.arange(len(positions), device=device) * window, ring=window
    )
    entries, stored = None, [[] for _ in positions]
    if ratio:
        visible = (position + 1) // ratio
        stored = [random_segments(int(v), channels, device) for v in visible]
        width = max(len(s) for s in stored)
        tables = [torch.nn.functional.pad(segment_table(s), (0, width - len(s))) for s in stored]
        most = int(visible.max())
        selected = random_choice(visible, most, chosen) if chosen else None
        entries = EntryRows(torch.cat(tables), ratio, most, selected)
    return _case(position, heads, channels, window_rows, entries, window, stored)


def _case(
    position: Tensor,
    heads: int,
    channels: int,
    window_rows: WindowRows,
    entries: EntryRows | None,
    window: int,
    stored: list[list[Tensor]],
) -> SparseCase:
    device = position.device
    q = torch.randn(position.shape[0], heads, channels, device=device).to(torch.bfloat16)
    angle = torch.rand(position.shape[0], ROPE // 2, device=device) * 6.3
    phases = torch.polar(torch.ones_like(angle), angle)
    sink = torch.randn(heads, device=device)
    return SparseCase(q, position, window_rows, entries, sink, phases, window, stored)
