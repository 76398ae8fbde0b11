"""Linears on the GPU against the reference; in Triton's interpreter, and by compilation, where there is no GPU."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.linear import Weight, linear
from dsv4_kernels.linear import grouped_linear as grouped_reference
from dsv4_kernels.rounding import round_fp8
from dsv4_kernels.triton import linear as kernel
from dsv4_kernels.triton.linear import (
    Fp8Matrix,
    expanded,
    fp8_linear,
    grouped_linear,
    plain_linear,
    split_float32,
)
from dsv4_kernels.triton.rounded import Rounded, round_activations

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values

BF16 = torch.bfloat16


def fp8_matrix(outputs: int, inputs: int) -> Fp8Matrix:
    data = (torch.randn(outputs, inputs, device=DEVICE) * 3).to(torch.float8_e4m3fn)
    scale = torch.randint(110, 124, (-(-outputs // 128), inputs // 128), dtype=torch.uint8, device=DEVICE)
    return Fp8Matrix(data, scale)


def as_weight(w: Fp8Matrix) -> Weight:
    return Weight(w.data.cpu(), w.scale.cpu(), "fp8", round_activations=True)


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(BF16)


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want.cpu().double()).norm() / want.double().norm().clamp_min(1e-30))


# Rounding a result to bf16 gives 1.7e-3 (the interpreter cuts off: 3.7e-3); the tensor cores' sums of FP8 keep about 14
# bits (1.3e-4 seen).
LIMIT = {BF16: 2.5e-3 if DEVICE == "cuda" else 5e-3, torch.float32: 4e-4}


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(0, 64, 128), (1, 200, 384), (63, 128, 256), (70, 320, 128)])
def test_fp8(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, w = activations(tokens, inputs), fp8_matrix(outputs, inputs)
    got = fp8_linear(x, w, poison(tokens, outputs, dtype=dtype))
    assert error(got, linear(x.cpu().double(), as_weight(w))) < LIMIT[dtype]
    assert torch.equal(fp8_linear(round_activations(x), w, dtype=dtype), got)


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(0, 8, 128), (1, 10, 256), (65, 72, 128)])
def test_plain(tokens: int, outputs: int, inputs: int) -> None:
    x, w = activations(tokens, inputs), activations(outputs, inputs)
    got = plain_linear(x, w, poison(tokens, outputs, dtype=torch.float32))
    assert error(got, x.cpu().double() @ w.cpu().double().T) < 1e-5
    assert error(plain_linear(x, w, dtype=BF16), got) < LIMIT[BF16]


def test_float32_weights_in_parts() -> None:
    x, w = activations(5, 256), torch.randn(70, 256, device=DEVICE)
    parts = split_float32(w)
    assert torch.equal(parts.double().sum(0), w.double())
    got = plain_linear(x, parts, poison(5, 70, dtype=torch.float32))
    assert error(got, x.cpu().double() @ w.cpu().double().T) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "groups", "outputs", "inputs"), [(0, 2, 128, 128), (3, 2, 128, 256), (66, 3, 256, 128)]
)
def test_grouped(tokens: int, groups: int, outputs: int, inputs: int) -> None:
    x, w = activations(tokens, groups, inputs), fp8_matrix(groups * outputs, inputs)
    got = grouped_linear(x, w, out=poison(tokens, groups * outputs, dtype=BF16))
    if tokens:
        assert error(got, grouped_reference(x.cpu().double(), as_weight(w))) < LIMIT[BF16]
    rounded = grouped_linear(x, w, rounded=True)
    assert torch.equal(rounded.values().to(BF16), round_fp8(got, 128))


def test_expanded_weights_are_exact() -> None:
    w = fp8_matrix(200, 256)
    w.scale[1, 1] = 10  # 2^-117
    assert torch.equal(expanded(w).cpu(), as_weight(w).dequantised(BF16))
    assert torch.equal(expanded(w).cpu().float(), as_weight(w).dequantised(torch.float32))


def test_stacked_weights_give_their_outputs_side_by_side() -> None:
    x, a, b = activations(2, 128), fp8_matrix(256, 128), fp8_matrix(64, 128)
    both = Fp8Matrix(torch.cat([a.data, b.data]), torch.cat([a.scale, b.scale]))
    assert torch.equal(fp8_linear(x, both), torch.cat([fp8_linear(x, a), fp8_linear(x, b)], 1))


def test_other_tokens_change_nothing() -> None:
    """NaN among the neighbours stays there."""
    x, w = round_activations(activations(4, 256)), fp8_matrix(128, 256)
    want = fp8_linear(x, w)
    x.scale[2, 1] = float("nan")
    got = fp8_linear(x, w)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp8_linear(activations(256, 4).T, fp8_matrix(64, 256)), "contiguous"),
        (lambda: plain_linear(activations(4, 256)[:, :128], activations(8, 128)), r"call \.contiguous\(\)"),
        (lambda: plain_linear(activations(4, 256), activations(256, 8).T), "weight contiguous"),
        (lambda: grouped_linear(activations(2, 4, 128).transpose(0, 1), fp8_matrix(256, 128)), "contiguous"),
        (lambda: fp8_linear(activations(4, 256), fp8_matrix(64, 128)), r"agree in I.*\(4, 256\) and \(64, 128\)"),
        (lambda: plain_linear(activations(4, 256).half(), activations(8, 256)), "split_float32"),
        (lambda: fp8_linear(activations(4, 128), fp8_matrix(64, 128), activations(4, 128)), r"\(4, 64\)"),
        (lambda: grouped_linear(activations(4, 2, 128), fp8_matrix(192, 128)), "multiple of 128"),
        (lambda: Fp8Matrix(fp8_matrix(64, 128).data, fp8_matrix(64, 256).scale), r"uint8 \(1, 1\)"),
    ],
)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- the kernels for Hopper ------------------------------------------------------------------------------------------


def test_hopper_kernels_compile() -> None:
    """The interpreter does not know Gluon; its compiler needs no GPU.  (In a process that does not interpret.)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True, timeout=300)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from dsv4_kernels.triton.linear_few import linear_few, widened_few
