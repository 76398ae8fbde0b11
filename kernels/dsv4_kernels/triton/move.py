"""Window rows from one block to another: from a decoding ring before a prefilled chunk, and back to it behind.

Rows are copied as bytes.  Layout of a block: rows.py.  Letters: R rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .rows import row_bytes, value_bytes


@triton.jit(do_not_specialize=["first", "from_base", "to_base"])
def _move(
    from_ptr,
    from_scales,
    from_base,
    to_ptr,
    to_scales,
    to_base,
    first,
    FROM_RING: tl.constexpr,
    TO_RING: tl.constexpr,
    VALUES: tl.constexpr,
    SCALES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One position a program."""
    position = first.to(tl.int64) + tl.program_id(0)
    source = from_base + (position % FROM_RING if FROM_RING else position)
    target = to_base + (position % TO_RING if TO_RING else position)
    byte = tl.arange(0, WIDTH)
    value = tl.load(from_ptr + source * VALUES + byte, mask=byte < VALUES, other=0)
    scale = tl.load(from_ptr + from_scales + source * SCALES + byte, mask=byte < SCALES, other=0)
    tl.store(to_ptr + target * VALUES + byte, value, mask=byte < VALUES)
    tl.store(to_ptr + to_scales + target * SCALES + byte, scale, mask=byte < SCALES)


@dataclass(frozen=True)
class Block:
    """Where rows lie: position p at row base + (p % ring, or p if ring is 0) of ``rows``, a uint8 block."""

    rows: Tensor
    base: int = 0
    ring: int = 0


def move_rows(source: Block, target: Block, channels: int, first: int, last: int) -> None:
    """Copy the rows of ``channels`` of positions first .. last - 1; those below 0 do not exist."""
    first = max(first, 0)
    if last <= first:
        return
    values, size = value_bytes(channels), row_bytes(channels)
    _move[(last - first,)](
        source.rows,
        source.rows.numel() // size * values,
        source.base,
        target.rows,
        target.rows.numel() // size * values,
        target.base,
        first,
        FROM_RING=source.ring,
        TO_RING=target.ring,
        VALUES=values,
        SCALES=size - values,
        WIDTH=triton.next_power_of_2(values),
        num_warps=2,
    )
