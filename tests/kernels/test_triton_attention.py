"""Sparse attention from packed rows, against float64 query by query; in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.triton import attention as kernel
from dsv4_kernels.triton.attention import sparse_attention
from dsv4_kernels.triton.rows import WindowRows, segment_table
from support.sparse_case import SparseCase, decode_case, prefill_case

# The interpreter cuts bf16 off where a GPU rounds, so outputs are float32 there; in bf16 they alone are off by 1.7e-3.
OUT, RELATIVE_RMS = (torch.float32, 4e-4) if DEVICE == "cpu" else (torch.bfloat16, 2e-3)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values


def run(case: SparseCase, queries: slice = slice(None)) -> torch.Tensor:
    q = case.q[queries].contiguous()
    entries = case.entries
    if entries is not None:
        table = entries.segments[queries] if entries.segments.shape[0] > 1 else entries.segments
        selected = None if entries.selected_SK is None else entries.selected_SK[queries].contiguous()
        entries = type(entries)(table, entries.ratio, entries.most, selected)
    window_rows = WindowRows(case.window_rows.block, case.window_rows.base_S[queries], case.window_rows.ring)
    out = torch.full(q.shape, float("nan"), dtype=OUT, device=q.device)
    position, phases = case.position[queries].contiguous(), case.phases[queries].contiguous()
    got = sparse_attention(q, position, window_rows, entries, case.sink, phases, case.window, out)
    assert got is out
    return out


def check(case: SparseCase, sample: int = 10**9) -> None:
    got = run(case)
    assert not got.isnan().any()
    queries = range(0, got.shape[0], max(1, got.shape[0] // sample))
    for t in queries:
        want = case.reference(t)
        assert ((got[t].double() - want).norm() / want.norm()).item() < RELATIVE_RMS, f"query {t}"


@pytest.fixture(autouse=True)
def short_chains(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Chains of two tiles, so that small cases have several."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(kernel, "CHAIN", 128)


@pytest.mark.parametrize(
    ("first", "queries", "ratio", "chosen"),
    [
        (0, 3, 0, None),  # a window that is not full
        (130, 2, 0, None),
        (126, 4, 128, None),  # the first block of 128 closes within the chunk
        (1, 4, 4, None),  # no entry, then one
        (1201, 2, 4, None),  # three chains
        (1398, 3, 4, 70),
        (40, 3, 4, 70),  # fewer entries than are chosen
    ],
)
def test_prefill(first: int, queries: int, ratio: int, chosen: int | None) -> None:
    check(prefill_case(first, queries, 4, 128, ratio, chosen, DEVICE))


@pytest.mark.parametrize(("ratio", "chosen"), [(4, 40), (4, None)])
def test_decoding_several_sequences(ratio: int, chosen: int | None) -> None:
    check(decode_case([700, 5, 64], 17, 192, ratio, chosen, DEVICE, window=40))


def test_no_queries() -> None:
    assert run(prefill_case(64, 0, 4, 128, 4, 16, DEVICE)).shape == (0, 4, 128)


def test_bits_do_not_depend_on_the_neighbours() -> None:
    case = prefill_case(1100, 3, 4, 128, 4, None, DEVICE)
    together = run(case)
    for t in range(3):
        assert torch.equal(run(case, slice(t, t + 1))[0], together[t])


def test_chains_summed_apart_are_added_up() -> None:
    queries, heads, chains, channels = 2, 3, 4, 128
    device = DEVICE
    partial = torch.randn(queries, heads, chains, channels, device=device)
    stats = torch.rand(queries, heads, chains, 2, device=device) * 3
    position = torch.tensor([2 * kernel.CHAIN, kernel.CHAIN // 2], device=device)  # of ratio 1: three chains and one
    sink = torch.randn(heads, device=device)
    phases = torch.ones(queries, 32, dtype=torch.complex64, device=device)
    out = torch.full((queries, heads, channels), float("nan"), device=device)
    kernel._add_chains[(queries, heads)](
        partial, stats, out, sink, torch.view_as_real(phases), position, 1, heads, chains, channels, kernel.CHAIN
    )
    for t, used in enumerate((3, 1)):
        top, weight = stats[t, :, :used].double().unbind(-1)
        share = top.sub(10).exp2()
        want = (partial[t, :, :used] * share[..., None]).sum(1)
        want /= ((weight * share).sum(1) + (sink.double() / torch.tensor(2.0).log() - 10).exp2())[:, None]
        torch.testing.assert_close(out[t].double(), want, rtol=1e-5, atol=1e-5)


def test_refusals_name_the_alternative() -> None:
    case = prefill_case(3, 2, 4, 128, 0, None, DEVICE)
    with pytest.raises(ValueError, match="kv_dtype='mixed'"):
        floats = WindowRows(torch.zeros(9 * 128), case.window_rows.base_S)
        sparse_attention(case.q, case.position, floats, None, case.sink, case.phases)
    with pytest.raises(ValueError, match="device='cpu'"):
        sparse_attention(case.q[..., :64], case.position, case.window_rows, None, case.sink, case.phases)
    with pytest.raises(ValueError, match="segment 1 has shape"):
        segment_table([torch.zeros(n * 584, dtype=torch.uint8) for n in (2048, 3, 2048)])


# ---- the kernel for 64 x 512 on Hopper -------------------------------------------------------------------------------


def test_hopper_kernels_compile() -> None:
    """The interpreter does not know Gluon; its compiler needs no GPU.  (In a process that does not interpret.)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True, timeout=300)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from dsv4_kernels.triton.attention_few import score_keys, sum_values
