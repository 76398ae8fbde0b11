"""The best K of a row of scores, exactly, in rising order; equal scores go to the lower entry.

The scores come with the largest of every GROUP.  topk units (groups, or for few scores single ones) hold a score that
reaches some rank, so no score below that rank can be among the best: only groups that reach it are read.  Nothing is
sorted, and every step keeps the entries' order.  A rank is a score as an integer of the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 16

_GROUP = tl.constexpr(GROUP)


@triton.jit
def _rank(score):
    """float32 -> uint32 in the same order; the largest 16 bits are its rank among bfloat16 values, rounded down."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _largest_of(value_ptr, count, every, UNITS: tl.constexpr):
    """Ranks, of 16 bits, of the largest of each ``every`` adjacent values: int32 [UNITS], 0 beyond the last."""
    unit = tl.arange(0, UNITS) * every
    largest = tl.full([UNITS], float("-inf"), tl.float32)
    for i in tl.static_range(8):  # together, so that one wait serves them all
        shown = (i < every) & (unit + i < count)
        largest = tl.maximum(largest, tl.load(value_ptr + unit + i, mask=shown, other=float("-inf")))
    for i in range(8, every):
        largest = tl.maximum(largest, tl.load(value_ptr + unit + i, mask=unit + i < count, other=float("-inf")))
    return tl.where(unit < count, (_rank(largest) >> 16).to(tl.int32), 0)


@triton.jit(do_not_specialize=["first"])
def select_best(
    score_ptr,
    largest_ptr,
    group_ptr,
    entry_ptr,
    position_ptr,
    out_ptr,
    first,
    ratio,
    stride,
    topk,
    UNITS: tl.constexpr,
    STEP: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """One query a program.  UNITS: largest scores held in registers; STEP groups are read at a time."""
    local = tl.program_id(0).to(tl.int64)
    visible = ((tl.load(position_ptr + first + local) + 1) // ratio).to(tl.int32)
    out_ptr += (first + local) * topk
    slot = tl.arange(0, CANDIDATES)
    if visible <= topk:
        for start in range(0, topk, CANDIDATES):
            entry = start + slot
            tl.store(out_ptr + entry, tl.where(entry < visible, entry, -1), mask=entry < topk)
        return
    score_ptr += local * stride
    entry_ptr += local * stride
    largest_ptr += local * (stride // _GROUP)
    group_ptr += local * (stride // _GROUP)

    # 1. A rank that at least topk scores reach, and not many more: topk units hold a score that does.
    groups = tl.cdiv(visible, _GROUP)
    if groups >= 4 * topk:
        rank = _largest_of(largest_ptr, groups, tl.cdiv(groups, UNITS), UNITS)
    else:
        rank = _largest_of(score_ptr, visible, tl.cdiv(visible, UNITS), UNITS)
    floor = 0
    for step in range(16):
        trial = floor | (32768 >> step)
        floor = tl.where(tl.sum((rank >= trial).to(tl.int32), 0) >= topk, trial, floor)

    # 2. The groups that reach it, in order.
    chosen = 0
    unit = tl.arange(0, UNITS)
    for start in range(0, groups, UNITS):
        inside = start + unit < groups
        largest = tl.load(largest_ptr + start + unit, mask=inside, other=0.0)
        takes = (inside & ((_rank(largest) >> 16).to(tl.int32) >= floor)).to(tl.int32)
        place = tl.cumsum(takes, 0)
        tl.store(group_ptr + chosen + place - 1, start + unit, mask=takes > 0)
        chosen += tl.max(place, 0)
    tl.debug_barrier()

    # 3. Their scores that reach it, in order: the candidates.  Ranks replace scores that were read before.
    found = 0
    member = tl.arange(0, STEP * _GROUP)
    for start in range(0, chosen, STEP):
        place = start + member // _GROUP
        entry = tl.load(group_ptr + place, mask=place < chosen, other=0) * _GROUP + member % _GROUP
        shown = (place < chosen) & (entry < visible)
        full = _rank(tl.load(score_ptr + entry, mask=shown, other=0.0))
        takes = (shown & ((full >> 16).to(tl.int32) >= floor)).to(tl.int32)
        place = tl.cumsum(takes, 0)
        tl.debug_barrier()
        tl.store((score_ptr + found + place - 1).to(tl.pointer_type(tl.uint32)), full, mask=takes > 0)
        tl.store(entry_ptr + found + place - 1, entry, mask=takes > 0)
        found += tl.max(place, 0)
    tl.debug_barrier()

    # 4. The rank of the last one chosen, exactly; two bits a step, the counts of three trials in one number.
    rank_ptr = score_ptr.to(tl.pointer_type(tl.uint32))
    ranks = tl.load(rank_ptr + slot, mask=slot < found, other=0)
    last = tl.zeros([], tl.uint32)
    one = last + 1
    for step in range(16):
        bit = one << (30 - 2 * step)
        counts = tl.sum(_reach(ranks, slot < found, last, bit), 0)
        for start in range(CANDIDATES, found, CANDIDATES):
            more = tl.load(rank_ptr + start + slot, mask=start + slot < found, other=0)
            counts += tl.sum(_reach(more, start + slot < found, last, bit), 0)
        low, middle, high = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        reached = (low >= topk).to(tl.uint32) + (middle >= topk).to(tl.uint32) + (high >= topk).to(tl.uint32)
        last += reached * bit
    above = tl.sum(((ranks > last) & (slot < found)).to(tl.int32), 0)
    for start in range(CANDIDATES, found, CANDIDATES):
        more = tl.load(rank_ptr + start + slot, mask=start + slot < found, other=0)
        above += tl.sum(((more > last) & (start + slot < found)).to(tl.int32), 0)

    # 5. All above it, and the first of its equals, in order.
    ties = topk - above
    written = 0
    equals = 0
    for start in range(0, found, CANDIDATES):
        inside = start + slot < found
        more = tl.load(rank_ptr + start + slot, mask=inside, other=0)
        entry = tl.load(entry_ptr + start + slot, mask=inside, other=0)
        equal = ((more == last) & inside).to(tl.int32)
        order = equals + tl.cumsum(equal, 0)
        takes = (((more > last) & inside) | ((equal > 0) & (order <= ties))).to(tl.int32)
        place = tl.cumsum(takes, 0)
        tl.store(out_ptr + written + place - 1, entry, mask=takes > 0)
        written += tl.max(place, 0)
        equals = tl.max(order, 0)


@triton.jit
def _reach(rank, shown, last, bit):
    """Whether ranks reach last + bit, last + 2 bit, last + 3 bit: ones at bits 0, 21 and 42."""
    low = (shown & (rank >= last + bit)).to(tl.int64)
    middle = (shown & (rank >= last + 2 * bit)).to(tl.int64)
    high = (shown & (rank >= last + 3 * bit)).to(tl.int64)
    return low | (middle << 21) | (high << 42)
