"""The best K of one query's many keys: scores with all their loads on their way at once, then a choice by counting.

As index.py and select_one.py, whose bits it has, for contexts where comparing every score with every other would take
too long.  Scores come with the largest of every unit of them; at most MOST_UNITS units are ranked by counting.  The
best K lie in the K units that come first, by largest score, then by number: a score that K units' largest beat is no
winner.  Of those units' scores only what reaches the last one's largest is kept; that is ranked by counting again.
Letters: H index heads, C index channels (128), N keys, K chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gpu import is_hopper
from .packing import PDL, begin, from_e2m1
from .rounded import INTERPRETED
from .rows import SEGMENT_ROWS
from .select import _rank

MOST_UNITS = 2048
MOST_KEYS = MOST_UNITS * 128  # units of 128 at most: a program's tile of keys
UNITS, OTHERS = 16, 512  # units that a program ranks; with so many others at a time
CANDIDATES, BLOCK = 16, 512  # candidates that a program ranks; with so many others at a time
PROGRAMS = 64  # that rank candidates
KEYS, TILES = 128, 2  # of a program of `score_far`
HOPPER_TILES = 4  # of 64 keys, of a program of `score_far_hopper`

_SEGMENT = tl.constexpr(SEGMENT_ROWS)
_ROW = tl.constexpr(68)  # 64 bytes of codes, 4 of scales
_TABLE = tl.constexpr(0x7C7874706C686000)  # e2m1's magnitudes times 2^6 as e4m3
_STEP = tl.constexpr(0x0808080808080800)  # half of each
_EXACT = tl.constexpr(11)  # halvings up to which none becomes subnormal


@triton.jit
def _halved(values_ptr, shift):
    """The eight magnitudes of e2m1 times 2^(6 - shift) as e4m3: int64; from the table where they are subnormal."""
    low = shift > _EXACT
    rare = tl.load(values_ptr + shift, mask=low, other=0)
    return tl.where(low, rare, _TABLE - shift.to(tl.int64) * _STEP)


@triton.jit
def score_far(
    q_ptr,
    weight_ptr,
    segments_ptr,
    values_ptr,
    position_ptr,
    score_ptr,
    largest_ptr,
    heads,
    ratio,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Scores of one query with TILES x KEYS keys of one segment, and the largest of every UNIT.

    Keys are fetched while the kernels in front run, but for those of the program whose last key may be this token's.
    """
    if not INTERPRETED:
        gdc_launch_dependents()
    visible = ((tl.load(position_ptr) + 1) // ratio).to(tl.int32)
    first = tl.program_id(0) * (KEYS * TILES)
    if not INTERPRETED:
        if first + KEYS * TILES >= visible:
            gdc_wait()
    if first < visible:
        segment = tl.load(segments_ptr + first // _SEGMENT)
        anchor = segments_ptr.to(tl.pointer_type(tl.uint8))  # relative to it the compiler sees the alignment
        block = tl.arange(0, 4)[None, :]
        byte = block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        codes = ()
        words = ()
        for tile in tl.static_range(TILES):
            key = first + tile * KEYS + tl.arange(0, KEYS)
            offset = (segment - segments_ptr.to(tl.int64)) // 4 * 4 + (key % _SEGMENT).to(tl.int64) * _ROW
            row = anchor + offset
            shown = key < visible
            words += (tl.load((row + 64).to(tl.pointer_type(tl.int32)), mask=shown, other=0),)  # type: ignore[assignment]
            codes += (tl.load(row[:, None, None] + byte, mask=shown[:, None, None], other=0),)  # type: ignore[assignment]
        if not INTERPRETED:
            gdc_wait()
        head = tl.arange(0, HEADS)
        real = head < heads
        weight = tl.load(weight_ptr + head, mask=real, other=0.0)
        half = tl.arange(0, 64)[:, None]
        q_even = tl.load(q_ptr + head[None, :] * 128 + half, mask=real[None, :], other=0.0)
        q_odd = tl.load(q_ptr + head[None, :] * 128 + half + 64, mask=real[None, :], other=0.0)
        for tile in tl.static_range(TILES):
            word = words[tile]  # type: ignore[var-annotated]
            most = tl.maximum(
                tl.maximum(word & 0xFF, (word >> 8) & 0xFF), tl.maximum((word >> 16) & 0xFF, (word >> 24) & 0xFF)
            )
            exponent = (word[:, None] >> (block * 8)) & 0xFF
            values = _halved(values_ptr, tl.minimum(most[:, None] - exponent, 31))
            even, odd = from_e2m1(codes[tile], values[:, :, None])
            even = tl.reshape(even, (KEYS, 64)).to(tl.float8e4nv, bitcast=True)
            odd = tl.reshape(odd, (KEYS, 64)).to(tl.float8e4nv, bitcast=True)
            products = tl.dot(odd, q_odd, tl.dot(even, q_even))
            weighted = tl.maximum(products, 0.0) * weight[None, :]
            score = tl.sum(weighted, 1) * tl.exp2((most - 133).to(tl.float32)) + 0.0  # no -0.0: it ties with 0
            start = first + tile * KEYS
            key = start + tl.arange(0, KEYS)
            score = tl.where(key < visible, score, float("-inf"))
            tl.store(score_ptr + key, score, mask=key < visible)
            unit = start // UNIT + tl.arange(0, KEYS // UNIT)
            largest = tl.max(tl.reshape(score, (KEYS // UNIT, UNIT)), 1)
            tl.store(largest_ptr + unit, largest, mask=unit * UNIT < visible)


@triton.jit
def _largest_rank(largest_ptr, unit, inside):
    """Between 1 and the last but one rank, which NaN only goes beyond."""
    rank = _rank(tl.load(largest_ptr + unit, mask=inside, other=0.0))
    return tl.minimum(tl.maximum(rank, 1), 0xFFFFFFFE)


@triton.jit
def rank_units(
    largest_ptr, count_ptr, floor_ptr, position_ptr, ratio, topk, UNIT: tl.constexpr, UNITS: tl.constexpr,
    OTHERS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """How many units come before each, by largest score, then by number; floor: [rank of the topk-th's, 0].

    The second word will count candidates.
    """
    begin()
    visible = ((tl.load(position_ptr) + 1) // ratio).to(tl.int32)
    units = (visible + UNIT - 1) // UNIT
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < units
    if tl.program_id(0) == 0:
        tl.store(floor_ptr + 1, 0)
        if units < topk:  # all are taken whole
            tl.store(floor_ptr, 0)
    if (visible > topk) & (tl.program_id(0) * UNITS < units):
        # Of equals the lower numbers come first: those of programs before this one count one more.
        start = tl.program_id(0) * UNITS
        mine = _largest_rank(largest_ptr, unit, inside)
        own = start + tl.arange(0, UNITS)
        theirs = _largest_rank(largest_ptr, own, own < units)
        first = (theirs[None, :] == mine[:, None]) & (own[None, :] < unit[:, None])
        count = tl.sum((((theirs[None, :] > mine[:, None]) | first) & (own < units)[None, :]).to(tl.int32), 1)
        better = tl.zeros([UNITS, OTHERS], tl.int32)
        for step in tl.static_range(STEPS):  # loads of all before the first is waited for
            other = step * OTHERS + tl.arange(0, OTHERS)
            counts = (other < units) & ((other < start) | (other >= start + UNITS))
            theirs = _largest_rank(largest_ptr, other, counts) + (other < start).to(tl.uint32)
            theirs = tl.where(counts, theirs, 0)
            better += (theirs[None, :] > mine[:, None]).to(tl.int32)
        count += tl.sum(better, 1)
        tl.store(count_ptr + unit, count, mask=inside)
        last = inside & (count == topk - 1)
        tl.store(floor_ptr + tl.zeros([UNITS], tl.int32), mine.to(tl.int32, bitcast=True), mask=last)


@triton.jit
def gather_candidates(
    score_ptr, count_ptr, floor_ptr, rank_ptr, entry_ptr, position_ptr, ratio, topk, UNIT: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """The scores of taken units that reach the floor, as ranks, with their numbers, in any order."""
    begin()
    visible = ((tl.load(position_ptr) + 1) // ratio).to(tl.int32)
    first = tl.program_id(0) * UNITS
    if (visible > topk) & (first * UNIT < visible):
        unit = first + tl.arange(0, UNITS)
        taken = tl.load(count_ptr + unit, mask=unit * UNIT < visible, other=topk) < topk
        entry = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
        shown = taken[:, None] & (entry < visible)
        floor = tl.load(floor_ptr).to(tl.uint32, bitcast=True)
        rank = _rank(tl.load(score_ptr + entry, mask=shown, other=0.0))
        takes = (shown & (rank >= floor)).to(tl.int32)
        many = tl.sum(takes, 1)
        base = tl.cumsum(many, 0) - many
        total = tl.sum(many, 0)
        if total > 0:
            at = tl.atomic_add(floor_ptr + 1, total)  # whose candidates come first is of no consequence
            place = at + base[:, None] + tl.cumsum(takes, 1) - 1
            tl.store(rank_ptr + place, rank.to(tl.int32, bitcast=True), mask=takes > 0)
            tl.store(entry_ptr + place, entry, mask=takes > 0)


@triton.jit
def rank_candidates(
    floor_ptr, rank_ptr, entry_ptr, taken_ptr, position_ptr, ratio, topk, CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether fewer than topk candidates beat each."""
    begin()
    visible = ((tl.load(position_ptr) + 1) // ratio).to(tl.int32)
    if visible > topk:
        found = tl.load(floor_ptr + 1)
        for start in range(tl.program_id(0) * CANDIDATES, found, tl.num_programs(0) * CANDIDATES):
            slot = start + tl.arange(0, CANDIDATES)
            rank = tl.load(rank_ptr + slot, mask=slot < found, other=0).to(tl.uint32, bitcast=True)
            entry = tl.load(entry_ptr + slot, mask=slot < found, other=0)
            better = tl.zeros([CANDIDATES, BLOCK], tl.int32)
            for place in range(0, found, BLOCK):
                other = place + tl.arange(0, BLOCK)
                inside = other < found
                theirs = tl.load(rank_ptr + other, mask=inside, other=0).to(tl.uint32, bitcast=True)
                number = tl.load(entry_ptr + other, mask=inside, other=0)
                first = (theirs[None, :] == rank[:, None]) & (number[None, :] < entry[:, None])
                better += (inside[None, :] & ((theirs[None, :] > rank[:, None]) | first)).to(tl.int32)
            tl.store(taken_ptr + slot, (tl.sum(better, 1) < topk).to(tl.int32), mask=slot < found)


@triton.jit
def place_candidates(
    floor_ptr, entry_ptr, taken_ptr, position_ptr, out_ptr, ratio, topk, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The entries taken, each where as many as are taken and lower come before it."""
    begin()
    visible = ((tl.load(position_ptr) + 1) // ratio).to(tl.int32)
    if visible > topk:
        found = tl.load(floor_ptr + 1)
        for start in range(tl.program_id(0) * CANDIDATES, found, tl.num_programs(0) * CANDIDATES):
            slot = start + tl.arange(0, CANDIDATES)
            taken = tl.load(taken_ptr + slot, mask=slot < found, other=0) > 0
            entry = tl.load(entry_ptr + slot, mask=slot < found, other=0)
            lower = tl.zeros([CANDIDATES, BLOCK], tl.int32)
            for place in range(0, found, BLOCK):
                other = place + tl.arange(0, BLOCK)
                number = tl.load(entry_ptr + other, mask=other < found, other=0)
                there = tl.load(taken_ptr + other, mask=other < found, other=0)
                lower += ((there > 0)[None, :] & (number[None, :] < entry[:, None])).to(tl.int32)
            tl.store(out_ptr + tl.sum(lower, 1), entry, mask=taken)
    else:
        for start in range(tl.program_id(0) * CANDIDATES, topk, tl.num_programs(0) * CANDIDATES):
            entry = start + tl.arange(0, CANDIDATES)
            tl.store(out_ptr + entry, tl.where(entry < visible, entry, -1), mask=entry < topk)


def _score(
    q_HC: Tensor,
    weights_H: Tensor,
    position_1: Tensor,
    segments: Tensor,
    values: Tensor,
    ratio: int,
    most: int,
    score: Tensor,
    largest: Tensor,
    unit: int,
    tiles: int,
) -> None:
    heads = q_HC.shape[0]
    inputs = (q_HC, weights_H, segments, values, position_1, score, largest, heads, ratio)
    width = max(16, triton.next_power_of_2(heads))
    if is_hopper(score.device):
        from .score_far import score_far_hopper

        score_far_hopper[(triton.cdiv(most, 64 * tiles),)](
            *inputs, HEADS=width, TILES=tiles, UNIT=unit, num_warps=4, launch_pdl=True
        )
        return
    score_far[(triton.cdiv(most, KEYS * TILES),)](
        *inputs, HEADS=width, KEYS=KEYS, TILES=TILES, UNIT=unit, num_warps=4, launch_pdl=PDL
    )


def score_near(
    q_HC: Tensor,
    weights_H: Tensor,
    position_1: Tensor,
    segments: Tensor,
    values: Tensor,
    ratio: int,
    most: int,
    score: Tensor,
) -> None:
    """Scores of one query's few keys, float32 of at least ``most``, for `select_one`.  Arguments as of `choose_far`."""
    unit = 64
    largest = torch.empty(triton.cdiv(most, unit), dtype=torch.float32, device=score.device)  # not read
    _score(q_HC, weights_H, position_1, segments, values, ratio, most, score, largest, unit, 1)


def unit_of(most: int) -> int:
    """Keys of a unit, such that there are at most MOST_UNITS."""
    return max(1, triton.next_power_of_2(most) // MOST_UNITS)


def choose_far(
    q_HC: Tensor,
    weights_H: Tensor,
    position_1: Tensor,
    segments: Tensor,
    values: Tensor,
    ratio: int,
    most: int,
    out: Tensor,
) -> None:
    """The best of one query's keys, as `choose_entries`, into out, int32 [K]; K < most <= MOST_KEYS, C = 128.

    values: from index._code_values.
    """
    topk, device, unit = out.shape[0], out.device, unit_of(most)
    units = triton.cdiv(most, unit)
    score = torch.empty(triton.cdiv(most, 1024) * 1024, dtype=torch.float32, device=device)
    largest = torch.empty(units, dtype=torch.float32, device=device)
    count, taken = (torch.empty(n, dtype=torch.int32, device=device) for n in (units, topk * unit))
    rank, entry = torch.empty(2, topk * unit, dtype=torch.int32, device=device)
    floor = torch.empty(2, dtype=torch.int32, device=device)
    _score(q_HC, weights_H, position_1, segments, values, ratio, most, score, largest, unit, HOPPER_TILES)
    programs = (triton.cdiv(units, UNITS),)
    rank_units[programs](
        largest, count, floor, position_1, ratio, topk, UNIT=unit, UNITS=UNITS, OTHERS=OTHERS,
        STEPS=triton.cdiv(units, OTHERS), num_warps=8, launch_pdl=PDL,
    )  # fmt: skip
    gather_candidates[programs](
        score, count, floor, rank, entry, position_1, ratio, topk, UNIT=unit, UNITS=UNITS, num_warps=4, launch_pdl=PDL
    )
    rank_candidates[(PROGRAMS,)](
        floor, rank, entry, taken, position_1, ratio, topk, CANDIDATES=CANDIDATES, BLOCK=BLOCK, num_warps=4,
        launch_pdl=PDL,
    )  # fmt: skip
    place_candidates[(PROGRAMS,)](
        floor, entry, taken, position_1, out, ratio, topk, CANDIDATES=CANDIDATES, BLOCK=BLOCK, num_warps=4,
        launch_pdl=PDL,
    )  # fmt: skip
