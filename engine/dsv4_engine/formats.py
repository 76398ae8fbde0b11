"""The byte layouts of quantised weights and of the cache's rows: values to bytes and back.

Owns how e4m3, e2m1 and e8m0 bytes are laid out.  The choice of a block's scale and the floors under it belong to
dsv4_kernels.rounding; dsv4_kernels.linear.Weight turns packed weights back into values.  Knows no model.
Letters: N rows, C channels, O outputs, I inputs, B blocks.

An e8m0 byte b means 2^(b - 127); 255 is NaN.  e2m1 codes 0..7 mean 0, .5, 1, 1.5, 2, 3, 4, 6, and bit 3 is the sign.
Two codes share a byte, the earlier one in the low nibble.  Rounding is to nearest, ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.linear import FP4_BLOCK, FP8_BLOCK, e2m1_pairs, e8m0_to_float32
from dsv4_kernels.rounding import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    FP4_AMAX_FLOOR,
    FP8_AMAX_FLOOR,
    e4m3_to_float32,
    power_of_two_scale,
)

CACHE_BLOCK = 64  # channels of a cache row that share one scale
ROW_ALIGNMENT = 8


def float32_to_e8m0(scale: Tensor) -> Tensor:
    """Powers of two in float32, 2^-126 .. 2^127, to their e8m0 bytes (uint8, same shape)."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


# ---- e2m1 ------------------------------------------------------------------------------------------------------------


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 [..., C] already divided by its scale -> codes uint8 [..., C]; magnitudes above 6 become 6."""
    m = x.abs()
    # A tie goes to the neighbour with an even code: strict where that is the lower one.
    code = (m > 0.25).to(torch.uint8)
    code += m >= 0.75
    code += m > 1.25
    code += m >= 1.75
    code += m > 2.5
    code += m >= 3.5
    code += m > 5.0
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Codes uint8 [..., C], C even -> bytes uint8 [..., C/2], low nibble first."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Bytes uint8 or int8 [..., C/2] -> values float32 [..., C], without a scale."""
    byte = packed.contiguous().view(torch.uint8).flatten().to(torch.int32)
    return e2m1_pairs(packed.device).index_select(0, byte).view(*packed.shape[:-1], packed.shape[-1] * 2)


# ---- weights ---------------------------------------------------------------------------------------------------------


