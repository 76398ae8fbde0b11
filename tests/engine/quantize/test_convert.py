"""The arithmetic of `quantize` against the references in dsv4_kernels.rounding, bit for bit, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_engine.formats import encode_e2m1, quantise_fp4, quantise_fp8_blocks
from dsv4_engine.quantize.convert import BadValues, Tally, _e2m1_codes, convert, encode_fp4, encode_fp8
from dsv4_kernels.linear import Weight
from dsv4_kernels.rounding import round_fp4, round_fp8

FP8, FP4 = "F8_E4M3", "I8"


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Values of many sizes: a normal times a power of two that differs from block to block, zeros, ties."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * 2.0 ** torch.randint(-30, 20, (rows, 1), generator=g)
    x[torch.rand(rows, columns, generator=g) < 0.05] = 0.0
    some = torch.rand(rows, columns, generator=g) < 0.2
    return torch.where(some, (x * 4).round() / 4, x)


def reference_fp8(x: Tensor) -> Tensor:
    """Each 128x128 block, cut at the edges, laid out as one row for the reference."""
    out = torch.empty_like(x)
    for top in range(0, x.shape[0], 128):
        for left in range(0, x.shape[1], 128):
            block = x[top : top + 128, left : left + 128]
            out[top : top + 128, left : left + 128] = round_fp8(block.reshape(1, -1), block.numel()).view(block.shape)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (3, 200), (130, 64), (128, 129), (300, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_the_references(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = matrix(*shape).to(dtype)
    rows = convert(Weight(x), FP8).rows
    assert torch.equal(rows.dequantised(torch.float32), reference_fp8(x.float()))
    data, scale = quantise_fp8_blocks(x)
    assert rows.scale is not None and same_bits(rows.data, data) and same_bits(rows.scale, scale)


@pytest.mark.parametrize("shape", [(1, 32), (5, 64), (128, 96), (257, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp4_is_the_references(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = matrix(*shape, seed=1).to(dtype)
    rows = convert(Weight(x), FP4).rows
    assert torch.equal(rows.dequantised(torch.float32), round_fp4(x.float()))
    data, scale = quantise_fp4(x)
    assert rows.scale is not None and same_bits(rows.data, data) and same_bits(rows.scale, scale)


def test_e2m1_codes_at_and_around_every_tie() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    at = torch.cat([ties, codes, torch.linspace(0, 6, 3001), torch.tensor([1e-45, 1e-38, 2.0**-126, 2.0**-22])])
    at = torch.cat([at, torch.nextafter(at, torch.zeros(())), torch.nextafter(at, torch.full((), 9.0)).clamp(max=6)])
    at = torch.cat([at, -at])
    assert torch.equal(_e2m1_codes(at), encode_e2m1(at))


def test_random_bits_as_input() -> None:
    """Every finite float32 is fair: sizes from the smallest subnormal to near the largest."""
    g = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (256, 256), generator=g).to(torch.int32).view(torch.float32)
    x = torch.where(bits.isfinite() & (bits.abs() < 1e37), bits, torch.zeros(()))
    x[:128] *= 1e-37
    assert torch.equal(encode_fp8(x)[0].dequantised(torch.float32), reference_fp8(x))
    assert torch.equal(encode_fp4(x)[0].dequantised(torch.float32), round_fp4(x))


@pytest.mark.parametrize("dtype", [FP4, FP8])
def test_steps_of_rows_change_nothing(dtype: str) -> None:
    x = Weight(matrix(300, 160, seed=3))
    whole = convert(x, dtype).rows
    parts = [convert(Weight(x.data[a : a + 128]), dtype).rows for a in (0, 128, 256)]
    assert same_bits(torch.cat([p.data.view(torch.uint8) for p in parts]), whole.data.view(torch.uint8))
    scales = [p.scale.view(torch.uint8) for p in parts if p.scale is not None]
    assert whole.scale is not None and torch.equal(torch.cat(scales), whole.scale.view(torch.uint8))


def test_fp8_to_fp4_rounds_the_exact_values() -> None:
    source = encode_fp8(matrix(256, 128, seed=4))[0]
    done = convert(source, FP4)
    assert torch.equal(done.rows.dequantised(torch.float32), round_fp4(source.dequantised(torch.float32)))
    assert done.tally.relative_error > 0.01


def test_what_has_the_type_already_comes_back_as_it_is() -> None:
    for rows, dtype in (
        (Weight(torch.ones(4, 1, dtype=torch.int64)), "I64"),
        (Weight(torch.ones(4, 1)), "F32"),
        (encode_fp8(torch.ones(4, 4))[0], FP8),
        (encode_fp4(torch.ones(4, 32))[0], FP4),
    ):
        assert convert(rows, dtype).rows is rows


def test_float32_scales_become_the_same_powers_of_two() -> None:
    rows = encode_fp8(matrix(130, 200, seed=5))[0]
    assert rows.scale is not None
    done = convert(Weight(rows.data, rows.scale.float(), "fp8"), FP8).rows
    assert done.scale is not None and same_bits(done.scale, rows.scale) and same_bits(done.data, rows.data)


def test_the_tally() -> None:
    """Against sums in float64, for sizes whose squares float32 does not hold."""
    for size in (1.0, 1e-30, 1e30):
        x = matrix(128, 64, seed=6) / 2.0**20 * size
        done = convert(Weight(x), FP4)
        back = done.rows.dequantised(torch.float32)
        tally, error = done.tally, (back.double() - x.double()).square().sum().sqrt() / x.double().norm()
        assert tally.relative_error == pytest.approx(float(error), rel=1e-5)
        assert (tally.values, tally.saturated) == (x.numel(), 0)
        assert tally.zeroed == int(((back == 0) & (x != 0)).sum()) > 0
    assert Tally().relative_error == 0.0
    both = Tally(1, 2, 3, 4.0, 5.0) + Tally(10, 20, 30, 40.0, 50.0)
    assert both == Tally(11, 22, 33, 44.0, 55.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [FP4, FP8, "BF16", "F32"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_with_their_place(bad: float, dtype: str, source: torch.dtype) -> None:
    x = torch.ones(130, 64, dtype=source)
    x[129, 7] = bad
    with pytest.raises(BadValues, match=r"NaN or infinity, first at \[641, 7\]"):
        convert(Weight(x), dtype, 512)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("dtype", [FP8, FP4])
def test_nan_codes_of_e4m3_are_refused(code: int, dtype: str) -> None:
    rows = encode_fp8(torch.ones(128, 64))[0]
    rows.data.view(torch.uint8)[5, 6] = code
    with pytest.raises(BadValues, match=r"NaN, first at \[5, 6\]"):
        convert(rows, dtype)


def test_values_beyond_the_type_are_refused() -> None:
    with pytest.raises(BadValues, match="too large for BF16"):
        convert(Weight(torch.full((1, 1), 3.4e38)), "BF16")
    with pytest.raises(BadValues, match="too large for I8"):
        convert(Weight(torch.full((1, 32), 3.4e38)), FP4)


# ---- FP4 to FP8 ------------------------------------------------------------------------------------------------------


def fp4_block(exponents: dict[tuple[int, int], int], code: int = 7, rows: int = 128, columns: int = 128) -> Weight:
    """FP4 with ``code`` everywhere and scale 2^0; ``exponents``: of single scales, by row and block of 32."""
    scale = torch.full((rows, columns // 32), 127, dtype=torch.uint8)
    for place, exponent in exponents.items():
        scale[place] = 127 + exponent
    data = torch.full((rows, columns // 2), code | code << 4, dtype=torch.uint8)
    return Weight(data.view(torch.int8), scale.view(torch.float8_e8m0fnu), "fp4")


@pytest.mark.parametrize(
    ("lowest", "code", "exact"),
    [(-6, 1, True), (-14, 1, True), (-15, 1, False), (-15, 2, True), (-15, 3, False), (-16, 4, True), (-20, 7, False)],
)
def test_how_far_scales_may_span(lowest: int, code: int, exact: bool) -> None:
    """The smallest step of e4m3 lies 2^-15 below the scale's power of two: 0.5 fits down to 2^-14, 1 down to 2^-15."""
    rows = fp4_block({})
    rows.scale.view(torch.uint8)[3, 2] = 127 + lowest  # type: ignore[union-attr]
    rows.data.view(torch.uint8)[3, 32:48] = code | (code | 8) << 4  # both signs
    done = convert(rows, FP8, first=256)
    same = torch.equal(done.rows.dequantised(torch.float32), rows.dequantised(torch.float32))
    assert same == exact == (not done.inexact) == (done.tally.error == 0)
    if not exact:
        (block,) = done.inexact
        assert (block.row, block.column, block.span) == (256, 0, -lowest)
        assert 0 < block.changed <= 32 and 0 < block.error < 2.0**-15


