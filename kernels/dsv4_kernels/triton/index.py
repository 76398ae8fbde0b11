"""The lightning indexer: FP8 scores of FP4 keys, and the best K entries a query, in memory that no context changes.

`choose_entries` is what the engine calls.  Queries are taken in slabs whose scores fit SCRATCH_BYTES; a slab's scores
are written once, with the largest of every GROUP of them; selection reads those, and then only groups that can hold a
winner.  One query alone goes through select_one.py or index_far.py.  Reference: dsv4_kernels.index.

e2m1 keys with a scale per 32 channels become e4m3 with one scale a key, which is exact while a key's scales lie within
2^14 of each other; values further down are rounded to 2^-15 of the key's largest.  Products are summed as the tensor
cores sum FP8, to about 14 bits.  A score does not depend on tiling or neighbours; equal scores go to the lower entry.
Letters: S queries, H index heads, C index channels, N keys, K chosen, T segments.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear import E2M1_VALUES
from ..rounding import E4M3_LARGEST, power_of_two_scale
from . import index_far
from .gpu import is_hopper
from .packing import PDL, begin, from_e2m1
from .rows import SEGMENT_ROWS
from .select import GROUP, select_best
from .select_one import MOST, select_one

UNITS = 4096  # largest scores that a program of the selection holds in registers
CANDIDATES = 1024
PROGRAMS = 512  # that score one query's keys
SCRATCH_BYTES = 512 << 20
MOST_KEYS = 1 << 21  # counts of keys take 21 bits in the selection

_SEGMENT = tl.constexpr(SEGMENT_ROWS)
_GROUP = tl.constexpr(GROUP)


def fold_queries(q_SHC: Tensor, weights_SH: Tensor) -> tuple[Tensor, Tensor]:
    """Index queries as the kernels take them: e4m3 [S, H, C], even channels first, and weights float32 [S, H].

    q: float [S, H, C], rounded to FP4 (`round_fp4`); weights: float32 [S, H].  A power of two of each head moves from
    the query to its weight, so nothing changes but the range (exact as for keys, see above).
    """
    amax = q_SHC.float().abs().amax(-1, keepdim=True)
    scale = power_of_two_scale(amax.clamp_min_(E4M3_LARGEST * 2.0**-100), E4M3_LARGEST)
    scaled = q_SHC.float() / scale
    return torch.cat([scaled[..., 0::2], scaled[..., 1::2]], -1).to(torch.float8_e4m3fn), weights_SH * scale[..., 0]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _code_values(device: torch.device) -> Tensor:
    """For 0, 1, .. 31 powers of two below 2^6: the eight magnitudes of e2m1 times it as e4m3, int64 [32]."""
    values = torch.tensor(E2M1_VALUES[:8]) * torch.exp2(6.0 - torch.arange(32))[:, None]
    return values.to(torch.float8_e4m3fn).view(torch.int64)[:, 0].to(device)


@triton.jit
def _unpacked(segments_ptr, values_ptr, key, shown, C: tl.constexpr):
    """Packed keys number ``key`` [N]: even and odd channels, e4m3 [N, C/2] each, and the keys' scales, float32 [N]."""
    ROW: tl.constexpr = C // 2 + C // 32
    ALIGNED: tl.constexpr = 4 if ROW % 4 == 0 else 1
    segment = tl.load(segments_ptr + key // _SEGMENT, mask=shown, other=0)
    anchor = segments_ptr.to(tl.pointer_type(tl.uint8))  # relative to it the compiler sees the alignment
    offset = (segment - segments_ptr.to(tl.int64)) // ALIGNED * ALIGNED + (key % _SEGMENT).to(tl.int64) * ROW
    row = (anchor + offset)[:, None]
    block = tl.arange(0, C // 32)[None, :]
    exponent = tl.load(row + C // 2 + block, mask=shown[:, None], other=0).to(tl.int32)
    most = tl.max(exponent, 1)
    # The largest block is scaled to 6 x 2^6 = 384, which e4m3 holds.
    values = tl.load(values_ptr + tl.minimum(most[:, None] - exponent, 31))[:, :, None]
    byte = block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    code = tl.load(row[:, :, None] + byte, mask=shown[:, None, None], other=0)
    even, odd = from_e2m1(code, values)
    keys: tl.constexpr = key.shape[0]
    even = tl.reshape(even, (keys, C // 2)).to(tl.float8e4nv, bitcast=True)
    odd = tl.reshape(odd, (keys, C // 2)).to(tl.float8e4nv, bitcast=True)
    return even, odd, tl.exp2((most - 133).to(tl.float32))


@triton.jit
def _unpack_keys(
    segments_ptr,
    values_ptr,
    keys_ptr,
    scale_ptr,
    count,
    C: tl.constexpr,
    KEYS: tl.constexpr,
):
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    shown = key < count
    even, odd, scale = _unpacked(segments_ptr, values_ptr, key, shown, C)
    place = keys_ptr + key.to(tl.int64)[:, None] * C + tl.arange(0, C // 2)[None, :]
    tl.store(place, even, mask=shown[:, None])
    tl.store(place + C // 2, odd, mask=shown[:, None])
    tl.store(scale_ptr + key, scale, mask=shown)


@triton.jit(do_not_specialize=["first", "queries"])
def _scores(
    q_ptr,
    weight_ptr,
    keys_ptr,
    scale_ptr,
    segments_ptr,
    segments_stride,
    values_ptr,
    position_ptr,
    score_ptr,
    largest_ptr,
    first,
    queries,
    heads,
    ratio,
    stride,
    chunk,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Scores of QUERIES queries and up to ``chunk`` keys, and the largest of every GROUP.

    PACKED: one query and its own packed keys instead of unpacked ones.
    """
    if PACKED:
        begin()
    local = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    t = first + local
    valid = t < queries
    visible = tl.where(valid, (tl.load(position_ptr + t, mask=valid, other=0) + 1) // ratio, 0).to(tl.int32)
    end = tl.minimum(tl.max(visible, 0), (tl.program_id(1) + 1) * chunk)

    pair = tl.arange(0, QUERIES * HEADS)  # query and head
    pair_t = first + tl.program_id(0) * QUERIES + pair // HEADS
    real = (pair_t < queries) & (pair % HEADS < heads)
    pair_row = pair_t.to(tl.int64) * heads + pair % HEADS
    weight = tl.load(weight_ptr + pair_row, mask=real, other=0.0)
    channel = tl.arange(0, C)[:, None]
    half = tl.arange(0, C // 2)[:, None]
    if PACKED:
        q_even = tl.load(q_ptr + pair_row[None, :] * C + half, mask=real[None, :], other=0.0)
        q_odd = tl.load(q_ptr + pair_row[None, :] * C + half + C // 2, mask=real[None, :], other=0.0)
    else:
        q = tl.load(q_ptr + pair_row[None, :] * C + channel, mask=real[None, :], other=0.0)

    for start in range(tl.program_id(1) * chunk, end, KEYS):
        key = start + tl.arange(0, KEYS)
        shown = key < end
        if PACKED:
            segments = segments_ptr + (first + tl.program_id(0)).to(tl.int64) * segments_stride
            even, odd, scale = _unpacked(segments, values_ptr, key, shown, C)
            products = tl.dot(odd, q_odd, tl.dot(even, q_even))
        else:
            # Keys are padded to whole tiles with what was in memory; it is masked below.
            k = tl.load(keys_ptr + key[:, None] * C + tl.arange(0, C)[None, :])
            scale = tl.load(scale_ptr + key)
            products = tl.dot(k, q)
        weighted = tl.maximum(products, 0.0) * weight[None, :]
        score = (
            tl.sum(tl.reshape(weighted, (KEYS, QUERIES, HEADS)), 2) * scale[:, None] + 0.0
        )  # no -0.0: it ties with 0
        seen = key[:, None] < visible[None, :]
        score = tl.where(seen, score, float("-inf"))
        row = local.to(tl.int64)[None, :] * stride
        tl.store(score_ptr + row + key[:, None], score, mask=seen)
        largest = tl.max(tl.reshape(score, (KEYS // _GROUP, _GROUP, QUERIES)), 1)
        group = start // _GROUP + tl.arange(0, KEYS // _GROUP)
        row = local.to(tl.int64)[None, :] * (stride // _GROUP)
        tl.store(largest_ptr + row + group[:, None], largest, mask=group[:, None] * _GROUP < visible[None, :])


def choose_entries(
    q_SHC: Tensor,
    weights_SH: Tensor,
    position_S: Tensor,
    segments: Tensor,
    ratio: int,
    most: int,
    topk: int,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """The ``topk`` visible entries with the largest score, in rising order, then -1: int32 [S, topk].

    score(t, s) = sum_h w[t, h] relu(q[t, h] . k[s]).  q, weights: from `fold_queries`; position: int64 [S]; segments:
    int64 [1, T] or [S, T], addresses of packed index keys (pack_index_keys; segment_table); a query at position p sees
    (p + 1) // ratio keys, at most ``most``.  scratch_bytes: for the scores of one slab of queries, at least one.
    Nothing is read back to the host and shapes alone decide what is launched.  Raises ValueError for what the kernels
    do not take.  Source: report, section 2.3.1.
    """
    queries, heads, channels = q_SHC.shape
    device = q_SHC.device
    if q_SHC.dtype != torch.float8_e4m3fn or channels % 32 or channels & (channels - 1):
        raise ValueError(
            f"the indexer on the GPU takes e4m3 queries of 32, 64, 128, ... channels from fold_queries "
            f"(kv_dtype='mixed'), got {channels} of {q_SHC.dtype}"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("the indexer on the GPU needs FP8 tensor cores (compute capability 8.9); use device='cpu'")
    if most >= MOST_KEYS:
        raise ValueError(f"the indexer on the GPU takes fewer than {MOST_KEYS} keys, got {most}; use device='cpu'")
    for name, tensor, dtype in (
        ("q", q_SHC, q_SHC.dtype),
        ("weights", weights_SH, torch.float32),
        ("position", position_S, torch.int64),
        ("segments", segments, torch.int64),
    ):
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"the indexer on the GPU needs {name} contiguous and of {dtype}, got {tensor.dtype}")
    out = torch.empty(queries, topk, dtype=torch.int32, device=device)
    if not queries:
        return out
    if queries == 1 and channels == 128 and most > topk:
        one = (q_SHC[0], weights_SH[0], position_S, segments, _code_values(device), ratio, most)
        if max(MOST, topk) < most <= index_far.MOST_KEYS:
            index_far.choose_far(*one, out[0])
            return out
        if most <= MOST and is_hopper(device):
            score = torch.empty(triton.cdiv(most, 64) * 64, dtype=torch.float32, device=device)
            index_far.score_near(*one, score)
            select_one(score, position_S, out[0], ratio, most)
            return out
    own = segments.shape[0] > 1 or queries == 1  # keys of one query are unpacked on the fly
    stride = -(-max(most, 1) // 64) * 64
    slab = max(1, min(queries, scratch_bytes // (8 * stride + 8 * stride // GROUP)))
    heads_padded = max(16 if own else 8, triton.next_power_of_2(heads))
    tile = 1 if own else max(1, 128 // heads_padded)
    values = _code_values(device)
    keys = scales = position_S  # not read
    if most > topk and not own:
        keys = torch.empty(stride, channels, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(stride, dtype=torch.float32, device=device)
        _unpack_keys[(triton.cdiv(most, 64),)](segments, values, keys, scales, most, C=channels, KEYS=64, num_warps=4)
        slab = max(tile, slab // tile * tile)
    score = torch.empty(slab, stride if most > topk else 0, dtype=torch.float32, device=device)
    entry = torch.empty_like(score, dtype=torch.int32)
    largest = torch.empty(slab, score.shape[1] // GROUP, dtype=torch.float32, device=device)
    group = torch.empty_like(largest, dtype=torch.int32)
    # Few programs would wait for one tile of keys after the other.
    chunk = 64 * triton.cdiv(most, 64 * PROGRAMS) if queries == 1 else 512 if own else 4096
    for first in range(0, queries, slab):
        rows = min(slab, queries - first)
        if most > topk:
            _scores[(triton.cdiv(rows, tile), triton.cdiv(most, chunk))](
                q_SHC,
                weights_SH,
                keys,
                scales,
                segments,
                segments.stride(0) if segments.shape[0] > 1 else 0,
                values,
                position_S,
                score,
                largest,
                first,
                first + rows,
                heads,
                ratio,
                stride,
                chunk,
                C=channels,
                HEADS=heads_padded,
                QUERIES=tile,
                KEYS=64,
                PACKED=own,
                num_warps=4,
                num_stages=3,
                maxnreg=None if own else 128,  # four programs a multiprocessor
                launch_pdl=PDL and own,
            )
        if queries == 1 and most <= MOST:
            select_one(score, position_S, out[0], ratio, most)
            continue
        select_best[(rows,)](
            score,
            largest,
            group,
            entry,
            position_S,
            out,
            first,
            ratio,
            stride,
            topk,
            UNITS=UNITS,
            STEP=128,
            CANDIDATES=CANDIDATES,
            num_warps=8,
        )
    return out