from dsv4_kernels.triton.linear_many import linear_many
from dsv4_kernels.triton.linear_one import linear_one

def tiles(kind, bits, *shape):
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=len(shape))
    return f"tensordesc<{kind}[{','.join(map(str, shape))}],{layout!r}>"

def compile(kernel, maxnreg, constants, kinds):
    kinds = {"xs_ptr": "*fp32", "ws_ptr": "*u8", "scale_ptr": "*fp32"} | kinds
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in places if name.endswith("_ptr")}
    source = GluonASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
    options = {"num_warps": 4} | ({"maxnreg": maxnreg} if maxnreg else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in compiled.asm["ptx"] and compiled.metadata.shared <= 227 << 10

def fp8(*shape): return tiles("fp8e4nv", 8, *shape)
def bf16(*shape): return tiles("bf16", 16, *shape)

compile(linear_many, None, dict(STAGES=4, FP8=True, ROUND=False, BAND=8),
        dict(x_desc=fp8(128, 128), w_desc=fp8(256, 128), out_desc=bf16(64, 128)))
compile(linear_many, None, dict(STAGES=4, FP8=False, ROUND=True, BAND=8),
        dict(x_desc=bf16(128, 64), w_desc=bf16(256, 64), out_desc=fp8(64, 128)))
compile(linear_few, 128, dict(STAGES=5, FP8=True),
        dict(x_desc=fp8(4, 8, 128), w_desc=fp8(4, 16, 128), out_ptr="*bf16"))
compile(linear_few, 128, dict(STAGES=4, FP8=False),
        dict(x_desc=bf16(4, 8, 64), w_desc=bf16(4, 32, 64), out_ptr="*fp32"))
compile(widened_few, 128, dict(STAGES=4),
        dict(x_desc=bf16(4, 16, 64), w_desc=fp8(2, 64, 128), out_ptr="*bf16"))
compile(linear_one, None, dict(STAGES=2, PARTS=1, KIND="fp8"),
        dict(x_desc=fp8(1, 64, 1, 128), w_desc=fp8(1, 32, 8, 128), out_ptr="*bf16"))
compile(linear_one, None, dict(STAGES=1, PARTS=1, KIND="rounding"),
        dict(x_desc=bf16(2, 64, 1, 64), w_desc=fp8(1, 64, 4, 128), out_ptr="*bf16"))
compile(linear_one, None, dict(STAGES=1, PARTS=3, KIND="bf16"),
        dict(x_desc=bf16(2, 32, 4, 64), w_desc=bf16(2, 32, 4, 64), out_ptr="*fp32"))
compile(linear_one, None, dict(STAGES=1, PARTS=1, KIND="widened"),
        dict(x_desc=bf16(2, 32, 1, 64), w_desc=fp8(1, 32, 8, 128), out_ptr="*bf16"))
"""

FLASH_FP8 = [(1536, 4096), (40960, 1024), (4096, 8192), (4096, 2048), (320, 384)]


SLICES = ((0, 1), (77, 78), (999, 1000), (5, 7), (20, 23), (3, 66), (9, 49), (30, 37), (100, 300))


def hold_alike(product: Callable[[slice], Tensor], portable: Callable[[slice], Tensor], tokens: int) -> Tensor:
    """One token, a few, many: the same bits as among all, and as the portable kernel's; returns all."""
    want = product(slice(0, tokens))
    for first, last in (*SLICES, (0, tokens)):
        assert torch.equal(product(slice(first, last)), want[first:last]), (first, last)
    assert torch.equal(portable(slice(60, 190)), want[60:190])
    return want


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[slice], Tensor]], Callable[[slice], Tensor]]:
    def without(product: Callable[[slice], Tensor]) -> Callable[[slice], Tensor]:
        def run(rows: slice) -> Tensor:
            with monkeypatch.context() as patch:
                patch.setattr(kernel, "is_hopper", lambda device: False)
                return product(rows)

        return run

    return without


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "inputs"), FLASH_FP8)
def test_fp8_has_the_same_bits_for_any_tokens(outputs: int, inputs: int, portable: Callable) -> None:
    x, w = activations(8192, inputs), fp8_matrix(outputs, inputs)

    def product(rows: slice) -> Tensor:
        part = x[rows]
        return fp8_linear(part, w, poison(len(part), outputs, dtype=BF16))

    want = hold_alike(product, portable(product), 8192)
    sample = [0, 77, 4095, 8191]
    assert error(want[sample], linear(x[sample].cpu().double(), as_weight(w))) < LIMIT[BF16]
    full = fp8_linear(x[:200], w, dtype=torch.float32)
    assert torch.equal(fp8_linear(x[:1], w, dtype=torch.float32), full[:1])
    assert torch.equal(full.to(BF16), want[:200])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("outputs", "inputs", "parts"), [(2624, 4096, 1), (256, 4096, 3), (130, 7168, 1), (1000, 384, 1)]
)
def test_plain_has_the_same_bits_for_any_tokens(outputs: int, inputs: int, parts: int, portable: Callable) -> None:
    x, w32 = activations(1000, inputs), torch.randn(outputs, inputs, device=DEVICE)
    w = split_float32(w32) if parts == 3 else w32.to(BF16)

    def product(rows: slice) -> Tensor:
        part = x[rows]
        return plain_linear(part, w, poison(len(part), outputs, dtype=torch.float32))

    want = hold_alike(product, portable(product), 1000)
    exact = w32 if parts == 3 else w
    assert error(want, x.double() @ exact.double().T) < 5e-5
    assert torch.equal(plain_linear(x, w, dtype=BF16), want.to(BF16))


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "outputs", "inputs"), [(8, 1024, 4096), (4, 128, 512), (16, 1024, 4096)])
def test_grouped_has_the_same_bits_for_any_tokens(groups: int, outputs: int, inputs: int, portable: Callable) -> None:
    x, w = activations(1000, groups, inputs), fp8_matrix(groups * outputs, inputs)

    def product(rows: slice) -> Tensor:
        part = x[rows]
        return grouped_linear(part, w, poison(len(part), groups * outputs, dtype=BF16))

    want = hold_alike(product, portable(product), 1000)
    sample = [0, 63, 999]
    assert error(want[sample], grouped_reference(x[sample].cpu().double(), as_weight(w))) < LIMIT[BF16]
    for tokens in (1, 65, 1000):
        out = Rounded.empty(tokens, groups * outputs, DEVICE)
        out.data.view(torch.uint8).fill_(0x7F)
        out.scale.fill_(float("nan"))
        rounded = grouped_linear(x[:tokens], w, rounded=True, out=out)
        expected = round_activations(want[:tokens])
        assert torch.equal(rounded.scale, expected.scale)
        assert torch.equal(rounded.data.view(torch.uint8), expected.data.view(torch.uint8))


@pytest.mark.gpu
def test_kernels_wait_for_what_they_read_and_repeat_in_a_graph() -> None:
    """A chain of products, each reading the one before, in one graph: early starts must not read too early."""
    x, w = activations(1, 4096), [fp8_matrix(4096, 4096) for _ in range(8)]
    g = fp8_matrix(8192, 4096)

    def chain() -> Tensor:
        y = x
        for matrix in w:
            y = fp8_linear(y, matrix)
            y = y / y.float().std()
            z = grouped_linear(y.to(BF16).repeat(1, 8).view(1, 8, 4096), g)
            y = (y + z[:, :4096] / 1000).to(BF16)
        return y

    want = chain()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = chain()
    for _ in range(20):
        got.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)