def test_each_inexact_block_is_named_and_others_are_not() -> None:
    rows = fp4_block({(0, 0): -20, (130, 5): -18, (290, 9): 3}, code=5, rows=300, columns=320)
    done = convert(rows, FP8)
    assert [(b.row, b.column, b.span, b.changed) for b in done.inexact] == [(0, 0, 20, 32), (128, 128, 18, 32)]
    # The step there is 2^-16: 3 * 2^-20 becomes 0 and 3 * 2^-18 becomes 2^-16; both beside a largest value of 3.
    assert [b.error for b in done.inexact] == [pytest.approx(2.0**-20), pytest.approx(2.0**-18 / 3)]


@pytest.mark.parametrize("exponent", [-127, -126, -100, -20, 0, 100, 124])
def test_small_and_large_blocks_are_exact(exponent: int) -> None:
    """Where the published floor under amax would flush them, and at the ends of float32."""
    rows = fp4_block({(r, c): exponent for r in range(128) for c in range(4)}, code=1)
    rows.data.view(torch.uint8)[:, ::3] = 0x27
    done = convert(rows, FP8)
    assert torch.equal(done.rows.dequantised(torch.float32), rows.dequantised(torch.float32)) and not done.inexact


def test_zeros_may_have_any_scale() -> None:
    rows = fp4_block({(0, 0): -127, (1, 1): 125}, code=7)
    rows.data[0, :16] = 0
    rows.data[1, 16:32] = 0
    assert not convert(rows, FP8).inexact
    nothing = fp4_block({(r, c): 9 * c - 20 for r in range(128) for c in range(4)}, code=0)
    done = convert(nothing, FP8)
    assert not done.inexact and float(done.rows.dequantised(torch.float32).abs().max()) == 0
    assert done.tally.relative_error == 0


def test_every_code_of_random_fp4_within_the_span() -> None:
    g = torch.Generator().manual_seed(7)
    data = torch.randint(0, 256, (256, 128), generator=g, dtype=torch.uint8)
    scale = torch.randint(90, 105, (256, 8), generator=g, dtype=torch.uint8)
    rows = Weight(data.view(torch.int8), scale.view(torch.float8_e8m0fnu), "fp4")
    done = convert(rows, FP8)
    assert torch.equal(done.rows.dequantised(torch.float32), rows.dequantised(torch.float32)) and not done.inexact
