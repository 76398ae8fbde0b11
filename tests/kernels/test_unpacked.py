"""Products with packed matrices by tiles of rows: what they give against the matrix unpacked whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from dsv4_kernels import unpacked
from dsv4_kernels.linear import Weight, grouped_linear, linear


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def packed(fmt: str, rows: int, columns: int) -> Weight:
    generator = torch.Generator().manual_seed(rows * columns)
    if fmt == "plain":
        return Weight(torch.randn(rows, columns, generator=generator).to(torch.bfloat16))
    block = 32 if fmt == "fp4" else 128
    shape = (rows if fmt == "fp4" else -(-rows // 128), -(-columns // block))
    scale = torch.randint(110, 130, shape, generator=generator).to(torch.uint8).view(torch.float8_e8m0fnu)
    if fmt == "fp4":
        data = torch.randint(-128, 128, (rows, columns // 2), generator=generator).to(torch.int8)
        return Weight(data, scale, "fp4")
    return Weight(torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn), scale, "fp8")


CASES = [("fp4", 300, 512), ("fp4", 1, 32), ("fp8", 300, 512), ("fp8", 129, 200), ("plain", 300, 96)]


@pytest.mark.parametrize(("fmt", "rows", "columns"), CASES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
def test_equals_the_matrix_unpacked_whole(
    fmt: str, rows: int, columns: int, tokens: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked, "TILE_BYTES", 1)  # as many tiles as there can be
    weight, x = packed(fmt, rows, columns), torch.randn(tokens, columns)
    got = linear(x, weight)
    want = F.linear(x.double(), weight.dequantised(torch.float32).double())
    assert got.shape == (tokens, rows) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()) if tokens else 0)


def test_unpacked_values_are_exact() -> None:
    """Every code at every scale, by products with unit vectors."""
    for fmt in ("fp4", "fp8"):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        finite = codes if fmt == "fp4" else torch.where(codes & 127 == 127, 0, codes)  # NaN is in no checkpoint
        data = finite.repeat(1, 1).view(torch.int8 if fmt == "fp4" else torch.float8_e4m3fn)
        columns = data.shape[1] * (2 if fmt == "fp4" else 1)
        for exponent in (0, 1, 100, 127, 200):
            blocks = columns // (32 if fmt == "fp4" else 128)
            scale = torch.full((1, blocks), exponent, dtype=torch.uint8).view(torch.float8_e8m0fnu)
            weight = Weight(data, scale, fmt)  # type: ignore[arg-type]
            assert torch.equal(linear(torch.eye(columns), weight)[:, 0], weight.dequantised(torch.float32)[0])


def test_bfloat16_products_use_the_exact_values(threads: int) -> None:
    weight, x = packed("fp4", 256, 512), torch.randn(7, 512).to(torch.bfloat16)
    assert torch.equal(linear(x, weight), F.linear(x, weight.dequantised(torch.bfloat16)))


@pytest.mark.parametrize("fmt", ["fp8", "plain"])
@pytest.mark.parametrize("rows", [128, 96])
def test_grouped(fmt: str, rows: int, threads: int) -> None:
    """Groups need not begin where a block of scales does."""
    weight, x = packed(fmt, 3 * rows, 256), torch.randn(5, 3, 256)
    want = torch.cat(
        [F.linear(x[:, g], weight.dequantised(torch.float32)[g * rows : (g + 1) * rows]) for g in range(3)], -1
    )
    torch.testing.assert_close(grouped_linear(x, weight), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_row_does_not_depend_on_its_neighbours(threads: int) -> None:
    weight, x = packed("fp4", 700, 512), torch.randn(64, 512)
    all_rows = linear(x, weight)
    assert torch.equal(linear(x[16:48], weight), all_rows[16:48])


def test_the_tile_is_all_that_is_unpacked() -> None:
    assert unpacked.unpacked_bytes(4096, 1) <= 3 * unpacked.TILE_BYTES
    assert unpacked.unpacked_bytes(4096, 64) <= 3 * 16 * unpacked.TILE_BYTES
