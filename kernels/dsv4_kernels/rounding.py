"""Rounding to the block formats of the checkpoints and the cache, as values: FP8 e4m3, FP4 e2m1, and the Hadamard turn.

A block of values shares one power-of-two scale, 2^ceil(log2(amax / largest)).  Rounding is to nearest, ties to
even.  Packing the rounded values into bytes is the engine's business.
Source: facts on precision in the published inference code; report, section 5.2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

E4M3_LARGEST = 448.0
E2M1_LARGEST = 6.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """2^ceil(log2(amax / largest)) for float32 ``amax`` > 0, exact (read off the exponent bits, no logarithm).

    The ratio must be a normal float32; the callers' floors under ``amax`` see to that.
    """
    bits = (amax / largest).view(torch.int32)
    # Any mantissa bit carries into the exponent, which is the ceiling; the mask then drops the mantissa.
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def e4m3_to_float32(x: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exact for every finite code; on a CPU several times faster than torch's cast.

    e4m3 and float16 differ only in field widths: shifted into place the code reads as a float16 that is 2^8 too
    small, subnormals included.  (The two NaN codes become +-480; checkpoints and roundings hold none.)
    """
    if x.device.type != "cpu":
        return x.to(torch.float32)  # one instruction there
    bits = x.view(torch.int8).to(torch.int16)
    bits = bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # sign stays in bit 15; its copy in bit 14 goes
    return bits.view(torch.float16).to(torch.float32).mul_(256.0)


def _round_block_e4m3(x_NB: Tensor) -> Tensor:
    amax = x_NB.abs().amax(-1, keepdim=True).clamp_min_(FP8_AMAX_FLOOR)
    scale = power_of_two_scale(amax, E4M3_LARGEST)
    return e4m3_to_float32((x_NB / scale).to(torch.float8_e4m3fn)) * scale


def round_fp8(x: Tensor, block: int) -> Tensor:
    """Values of ``x`` after e4m3 rounding in blocks of ``block`` along the last dim (a shorter last block is its own).

    x: float32 or bfloat16 [..., C]; returns the same shape and dtype.  Not differentiable: training adds its own
    straight-through gradient.
    """
    width = x.shape[-1]
    whole = width - width % block
    x32 = x.float()
    parts = []
    if whole:
        parts.append(_round_block_e4m3(x32[..., :whole].unflatten(-1, (-1, block))).flatten(-2))
    if whole < width:
        parts.append(_round_block_e4m3(x32[..., whole:]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype)


def round_fp4(x: Tensor, block: int = 32) -> Tensor:
    """Values of ``x`` after e2m1 rounding in blocks of ``block`` along the last dim, which ``block`` must divide.

    x: float32 or bfloat16 [..., C]; returns the same shape and dtype.
    """
    x32 = x.float().unflatten(-1, (-1, block))
    amax = x32.abs().amax(-1, keepdim=True).clamp_min_(FP4_AMAX_FLOOR)
    scale = power_of_two_scale(amax, E2M1_LARGEST)
    v = x32 / scale
    # Spacing of e2m1: 1/2 below 2, 1 below 4, 2 up to 6.  torch.round goes to even multiples, which are the codes
    # with an even mantissa bit.
    magnitude = v.abs()
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return ((v / step).round_() * step * scale).flatten(-2).to(x.dtype)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a tensor made in inference mode could not take part in training later
def hadamard_matrix(size: int, device: torch.device) -> Tensor:
    """The symmetric matrix behind `hadamard`: float32 [size, size]."""
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * size**-0.5


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last dim (a power of two), scaled by C^-0.5, so orthogonal.

    x: [..., C]; computed in float32, returned in x's dtype.
    """
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"hadamard needs a power of two as last dim, got {size}")
    return (x.float() @ hadamard_matrix(size, x.device)).to(x.dtype)
