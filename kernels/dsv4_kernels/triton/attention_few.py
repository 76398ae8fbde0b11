"""The sparse attention of attention.py for few queries on compute capability 9.0: 512 channels, a window of 128.

Two launches.  `score_keys`: half a tile of keys and some heads a program, so that all keys are scored at once.
`sum_values`: 64 channels, 16 heads and a chain a program, which unpacks its channels of the values while the scores
are made, and then adds up tile by tile, as attention_hopper.py does: the same products in the same order, hence the
same bits.  Products are turned round here (keys or channels are the rows, heads the columns), which changes no bit.
Each launch starts before the one in front has ended, and reads nothing that is still being written.
Knows nothing of the dispatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_hopper import (
    BYTES,
    CHANNELS,
    CODES,
    HALF,
    KEYS,
    LIFT,
    LOG2E,
    ROPE,
    ROW_OF,
    SCALES,
    SEGMENT,
    VALUES,
    WIDE,
    WORDS,
    fetch,
    narrow,
    unpack,
    widen,
)
from .staging import barrier, barriers

PART = gl.constexpr(64)  # channels that a program sums: they share a scale
COLUMNS = gl.constexpr(16)  # heads that a program sums
# The scores of a tile, such that a half's weights are added up as attention_hopper.py adds them.
TILE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 8], [0, 16], [0, 32]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[8, 0], [0, 64]],
        [],
        [16, 128],
    )
)
HEADS_OF = gl.constexpr(gl.SliceLayout(1, TILE))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
TURNED = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))


@gluon.jit
def _entries(position, ratio, chosen, GATHER: gl.constexpr):
    """How many entries the query at ``position`` sees."""
    end = gl.where(ratio > 0, (position + 1) // gl.maximum(ratio, 1), 0)
    if GATHER:
        end = gl.minimum(end, chosen)
    return end


@gluon.jit
def _chosen(selected_ptr, place, chosen, GATHER: gl.constexpr):
    """Row numbers of the entries at ``place``, which wait for nothing: those that are not seen may be any."""
    if GATHER:
        return gl.load(selected_ptr + gl.minimum(place, chosen - 1))
    else:
        return place


@gluon.jit(do_not_specialize=["window_scales", "segments_stride", "ratio", "ring", "chosen"])
def score_keys(
    q_ptr,
    score_ptr,
    best_ptr,
    window_ptr,
    window_scales,
    base_ptr,
    segments_ptr,
    segments_stride,
    selected_ptr,
    sink_ptr,
    phase_ptr,
    position_ptr,
    scale,
    ratio,
    ring,
    chosen,
    heads,
    GATHER: gl.constexpr,
    HEADS: gl.constexpr,
):
    """Products of queries and keys, -inf where a key is not seen, to score [S, halves of tiles, heads, 64]; each
    head's largest to best [S, halves, heads].  The first tile is the window; only tiles with a key are written.
    Half a tile and HEADS heads a program.
    """
    gdc_wait()
    gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, HEADS // (WARPS // 4), 16])
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    CODE: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    half, t = gl.program_id(0), gl.program_id(2).to(gl.int64)
    head = gl.program_id(1) * HEADS
    q_s = gl.allocate_shared_memory(gl.float16, [HEADS, CHANNELS], WIDE)
    k_s = gl.allocate_shared_memory(gl.float16, [1, HALF, CHANNELS], WIDE)
    entry = half * HALF - KEYS
    place = gl.maximum(entry, 0) + gl.arange(0, HALF, gl.SliceLayout(1, CODE))
    number = _chosen(selected_ptr + t * chosen, place, chosen, GATHER)
    position = gl.load(position_ptr + t).to(gl.int32)
    base = gl.load(base_ptr + t).to(gl.int32)
    row = gl.arange(0, HEADS, gl.SliceLayout(1, PLAIN))
    column = gl.arange(0, CHANNELS, gl.SliceLayout(0, PLAIN))
    q = gl.load(q_ptr + (t * heads + head) * CHANNELS + row[:, None] * CHANNELS + column[None, :])
    end = _entries(position, ratio, chosen, GATHER)
    if half // 2 * KEYS < end + KEYS:
        number = gl.where(place < end, number, 0)
        segments = segments_ptr + t * segments_stride
        rows = fetch(window_ptr, window_scales, segments, base, position, ring, entry, number)
        q_s.store(q.to(gl.float16))
        unpack(k_s._reinterpret(gl.int32, [1, HALF, CHANNELS // 2], WORDS).index(0), rows)
        fence_async_shared()
        barrier()
        s = gl.zeros([HALF, HEADS], gl.float32, SCORES)
        s = warpgroup_mma(k_s.index(0), q_s.permute((1, 0)), s, use_acc=False)
        key = gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
        seen = gl.where(entry < 0, position + 1 + entry + key >= 0, entry + key < end)
        of = head + gl.arange(0, HEADS, gl.SliceLayout(0, SCORES))
        s, seen = gl.broadcast(s, gl.expand_dims(seen, 1))
        s = gl.where(seen, s, float("-inf"))
        line = (t * gl.num_programs(0) + half) * heads
        gl.store(score_ptr + line * HALF + of[None, :] * HALF + key[:, None], s)
        gl.store(best_ptr + line + of, gl.max(s, 0))


@gluon.jit
def _column(window_ptr, window_scales, segments_ptr, base, position, ring, end, tile, number, part):
    """Part ``part`` of a tile's rows, of whose entries these are the numbers: two times 64 bytes, of which codes take
    the first; and their scale.  Beyond the last tile: some rows of the window.
    """
    key = gl.arange(0, KEYS, ROW_OF)
    place = tile * KEYS - KEYS + key
    if (tile == 0) | (tile * KEYS - KEYS >= end):
        seen = gl.maximum(position + 1 - KEYS + key, 0)
        row = (base + gl.where(ring > 0, seen % gl.maximum(ring, 1), seen)).to(gl.int64)
        value, scale = row * BYTES, window_scales + row * SCALES
    else:
        number = gl.where(place < end, number, 0)
        block = gl.load(segments_ptr + (number // SEGMENT)) - window_ptr.to(gl.int64)
        row = (number % SEGMENT).to(gl.int64)
        value, scale = block + row * BYTES, block + (SEGMENT * BYTES + row * SCALES)
    values = (window_ptr + (value >> 4) * 16).to(gl.pointer_type(gl.int32)) + part * (PART // 4)
    words = values[:, None] + gl.arange(0, PART // 4, gl.SliceLayout(0, CODES))[None, :]
    rotated = gl.full([KEYS, PART // 4], part * PART == VALUES, gl.int1, CODES)
    return gl.load(words), gl.load(words + PART // 4, mask=rotated, other=0), gl.load(window_ptr + scale + part)


@gluon.jit
def _unpack_values(
    words,
    full,
    empty,
    window_ptr,
    window_scales,
    base_ptr,
    segments_ptr,
    selected_ptr,
    position_ptr,
    ratio,
    ring,
    chosen,
    first,
    batches,
    part,
    GATHER: gl.constexpr,
    BATCH: gl.constexpr,
):
    """Eight warps: the program's channels of its tiles, from ``first`` on, a batch of tiles ahead in registers."""
    key = gl.arange(0, KEYS, ROW_OF)
    numbers = ()
    for g in gl.static_range(BATCH):
        place = gl.maximum((first + g) * KEYS - KEYS, 0) + key
        numbers += (_chosen(selected_ptr, place, chosen, GATHER),)  # type: ignore[assignment]
    position = gl.load(position_ptr).to(gl.int32)
    base = gl.load(base_ptr).to(gl.int32)
    end = _entries(position, ratio, chosen, GATHER)
    rows = ()
    for g in gl.static_range(BATCH):
        tile = first + g
        row = _column(window_ptr, window_scales, segments_ptr, base, position, ring, end, tile, numbers[g], part)
        rows += (row,)  # type: ignore[assignment]
    for batch in range(batches):
        for g in gl.static_range(BATCH):
            mbarrier.wait(empty.index(g), (batch & 1) ^ 1)
            if part * PART == VALUES:
                words.index(g).slice(0, 16, dim=1).store(narrow(rows[0][0]))  # type: ignore[misc]
                words.index(g).slice(16, 16, dim=1).store(narrow(rows[0][1]))  # type: ignore[misc]
            else:
                words.index(g).store(widen(rows[0][0], rows[0][2].to(gl.int32)))  # type: ignore[misc]
            fence_async_shared()
            barrier()
            mbarrier.arrive(full.index(g), count=1)
            more = rows[0]  # type: ignore[misc]
            if batch + 1 < batches:
                tile = first + (batch + 1) * BATCH + g
                number = _chosen(selected_ptr, tile * KEYS - KEYS + key, chosen, GATHER)
                more = _column(window_ptr, window_scales, segments_ptr, base, position, ring, end, tile, number, part)
            rows = rows[1:]
            rows += (more,)  # type: ignore[assignment]


