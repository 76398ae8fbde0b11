"""Linear layers over plain, FP8 and FP4 weights.

`Weight` is a matrix as a checkpoint holds it, or the same matrix expanded.  Quantised linears round their
activations to FP8 first, whatever form the weight is held in, so that expansion changes speed and never values.
On a CPU a matrix that is not held as it multiplies is unpacked a tile of rows at a time (unpacked.py).
Letters: S tokens, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import e4m3_to_float32, round_fp8
from .unpacked import E2M1_VALUES, FP4_BLOCK, FP8_BLOCK, unpacked_linear

ACTIVATION_BLOCK = 128


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a tensor made in inference mode could not take part in training later
def e2m1_pairs(device: torch.device) -> Tensor:
    """The two values in each of the 256 bytes, low nibble first: float32 [256, 2]."""
    return torch.tensor([(E2M1_VALUES[b & 15], E2M1_VALUES[b >> 4]) for b in range(256)], device=device)


@dataclass(frozen=True)
class Weight:
    """A matrix [O, I] in one of three forms.

    plain: data [O, I] float.  fp8: data e4m3 [O, I], scale e8m0 [ceil(O/128), ceil(I/128)].
    fp4: data int8 [O, I/2], two e2m1 codes a byte, low nibble first, scale e8m0 [O, I/32].
    ``round_activations``: inputs are rounded to e4m3 per 1x128 before the product.
    """

    data: Tensor
    scale: Tensor | None = None
    fmt: Literal["plain", "fp8", "fp4"] = "plain"
    round_activations: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.data.shape
        return (rows, columns * 2 if self.fmt == "fp4" else columns)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def to(self, device: torch.device) -> Weight:
        """The same weight on ``device``; itself where it is there already."""
        if self.data.device == device:
            return self
        return replace(self, data=self.data.to(device), scale=None if self.scale is None else self.scale.to(device))

    def rows(self, start: int, end: int) -> Weight:
        """Outputs [start, end), without a copy; of an fp8 weight in whole blocks."""
        if self.scale is None:
            return replace(self, data=self.data[start:end])
        step = FP8_BLOCK if self.fmt == "fp8" else 1
        assert start % step == 0 and (end % step == 0 or end == self.data.shape[0])
        return replace(self, data=self.data[start:end], scale=self.scale[start // step : -(-end // step)])

    def columns(self, start: int, end: int) -> Weight:
        """Inputs [start, end) as a copy; of a packed weight in whole blocks."""
        per_byte = 2 if self.fmt == "fp4" else 1
        data = self.data[:, start // per_byte : end // per_byte].contiguous()
        if self.scale is None:
            return replace(self, data=data)
        step = FP8_BLOCK if self.fmt == "fp8" else FP4_BLOCK
        assert start % step == 0 and end % step == 0
        return replace(self, data=data, scale=self.scale[:, start // step : end // step].contiguous())

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I] in ``dtype``; exact in float32 and in bfloat16 for both packed formats."""
        if self.fmt == "plain":
            return self.data.to(dtype)
        assert self.scale is not None
        scale = e8m0_to_float32(self.scale)
        if self.fmt == "fp8":
            rows, columns = self.data.shape
            scale_OI = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
            return e4m3_to_float32(self.data).mul_(scale_OI).to(dtype)
        codes = self.data.view(torch.uint8).to(torch.int32).flatten()
        values = e2m1_pairs(codes.device).index_select(0, codes).view(self.shape[0], -1, FP4_BLOCK)
        return (values * scale[..., None]).flatten(1).to(dtype)

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Whether it is held as a plain matrix in ``dtype``."""
        return self.fmt == "plain" and self.data.dtype == dtype

    def expanded(self, dtype: torch.dtype) -> Weight:
        """The same weight held as a plain matrix in ``dtype``; a plain weight already in it is returned as it is."""
        if self.is_plain(dtype):
            return self
        return Weight(self.dequantised(dtype), round_activations=self.round_activations)


def e8m0_to_float32(scale: Tensor) -> Tensor:
    """float8_e8m0fnu (or its bytes) -> 2^(byte - 127) in float32; byte 0, below float32's normals, included."""
    bits = scale.view(torch.uint8).to(torch.int32) << 23  # the byte is a float32's exponent field
    return bits.clamp_min_(1 << 22).view(torch.float32)  # 2^-127 is the one with a mantissa bit instead


def linear(x: Tensor, weight: Weight, rounded: bool = False) -> Tensor:
    """x W^T for x [..., I] -> [..., O] in x's dtype.  ``rounded``: x already went through `round_for`."""
    if not rounded:
        x = round_for(x, weight)
    if weight.is_plain(x.dtype):
        return F.linear(x, weight.data)
    if _by_tiles(x):
        return unpacked_linear(x, weight.data, weight.scale, weight.fmt)
    return F.linear(x, weight.dequantised(x.dtype))


def linear_into(out_SO: Tensor, x_SI: Tensor, weights: tuple[Weight, ...]) -> None:
    """`stacked_linear` of inputs [S, I] that went through `round_for`, written to ``out`` [S, sum of O]."""
    if len(weights) == 1 and weights[0].is_plain(x_SI.dtype):
        torch.mm(x_SI, weights[0].data.t(), out=out_SO)
    else:
        out_SO.copy_(stacked_linear(x_SI, weights, rounded=True))


def _by_tiles(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def round_for(x: Tensor, weight: Weight) -> Tensor:
    """The activations as ``weight`` wants them: e4m3 per 1x128 for quantised weights, unchanged for plain ones."""
    return round_fp8(x, ACTIVATION_BLOCK) if weight.round_activations else x


def stack(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Weights that read the same input, as one where they can be joined without unpacking, for `stacked_linear`."""
    plain = all(w.fmt == "plain" and w.data.dtype == weights[0].data.dtype for w in weights)
    if not plain or any(w.round_activations != weights[0].round_activations for w in weights):
        return tuple(weights)
    return (Weight(torch.cat([w.data for w in weights]), round_activations=weights[0].round_activations),)


def stacked_linear(x: Tensor, weights: tuple[Weight, ...], rounded: bool = False) -> Tensor:
    """The outputs of all ``weights`` side by side: [..., sum of O] (see `linear`)."""
    if not rounded:
        x = round_for(x, weights[0])
    if len(weights) == 1:
        return linear(x, weights[0], rounded=True)
    return torch.cat([linear(x, w, rounded=True) for w in weights], -1)


def grouped_linear(x_SGI: Tensor, weight: Weight) -> Tensor:
    """Block-diagonal product: group g of x [S, G, I] times rows g*O..(g+1)*O of weight [G*O, I] -> [S, G*O]."""
    tokens, groups, width = x_SGI.shape
    if _by_tiles(x_SGI) and not weight.is_plain(x_SGI.dtype):
        rows = weight.shape[0] // groups
        parts = ((x_SGI[:, g], range(g * rows, (g + 1) * rows)) for g in range(groups))
        return torch.cat([unpacked_linear(x, weight.data, weight.scale, weight.fmt, at) for x, at in parts], -1)
    w_GIO = weight.dequantised(x_SGI.dtype).view(groups, -1, width).transpose(1, 2)
    return torch.bmm(x_SGI.transpose(0, 1), w_GIO).transpose(0, 1).reshape(tokens, -1)
