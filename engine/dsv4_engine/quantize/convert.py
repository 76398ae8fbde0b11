"""Rows of one tensor from the form that the source holds them in to that of the result, and how far the values moved.

Owns the arithmetic.  Blocks are rounded as the published files are: a power-of-two scale, 2^ceil(log2(amax / largest)),
to nearest, ties to even.  Knows no files, names or units.
Letters: O outputs, I inputs; R and C: blocks of 128 down and across.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dsv4_engine.checkpoint import DTYPES
from dsv4_engine.formats import float32_to_e8m0, pack_e2m1
from dsv4_kernels.linear import FP4_BLOCK, FP8_BLOCK, Weight
from dsv4_kernels.rounding import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    FP4_AMAX_FLOOR,
    FP8_AMAX_FLOOR,
    power_of_two_scale,
)

from .schemes import FP4, FP8

# Under an FP4 block's values lies no floor that is worth keeping: e4m3 holds them all exactly.  This one keeps the
# scale a normal float32.
_EXACT_FLOOR = E4M3_LARGEST * 2.0**-126


class BadValues(ValueError):
    """Values that cannot be used; the message goes behind the tensor's name."""


@dataclass(frozen=True)
class Tally:
    """What happened to some values.  square, error: sums of squares, of the values and of their change.

    saturated: beyond the block's largest code.  zeroed: became 0 and were not.
    """

    values: int = 0
    saturated: int = 0
    zeroed: int = 0
    square: float = 0.0
    error: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def relative_error(self) -> float:
        """Root mean square of the change, relative to that of the values."""
        return math.sqrt(self.error / self.square) if self.square else 0.0


@dataclass(frozen=True)
class InexactBlock:
    """A 128x128 block of an FP4 matrix that FP8 does not hold without loss.

    row, column: of its first value.  span: the block's largest scale is 2^span times its smallest.  changed: values.
    error: the largest change, of the block's largest value.
    """

    row: int
    column: int
    span: int
    changed: int
    error: float


@dataclass(frozen=True)
class Converted:
    """Rows in the form of the result, what happened to them, and blocks that should be exact and are not."""

    rows: Weight
    tally: Tally
    inexact: tuple[InexactBlock, ...] = ()


def convert(rows: Weight, dtype: str, first: int = 0) -> Converted:
    """Rows in the source's form to the type ``dtype``.

    rows: plain [N, C] of any type, or packed with N starting on a multiple of 128 (``first``, for messages).  Rows that
    have the type already are checked and come back as they are.  Raises BadValues for NaN and infinity, and for values
    that the type cannot hold.
    """
    if rows.fmt == "fp8":
        _check_e4m3(rows.data, first)
        rows = _with_e8m0(rows)
    if _is(rows, dtype):
        if rows.fmt == "plain" and rows.data.is_floating_point() and rows.data.itemsize > 1:
            _check_finite(rows.data, first)
        return Converted(rows, Tally(values=math.prod(rows.shape)))
    x_OI = rows.dequantised(torch.float32)
    _check_finite(x_OI, first)
    saturated = 0
    if dtype == FP8:
        out, saturated = encode_fp8(x_OI, _EXACT_FLOOR if rows.fmt == "fp4" else FP8_AMAX_FLOOR)
    elif dtype == FP4:
        out, saturated = encode_fp4(x_OI)
    else:
        out = Weight(x_OI.to(DTYPES[dtype]))
    if rows.fmt == "plain" and dtype == "F32":  # widened
        return Converted(out, Tally(values=x_OI.numel()))
    back_OI = out.dequantised(torch.float32)
    if not _finite(back_OI):
        raise BadValues(f"holds values too large for {dtype}, up to {float(x_OI.abs().max()):.3g}")
    if torch.equal(x_OI, back_OI):  # every value of what will be written
        return Converted(out, Tally(values=x_OI.numel(), square=_sum_of_squares(x_OI)))
    lossless = rows.fmt == "fp4" and dtype == FP8
    inexact = tuple(_inexact_blocks(rows, x_OI, back_OI, first)) if lossless else ()
    return Converted(out, _tally(x_OI, back_OI, saturated), inexact)


def _is(rows: Weight, dtype: str) -> bool:
    """Whether rows have the type already."""
    return rows.data.dtype == DTYPES[dtype]


