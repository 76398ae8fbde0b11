"""The best K of one query's few scores, exactly, in rising order; equal scores go to the lower entry.

As select.py, where waiting is all there is to gain: no sequence of steps, but every score compared with every other,
by as many programs as there are.  A score's place among them is how many beat it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import PDL, begin
from .select import _rank

MOST = 4096  # scores; with more, comparing takes longer than waiting
ENTRIES, OTHERS, BLOCK = 16, 256, 512


@triton.jit
def count_better(
    score_ptr, count_ptr, position_ptr, ratio, topk, ENTRIES: tl.constexpr, OTHERS: tl.constexpr, STEPS: tl.constexpr
):
    """How many of the visible scores beat each; ENTRIES of them a program."""
    begin()
    visible = ((tl.load(position_ptr) + 1) // ratio).to(tl.int32)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    if (visible > topk) & (tl.program_id(0) * ENTRIES < visible):
        mine = _rank(tl.load(score_ptr + entry, mask=entry < visible, other=0.0))
        better = tl.zeros([ENTRIES, OTHERS], tl.int32)
        for step in tl.static_range(STEPS):  # loads of all before the first is waited for
            other = step * OTHERS + tl.arange(0, OTHERS)
            shown = (other < visible)[None, :]
            theirs = _rank(tl.load(score_ptr + other, mask=other < visible, other=0.0))
            first = (theirs[None, :] == mine[:, None]) & (other[None, :] < entry[:, None])
            better += (shown & ((theirs[None, :] > mine[:, None]) | first)).to(tl.int32)
        tl.store(count_ptr + entry, tl.sum(better, 1), mask=entry < visible)


@triton.jit
def write_best(count_ptr, position_ptr, out_ptr, ratio, topk, BLOCK: tl.constexpr):
    """The entries that fewer than topk beat, in order; BLOCK entries a program."""
    begin()
    visible = ((tl.load(position_ptr) + 1) // ratio).to(tl.int32)
    slot = tl.arange(0, BLOCK)
    first = tl.program_id(0) * BLOCK
    entry = first + slot
    if visible <= topk:
        tl.store(out_ptr + entry, tl.where(entry < visible, entry, -1), mask=entry < topk)
    else:
        before = tl.zeros([BLOCK], tl.int32)
        for start in range(0, first, BLOCK):
            before += (tl.load(count_ptr + start + slot, mask=start + slot < visible, other=topk) < topk).to(tl.int32)
        takes = (tl.load(count_ptr + entry, mask=entry < visible, other=topk) < topk).to(tl.int32)
        place = tl.sum(before, 0) + tl.cumsum(takes, 0)
        tl.store(out_ptr + place - 1, entry, mask=takes > 0)


def select_one(score: Tensor, position_1: Tensor, out: Tensor, ratio: int, most: int) -> None:
    """score: float32, of at least ``most`` entries, of which (position + 1) // ratio are there; out: int32 [topk]."""
    topk = out.shape[0]
    count = torch.empty(most, dtype=torch.int32, device=out.device)
    if most > topk:
        count_better[(triton.cdiv(most, ENTRIES),)](
            score,
            count,
            position_1,
            ratio,
            topk,
            ENTRIES=ENTRIES,
            OTHERS=OTHERS,
            STEPS=triton.cdiv(most, OTHERS),
            num_warps=4,
            launch_pdl=PDL,
        )
    write_best[(triton.cdiv(max(most, topk), BLOCK),)](
        count, position_1, out, ratio, topk, BLOCK=BLOCK, num_warps=4, launch_pdl=PDL
    )
