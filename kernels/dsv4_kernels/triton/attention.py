"""Sparse attention from packed rows: window, compressed entries and sink in one softmax, outputs rotated back.

`sparse_attention` is what the engine calls; where they apply it picks the Gluon kernels, attention_hopper.py or, for
few queries, attention_few.py, and the portable kernel of this file otherwise.  Reference: dsv4_kernels.attention and
dsv4_kernels.rope.

One reduction plan.  A query's keys are its window, oldest first, then its entries in rising order.  They are summed in
tiles of KEY_TILE, and tiles in chains: the window with the first CHAIN entries, then CHAIN entries each.  A chain
starts from nothing, and chains are added up in their order.  None of this depends on other queries, on the chunk or on
how many programs share a query, so neither do the bits of the result.  (The portable kernel's last bits differ from
those of the kernels for Hopper.)

Arithmetic: keys (= values), queries and weights in fp16, sums in fp32.  e4m3 times a power of two is exact in fp16 down
to 2^-24; values beyond 65,504 become infinite and show as NaN.  Weights are scaled by 2^14, so that small ones keep
their 11 bits.
Letters: S queries, H heads, C channels, K entries chosen per query, P rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import is_hopper, processors_of
from .rows import ROPE, SEGMENT_ROWS, EntryRows, WindowRows, row_bytes, value_bytes

KEY_TILE = 64  # of the portable kernel; the Hopper kernel has its own
CHAIN = 2048  # shorter chains cost prefill more additions, longer ones leave decoding fewer programs
HEAD_TILE = 16  # the least that tensor cores take
LOG2E = 1.4426950408889634

_SEGMENT = tl.constexpr(SEGMENT_ROWS)
_ROPE = tl.constexpr(ROPE)
_LIFT = tl.constexpr(14.0)  # weights are scaled by 2^14
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _keys(anchor, value, scale, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows whose values and scales lie ``value`` and ``scale`` [K] bytes from ``anchor``: fp16 [K, WIDTH], zero beyond
    CHANNELS.
    """
    VALUES: tl.constexpr = CHANNELS - _ROPE
    row = (anchor + (value >> 4) * 16)[:, None]  # so that the compiler sees the alignment
    column = tl.arange(0, WIDTH)[None, :]
    packed = column < VALUES
    code = tl.load(row + column, mask=packed, other=0).to(tl.float8e4nv, bitcast=True)
    exponent = tl.load((anchor + scale)[:, None] + column // 64, mask=packed, other=127)
    factor = (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    rotated = (column >= VALUES) & (column < CHANNELS)
    rope = tl.load((row + VALUES).to(tl.pointer_type(tl.bfloat16)) + (column - VALUES), mask=rotated, other=0.0)
    return tl.where(packed, code.to(tl.float32) * factor, rope.to(tl.float32)).to(tl.float16)


@triton.jit
def _add_tile(q, k, bias, scale, top, weight, acc):
    """One tile of keys [K, C] more: running maximum (less the lift) and weight sum [H], weighted sum [H, C]."""
    logits = tl.fma(tl.dot(q, tl.trans(k)), scale, bias[None, :])
    new = tl.maximum(top, tl.max(logits, 1) - _LIFT)
    old = tl.exp2(top - new)
    p = tl.exp2(logits - new[:, None])
    acc = tl.dot(p.to(tl.float16), k, acc * old[:, None])
    return new, weight * old + tl.sum(p, 1), acc


@triton.jit
def _merge(top, weight, acc, chain_top, chain_weight, chain_acc):
    """The sum of all chains so far, and one more."""
    new = tl.maximum(top, chain_top)
    a, b = tl.exp2(top - new), tl.exp2(chain_top - new)
    return new, tl.fma(chain_weight, b, weight * a), tl.fma(chain_acc, b[:, None], acc * a[:, None])


@triton.jit
def _finish(out_ptr, phase_ptr, sink, top, weight, acc, rows, shown, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Divide by the softmax' denominator, turn the rotated channels back, store.  rows: [H] of ``out``."""
    acc = acc * (1.0 / (weight + tl.exp2(sink * _LOG2E - top)))[:, None]
    heads: tl.constexpr = acc.shape[0]
    real, imaginary = tl.split(tl.reshape(acc, (heads, WIDTH // 2, 2)))
    pair = tl.arange(0, WIDTH // 2) - (CHANNELS - _ROPE) // 2
    turned = (pair >= 0) & (pair < _ROPE // 2)
    cos = tl.load(phase_ptr + 2 * pair, mask=turned, other=1.0)[None, :]
    sin = tl.load(phase_ptr + 2 * pair + 1, mask=turned, other=0.0)[None, :]
    back = tl.join(tl.fma(real, cos, imaginary * sin), tl.fma(imaginary, cos, -(real * sin)))
    column = tl.arange(0, WIDTH)
    place = rows[:, None] * CHANNELS + column[None, :]
    value = tl.reshape(back, (heads, WIDTH)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, value, mask=shown[:, None] & (column < CHANNELS)[None, :])


@triton.jit
def _attention(
    q_ptr,
    out_ptr,
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
    window,
    chosen,
    heads,
    BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One query and HEADS of its heads a program."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    shown = head < heads
    rows = t * heads + head
    column = tl.arange(0, WIDTH)
    inside = shown[:, None] & (column < CHANNELS)[None, :]
    q = tl.load(q_ptr + rows[:, None] * CHANNELS + column[None, :], mask=inside, other=0.0).to(tl.float16)

    position = tl.load(position_ptr + t)
    base = tl.load(base_ptr + t)
    entries = tl.where(ratio > 0, (position + 1) // tl.maximum(ratio, 1), 0).to(tl.int32)
    if GATHER:
        entries = tl.minimum(entries, chosen)
    segments = segments_ptr + t * segments_stride
    selected = selected_ptr + t * chosen

    # Keys that are not seen read the query's own row, which is always there, and get the weight zero.
    own = base + tl.where(ring > 0, position % tl.maximum(ring, 1), position)
    key = tl.arange(0, KEYS)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    for start in range(0, window, KEYS):
        if start + KEYS > window - 1 - position:  # a tile wholly before the sequence's start would leave no maximum
            seen = position - window + 1 + start + key
            valid = (seen >= 0) & (start + key < window)
            seen = tl.where(valid, seen, position)
            row = base + tl.where(ring > 0, seen % tl.maximum(ring, 1), seen)
            k = _keys(window_ptr, row * BYTES, window_scales + row * SCALES, CHANNELS, WIDTH)
            top, weight, acc = _add_tile(q, k, tl.where(valid, 0.0, float("-inf")), scale, top, weight, acc)
    all_top, all_weight, all_acc = top, weight, acc
    for first in range(0, entries, CHAIN):
        if first > 0:
            top = tl.full([HEADS], float("-inf"), tl.float32)
            weight = tl.zeros([HEADS], tl.float32)
            acc = tl.zeros([HEADS, WIDTH], tl.float32)
        for start in range(first, tl.minimum(first + CHAIN, entries), KEYS):
            valid = start + key < entries
            if GATHER:
                row = tl.load(selected + start + key, mask=valid, other=0)
            else:
                row = tl.where(valid, start + key, 0)
            segment = tl.load(segments + row // _SEGMENT, mask=valid, other=0)
            block = segment - window_ptr.to(tl.int64)
            row = row % _SEGMENT
            value = tl.where(valid, block + row * BYTES, own * BYTES)
            factor = tl.where(valid, block + (_SEGMENT * BYTES + row * SCALES), window_scales + own * SCALES)
            k = _keys(window_ptr, value, factor, CHANNELS, WIDTH)
            top, weight, acc = _add_tile(q, k, tl.where(valid, 0.0, float("-inf")), scale, top, weight, acc)
        if first > 0:
            all_top, all_weight, all_acc = _merge(all_top, all_weight, all_acc, top, weight, acc)
        else:
            all_top, all_weight, all_acc = top, weight, acc
    sink = tl.load(sink_ptr + head, mask=shown, other=0.0)
    _finish(out_ptr, phase_ptr + t * _ROPE, sink, all_top, all_weight, all_acc, rows, shown, CHANNELS, WIDTH)


@triton.jit
def _add_chains(
    partial_ptr,
    stats_ptr,
    out_ptr,
    sink_ptr,
    phase_ptr,
    position_ptr,
    ratio,
    heads,
    chains,
    CHANNELS: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """One query and one head a program: the chains that an earlier launch summed, in their order."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    entries = (tl.load(position_ptr + t) + 1) // ratio
    rows = t * heads + head + tl.arange(0, 1)
    column = tl.arange(0, CHANNELS)[None, :]
    place = rows * chains
    top, weight = tl.load(stats_ptr + place * 2), tl.load(stats_ptr + place * 2 + 1)
    acc = tl.load(partial_ptr + place[:, None] * CHANNELS + column)
    for chain in range(1, tl.minimum(tl.cdiv(entries, CHAIN), chains)):
        place = rows * chains + chain
        chain_top, chain_weight = tl.load(stats_ptr + place * 2), tl.load(stats_ptr + place * 2 + 1)
        chain_acc = tl.load(partial_ptr + place[:, None] * CHANNELS + column)
        top, weight, acc = _merge(top, weight, acc, chain_top, chain_weight, chain_acc)
    sink = tl.load(sink_ptr + head + tl.arange(0, 1))
    _finish(out_ptr, phase_ptr + t * _ROPE, sink, top, weight, acc, rows, rows >= 0, CHANNELS, CHANNELS)


@dataclass(frozen=True)
class Plan:
    """How a launch is divided: ``parts`` of the channels, ``chains`` as programs of their own.  Changes no bit between
    "few" and "hopper".
    """

    kernel: Literal["few", "hopper", "portable"]
    parts: int = 1
    chains: int = 1


def plan(device: torch.device, queries: int, heads: int, channels: int, window: int, most: int) -> Plan:
    """The kernel and the division for ``queries`` that see at most ``most`` entries each."""
    if not is_hopper(device) or channels != 512 or heads % 64 or window != 128:
        return Plan("portable")
    programs = processors_of(device)
    items = queries * heads // 64
    # 32 programs for 64 heads and a chain: measured, they are faster up to two waves (8 queries with 512 entries each:
    # 18 instead of 25 us; 16: 33 instead of 25).
    if items * 32 * max(1, -(-most // CHAIN)) <= 2 * programs:
        return Plan("few")
    chains = -(-most // CHAIN) if most > CHAIN and items < programs else 1
    parts = 8
    while parts > 1 and items * chains * parts > programs:
        parts //= 2
    return Plan("hopper", parts, chains)


def sparse_attention(
    q_SHC: Tensor,
    position_S: Tensor,
    window_rows: WindowRows,
    entries: EntryRows | None,
    sink_H: Tensor,
    phases_SP: Tensor,
    window: int = 128,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of S queries over their windows and entries, rotated back: bfloat16 [S, H, C].

    q: bfloat16 or float16 [S, H, C], normed and rotated, not scaled (the kernel multiplies by C^-0.5), contiguous;
    position: int64 [S]; sink: float32 [H]; phases: complex64 [S, 32], the angles by which q was rotated; window: how
    many positions a query sees, itself included; out: where the result goes (the portable kernel also writes float32).
    The queries may belong to different sequences, in any order.  Nothing is read back to the host and shapes alone
    decide what is launched, so calls can be captured in a graph.  Raises ValueError for what no kernel takes.
    Source: report, section 2.3; the reference is dsv4_kernels.attention.
    """
    queries, heads, channels = q_SHC.shape
    if channels <= ROPE or channels % 16:
        raise ValueError(
            f"attention on the GPU needs a head_dim above {ROPE} that is a multiple of 16, got {channels}; "
            f"use device='cpu'"
        )
    rows = window_rows.block
    if rows.dtype != torch.uint8 or rows.numel() % row_bytes(channels):
        raise ValueError(
            f"attention on the GPU reads packed rows of {row_bytes(channels)} bytes (kv_dtype='mixed'), "
            f"got {rows.numel()} of {rows.dtype}"
        )
    if out is None:
        out = torch.empty(q_SHC.shape, dtype=torch.bfloat16, device=q_SHC.device)
    selected = entries.selected_SK if entries is not None else None
    segments = entries.segments if entries is not None else window_rows.base_S[None]
    for name, tensor, dtype in (
        ("q", q_SHC, q_SHC.dtype),
        ("position", position_S, torch.int64),
        ("window rows", rows, torch.uint8),
        ("window base", window_rows.base_S, torch.int64),
        ("segments", segments, torch.int64),
        ("selected", selected, torch.int32),
        ("sink", sink_H, torch.float32),
        ("phases", phases_SP, torch.complex64),
        ("out", out, out.dtype),
    ):
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_contiguous()):
            raise ValueError(f"attention on the GPU needs {name} contiguous and of {dtype}, got {tensor.dtype}")
    if not queries:
        return out
    ratio = entries.ratio if entries is not None else 0
    most = entries.most if entries is not None else 0
    if selected is not None:
        most = min(most, selected.shape[1])
    how = plan(q_SHC.device, queries, heads, channels, window, most)
    phases = torch.view_as_real(phases_SP)
    inputs = (
        rows,
        rows.numel() // row_bytes(channels) * value_bytes(channels),  # where the scales begin
        window_rows.base_S,
        segments,
        segments.stride(0) if segments.shape[0] > 1 else 0,
        selected if selected is not None else position_S,
        sink_H,
        phases,
        position_S,
        channels**-0.5 * LOG2E,
        ratio,
        window_rows.ring,
    )
    chosen = selected.shape[1] if selected is not None else 0
    if how.kernel == "portable":
        _attention[(queries, triton.cdiv(heads, HEAD_TILE))](
            q_SHC,
            out,
            *inputs,
            window,
            chosen,
            heads,
            BYTES=value_bytes(channels),
            SCALES=row_bytes(channels) - value_bytes(channels),
            CHANNELS=channels,
            WIDTH=triton.next_power_of_2(channels),
            GATHER=selected is not None,
            HEADS=HEAD_TILE,
            KEYS=KEY_TILE,
            CHAIN=CHAIN,
            num_warps=4,
        )
        return out
    if out.dtype != torch.bfloat16:
        raise ValueError(f"attention on this GPU writes bfloat16, not {out.dtype}; use dtype='bfloat16'")
    processors = processors_of(q_SHC.device)
    if how.kernel == "few":
        from .attention_few import sum_few

        partial, stats, chains = sum_few(q_SHC, out, inputs, chosen, most, CHAIN, processors)
    else:
        from .attention_hopper import attention_hopper

        chains = how.chains
        items = queries * (heads // 64) * how.parts * chains
        programs = min(items, processors)
        sums = queries * heads * chains if chains > 1 else (programs * 64 if most > CHAIN else 0)
        partial = torch.empty(sums, channels, dtype=torch.float32, device=q_SHC.device)
        stats = torch.empty(sums, 2, dtype=torch.float32, device=q_SHC.device)
        attention_hopper[(programs,)](
            q_SHC,
            out,
            partial,
            stats,
            *inputs,
            chosen,
            heads,
            items,
            chains,
            GATHER=selected is not None,
            SPLIT=chains > 1,
            PARTS=how.parts,
            CHAIN=CHAIN,
            num_warps=8,
        )
    if chains > 1:
        _add_chains[(queries, heads)](
            partial,
            stats,
            out,
            sink_H,
            phases,
            position_S,
            ratio,
            heads,
            chains,
            CHANNELS=channels,
            CHAIN=CHAIN,
            num_warps=1,
        )
    return out
