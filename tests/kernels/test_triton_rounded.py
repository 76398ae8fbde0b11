"""Rounding of activations on the GPU against the reference, bit for bit; in Triton's interpreter without a GPU."""

import pytest
import torch

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.rounding import round_fp8
from dsv4_kernels.triton.rounded import Rounded, round_activations

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values


def poisoned(tokens: int, inputs: int) -> Rounded:
    out = Rounded.empty(tokens, inputs, DEVICE)
    out.data.view(torch.uint8).fill_(0x7F)
    out.scale.fill_(float("nan"))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "inputs"), [(0, 128), (1, 256), (63, 384)])
def test_rounding(tokens: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, inputs, device=DEVICE) * torch.exp2(torch.randint(-40, 40, (tokens, 1), device=DEVICE))
    x = (x * torch.rand(tokens, inputs, device=DEVICE).pow(12)).to(dtype)  # subnormal codes, too
    out = round_activations(x, poisoned(tokens, inputs))
    assert torch.equal(out.values().to(dtype), round_fp8(x, 128))
    assert torch.equal(out.scale.log2(), out.scale.log2().round())


def test_every_code_tie_and_edge_of_a_scale() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    edges = torch.tensor([448.0, 449.0, 447.9999, 448.00003, 0.0, 1e-4, 1e-20, 3e38], device=DEVICE)
    below, above = between.nextafter(codes[:-1]), between.nextafter(codes[1:])
    rows = [codes, between, below, above, -between, *edges[:, None]]
    x = torch.zeros(len(rows), 128, device=DEVICE)
    for row, values in zip(x, rows, strict=True):
        row[: len(values)] = values
    x[1:5, 127] = 448.0
    out = round_activations(x, poisoned(*x.shape))
    want = round_fp8(x, 128)
    assert torch.equal(out.values(), want)
    assert torch.equal(out.values().signbit(), want.signbit())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = torch.ones(2, 256, device=DEVICE)
    x[1, 130] = bad
    out = round_activations(x, poisoned(2, 256))
    assert torch.equal(out.values()[0], x[0])
    assert torch.equal(out.values()[1, :128], x[1, :128])
    assert out.values()[1, 130].isnan()


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        round_activations(torch.ones(256, 4, device=DEVICE).T)
    with pytest.raises(ValueError, match="does not divide 100"):
        round_activations(torch.ones(2, 100, device=DEVICE))
    with pytest.raises(ValueError, match="float16"):
        round_activations(torch.ones(2, 128, device=DEVICE, dtype=torch.float16))
