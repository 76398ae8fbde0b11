"""The compressor on the GPU: projected tokens into packed entries and index keys, at any chunk boundary.

Two launches: a softmax over the tokens of each block, every channel for itself, by as many programs as keep the memory
busy; then norm, turn, rounding and the row, an entry a program.  A single token's call is one launch.  What a sequence
carries on from call to call is a ring of its last projected tokens, so no entry depends on where a chunk ends; sums are
taken in an order that is written out, so that their bits do not depend on the shape of a program either.
Reference: dsv4_kernels.compress, dsv4_engine.compressor and formats.
Letters: S tokens, X projected columns, N blocks, R ring slots, C channels, E channels of an index key, T segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import PDL, begin, check_inputs, product, store_index_key, store_row, turn
from .rows import ROPE, SEGMENT_ROWS

OVERLAPPING = 4  # the ratio whose blocks reach back over the block before
SHARES = 8  # of a long block, pooled beside each other
ENTRIES, CHANNELS = 4, 64  # short blocks and channels of a program that pools
SHORT_WARPS, LONG_WARPS = 2, 8  # of a program that makes a row, also for one token: they add up the norm together
SHORT_PART, LONG_PART = 512, 128  # channels that one token's program pools at a time

_SEGMENT = tl.constexpr(SEGMENT_ROWS)


@dataclass(frozen=True)
class Compressing:
    """One compressor: its weights, the open end of a sequence, and where its rows go.

    ape: float32 [ratio, width], width = 2C for ratio 4, else C; norm: float32 [C]; ring: float32 [R, 2 * width], R = 8
    for ratio 4, else the ratio; slot p % R holds token p's kv and its gate with ape added.  segments: int64 [1, T],
    addresses that rows are written to (rows.segment_table).  All contiguous.
    """

    ape: Tensor
    norm: Tensor
    ring: Tensor
    segments: Tensor


@triton.jit
def _token(
    projected_ptr, ape_ptr, apart, token, there, position, stride, column, half: tl.constexpr, RATIO: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gate, position bias added, and kv of tokens [N] at ``column`` [C] of a half: float32 [N, C] each.

    Tokens before ``position`` come from the ring, ``apart`` from the projected ones; tokens before the sequence have no
    weight.
    """
    new, there = (token >= position)[:, None], (there & (token >= 0))[:, None]
    row = tl.where(token >= position, (token - position) * stride, apart + token % SLOTS * (2 * WIDTH))
    place = projected_ptr + row[:, None] + (half + column)[None, :]
    gate = tl.load(place + WIDTH, mask=there, other=float("-inf"))
    kv = tl.load(place, mask=there, other=0.0)
    bias = tl.load(ape_ptr + (token % RATIO)[:, None] * WIDTH + (half + column)[None, :], mask=there, other=0.0)
    return tl.where(new, gate + bias, gate), kv


@triton.jit
def _sum_of_shares(x, ENTRIES: tl.constexpr, SHARES: tl.constexpr):
    """[ENTRIES * SHARES, C] -> [ENTRIES, C]: the second half of an entry's shares is added to the first, and again."""
    channels: tl.constexpr = x.shape[1]
    for bit in tl.static_range(6):
        if SHARES >> bit > 1:
            pairs = tl.reshape(x, (ENTRIES, 2, SHARES >> (bit + 1), channels))
            a, b = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
            x = tl.reshape(a + b, (ENTRIES * (SHARES >> (bit + 1)), channels))
    return x


