"""Activations in FP8 as the GPU's linears read them: e4m3 codes with a power-of-two scale per token and 128 inputs.

`Rounded` is the type, `round_block` what kernels that produce one call in their last lines, `round_activations` the
kernel for tensors that no such kernel wrote.  Bit for bit the rounding of dsv4_kernels.rounding.round_fp8, block 128.
Infinities and NaN spoil their whole block, so that they show in every product (a conversion alone would cut them off).
Letters: S tokens, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rounding import FP8_AMAX_FLOOR

ROUND_BLOCK = 128  # inputs that share a scale
TILE = 16  # blocks that a program of `round_activations` takes

_FLOOR = tl.constexpr(FP8_AMAX_FLOOR)
# Triton's interpreter converts to e4m3 with ties away from zero, without carry and without NaN.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Rounded:
    """e4m3 [S, I] and their scales: float32 [S, I/128], powers of two.  The value is code times scale."""

    data: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, tokens: int, inputs: int, device: torch.device | str) -> Rounded:
        """Room for S x I, not written.  Raises ValueError where 128 does not divide I."""
        if inputs % ROUND_BLOCK:
            raise ValueError(f"activations are rounded in blocks of {ROUND_BLOCK}, which does not divide {inputs}")
        return cls(
            torch.empty(tokens, inputs, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(tokens, inputs // ROUND_BLOCK, dtype=torch.float32, device=device),
        )

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def values(self) -> Tensor:
        """The rounded values: float32 [S, I]."""
        return (self.data.float().unflatten(-1, (-1, ROUND_BLOCK)) * self.scale[..., None]).flatten(-2)


@triton.jit
def to_e4m3(x):
    """float32 within +-448 to e4m3, to nearest, ties to even."""
    if INTERPRETED:
        exponent = (tl.abs(x).to(tl.int32, bitcast=True) >> 23) - 127
        step = ((tl.maximum(exponent, -6) + 124) << 23).to(tl.float32, bitcast=True)  # 2^(exponent - 3)
        nearest = tl.abs(x) + 8388608.0 * step - 8388608.0 * step  # 2^23: only multiples of the step remain
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        exact = (nearest.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True).to(tl.float8e4nv)
        return tl.where(x == x, exact.to(tl.uint8, bitcast=True), 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def round_block(x, AXIS: tl.constexpr = 1):
    """float32 [R, 128] to (e4m3 [R, 128], scale float32 [R]); with AXIS 0: [128, R] to ([128, R], [R]).

    A token's 128 inputs that share a scale lie along AXIS.  For the bits of a stored bf16 tensor pass its values, that
    is x.to(tl.bfloat16).to(tl.float32).
    """
    amax = tl.max(tl.abs(x), AXIS)
    bits = tl.maximum(amax, _FLOOR).to(tl.int32, bitcast=True)
    # 2^ceil(log2(amax / 448)), 448 = 1.75 x 2^8: a mantissa above 1.75 carries into the exponent.
    bits = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    endless = amax == float("inf")
    scale = tl.where(endless, float("inf"), bits.to(tl.float32, bitcast=True))
    inverse = tl.where(endless, 0.0, inverse)  # infinite inputs become NaN, the others of their block 0 x infinity
    return to_e4m3(x * tl.expand_dims(inverse, AXIS)), scale


@triton.jit
def _round_activations(x_ptr, data_ptr, scale_ptr, blocks, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    place = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + place, mask=inside[:, None], other=0.0).to(tl.float32)
    data, scale = round_block(x)
    tl.store(data_ptr + place, data, mask=inside[:, None])
    tl.store(scale_ptr + block, scale, mask=inside)


def round_activations(x_SI: Tensor, out: Rounded | None = None) -> Rounded:
    """``x`` rounded to e4m3 per token and 128 inputs.

    x: bfloat16 or float32 [S, I], contiguous, 128 divides I.  Raises ValueError for anything else.
    """
    if x_SI.dim() != 2 or x_SI.dtype not in (torch.bfloat16, torch.float32) or not x_SI.is_contiguous():
        raise ValueError(
            f"activations to round must be contiguous bfloat16 or float32 [S, I], "
            f"got {x_SI.dtype} {tuple(x_SI.shape)} with strides {x_SI.stride()}"
        )
    if out is None:
        out = Rounded.empty(x_SI.shape[0], x_SI.shape[1], x_SI.device)
    blocks = x_SI.numel() // ROUND_BLOCK
    if blocks:
        _round_activations[(triton.cdiv(blocks, TILE),)](x_SI, out.data, out.scale, blocks, BLOCKS=TILE, num_warps=4)
    return out