def encode_fp8(x_OI: Tensor, floor: float = FP8_AMAX_FLOOR) -> tuple[Weight, int]:
    """float32 [O, I], finite -> e4m3 [O, I] with e8m0 scales of 128x128 blocks, and how many values saturated."""
    rows, columns = x_OI.shape
    padded = x_OI
    if rows % FP8_BLOCK or columns % FP8_BLOCK:
        padded = torch.nn.functional.pad(x_OI, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    x_RBCB = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    amax_RC = x_RBCB.abs().amax(3).amax(1).clamp_min_(floor)
    scale_RC = power_of_two_scale(amax_RC, E4M3_LARGEST)
    v_RBCB = x_RBCB / scale_RC[:, None, :, None]
    saturated = _count_above(v_RBCB, E4M3_LARGEST)
    data = v_RBCB.to(torch.float8_e4m3fn).view(padded.shape)[:rows, :columns].contiguous()
    return Weight(data, float32_to_e8m0(scale_RC).view(torch.float8_e8m0fnu), "fp8"), saturated


def encode_fp4(x_OI: Tensor) -> tuple[Weight, int]:
    """float32 [O, I], finite, I a multiple of 32 -> packed e2m1 with e8m0 scales per 32, and how many saturated."""
    x_OCB = x_OI.unflatten(1, (-1, FP4_BLOCK))
    scale_OC = power_of_two_scale(x_OCB.abs().amax(2).clamp_min_(FP4_AMAX_FLOOR), E2M1_LARGEST)
    v_OI = (x_OCB / scale_OC[..., None]).flatten(1)
    saturated = _count_above(v_OI, E2M1_LARGEST)
    data = pack_e2m1(_e2m1_codes(v_OI)).view(torch.int8)
    return Weight(data, float32_to_e8m0(scale_OC).view(torch.float8_e8m0fnu), "fp4"), saturated


def _e2m1_codes(v: Tensor) -> Tensor:
    """float32, at most 6 in magnitude -> the codes of formats.encode_e2m1 in a third of the time.

    Adding 2^22 times a number's power of two (at least 1) leaves room for one bit behind that power: the addition
    itself rounds to nearest even, and the sum's low bits count in steps of e2m1 there.
    """
    magnitude = v.abs()
    power = magnitude.clamp_min(1.0).view(torch.int32).bitwise_and_(0x7F800000)
    codes = magnitude.add_((power + (22 << 23)).view(torch.float32)).view(torch.int32)
    codes.sub_(power).add_(power.bitwise_right_shift_(22)).sub_((22 << 23) + (127 << 1))  # two codes a power of two
    sign = v.view(torch.int32).bitwise_right_shift(28).bitwise_and_(8)
    return codes.bitwise_or_(sign).to(torch.uint8)


def _with_e8m0(rows: Weight) -> Weight:
    """The Base checkpoints hold the same powers of two as float32."""
    assert rows.scale is not None
    if rows.scale.dtype != torch.float32:
        return rows
    return Weight(rows.data, float32_to_e8m0(rows.scale).view(torch.float8_e8m0fnu), rows.fmt)


def _count_above(v: Tensor, largest: float) -> int:
    low, high = torch.aminmax(v)  # quick; the scale's ceiling leaves nothing to count
    return int((v.abs() > largest).sum()) if max(-float(low), float(high)) > largest else 0


def _finite(x: Tensor) -> bool:
    if not x.numel():
        return True
    low, high = torch.aminmax(x)  # NaN passes through both; several times quicker than isfinite
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _check_finite(x: Tensor, first: int) -> None:
    if not _finite(x):
        raise _bad_at(~torch.isfinite(x), first, "NaN or infinity")


def _check_e4m3(data: Tensor, first: int) -> None:
    nan = data.view(torch.uint8).bitwise_and(0x7F) == 0x7F
    if bool(nan.any()):
        raise _bad_at(nan, first, "NaN")


def _bad_at(where: Tensor, first: int, what: str) -> BadValues:
    row, column = (int(v) for v in where.nonzero()[0])
    place = f"[{first + row}]" if where.shape[1] == 1 else f"[{first + row}, {column}]"
    return BadValues(f"holds {what}, first at {place}")


def _tally(x: Tensor, back: Tensor, saturated: int) -> Tally:
    return Tally(
        values=x.numel(),
        saturated=saturated,
        zeroed=int(torch.count_nonzero(x)) - int(torch.count_nonzero(back)),
        square=_sum_of_squares(x),
        error=_sum_of_squares(back - x),
    )


def _sum_of_squares(x_OI: Tensor) -> float:
    """In float32 along the rows, which is several times quicker than in float64, with the largest value near 1."""
    low, high = torch.aminmax(x_OI)
    largest = max(-float(low), float(high))
    if largest == 0:
        return 0.0
    power = min(max(math.frexp(largest)[1], -126), 126)
    norms = torch.linalg.vector_norm(x_OI * 2.0**-power, dim=1)
    return float(norms.double().square().sum()) * 4.0**power


def _inexact_blocks(rows: Weight, x_OI: Tensor, back_OI: Tensor, first: int) -> Iterator[InexactBlock]:
    """The blocks of FP4 rows in which a value is another than in what was written."""
    assert rows.scale is not None
    exponents = rows.scale.view(torch.uint8).int()
    for top in range(0, x_OI.shape[0], FP8_BLOCK):
        for left in range(0, x_OI.shape[1], FP8_BLOCK):
            x, back = (t[top : top + FP8_BLOCK, left : left + FP8_BLOCK] for t in (x_OI, back_OI))
            changed = int((x != back).sum())
            if not changed:
                continue
            blocks = exponents[top : top + FP8_BLOCK, left // FP4_BLOCK : (left + FP8_BLOCK) // FP4_BLOCK]
            used = blocks[x.unflatten(1, (-1, FP4_BLOCK)).abs().amax(2) > 0]  # a block of zeros has any scale
            error = float((back - x).abs().max() / x.abs().max())
            yield InexactBlock(first + top, left, int(used.max() - used.min()), changed, error)