def quantise_fp8_blocks(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [O, I] (float32 or bfloat16, finite) -> e4m3 [O, I] and e8m0 scales [ceil(O/128), ceil(I/128)].

    scale = 2^ceil(log2(amax / 448)) of each 128x128 block, cut at the matrix' edge; amax is floored at 1e-4.
    Source: facts on the published checkpoints' FP8 linears.
    """
    rows, columns = w_OI.shape
    w = w_OI.float()
    padded = torch.nn.functional.pad(w.abs(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    amax = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK)).amax((1, 3)).clamp_min_(FP8_AMAX_FLOOR)
    scale = power_of_two_scale(amax, E4M3_LARGEST)
    scale_OI = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return (w / scale_OI).to(torch.float8_e4m3fn), float32_to_e8m0(scale).view(torch.float8_e8m0fnu)


def quantise_fp4(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [O, I], I a multiple of 32 -> packed e2m1 int8 [O, I/2] and e8m0 scales [O, I/32].

    scale = 2^ceil(log2(amax / 6)) of each 32 values along the inputs; amax is floored at 6 * 2^-126.
    """
    if w_OI.shape[1] % FP4_BLOCK:
        raise ValueError(f"FP4 needs an input size that is a multiple of {FP4_BLOCK}, got {w_OI.shape[1]}")
    codes, scale = _fp4_blocks(w_OI.float())
    return pack_e2m1(codes).view(torch.int8), scale.view(torch.float8_e8m0fnu)


def _fp4_blocks(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [N, C] -> codes uint8 [N, C] and e8m0 bytes uint8 [N, C/32]."""
    x_NBI = x_NC.unflatten(-1, (-1, FP4_BLOCK))
    scale = power_of_two_scale(x_NBI.abs().amax(-1).clamp_min_(FP4_AMAX_FLOOR), E2M1_LARGEST)
    return encode_e2m1((x_NBI / scale[..., None]).flatten(-2)), float32_to_e8m0(scale)


# ---- cache rows ------------------------------------------------------------------------------------------------------


def _row_layout(head_dim: int, rope_dim: int) -> tuple[int, int, int, int]:
    """Where a row's parts end, in bytes: e4m3 values, bf16 values, scales, padding."""
    values = head_dim - rope_dim
    scales = values + 2 * rope_dim
    end = scales - (-values // CACHE_BLOCK)
    return values, scales, end, end + -end % ROW_ALIGNMENT


def row_bytes(head_dim: int, rope_dim: int) -> int:
    """Bytes of one mixed attention entry: e4m3 for the unrotated channels, bf16 for the rotated, a scale per 64, then
    padding to a multiple of 8.  584 for 512 channels of which 64 are rotated.
    """
    return _row_layout(head_dim, rope_dim)[-1]


def pack_rows(x_NC: Tensor, rope_dim: int) -> Tensor:
    """Attention entries float32 [N, C] -> uint8 [N, row_bytes]: the last rope_dim channels in bf16, the rest in FP8.

    Lossless for entries that went through the cache's rounding before.
    """
    rows, channels = x_NC.shape
    values, scales, end, size = _row_layout(channels, rope_dim)
    blocks = end - scales
    x_NBI = torch.nn.functional.pad(x_NC[:, :values], (0, blocks * CACHE_BLOCK - values)).unflatten(1, (blocks, -1))
    scale = power_of_two_scale(x_NBI.abs().amax(-1).clamp_min_(FP8_AMAX_FLOOR), E4M3_LARGEST)
    e4m3 = (x_NBI / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    out = x_NC.new_zeros(rows, size, dtype=torch.uint8)
    out[:, :values] = e4m3[:, :values]
    out[:, values:scales] = x_NC[:, values:].to(torch.bfloat16).contiguous().view(torch.uint8)
    out[:, scales:end] = float32_to_e8m0(scale)
    return out


def unpack_rows(rows: Tensor, head_dim: int, rope_dim: int) -> Tensor:
    """The inverse of pack_rows: uint8 [N, row_bytes] -> float32 [N, head_dim]."""
    values, scales, end, _ = _row_layout(head_dim, rope_dim)
    blocks = end - scales
    out = rows.new_empty(rows.shape[0], head_dim, dtype=torch.float32)
    scale = e8m0_to_float32(rows[:, scales:end].contiguous())
    whole = values // CACHE_BLOCK
    unrotated = e4m3_to_float32(rows[:, :values].contiguous().view(torch.float8_e4m3fn))
    cut = whole * CACHE_BLOCK
    out_NBI = out[:, :cut].unflatten(1, (whole, CACHE_BLOCK))
    torch.mul(unrotated[:, :cut].unflatten(1, (whole, CACHE_BLOCK)), scale[:, :whole, None], out=out_NBI)
    if whole < blocks:
        out[:, cut:values] = unrotated[:, cut:] * scale[:, whole:]
    out[:, values:] = rows[:, values:scales].contiguous().view(torch.bfloat16)
    return out


def index_key_bytes(index_head_dim: int) -> int:
    """Bytes of one packed indexer key: two values a byte and a scale per 32.  68 for 128 channels."""
    return index_head_dim // 2 + index_head_dim // FP4_BLOCK


def pack_index_keys(x_NC: Tensor) -> Tensor:
    """Indexer keys float32 [N, C], C a multiple of 32 -> uint8 [N, C/2 + C/32]: e2m1 codes, then their scales.

    Lossless for keys that went through the FP4 rounding before.
    """
    codes, scale = _fp4_blocks(x_NC)
    return torch.cat([pack_e2m1(codes), scale], 1)


def unpack_index_keys(rows: Tensor) -> Tensor:
    """The inverse of pack_index_keys: uint8 [N, C/2 + C/32] -> float32 [N, C]."""
    blocks = rows.shape[1] // (FP4_BLOCK // 2 + 1)
    half = blocks * (FP4_BLOCK // 2)
    values = unpack_e2m1(rows[:, :half]).unflatten(1, (blocks, FP4_BLOCK))
    return (values * e8m0_to_float32(rows[:, half:].contiguous())[..., None]).flatten(1)