@triton.jit
def _pooled(
    projected_ptr, ape_ptr, apart, block, finished, position, stride, column, RATIO: tl.constexpr,
    SLOTS: tl.constexpr, C: tl.constexpr, ENTRIES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Entries ``block`` .. block + ENTRIES - 1, those before ``finished``, before their norm: float32 [ENTRIES, c].

    A share of a block is summed over eight tokens at a time, rescaled to the largest gate so far.
    """
    OVERLAP: tl.constexpr = SLOTS > RATIO
    WIDTH: tl.constexpr = 2 * C if OVERLAP else C
    BACK: tl.constexpr = SLOTS - RATIO
    TOKENS: tl.constexpr = SLOTS // SHARES
    early: tl.constexpr = 0
    late: tl.constexpr = WIDTH - C
    share = tl.arange(0, ENTRIES * SHARES)
    entry = block + share // SHARES
    there = entry < finished
    first = entry * RATIO - BACK + share % SHARES * TOKENS
    zero = tl.zeros([ENTRIES * SHARES, column.shape[0]], tl.float32)
    top, weights, total = zero + float("-inf"), zero, zero
    for start in tl.static_range(0, TOKENS, 8):
        token = first + start
        g0, k0 = _token(
            projected_ptr, ape_ptr, apart, token, there, position, stride, column, early, RATIO, SLOTS, WIDTH
        )
        g1, k1 = _token(
            projected_ptr, ape_ptr, apart, token + 1, there, position, stride, column, early, RATIO, SLOTS, WIDTH
        )
        g2, k2 = _token(
            projected_ptr, ape_ptr, apart, token + 2, there, position, stride, column, early, RATIO, SLOTS, WIDTH
        )
        g3, k3 = _token(
            projected_ptr, ape_ptr, apart, token + 3, there, position, stride, column, early, RATIO, SLOTS, WIDTH
        )
        g4, k4 = _token(
            projected_ptr, ape_ptr, apart, token + 4, there, position, stride, column, late, RATIO, SLOTS, WIDTH
        )
        g5, k5 = _token(
            projected_ptr, ape_ptr, apart, token + 5, there, position, stride, column, late, RATIO, SLOTS, WIDTH
        )
        g6, k6 = _token(
            projected_ptr, ape_ptr, apart, token + 6, there, position, stride, column, late, RATIO, SLOTS, WIDTH
        )
        g7, k7 = _token(
            projected_ptr, ape_ptr, apart, token + 7, there, position, stride, column, late, RATIO, SLOTS, WIDTH
        )
        most = tl.maximum(tl.maximum(g0, g1), tl.maximum(g2, g3))
        most = tl.maximum(most, tl.maximum(tl.maximum(g4, g5), tl.maximum(g6, g7)))
        new = tl.maximum(top, most)
        g0, g1, g2, g3 = tl.exp(g0 - new), tl.exp(g1 - new), tl.exp(g2 - new), tl.exp(g3 - new)
        g4, g5, g6, g7 = tl.exp(g4 - new), tl.exp(g5 - new), tl.exp(g6 - new), tl.exp(g7 - new)
        old = tl.exp(top - new)
        weights = tl.fma(weights, old, ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7)))
        total = tl.fma(g0, k0, product(total, old))
        total = tl.fma(g3, k3, tl.fma(g2, k2, tl.fma(g1, k1, total)))
        total = tl.fma(g7, k7, tl.fma(g6, k6, tl.fma(g5, k5, tl.fma(g4, k4, total))))
        top = new
    if SHARES > 1:
        most = tl.max(tl.reshape(top, (ENTRIES, SHARES, column.shape[0])), 1)[:, None, :]
        scale = tl.exp(top - tl.reshape(tl.broadcast_to(most, (ENTRIES, SHARES, column.shape[0])), top.shape))
        weights = _sum_of_shares(product(weights, scale), ENTRIES, SHARES)
        total = _sum_of_shares(product(total, scale), ENTRIES, SHARES)
    return total / weights


@triton.jit
def _keep_token(
    projected_ptr, ape_ptr, ring_ptr, token, position, stride, RATIO: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    here = projected_ptr + (token - position) * stride + column
    kept = ring_ptr + (token % SLOTS) * (2 * WIDTH) + column
    tl.store(kept, tl.load(here))
    tl.store(kept + WIDTH, tl.load(here + WIDTH) + tl.load(ape_ptr + (token % RATIO) * WIDTH + column))


@triton.jit
def _normed(pooled_ptr, norm_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """[C] -> [C / BLOCK, BLOCK]"""
    column = tl.arange(0, C // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(pooled_ptr + column)
    x *= tl.rsqrt(tl.sum(tl.sum(product(x, x), 1), 0) / C + eps)
    return x * tl.load(norm_ptr + column)


@triton.jit
def _finish_entry(pooled_ptr, norm_ptr, segments_ptr, phase_ptr, block, eps, C: tl.constexpr):
    x = _normed(pooled_ptr, norm_ptr, eps, C, 64)
    segment = tl.load(segments_ptr + block // _SEGMENT).to(tl.pointer_type(tl.uint8))
    row = block % _SEGMENT
    VALUES: tl.constexpr = C + 64
    SCALES: tl.constexpr = (C // 64 - 1 + 7) // 8 * 8
    store_row(x, segment + row * VALUES, segment + _SEGMENT * VALUES + row * SCALES, phase_ptr, C)


@triton.jit
def _finish_key(pooled_ptr, norm_ptr, segments_ptr, phase_ptr, block, eps, E: tl.constexpr):
    x = turn(_normed(pooled_ptr, norm_ptr, eps, E, E), phase_ptr, E - 64)
    segment = tl.load(segments_ptr + block // _SEGMENT).to(tl.pointer_type(tl.uint8))
    store_index_key(x, segment + (block % _SEGMENT) * (E // 2 + E // 32), E)


@triton.jit
def _distance(projected_ptr, ring_ptr, ALIGNED: tl.constexpr):
    """From the projected tokens to the ring, in numbers, in a way that shows the compiler the alignment."""
    return (ring_ptr.to(tl.int64) - projected_ptr.to(tl.int64)) // ALIGNED * (ALIGNED // 4)


@triton.jit(do_not_specialize=["tokens"])
def _pool(
    projected_ptr, stride, position_ptr, tokens, pooled_ptr, ape_ptr, ring_ptr, index_ape_ptr, index_ring_ptr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, E: tl.constexpr, ENTRIES: tl.constexpr,
    SHARES: tl.constexpr, PART: tl.constexpr, INDEX_PART: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """ENTRIES blocks and a part of their channels a program: float32 [N, C + E], the index keys' channels last."""
    begin()
    position = tl.load(position_ptr)
    WIDTH: tl.constexpr = 2 * C if SLOTS > RATIO else C
    local = tl.program_id(0) * ENTRIES
    block, finished = position // RATIO + local, (position + tokens) // RATIO
    part = tl.program_id(1)
    entry = local + tl.arange(0, ENTRIES)
    shown = (block + tl.arange(0, ENTRIES) < finished)[:, None]
    out = pooled_ptr + entry[:, None] * (C + E)
    if part < C // PART:
        column = part * PART + tl.arange(0, PART)
        apart = _distance(projected_ptr, ring_ptr, ALIGNED)
        x = _pooled(
            projected_ptr, ape_ptr, apart, block, finished, position, stride, column, RATIO, SLOTS, C, ENTRIES, SHARES
        )
        tl.store(out + column[None, :], x, mask=shown)
    elif E > 0:
        projected_ptr += 2 * WIDTH
        column = (part - C // PART) * INDEX_PART + tl.arange(0, INDEX_PART)
        apart = _distance(projected_ptr, index_ring_ptr, ALIGNED)
        x = _pooled(
            projected_ptr, index_ape_ptr, apart, block, finished, position, stride, column, RATIO, SLOTS, E, ENTRIES,
            SHARES,
        )  # fmt: skip
        tl.store(out + C + column[None, :], x, mask=shown)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _finish(
    projected_ptr, stride, position_ptr, phase_ptr, tokens, blocks, eps, pooled_ptr, ape_ptr, norm_ptr, ring_ptr,
    segments_ptr, index_ape_ptr, index_norm_ptr, index_ring_ptr, index_segments_ptr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """A row of entries or, in the second row of the grid, index keys a program.  The programs behind them keep the last
    SLOTS tokens in the ring, one each; without overlap those of the unfinished block only.
    """
    begin()
    position = tl.load(position_ptr)
    WIDTH: tl.constexpr = 2 * C if SLOTS > RATIO else C
    end = position + tokens
    local = tl.program_id(0)
    if local < blocks:
        block = position // RATIO + local
        if block < end // RATIO:
            pooled_ptr += local * (C + E)
            phase_ptr += local * 64
            if tl.program_id(1) == 0:
                _finish_entry(pooled_ptr, norm_ptr, segments_ptr, phase_ptr, block, eps, C)
            elif E > 0:
                _finish_key(pooled_ptr + C, index_norm_ptr, index_segments_ptr, phase_ptr, block, eps, E)
    else:
        token = end - 1 - (local - blocks)
        first = position
        if SLOTS == RATIO:
            first = tl.maximum(position, end // RATIO * RATIO)
        if token >= first:
            if tl.program_id(1) == 0:
                _keep_token(projected_ptr, ape_ptr, ring_ptr, token, position, stride, RATIO, SLOTS, WIDTH)
            elif E > 0:
                projected_ptr += 2 * WIDTH
                _keep_token(projected_ptr, index_ape_ptr, index_ring_ptr, token, position, stride, RATIO, SLOTS, 2 * E)


@triton.jit
def _compress_one(
    projected_ptr, stride, position_ptr, phase_ptr, eps, pooled_ptr, ape_ptr, norm_ptr, ring_ptr, segments_ptr,
    index_ape_ptr, index_norm_ptr, index_ring_ptr, index_segments_ptr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, E: tl.constexpr, SHARES: tl.constexpr,
    PART: tl.constexpr, INDEX_PART: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One token: kept in the ring (no slot that is read is written) and, if it ends a block, made into its row."""
    begin()
    position = tl.load(position_ptr)
    WIDTH: tl.constexpr = 2 * C if SLOTS > RATIO else C
    block, finished = position // RATIO, (position + 1) // RATIO
    if tl.program_id(0) == 0:
        _keep_token(projected_ptr, ape_ptr, ring_ptr, position, position, stride, RATIO, SLOTS, WIDTH)
        if block < finished:
            apart = _distance(projected_ptr, ring_ptr, ALIGNED)
            for first in range(0, C, PART):
                column = first + tl.arange(0, PART)
                x = _pooled(
                    projected_ptr, ape_ptr, apart, block, finished, position, stride, column, RATIO, SLOTS, C, 1,
                    SHARES,
                )  # fmt: skip
                tl.store(pooled_ptr + column[None, :], x)
            tl.debug_barrier()
            _finish_entry(pooled_ptr, norm_ptr, segments_ptr, phase_ptr, block, eps, C)
    elif E > 0:
        projected_ptr += 2 * WIDTH
        _keep_token(projected_ptr, index_ape_ptr, index_ring_ptr, position, position, stride, RATIO, SLOTS, 2 * E)
        if block < finished:
            apart = _distance(projected_ptr, index_ring_ptr, ALIGNED)
            for first in range(0, E, INDEX_PART):
                column = first + tl.arange(0, INDEX_PART)
                x = _pooled(
                    projected_ptr, index_ape_ptr, apart, block, finished, position, stride, column, RATIO, SLOTS, E, 1,
                    SHARES,
                )  # fmt: skip
                tl.store(pooled_ptr + C + column[None, :], x)
            tl.debug_barrier()
            _finish_key(pooled_ptr + C, index_norm_ptr, index_segments_ptr, phase_ptr, block, eps, E)


def compress(
    projected_SX: Tensor,
    ratio: int,
    position: Tensor,
    start_phases: Tensor,
    eps: float,
    entries: Compressing,
    index_keys: Compressing | None = None,
) -> None:
    """Take in S tokens of one sequence from ``position`` on: rows of all blocks they finish, and the ring after them.

    projected: float32 [S, X], columns wkv | wgate (2C each for ratio 4, else C), then those of the index compressor,
    then anything; contiguous in X.  position: int64 [1]; start_phases: float32 [N, 32, 2], row i for token
    (position // ratio + i) * ratio, N at least ceil(S / ratio).  Tokens before the sequence have no weight.  Repeating
    a call repeats its result as long as the ring still holds what was before it.  Nothing is read back to the host.
    Raises ValueError for what the kernels do not take.  Source: report, sections 2.3.1 and 2.3.2.
    """
    tokens, columns = projected_SX.shape
    channels = entries.norm.shape[0]
    index_channels = index_keys.norm.shape[0] if index_keys is not None else 0
    slots = 2 * ratio if ratio == OVERLAPPING else ratio
    factor = slots // ratio
    powers = not channels & (channels - 1) and not index_channels & (index_channels - 1)
    if not powers or channels <= ROPE or 0 < index_channels < ROPE:
        raise ValueError(
            f"the compressor on the GPU takes head_dims of 128, 256, ... and index_head_dims of 64, 128, ..., got "
            f"{channels} and {index_channels}; use device='cpu'"
        )
    if ratio & (ratio - 1) or ratio < OVERLAPPING:
        raise ValueError(f"the compressor on the GPU takes blocks of 4, 8, ... tokens, got {ratio}; use device='cpu'")
    if projected_SX.dtype != torch.float32 or projected_SX.stride(1) != 1:
        raise ValueError(f"projected tokens must be float32, contiguous in their last dim, got {projected_SX.dtype}")
    if columns < 2 * factor * (channels + index_channels):
        raise ValueError(f"{2 * factor * (channels + index_channels)} projected columns are needed, got {columns}")
    blocks = triton.cdiv(tokens, ratio)
    second = index_keys if index_keys is not None else entries
    for what, one in (("", entries), ("the index keys' ", second)):
        width = factor * one.norm.shape[0]
        check_inputs(
            (f"{what}ape", one.ape, torch.float32, (ratio, width)),
            (f"{what}norm", one.norm, torch.float32, (width // factor,)),
            (f"{what}ring", one.ring, torch.float32, (slots, 2 * width)),
            (f"{what}segments", one.segments, torch.int64, (1, one.segments.shape[-1])),
        )
    check_inputs(
        ("position", position, torch.int64, (1,)),
        ("start_phases", start_phases[:blocks], torch.float32, (blocks, ROPE // 2, 2)),
    )
    if not tokens:
        return
    rows = 2 if index_keys is not None else 1
    pointers = [t.data_ptr() for t in (projected_SX, entries.ring, second.ring)]
    pooled = torch.empty(blocks, channels + index_channels, device=projected_SX.device)
    overlaps = ratio == OVERLAPPING
    shape = {"RATIO": ratio, "SLOTS": slots, "C": channels, "E": index_channels}
    pooling = {
        "SHARES": 1 if overlaps else max(1, min(SHARES, ratio // 8)),
        "ALIGNED": 16 if all(pointer % 16 == 0 for pointer in pointers) else 4,
    }
    warps = SHORT_WARPS if overlaps else LONG_WARPS
    if tokens == 1:
        _compress_one[(rows,)](
            projected_SX,
            projected_SX.stride(0),
            position,
            start_phases,
            eps,
            pooled,
            entries.ape,
            entries.norm,
            entries.ring,
            entries.segments,
            second.ape,
            second.norm,
            second.ring,
            second.segments,
            **shape,
            **pooling,
            PART=min(SHORT_PART if overlaps else LONG_PART, channels),
            INDEX_PART=max(index_channels, 1),
            num_warps=warps,
            launch_pdl=PDL,
        )
        return
    part, index_part = min(CHANNELS, channels), min(CHANNELS, max(index_channels, 1))
    together = ENTRIES if overlaps else 1
    _pool[(triton.cdiv(blocks, together), channels // part + index_channels // index_part)](
        projected_SX,
        projected_SX.stride(0),
        position,
        tokens,
        pooled,
        entries.ape,
        entries.ring,
        second.ape,
        second.ring,
        **shape,
        **pooling,
        ENTRIES=together,
        PART=part,
        INDEX_PART=index_part,
        num_warps=2 if overlaps else 4,
        launch_pdl=PDL,
    )
    _finish[(blocks + min(tokens, slots), rows)](  # also keeps the ring, which the first launch reads
        projected_SX,
        projected_SX.stride(0),
        position,
        start_phases,
        tokens,
        blocks,
        eps,
        pooled,
        entries.ape,
        entries.norm,
        entries.ring,
        entries.segments,
        second.ape,
        second.norm,
        second.ring,
        second.segments,
        **shape,
        num_warps=warps,
        launch_pdl=PDL,
    )
