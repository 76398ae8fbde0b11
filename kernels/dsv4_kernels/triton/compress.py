"""The compressor on the GPU: projected tokens into packed entries and index keys, at any chunk boundary, in one pass.

A program makes one entry: it pools the block's tokens, norms, turns, rounds and writes the row.  What a sequence
carries on from call to call is a ring of its last projected tokens, so no entry depends on where a chunk ends.
Reference: dsv4_kernels.compress, dsv4_engine.compressor and formats.
Letters: S tokens, X projected columns, N blocks, R ring slots, C channels, E channels of an index key, T segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import PDL, begin, check_inputs, store_index_key, store_row, turn
from .rows import ROPE, SEGMENT_ROWS

OVERLAPPING = 4  # the ratio whose blocks reach back over the block before
STEP, STAGES = 8, 3  # tokens of a long block that are pooled at a time, and how many such steps are on their way

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
def _tokens(
    projected_ptr, ape_ptr, ring_ptr, token, position, stride, column, half, RATIO: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """kv and gate, position bias added, of tokens [K] at ``column`` [C] of ``half`` [K]: float32 [K, C] each.

    Tokens before ``position`` come from the ring, tokens before the sequence have no weight.
    """
    # The ring as seen from projected_ptr, in a way that shows the compiler the alignment.
    apart = (ring_ptr.to(tl.int64) - projected_ptr.to(tl.int64)) // ALIGNED * (ALIGNED // 4)
    new, there = (token >= position)[:, None], (token >= 0)[:, None]
    row = tl.where(token >= position, (token - position) * stride, apart + token % SLOTS * (2 * WIDTH))
    at = half[:, None] + column[None, :]
    place = projected_ptr + row[:, None] + at
    kv = tl.load(place, mask=there, other=0.0)
    weight = tl.load(place + WIDTH, mask=there, other=float("-inf"))
    bias = tl.load(ape_ptr + (token % RATIO)[:, None] * WIDTH + at, mask=new, other=0.0)
    return kv, tl.where(new, weight + bias, weight)


@triton.jit
def _pooled(
    projected_ptr, ape_ptr, ring_ptr, block, position, stride, RATIO: tl.constexpr, SLOTS: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Entry ``block`` before its norm: float32 [C]."""
    OVERLAP: tl.constexpr = SLOTS > RATIO
    WIDTH: tl.constexpr = 2 * C if OVERLAP else C
    column = tl.arange(0, C)
    step = tl.arange(0, K)
    first = block * RATIO - (SLOTS - RATIO)
    top = tl.full([C], float("-inf"), tl.float32)
    total = tl.zeros([C], tl.float32)
    weights = tl.zeros([C], tl.float32)
    for start in tl.range(0, SLOTS, K, num_stages=STAGES):
        half = tl.where(start + step < SLOTS - RATIO, 0, WIDTH - C)
        kv, gate = _tokens(
            projected_ptr, ape_ptr, ring_ptr, first + start + step, position, stride, column, half, RATIO,
            SLOTS, WIDTH, ALIGNED,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(gate, 0))
        share = tl.exp(gate - new[None, :])
        old = tl.exp(top - new)
        weights = tl.fma(weights, old, tl.sum(share, 0))
        total = tl.fma(total, old, tl.sum(share * kv, 0))
        top = new
    return total / weights


