"""Where cache rows lie on the GPU, and what the kernels ask of them.

A row has the bytes of dsv4_engine.formats.pack_rows: e4m3 for the unrotated channels, bf16 for the rotated ones, an
e8m0 scale per 64 channels, padding.  On the GPU rows lie in blocks: a block of R rows is first R times the values, then
R times the scales and their padding.  So values are aligned to 16 bytes, which a thread reads at once; rows of 584
bytes are aligned to 8.  Row r of a sequence lies in segment r // SEGMENT_ROWS, a block of SEGMENT_ROWS rows; kernels
read a table of segment addresses, so rows shared between sequences are never copied.  Index keys are stored row by row.
Letters: S queries, T segments, R window rows, K entries chosen per query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT_ROWS = 2048
ROPE = 64  # channels of a row that are rotated and kept in bf16
SCALE_BLOCK = 64  # channels that share a scale


def value_bytes(channels: int) -> int:
    """Bytes of a row's values: 576 for 512 channels."""
    return channels - ROPE + 2 * ROPE


def row_bytes(channels: int) -> int:
    """Bytes of a packed attention row of ``channels``: 584 for 512."""
    size = value_bytes(channels) - (-(channels - ROPE) // SCALE_BLOCK)
    return size + -size % 8


def index_key_bytes(channels: int) -> int:
    """Bytes of a packed index key: 68 for 128 channels."""
    return channels // 2 + channels // 32


def to_block(rows: Tensor, channels: int, size: int = 0) -> Tensor:
    """Packed rows uint8 [N, row_bytes] as a block of max(N, size) rows: uint8, flat.  The rest is not written."""
    values, count = value_bytes(channels), rows.shape[0]
    size = max(size, count)
    block = rows.new_empty(size * rows.shape[1])
    cut = size * values
    block[:cut].view(size, values)[:count] = rows[:, :values]
    block[cut:].view(size, rows.shape[1] - values)[:count] = rows[:, values:]
    return block


def from_block(block: Tensor, channels: int) -> Tensor:
    """The inverse of `to_block`: uint8 [R, row_bytes]."""
    values, size = value_bytes(channels), block.numel() // row_bytes(channels)
    return torch.cat([block[: size * values].view(size, values), block[size * values :].view(size, -1)], 1)


def segment_table(segments: Sequence[Tensor]) -> Tensor:
    """Addresses of one sequence's segments: int64 [1, T] on their device.

    segments: uint8, contiguous, 16-byte aligned: blocks of SEGMENT_ROWS attention rows, or index keys
    [SEGMENT_ROWS, B]; only the last may hold fewer keys.  The caller keeps them alive.  Tables of several sequences are
    stacked to [S, T], shorter ones padded with any number.
    """
    for number, segment in enumerate(segments):
        if not segment.is_contiguous() or segment.dtype != torch.uint8 or segment.data_ptr() % 16:
            raise ValueError(f"segment {number} must be contiguous, 16-byte aligned uint8, got {segment.dtype}")
        if segment.shape != segments[0].shape and number + 1 < len(segments):
            raise ValueError(f"segment {number} has shape {tuple(segment.shape)}, the first {tuple(segments[0].shape)}")
    device = segments[0].device if segments else None
    return torch.tensor([[segment.data_ptr() for segment in segments]], dtype=torch.int64, device=device)


@dataclass(frozen=True)
class WindowRows:
    """The rows of recent positions.  Position p of query t's sequence is row base[t] + (p % ring, or p if ring is 0).

    block: uint8, a block of R rows (`to_block`); base: int64 [S].  Prefill: rows of positions first .. last in one
    block, base = -first, ring 0.  Decoding: one ring of at least ``window`` rows a sequence, base = its first row, ring
    = its size.
    """

    block: Tensor
    base_S: Tensor
    ring: int = 0


@dataclass(frozen=True)
class EntryRows:
    """The compressed rows that queries attend to besides the window.

    segments: int64 [1, T] (all queries are of one sequence) or [S, T]; a query at position p sees the first
    (p + 1) // ratio entries.  most: an upper bound of that number for this launch, which fixes the grid; a captured
    graph takes it for the longest context it will be replayed at.  selected: int32 [S, K] or None: of those entries
    only the chosen ones, rising, of which the first min(K, visible) are read (dsv4_kernels.triton.index).
    """

    segments: Tensor
    ratio: int
    most: int
    selected_SK: Tensor | None = None
