"""The choice for one query with many keys against the exact one and against the other way; see test_triton_index.py."""

import os
import subprocess
import sys

import pytest
import torch

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.rounding import round_fp4
from dsv4_kernels.triton import index as kernel
from dsv4_kernels.triton import index_far as far
from dsv4_kernels.triton.index import choose_entries, fold_queries
from support.index_case import IndexCase, grid_values, index_case
from support.streams_case import poisoned

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values
SMALL = {
    "MOST_UNITS": 128, "MOST_KEYS": 1 << 20, "UNITS": 4, "OTHERS": 16, "CANDIDATES": 4, "BLOCK": 16, "PROGRAMS": 3,
    "KEYS": 32, "TILES": 2,
}  # fmt: skip


def choose(case: IndexCase, topk: int, most: int) -> torch.Tensor:
    q, weights = fold_queries(case.q, case.weights)
    with poisoned():
        return choose_entries(q, weights, case.position, case.segments, 4, most, topk)


def both_ways(case: IndexCase, topk: int, most: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The entries, once the kernels for few keys and for many have chosen the same."""
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "MOST", 0)
        for name, value in SMALL.items():
            patch.setattr(far, name, value)
        got = choose(case, topk, most)
        patch.setattr(far, "MOST_KEYS", 0)
        assert torch.equal(choose(case, topk, most), got)
    return got[0].long()


@pytest.mark.parametrize(("count", "most"), [(39, 300), (41, 300), (150, 300), (290, 700), (1030, 1030)])
def test_choice(count: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = index_case([4 * count + 2], True, 4, 128, 4, DEVICE)
    assert torch.equal(both_ways(case, 40, most, monkeypatch), case.choice(0, 40))
    case.q, case.weights = round_fp4(torch.randn_like(case.q)), torch.randn_like(case.weights)
    both_ways(case, 40, most, monkeypatch)


@pytest.mark.parametrize("positive", [True, False])
def test_equal_scores_go_to_the_lower_entry(positive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = grid_values(1, 128, device=DEVICE).expand(280, -1)
    case = index_case([4 * 280 - 1], True, 2, 128, 4, DEVICE, keys)
    case.weights[:] = 1.0 if positive else -1.0
    assert torch.equal(both_ways(case, 40, 280, monkeypatch), torch.arange(40, device=DEVICE))


def test_best_side_by_side_and_scales_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key's four scales lie up to 2^20 apart, also where codes become subnormal."""
    apart = torch.exp2(-5.0 * torch.arange(4, device=DEVICE)).repeat_interleave(32)
    keys = torch.randn(530, 128, device=DEVICE) * apart
    keys[200:260] *= 8
    keys = keys * torch.exp2(torch.randint(-3, 4, (530, 1), device=DEVICE).float())
    case = index_case([4 * 530 - 1], True, 3, 128, 4, DEVICE, round_fp4(keys))
    both_ways(case, 40, 530, monkeypatch)


def test_halved_magnitudes() -> None:
    """Subtracting is what the table says, up to the first that becomes subnormal."""
    table = kernel._code_values(torch.device("cpu")).tolist()
    for halvings in range(far._EXACT.value + 1):
        assert table[halvings] == far._TABLE.value - halvings * far._STEP.value
    assert table[12] != far._TABLE.value - 12 * far._STEP.value


def test_the_hopper_kernel_compiles() -> None:
    """The interpreter does not know Gluon; its compiler needs no GPU.  (In a process that does not interpret.)"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from dsv4_kernels.triton.score_far import score_far_hopper as kernel

kinds = {"q": "*fp8e4nv", "segments": "*i64", "values": "*i64", "position": "*i64"}
constants = {"HEADS": 64, "TILES": 2, "UNIT": 128}
places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
def kind(name):
    plain = name.removesuffix("_ptr")
    return "constexpr" if name in constants else "i32" if plain == name else kinds.get(plain, "*fp32")
signature = {name: kind(name) for name in places}
aligned = {places[name]: [["tt.divisibility", 16]] for name in places if name.endswith("_ptr")}
source = GluonASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3" in compiled.asm["ptx"]
"""


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("most", "visible"),
    [(2048, 513), (4096, 4001), (8192, 513), (8192, 8191), (131_072, 100_001), (262_144, 258_003), (262_144, 511)],
)
@pytest.mark.parametrize("apart", [False, True])
def test_flash_shapes(most: int, visible: int, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways choose the same where nothing is exact: the scores have the same bits."""
    keys = torch.randn(visible, 128, device="cuda")
    if apart:
        keys *= torch.exp2(-5.0 * torch.arange(4, device="cuda")).repeat_interleave(32)
        keys *= torch.exp2(torch.randint(-3, 4, (visible, 1), device="cuda").float())
    case = index_case([4 * visible - 1], True, 64, 128, 4, "cuda", round_fp4(keys))
    case.q, case.weights = round_fp4(torch.randn_like(case.q)), torch.randn_like(case.weights)
    for topk in (512, 1024):
        got = choose(case, topk, most)
        with monkeypatch.context() as patch:
            patch.setattr(far, "MOST_KEYS", 0)
            patch.setattr(kernel, "is_hopper", lambda device: False)
            assert torch.equal(choose(case, topk, most), got)
            if most > kernel.MOST:  # the kernel of other GPUs
                patch.setattr(far, "MOST_KEYS", 1 << 18)
                patch.setattr(far, "is_hopper", lambda device: False)
                assert torch.equal(choose(case, topk, most), got)