@gluon.jit
def _best(best_ptr, heads, tile, last, head):
    """The largest score of each head in a tile, -inf beyond ``last``."""
    seen = gl.full(head.shape, tile <= last, gl.int1, head.type.layout)
    best = best_ptr + tile.to(gl.int64) * 2 * heads + head
    return gl.maximum(
        gl.load(best, mask=seen, other=float("-inf")), gl.load(best + heads, mask=seen, other=float("-inf"))
    )


@gluon.jit
def _scored(score_ptr, best_ptr, heads, tile, last, BATCH: gl.constexpr):
    """Scores [COLUMNS, KEYS] of the tiles from ``tile`` on, -inf beyond ``last``; then their largest, by head, in the
    layouts of weights and of sums.
    """
    key = gl.arange(0, KEYS, gl.SliceLayout(0, TILE))
    of = gl.arange(0, COLUMNS, HEADS_OF)
    place = of[:, None] * HALF + (key // HALF * heads * HALF + key % HALF)[None, :]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, SUMS))
    scores, rows, columns = (), (), ()
    for g in gl.static_range(BATCH):
        line = (tile + g).to(gl.int64) * 2 * heads
        seen = gl.full([COLUMNS, KEYS], tile + g <= last, gl.int1, TILE)
        scores += (gl.load(score_ptr + line * HALF + place, mask=seen, other=float("-inf")),)  # type: ignore[assignment]
        rows += (_best(best_ptr, heads, tile + g, last, of),)  # type: ignore[assignment]
        columns += (_best(best_ptr, heads, tile + g, last, column),)  # type: ignore[assignment]
    return scores, rows, columns


@gluon.jit
def _raised(top, best, scale):
    return gl.maximum(top, gl.fma(best, gl.full_like(best, scale), gl.full_like(best, -LIFT)))


@gluon.jit
def _add_tiles(
    v_s,
    p_s,
    full,
    empty,
    score_ptr,
    best_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    sink_ptr,
    phase_ptr,
    scale,
    heads,
    first,
    last,
    batches,
    part,
    SPLIT: gl.constexpr,
    BATCH: gl.constexpr,
):
    """Four warps: weights of a tile while the sums of the tile before run."""
    gdc_wait()
    scores, best, best_c = _scored(score_ptr, best_ptr, heads, first, last, BATCH)
    nothing = gl.zeros([COLUMNS, KEYS], gl.float32, TILE)
    weight = gl.sum(gl.reshape(nothing, [COLUMNS, 2, HALF]), 2)
    top = gl.full([COLUMNS], float("-inf"), gl.float32, HEADS_OF)
    top_c = gl.full([COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(0, SUMS))
    acc = gl.zeros([PART, COLUMNS], gl.float32, SUMS)
    for batch in range(batches):
        for g in gl.static_range(BATCH):
            new = _raised(top, best[g], scale)
            old = gl.exp2(top - new)
            top = new + 0.0
            new_c = _raised(top_c, best_c[g], scale)
            old_c = gl.exp2(top_c - new_c)
            top_c = new_c + 0.0
            s, shift = gl.broadcast(scores[g], (-new)[:, None])
            p = gl.exp2(gl.fma(s, gl.full_like(s, scale), shift))
            p_s.index(g).store(p.to(gl.float16))
            weight, old = gl.broadcast(weight, gl.convert_layout(old, gl.SliceLayout(1, weight.type.layout))[:, None])
            weight = gl.fma(weight, old, gl.sum(gl.reshape(p, [COLUMNS, 2, HALF]), 2))
            fence_async_shared()
            barrier()
            if g >= 2:  # all warps are behind its products
                mbarrier.arrive(empty.index(g - 2), count=1)
            if g > 0:
                acc = warpgroup_mma_wait(0, [acc])
            acc, old_c = gl.broadcast(acc, old_c[None, :])
            acc = acc * old_c
            mbarrier.wait(full.index(g), batch & 1)
            acc = warpgroup_mma(v_s.index(g).permute((1, 0)), p_s.index(g).permute((1, 0)), acc, is_async=True)
        if batch + 1 < batches:
            scores, best, best_c = _scored(score_ptr, best_ptr, heads, first + (batch + 1) * BATCH, last, BATCH)
        acc = warpgroup_mma_wait(0, [acc])
        barrier()
        if BATCH > 1:
            mbarrier.arrive(empty.index(BATCH - 2), count=1)
        mbarrier.arrive(empty.index(BATCH - 1), count=1)

    total = gl.sum(weight, 1)
    total = gl.convert_layout(total, HEADS_OF)
    of = gl.arange(0, COLUMNS, gl.SliceLayout(0, TURNED))
    channel = part * PART + gl.arange(0, PART, gl.SliceLayout(1, TURNED))
    if SPLIT:
        chains = gl.num_programs(1)
        line = of * chains * CHANNELS
        gl.store(partial_ptr + line[None, :] + channel[:, None], gl.convert_layout(acc, TURNED))
        if part == 0:
            stats = stats_ptr + gl.arange(0, COLUMNS, HEADS_OF) * chains * 2
            gl.store(stats, top)
            gl.store(stats + 1, total)
    else:
        sink = gl.load(sink_ptr + gl.arange(0, COLUMNS, HEADS_OF))
        share = gl.convert_layout(1.0 / (total + gl.exp2(sink * LOG2E - top)), gl.SliceLayout(0, SUMS))
        acc, share = gl.broadcast(acc, share[None, :])
        acc = gl.convert_layout(acc * share, TURNED)
        pairs = gl.permute(gl.reshape(acc, [PART // 2, 2, COLUMNS]), (0, 2, 1))
        real, imaginary = gl.split(pairs)
        pair = (part * PART - VALUES) // 2 + gl.arange(0, PART // 2, gl.SliceLayout(1, real.type.layout))
        real, cos = gl.broadcast(real, gl.load(phase_ptr + 2 * pair, mask=pair >= 0, other=1.0)[:, None])
        real, sin = gl.broadcast(real, gl.load(phase_ptr + 2 * pair + 1, mask=pair >= 0, other=0.0)[:, None])
        back = gl.join(gl.fma(real, cos, imaginary * sin), gl.fma(imaginary, cos, -(real * sin)))
        o = gl.convert_layout(gl.reshape(gl.permute(back, (0, 2, 1)), [PART, COLUMNS]), TURNED)
        gl.store(out_ptr + (of * CHANNELS)[None, :] + channel[:, None], o.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["window_scales", "segments_stride", "ratio", "ring", "chosen", "tiles"])
def sum_values(
    score_ptr,
    best_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    window_ptr,
    window_scales,
    base_ptr,
    segments_ptr,
    segments_stride,
    selected_ptr,
    sink_ptr,
    phase_ptr,
    position_ptr,
    scale,
    ratio,
    ring,
    chosen,
    heads,
    tiles,
    GATHER: gl.constexpr,
    SPLIT: gl.constexpr,
    BATCH: gl.constexpr,
    CHAIN: gl.constexpr,
):
    """A part of the channels and COLUMNS heads, a chain, a query a program: what `score_keys` left, added up.

    To out, or if SPLIT to partial [S, heads, chains, CHANNELS] and stats [S, heads, chains, 2].  BATCH tiles are in
    shared memory at a time.  Before `score_keys` has ended, only what was written before it is read.
    """
    gdc_launch_dependents()
    PARTS: gl.constexpr = CHANNELS // PART
    part, head = gl.program_id(0) % PARTS, gl.program_id(0) // PARTS * COLUMNS
    chain, t = gl.program_id(1), gl.program_id(2).to(gl.int64)
    v_s = gl.allocate_shared_memory(gl.float16, [BATCH, KEYS, PART], WIDE)
    p_s = gl.allocate_shared_memory(gl.float16, [BATCH, COLUMNS, KEYS], WIDE)
    full, empty = barriers(BATCH, 1)
    end = _entries(gl.load(position_ptr + t).to(gl.int32), ratio, chosen, GATHER)
    PER: gl.constexpr = CHAIN // KEYS
    last = gl.minimum((end + KEYS - 1) // KEYS, (chain + 1) * PER)
    first = gl.where(chain == 0, 0, chain * PER + 1)
    batches = (last - first + BATCH) // BATCH
    row = t * heads + head
    partial = (row * gl.num_programs(1) + chain) * CHANNELS
    # fmt: off
    gl.warp_specialize(
        [
            (_add_tiles, (v_s, p_s, full, empty, score_ptr + (t * tiles * 2 * heads + head) * HALF,
                          best_ptr + t * tiles * 2 * heads + head, out_ptr + row * CHANNELS, partial_ptr + partial,
                          stats_ptr + (row * gl.num_programs(1) + chain) * 2, sink_ptr + head, phase_ptr + t * ROPE,
                          scale, heads, first, last, batches, part, SPLIT, BATCH)),
            (_unpack_values, (v_s._reinterpret(gl.int32, [BATCH, KEYS, PART // 2], WORDS), full, empty, window_ptr,
                              window_scales, base_ptr + t, segments_ptr + t * segments_stride,
                              selected_ptr + t * chosen, position_ptr + t, ratio, ring, chosen, first, batches, part,
                              GATHER, BATCH)),
        ],
        [8],
        [136],
    )
    # fmt: on


# ---- launching -------------------------------------------------------------------------------------------------------

MOST_TILES = 5  # in shared memory at a time; as many as a window and 512 entries make


def batch_of(tiles: int) -> int:
    """Tiles at a time, so that the last batch of ``tiles`` is as full as the others."""
    return -(-tiles // -(-tiles // MOST_TILES))


def sum_few(
    q: Tensor, out: Tensor, inputs: tuple[Any, ...], chosen: int, most: int, chain: int, processors: int
) -> tuple[Tensor, Tensor, int]:
    """Attention of q [S, H, 512] to out, if at most one chain of entries is seen; else sums of chains are returned.

    partial float32 [S * H * chains, 512], stats float32 [S * H * chains, 2], chains.  inputs: what attention_hopper
    takes from window_ptr to ring; chosen: entries chosen per query, 0 if all are seen; most: how many entries a query
    may see.
    """
    queries, heads, channels = q.shape
    tiles, chains = 1 - (-most // 128), max(1, -(-most // chain))
    kept = queries * heads * chains if chains > 1 else 0
    score = torch.empty(queries, 2 * tiles, heads, 64, dtype=torch.float32, device=q.device)
    best = torch.empty(queries, 2 * tiles, heads, dtype=torch.float32, device=q.device)
    partial = torch.empty(kept, channels, dtype=torch.float32, device=q.device)
    stats = torch.empty(kept, 2, dtype=torch.float32, device=q.device)
    together = 32 if queries * tiles * heads // 16 <= processors else 64
    score_keys[(2 * tiles, heads // together, queries)](
        q,
        score,
        best,
        *inputs,
        chosen,
        heads,
        GATHER=chosen > 0,
        HEADS=together,
        num_warps=4,
        launch_pdl=True,
    )
    sum_values[(channels // 64 * heads // 16, chains, queries)](
        score,
        best,
        out,
        partial,
        stats,
        *inputs,
        chosen,
        heads,
        tiles,
        GATHER=chosen > 0,
        SPLIT=chains > 1,
        BATCH=batch_of(min(tiles, 1 + chain // 128)),
        CHAIN=chain,
        num_warps=4,
        launch_pdl=True,
    )
    return partial, stats, chains
