"""Between attention's projections and its cores: norm, RoPE, rounding and packing of queries, window rows and index
queries.  Every value is read once and written once.

`split_low_rank` takes what wq_a and wkv made of a token, `finish_queries` what wq_b and the indexer's wq_b made of the
former's result.  Reference: dsv4_kernels.norm, rope and rounding, dsv4_engine.formats, fold_queries.
Letters: S tokens, L q_lora_rank, H heads, C channels of a head, I index heads, E channels of an index head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import PDL, begin, begin_alone, check_inputs, e2m1_scale, hadamard, inverse_of, store_row, to_bf16, turn
from .rounded import Rounded, round_block, to_e4m3
from .rows import ROPE, WindowRows, row_bytes, value_bytes

HEADS = 8  # a program of `finish_queries`
INDEX_HEADS = 16
FEW = 1024  # tokens below which `split_low_rank` takes two programs each

_FOLD_FLOOR = tl.constexpr(448.0 * 2.0**-100)


@triton.jit
def _split_low_rank(
    y_ptr,
    q_norm_ptr,
    kv_norm_ptr,
    phase_ptr,
    position_ptr,
    base_ptr,
    data_ptr,
    scale_ptr,
    window_ptr,
    window_scales,
    ring,
    eps,
    L: tl.constexpr,
    C: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    KV_BLOCKS: tl.constexpr,
    BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One token a program; if SPLIT, one program makes qr and another the window row."""
    begin_alone()  # else wq_b would fill the device before the compressor's products come, on another stream
    if SPLIT:
        t = (tl.program_id(0) // 2).to(tl.int64)
        part = tl.program_id(0) % 2
    else:
        t = tl.program_id(0).to(tl.int64)
        part = 2
    y_ptr += t * (L + C)
    if part != 0:
        position = tl.load(position_ptr + t)
        row = tl.load(base_ptr + t) + tl.where(ring > 0, position % tl.maximum(ring, 1), position)
        kv_block = tl.arange(0, KV_BLOCKS)
        kv_column = kv_block[:, None] * 64 + tl.arange(0, 64)[None, :]
        kv_inside = (kv_block < C // 64)[:, None]
        kv = tl.load(y_ptr + L + kv_column, mask=kv_inside, other=0.0).to(tl.float32)
        kv *= tl.rsqrt(tl.sum(tl.sum(kv * kv, 1), 0) / C + eps)
        kv *= tl.load(kv_norm_ptr + kv_column, mask=kv_inside, other=0.0)
        store_row(kv, window_ptr + row * BYTES, window_ptr + window_scales + row * SCALES, phase_ptr + t * 64, C)
    if part != 1:
        block = tl.arange(0, Q_BLOCKS)
        column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = (block < L // 128)[:, None]
        x = tl.load(y_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / L + eps)
        x = to_bf16(x * tl.load(q_norm_ptr + column, mask=inside, other=0.0))
        data, scale = round_block(x.to(tl.float32))
        tl.store(data_ptr + t * L + column, data, mask=inside)
        tl.store(scale_ptr + t * (L // 128) + block, scale, mask=block < L // 128)


def split_low_rank(
    y_SX: Tensor,
    q_norm_L: Tensor,
    kv_norm_C: Tensor,
    phases: Tensor,
    position_S: Tensor,
    rows: WindowRows,
    eps: float,
) -> Rounded:
    """qr = rmsnorm(y[:, :L]), rounded for wq_b; window rows from rmsnorm(y[:, L:]), turned and packed into ``rows``.

    y: bfloat16 [S, L + C]; norms: float32 [L], [C]; phases: float32 [S, 32, 2]; position: int64 [S].  Rows are written
    where `sparse_attention` looks for them.  Raises ValueError for what the kernel does not take.
    Source: report, section 2.3; rounding as in dsv4_engine.formats.pack_rows.
    """
    tokens, low, channels = y_SX.shape[0], q_norm_L.shape[0], kv_norm_C.shape[0]
    if low % 128 or channels % 64 or channels <= ROPE:
        raise ValueError(
            f"low-rank projections on the GPU need 128 to divide q_lora_rank and 64 to divide a head_dim above {ROPE}, "
            f"got {low} and {channels}; use device='cpu'"
        )
    check_inputs(
        ("y", y_SX, torch.bfloat16, (tokens, low + channels)),
        ("q_norm", q_norm_L, torch.float32, (low,)),
        ("kv_norm", kv_norm_C, torch.float32, (channels,)),
        ("phases", phases, torch.float32, (tokens, ROPE // 2, 2)),
        ("position", position_S, torch.int64, (tokens,)),
        ("window base", rows.base_S, torch.int64, (tokens,)),
        ("window rows", rows.block, torch.uint8, tuple(rows.block.shape)),
    )
    out = Rounded.empty(tokens, low, y_SX.device)
    if tokens:
        values, size = value_bytes(channels), row_bytes(channels)
        few = tokens < FEW
        _split_low_rank[(2 * tokens if few else tokens,)](
            y_SX,
            q_norm_L,
            kv_norm_C,
            phases,
            position_S,
            rows.base_S,
            out.data,
            out.scale,
            rows.block,
            rows.block.numel() // size * values,
            rows.ring,
            eps,
            L=low,
            C=channels,
            Q_BLOCKS=triton.next_power_of_2(low // 128),
            KV_BLOCKS=triton.next_power_of_2(channels // 64),
            BYTES=values,
            SCALES=size - values,
            SPLIT=few,
            num_warps=1,  # which adds a row up without waiting for others
            launch_pdl=PDL,
        )
    return out


@triton.jit
def _query_heads(y_ptr, out_ptr, phase_ptr, first, heads, eps, C: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    head = first + tl.arange(0, N)
    column = tl.arange(0, WIDTH)
    inside = (head < heads)[:, None] & (column < C)[None, :]
    place = head[:, None] * C + column[None, :]
    x = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    tl.store(out_ptr + place, to_bf16(turn(x, phase_ptr, C - 64)), mask=inside)


@triton.jit
def _index_heads(y_ptr, weight_ptr, out_ptr, folded_ptr, phase_ptr, first, heads, factor, E: tl.constexpr,
                 N: tl.constexpr):  # fmt: skip
    head = first + tl.arange(0, N)
    shown = head < heads
    x = tl.load(y_ptr + head[:, None] * E + tl.arange(0, E)[None, :], mask=shown[:, None], other=0.0)
    x = tl.reshape(hadamard(turn(x.to(tl.float32), phase_ptr, E - 64)), (N * E // 32, 32))
    scale = e2m1_scale(x)
    v = x * inverse_of(scale)[:, None]
    magnitude = tl.abs(v)
    step = 0.5 + 0.5 * (magnitude >= 2.0).to(tl.float32) + (magnitude >= 4.0).to(tl.float32)
    inverse = tl.where(magnitude >= 4.0, 0.5, tl.where(magnitude >= 2.0, 1.0, 2.0))
    v = ((v * inverse + 12582912.0) - 12582912.0) * step * scale[:, None]  # 1.5 x 2^23: only whole numbers remain
    v = tl.reshape(v, (N, E))
    amax = tl.maximum(tl.max(tl.abs(v), 1), _FOLD_FLOOR)
    bits = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    fold = bits.to(tl.float32, bitcast=True)
    even, odd = tl.split(tl.reshape(to_e4m3(v * inverse_of(fold)[:, None]), (N, E // 2, 2)))
    place = out_ptr + head[:, None] * E + tl.arange(0, E // 2)[None, :]
    tl.store(place, even, mask=shown[:, None])
    tl.store(place + E // 2, odd, mask=shown[:, None])
    weight = tl.load(weight_ptr + head, mask=shown, other=0.0)
    tl.store(folded_ptr + head, weight * factor * fold, mask=shown)


@triton.jit
def _finish_queries(
    y_ptr,
    q_ptr,
    index_ptr,
    weight_ptr,
    weight_stride,
    folded_ptr,
    phase_ptr,
    heads,
    index_heads,
    eps,
    factor,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
):
    """HEADS heads or INDEX_HEADS index heads of one token a program."""
    begin()
    parts = tl.cdiv(heads, HEADS)
    # The parts of a token side by side, so that those that compute run beside those that wait for memory.
    share = parts + (tl.cdiv(index_heads, INDEX_HEADS) if E > 0 else 0)
    t = (tl.program_id(0) // share).to(tl.int64)
    part = tl.program_id(0) % share
    y_ptr += t * (heads * C + index_heads * E)
    phase_ptr += t * 64
    if part < parts:
        _query_heads(y_ptr, q_ptr + t * heads * C, phase_ptr, part * HEADS, heads, eps, C, WIDTH, HEADS)
    elif E > 0:
        _index_heads(
            y_ptr + heads * C,
            weight_ptr + t * weight_stride,
            index_ptr + t * index_heads * E,
            folded_ptr + t * index_heads,
            phase_ptr,
            (part - parts) * INDEX_HEADS,
            index_heads,
            factor,
            E,
            INDEX_HEADS,
        )


def finish_queries(
    y_SX: Tensor,
    heads: int,
    channels: int,
    phases: Tensor,
    eps: float,
    index_weights_SI: Tensor | None = None,
    index_channels: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries bfloat16 [S, H, C], normed and turned; index queries e4m3 [S, I, E] and their weights float32 [S, I].

    y: bfloat16 [S, H*C + I*E]; phases: float32 [S, 32, 2]; index weights: float32 [S, I], as weights_proj makes them,
    contiguous in I (the factor (I E)^-0.5 is applied here), or None: then y is [S, H*C] and both index outputs None.
    Index queries are turned, through the Hadamard transform, rounded to FP4 and laid out as `fold_queries` does.
    Raises ValueError for what the kernel does not take.  Source: report, section 2.3.
    """
    tokens = y_SX.shape[0]
    index_heads = index_weights_SI.shape[1] if index_weights_SI is not None else 0
    wrong = index_channels < ROPE or index_channels & (index_channels - 1)
    if channels % 16 or channels <= ROPE or (index_heads and wrong):
        raise ValueError(
            f"queries on the GPU need a head_dim above {ROPE} that is a multiple of 16 and index heads of 64, 128, ... "
            f"channels, got {channels} and {index_channels}; use device='cpu'"
        )
    check_inputs(
        ("y", y_SX, torch.bfloat16, (tokens, heads * channels + index_heads * index_channels)),
        ("phases", phases, torch.float32, (tokens, ROPE // 2, 2)),
    )
    device = y_SX.device
    q = torch.empty(tokens, heads, channels, dtype=torch.bfloat16, device=device)
    index_q = folded = None
    if index_weights_SI is not None:
        if index_weights_SI.dtype != torch.float32 or index_weights_SI.stride(1) != 1:
            raise ValueError(f"index weights on the GPU are float32 [S, I], got {index_weights_SI.dtype}")
        index_q = torch.empty(tokens, index_heads, index_channels, dtype=torch.float8_e4m3fn, device=device)
        folded = torch.empty(tokens, index_heads, device=device)
    if tokens:
        _finish_queries[(tokens * (triton.cdiv(heads, HEADS) + triton.cdiv(index_heads, INDEX_HEADS)),)](
            y_SX,
            q,
            index_q if index_q is not None else q,
            index_weights_SI if index_weights_SI is not None else phases,
            index_weights_SI.stride(0) if index_weights_SI is not None else 0,
            folded if folded is not None else phases,
            phases,
            heads,
            index_heads,
            eps,
            max(index_heads * index_channels, 1) ** -0.5,
            C=channels,
            WIDTH=triton.next_power_of_2(channels),
            E=index_channels if index_heads else 0,
            HEADS=HEADS,
            INDEX_HEADS=INDEX_HEADS,
            num_warps=4,
            launch_pdl=PDL,
        )
    return q, index_q, folded