@triton.jit
def _normed(x, norm_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """[C] -> [C / BLOCK, BLOCK]"""
    x = tl.reshape(x, (C // BLOCK, BLOCK))
    x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / C + eps)
    column = tl.arange(0, C // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return x * tl.load(norm_ptr + column)


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


@triton.jit(do_not_specialize=["tokens"])
def _compress(
    projected_ptr,
    stride,
    position_ptr,
    phase_ptr,
    tokens,
    eps,
    ape_ptr,
    norm_ptr,
    ring_ptr,
    segments_ptr,
    index_ape_ptr,
    index_norm_ptr,
    index_ring_ptr,
    index_segments_ptr,
    RATIO: tl.constexpr,
    SLOTS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    KEEP: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block a program, entries in the first row of the grid, index keys in the second.

    KEEP: there is one token, which the first program also writes to the ring (no slot that is read is written then).
    """
    begin()
    position = tl.load(position_ptr)
    block = position // RATIO + tl.program_id(0)
    finished = block < (position + tokens) // RATIO
    WIDTH: tl.constexpr = 2 * C if SLOTS > RATIO else C
    if tl.program_id(1) == 0:
        if KEEP:
            _keep_token(projected_ptr, ape_ptr, ring_ptr, position, position, stride, RATIO, SLOTS, WIDTH)
        if finished:
            x = _pooled(projected_ptr, ape_ptr, ring_ptr, block, position, stride, RATIO, SLOTS, C, K, STAGES, ALIGNED)
            x = _normed(x, norm_ptr, eps, C, 64)
            segment = tl.load(segments_ptr + block // _SEGMENT).to(tl.pointer_type(tl.uint8))
            row = block % _SEGMENT
            VALUES: tl.constexpr = C + 64
            SCALES: tl.constexpr = (C // 64 - 1 + 7) // 8 * 8
            store_row(
                x,
                segment + row * VALUES,
                segment + _SEGMENT * VALUES + row * SCALES,
                phase_ptr + tl.program_id(0) * 64,
                C,
            )
    elif E > 0:
        projected_ptr += 2 * WIDTH
        if KEEP:
            _keep_token(projected_ptr, index_ape_ptr, index_ring_ptr, position, position, stride, RATIO, SLOTS, 2 * E)
        if finished:
            x = _pooled(
                projected_ptr,
                index_ape_ptr,
                index_ring_ptr,
                block,
                position,
                stride,
                RATIO,
                SLOTS,
                E,
                K,
                STAGES,
                ALIGNED,
            )
            x = turn(_normed(x, index_norm_ptr, eps, E, E), phase_ptr + tl.program_id(0) * 64, E - 64)
            segment = tl.load(index_segments_ptr + block // _SEGMENT).to(tl.pointer_type(tl.uint8))
            store_index_key(x, segment + (block % _SEGMENT) * (E // 2 + E // 32), E)


@triton.jit(do_not_specialize=["tokens"])
def _keep(
    projected_ptr,
    stride,
    position_ptr,
    tokens,
    ape_ptr,
    ring_ptr,
    index_ape_ptr,
    index_ring_ptr,
    RATIO: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
):
    """The last SLOTS tokens to the ring, one a program; without overlap those of the unfinished block only."""
    begin()
    position = tl.load(position_ptr)
    end = position + tokens
    token = end - 1 - tl.program_id(0)
    first = position
    if SLOTS == RATIO:
        first = tl.maximum(position, end // RATIO * RATIO)
    if token < first:
        return
    if tl.program_id(1) == 0:
        _keep_token(projected_ptr, ape_ptr, ring_ptr, token, position, stride, RATIO, SLOTS, WIDTH)
    elif E > 0:
        _keep_token(
            projected_ptr + 2 * WIDTH, index_ape_ptr, index_ring_ptr, token, position, stride, RATIO, SLOTS, 2 * E
        )


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
    _compress[(blocks, rows)](
        projected_SX,
        projected_SX.stride(0),
        position,
        start_phases,
        tokens,
        eps,
        entries.ape,
        entries.norm,
        entries.ring,
        entries.segments,
        second.ape,
        second.norm,
        second.ring,
        second.segments,
        RATIO=ratio,
        SLOTS=slots,
        K=min(STEP, slots),
        C=channels,
        E=index_channels,
        KEEP=tokens == 1,
        STAGES=STAGES if slots > STEP else 1,
        ALIGNED=16 if all(pointer % 16 == 0 for pointer in pointers) else 4,
        num_warps=4 if ratio == OVERLAPPING else 16,
        launch_pdl=PDL,
    )
    if tokens > 1:  # a launch of its own, since slots are written that the first one reads
        _keep[(min(tokens, slots), rows)](
            projected_SX,
            projected_SX.stride(0),
            position,
            tokens,
            entries.ape,
            entries.ring,
            second.ape,
            second.ring,
            RATIO=ratio,
            SLOTS=slots,
            WIDTH=factor * channels,
            E=index_channels,
            num_warps=4,
            launch_pdl=PDL,
        )