from dsv4_kernels.triton.attention_hopper import attention_hopper

kinds = {"q": "*bf16", "out": "*bf16", "window": "*u8", "selected": "*i32"}
kinds |= {"base": "*i64", "segments": "*i64", "position": "*i64"}
for kernel, warps, constants in (
    (attention_hopper, 8, {"GATHER": True, "SPLIT": False, "PARTS": 8, "CHAIN": 2048}),
    (score_keys, 4, {"GATHER": True, "HEADS": 32}),
    (sum_values, 4, {"GATHER": True, "SPLIT": False, "BATCH": 5, "CHAIN": 2048}),
):
    signature = {name: kinds.get(name[:-4], "*fp32") if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= {"scale": "fp32"} | {name: "constexpr" for name in constants}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in places if name.endswith("_ptr")}
    source = GluonASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert "wgmma.mma_async" in compiled.asm["ptx"] and compiled.metadata.shared <= 227 << 10
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("first", "queries", "heads", "ratio", "chosen"),
    [
        (0, 63, 64, 0, None),
        (0, 1000, 64, 4, 512),
        (1_000_003, 1000, 64, 4, 512),  # rows beyond 2^31 bytes, chunk ends within a block
        (5001, 300, 128, 4, 1024),
        (100, 1000, 64, 128, None),
        (1_040_000, 500, 64, 128, None),  # four chains in one program
        (524_400, 40, 64, 128, None),  # two and three chains, as programs of their own
        (9000, 1, 64, 4, 512),
    ],
)
def test_hopper_prefill(first: int, queries: int, heads: int, ratio: int, chosen: int | None) -> None:
    check(prefill_case(first, queries, heads, 512, ratio, chosen, "cuda"), sample=12)


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "chosen"), [(4, 512), (128, None), (0, None)])
@pytest.mark.parametrize("batch", [1, 7, 40, 200])
def test_hopper_decoding(batch: int, ratio: int, chosen: int | None) -> None:
    longest = 1_048_575 if batch < 10 else 200_000
    positions = [longest, 77, 128, 131_071 * 3 // 2, 20_000, 3, 131_071]
    positions = [min(positions[i % 7] + i // 7, longest) for i in range(batch)]
    check(decode_case(positions, 64, 512, ratio, chosen, "cuda"), sample=20)


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "chosen"), [(4, 512), (128, None)])
def test_hopper_bits_do_not_depend_on_batch_or_chunk(ratio: int, chosen: int | None) -> None:
    case = prefill_case(1_000_000, 300, 64, 512, ratio, chosen, "cuda")
    together = run(case)
    assert torch.equal(run(case), together)
    for part in (slice(0, 1), slice(7, 9), slice(20, 50), slice(99, 170), slice(2, 280)):
        assert torch.equal(run(case, part), together[part])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("positions", "heads", "ratio", "chosen"),
    [
        ([0, 1, 62, 63, 64, 65, 126, 127], 64, 0, None),
        ([0, 2, 3, 251, 255, 259, 507, 511], 64, 4, 512),  # no entry, 1, 63, 64, 65, 127, 128
        ([515, 2046, 2047, 77, 1_048_575, 4099, 20_000, 128], 64, 4, 512),
        ([1_048_575, 40_003], 128, 4, 1024),
        ([126, 127, 128 * 64 - 1, 128 * 65 - 1, 128 * 128 - 1, 128 * 129 - 1, 128 * 500, 131_071], 64, 128, None),
        ([1_048_575, 128 * 2049 - 1], 64, 128, None),  # four chains and one; one chain and an entry
        ([128 * 4161, 77], 64, 128, None),
    ],
)
def test_hopper_bits_do_not_depend_on_the_kernel(
    positions: list[int], heads: int, ratio: int, chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is faster for few queries gives the bits of the kernel for many."""
    case = decode_case(positions, heads, 512, ratio, chosen, "cuda")
    most = case.entries.most if case.entries is not None else 0
    assert kernel.plan(case.q.device, len(positions), heads, 512, 128, min(most, chosen or most)).kernel == "few"
    few = [run(case) for _ in range(3)]
    monkeypatch.setattr(kernel, "plan", lambda *_: kernel.Plan("hopper"))
    many = run(case)
    assert not many.isnan().any() and all(torch.equal(each, many) for each in few)
