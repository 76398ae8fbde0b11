"""Routing, grouping and packed experts against the torch reference; in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.linear import Weight
from dsv4_kernels.moe import route as reference_route
from dsv4_kernels.rounding import round_fp8
from dsv4_kernels.triton.moe import (
    ExpertPool,
    Way,
    check_pool,
    down,
    gate_up,
    gathered,
    reorder,
    route,
    routed_experts,
    swiglu_round,
    way_for,
)
from dsv4_kernels.triton.moe_route import group
from dsv4_kernels.triton.rounded import Rounded, round_activations

RELATIVE_RMS = 5e-3  # of the second product; rounding to bf16 alone gives 1.7e-3 (the interpreter cuts off: twice that)
# The tensor cores sum FP8 to about 14 bits, so a value between the products that lies between two e4m3 codes may take
# the other one, up to an eighth away; near zero they are exact relative to their block's largest.
CODE_APART, NEAR_ZERO, OTHER_CODES = 0.13, 1e-2, 0.15
LIMIT = 10.0


def fresh_pool(experts: int, inputs: int, hidden: int, fp8: bool = False, spread: int = 11) -> ExpertPool:
    """Random experts in slots that are not their numbers; one slot stays free and holds what no product may read."""
    slots = experts + 1
    order = torch.randperm(slots, device=DEVICE)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=DEVICE)

    if fp8:
        codes = [
            torch.randn(slots, *s, device=DEVICE).to(torch.float8_e4m3fn)
            for s in ((2 * hidden, inputs), (inputs, hidden))
        ]
        s13, s2 = (
            random(114, 122, slots, 2 * hidden // 128, inputs // 128),
            random(114, 122, slots, inputs // 128, hidden // 128),
        )
        pool = ExpertPool(codes[0], s13, codes[1], s2, order[:experts].int())
        pool.w13.view(torch.uint8)[order[-1]] = pool.w2.view(torch.uint8)[order[-1]] = 0x7F  # NaN
        return pool
    w13, w2 = random(0, 256, slots, 2 * hidden, inputs // 2), random(0, 256, slots, inputs, hidden // 2)
    s13, s2 = (random(124 - spread, 125, slots, *s) for s in ((2 * hidden, inputs // 32), (inputs, hidden // 32)))
    s13[order[-1]] = s2[order[-1]] = 254
    return ExpertPool(w13, s13, w2, s2, order[:experts].int())


def matrices(pool: ExpertPool, expert: int) -> tuple[Tensor, Tensor]:
    """One expert's gate and up rows, and its w2: float64."""
    slot, fmt = int(pool.slot_of_expert[expert]), "fp8" if pool.fp8 else "fp4"
    w13 = Weight(pool.w13[slot], pool.s13[slot], fmt).dequantised(torch.float32).double()
    return w13, Weight(pool.w2[slot], pool.s2[slot], fmt).dequantised(torch.float32).double()


def between(way: Way, hidden: tuple[Tensor, Tensor | None]) -> Tensor:
    """The values between the products that the second one reads, by pair: float32 [P, I]."""
    data, scale = hidden
    if scale is None:
        return round_fp8(data, 128)
    assert way.groups is not None
    blocks = data.float().unflatten(-1, (-1, 128))
    if way.kernels == "many":
        blocks = blocks.unflatten(-1, (4, 2, 4, 4)).permute(0, 1, 4, 2, 5, 3).reshape(blocks.shape)
        by_tile, counts = scale.transpose(1, 2), way.groups.tiles[:, 2].tolist()
        scale = torch.cat([by_tile[tile, :count] for tile, count in enumerate(counts)])
    return (blocks * scale[..., None]).flatten(1)[way.groups.order.argsort()]


def draw(
    tokens: int, pool: ExpertPool, topk: int, chosen: Callable[[Tensor], Tensor] | None = None
) -> tuple[Rounded, Tensor, Tensor]:
    x = round_activations(torch.randn(tokens, pool.inputs, device=DEVICE) * 0.4)
    picks = torch.rand(tokens, pool.experts, device=DEVICE).topk(topk, -1).indices.int()
    if chosen is not None:
        picks = chosen(picks)
    return x, picks.contiguous(), torch.rand(tokens, topk, device=DEVICE) + 0.2


def run(x: Rounded, picks: Tensor, weights: Tensor, pool: ExpertPool, tokens: slice = slice(None)) -> Tensor:
    part = Rounded(x.data[tokens].contiguous(), x.scale[tokens].contiguous())
    return routed_experts(part, picks[tokens].contiguous(), weights[tokens].contiguous(), pool, LIMIT)


def check(pool: ExpertPool, x: Rounded, picks: Tensor, weights: Tensor, sample: int = 10**9) -> Tensor:
    """Both products of sampled pairs, each of its own inputs, against float64."""
    got = run(x, picks, weights, pool)
    assert got.shape == (*picks.shape, pool.inputs) and not got.isnan().any()
    way = way_for(picks, pool)
    hidden = gate_up(way, x, picks, weights, pool, LIMIT)
    values = between(way, hidden).view(*picks.shape, pool.hidden)
    assert torch.equal(down(way, hidden, picks, pool, torch.empty_like(got)), got)
    for t in range(0, picks.shape[0], max(1, picks.shape[0] // sample)):
        for k in {0, picks.shape[1] - 1}:
            w13, w2 = matrices(pool, int(picks[t, k]))
            gate, up = (w13 @ x.values()[t].double()).chunk(2)
            exact = F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT) * weights[t, k]
            codes = round_fp8(exact.float(), 128)
            largest = codes.abs().view(-1, 128).amax(1, keepdim=True).expand(-1, 128).flatten()
            apart = (values[t, k] - codes).abs()
            assert (apart <= CODE_APART * codes.abs() + NEAR_ZERO * largest).all(), f"token {t}, choice {k}: first"
            assert apart.gt(0).float().mean() < OTHER_CODES, f"token {t}, choice {k}: first"
            want = w2 @ values[t, k].double()
            error = ((got[t, k].double() - want).norm() / want.norm()).item()
            assert error < RELATIVE_RMS, f"token {t}, choice {k}: second off by {error:.1e}"
    return got


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels' own allocations hold is NaN, or, as integers, far outside of every table."""

    def poison(made: Tensor) -> Tensor:
        if made.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).fill_(0x7F)
        elif made.dtype.is_floating_point:
            made.fill_(float("nan"))
        elif made.dtype in (torch.int32, torch.int64):
            made.fill_(2**30)
        return made

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: poison(empty(*size, **kind)))
    monkeypatch.setattr(torch, "empty_like", lambda *like, **kind: poison(empty_like(*like, **kind)))


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 12, 2), (63, 12, 2), (5, 256, 6)])
@pytest.mark.parametrize("normalise", [True, False])
def test_route(tokens: int, experts: int, topk: int, normalise: bool) -> None:
    logits, bias = torch.randn(tokens, experts, device=DEVICE) * 8, torch.randn(experts, device=DEVICE)
    chosen, weights = route(logits, topk, 1.5, normalise, bias)
    unit = torch.eye(experts, device=DEVICE)
    want, want_weights = reference_route(logits, unit, topk=topk, scaling=1.5, normalise=normalise, bias_E=bias)
    assert torch.equal(chosen.long(), want)
    torch.testing.assert_close(weights, want_weights, rtol=2e-6, atol=0)
    table = torch.randint(0, experts, (50, topk), dtype=torch.int64, device=DEVICE)
    ids = torch.randint(0, 50, (tokens,), device=DEVICE)
    chosen, weights = route(logits, topk, 2.5, normalise, table=table, token_ids=ids)
    _, want_weights = reference_route(logits, unit, topk=topk, scaling=2.5, normalise=normalise, chosen_SK=table[ids])
    assert torch.equal(chosen.long(), table[ids])
    torch.testing.assert_close(weights, want_weights, rtol=2e-6, atol=0)


def test_route_extremes() -> None:
    """Scores far below 1 keep their precision; equal ones go to the lower expert, the better one first."""
    logits = torch.tensor([[-80.0, -60.0, -60.0, 3.0, 90.0, -60.0]], device=DEVICE)
    chosen, weights = route(logits, 5, 1.0, False)
    assert chosen.tolist() == [[4, 3, 1, 2, 5]]
    want = F.softplus(logits.double(), threshold=1000).sqrt().gather(1, chosen.long())
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=0)
    assert route(torch.zeros(0, 6, device=DEVICE), 2, 1.0, True)[0].shape == (0, 2)


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 12, 2), (63, 40, 3), (85, 256, 6), (250, 5, 3)])
def test_group(tokens: int, experts: int, topk: int, size: int) -> None:
    chosen = torch.rand(tokens, experts, device=DEVICE).topk(topk, -1).indices.int()
    groups = group(chosen, experts, size)
    assert torch.equal(groups.order.long(), chosen.flatten().argsort(stable=True))
    want, first = [], 0
    for expert, count in enumerate(torch.bincount(chosen.flatten(), minlength=experts).tolist()):
        want += [[expert, first + at, min(size, count - at)] for at in range(0, count, size)]
        first += count
    assert groups.tiles[: len(want)].tolist() == want
    assert not groups.tiles[len(want) :, 2].any()


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_reorder(blocks: int) -> None:
    x = round_activations(torch.randn(11, 128 * blocks, device=DEVICE))
    got = reorder(x)
    place = torch.arange(128, device=DEVICE)  # 32c + 16h + 4q + j holds input 32q + 8c + 2j + h
    source = place // 4 % 4 * 32 + place // 32 * 8 + place % 4 * 2 + place // 16 % 2
    want = x.data.view(torch.uint8).view(-1, blocks, 128)[..., source]
    assert torch.equal(got.data.view(torch.uint8).view(-1, blocks, 128), want) and got.scale is x.scale


@pytest.mark.parametrize(("tokens", "experts", "inputs", "size"), [(63, 5, 384, 32), (20, 7, 128, 16)])
def test_gathered(tokens: int, experts: int, inputs: int, size: int) -> None:
    x = round_activations(torch.randn(tokens, inputs, device=DEVICE))
    groups = group(torch.rand(tokens, experts, device=DEVICE).topk(2, -1).indices.int(), experts, size)
    data, scale = gathered(x, groups, 2)
    rows = groups.order.long() // 2
    assert torch.equal(data.view(torch.uint8), reorder(x).data.view(torch.uint8)[rows])
    for tile, (_, first, count) in enumerate(groups.tiles.tolist()):
        assert torch.equal(scale[tile, :, :count].T, x.scale[rows[first : first + count]])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_experts(tokens: int, fp8: bool) -> None:
    check(pool := fresh_pool(4, 256, 128, fp8), *draw(tokens, pool, 2))


def test_slots_change_between_calls() -> None:
    pool = fresh_pool(3, 128, 128)
    x, picks, weights = draw(2, pool, 2)
    before = check(pool, x, picks, weights)
    free = ({0, 1, 2, 3} - set(pool.slot_of_expert.tolist())).pop()
    expert = int(picks[0, 0])
    slot = int(pool.slot_of_expert[expert])
    for tensor in (pool.w13, pool.s13, pool.w2, pool.s2):
        tensor[free] = tensor[slot]
        tensor[slot] = 255
    pool.slot_of_expert[expert] = free
    assert torch.equal(run(x, picks, weights, pool), before)


def test_all_on_one_expert_and_none() -> None:
    pool = fresh_pool(4, 128, 128)
    x, picks, weights = draw(19, pool, 1, torch.zeros_like)  # two tiles of 16
    check(pool, x, picks, weights, sample=3)
    x, picks, weights = draw(0, pool, 2)
    assert run(x, picks, weights, pool).shape == (0, 2, 128)


def test_bits_do_not_depend_on_the_neighbours() -> None:
    pool = fresh_pool(3, 128, 128)
    x, picks, weights = draw(70, pool, 2)
    together = run(x, picks, weights, pool)
    for part in (slice(0, 1), slice(3, 20)):
        assert torch.equal(run(x, picks, weights, pool, part), together[part])


def test_nan_shows_and_stays_with_its_token() -> None:
    pool = fresh_pool(3, 128, 128)
    x, picks, weights = draw(3, pool, 2)
    x.scale[1] = float("nan")
    got = run(x, picks, weights, pool)
    assert got[0].isfinite().all() and got[2].isfinite().all()
    if DEVICE == "cuda":  # the interpreter reads e4m3's NaN as 480
        assert got[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_swiglu_round(tokens: int, dtype: torch.dtype) -> None:
    y = (torch.randn(tokens, 768, device=DEVICE) * 8).to(dtype)
    got = swiglu_round(y, LIMIT).values()
    gate, up = y.float().chunk(2, -1)
    want = round_fp8(F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT), 128)
    assert got.shape == want.shape
    # The last bit of exp decides some ties: those values differ by one step, one part in eight.
    assert (got - want).abs().gt(0.13 * want.abs()).sum() == 0 and (got != want).float().mean().nan_to_num() < 0.01


def test_check_pool_names_the_tensor() -> None:
    pool = fresh_pool(3, 128, 128)
    check_pool(pool, "layer 7")
    slot = int(pool.slot_of_expert[0])
    pool.s13[int(({0, 1, 2, 3} - set(pool.slot_of_expert.tolist())).pop())] = 120
    pool.s2[slot, 5] = torch.tensor([120, 120, 105, 120])
    with pytest.raises(ValueError, match=f"layer 7, expert in slot {slot}, w2"):
        check_pool(pool, "layer 7")
    pool.w2[slot, 5, 32:48] &= 0x88  # zeros, whatever their scale
    check_pool(pool, "layer 7")


def test_spread_scales_are_exact() -> None:
    """Codes 2^14 below their row's largest scale take part with their exact value."""
    pool = fresh_pool(1, 128, 128)
    slot = int(pool.slot_of_expert[0])
    pool.s2[slot, :] = torch.tensor([124, 110, 112, 113])
    pool.w2[slot, :, :16] = 0  # the largest scale stands over zeros
    check(pool, *draw(2, pool, 1))


def test_refusals_name_the_alternative() -> None:
    pool = fresh_pool(3, 128, 128)
    with pytest.raises(ValueError, match="device='cpu'"):
        ExpertPool(
            pool.w13[..., :48].contiguous(), pool.s13, pool.w2[:, :96].contiguous(), pool.s2, pool.slot_of_expert
        )
    with pytest.raises(ValueError, match="s13 must be"):
        ExpertPool(pool.w13, pool.s13[..., :2], pool.w2, pool.s2, pool.slot_of_expert)
    x, picks, weights = draw(2, pool, 2)
    with pytest.raises(ValueError, match="int32"):
        routed_experts(x, picks.long(), weights, pool, LIMIT)


def test_hopper_kernels_compile_to_its_tensor_core_instructions() -> None:
    """The interpreter cannot run Gluon, so without a GPU this is all that can be seen."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from dsv4_kernels.triton import moe_few, moe_many

kinds = {"x_scale": "*fp32", "weights": "*fp32", "w": "*u8", "s": "*u8", "table": "*i64", "out_scale": "*fp32"}
kinds |= {"x": "*fp8e4nv", "limit": "fp32"}
few = {"INPUTS": 256, "K": 6, "BLOCKS": 2, "BURST": 2, "HALVES": 1}
few |= {"GATED": True, "ROUNDED": True, "SORTED": True, "FP8": False}
many = {"PIECES": 2, "COUNT": 4, "WIDE": 2, "STAGES": 2, "HALVES": 1, "WGS": 2, "SIDE": 2}
many |= {"GATED": False, "FP8": False}
swizzled, plain = gl.NVMMASharedLayout(128, 8, rank=2), gl.NVMMASharedLayout(0, 32, rank=2)
kinds |= {"x_desc": f"tensordesc<fp8e4nv[64, 128],{swizzled!r}>", "w_desc": f"tensordesc<u8[64, 128],{swizzled!r}>"}
kinds |= {"scale_desc": f"tensordesc<fp32[1, 128],{plain!r}>"}
for kernel, constants, out, warps, instruction in (
    (moe_few.few, few, "*fp32", 4, "m64n8k32"),
    (moe_many.many, many, "*bf16", 4, "m64n64k32"),
):
    def kind(name):
        if name in constants:
            return "constexpr"
        plain = name.removesuffix("_ptr")
        return out if plain == "out" else kinds.get(plain, "*i32" if plain != name else "i32")
    names = kernel.arg_names
    places = {name: (place,) for place, name in enumerate(names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in names if name.endswith("_ptr")}
    constexprs = {places[name]: value for name, value in constants.items()}
    source = GluonASTSource(kernel, {name: kind(name) for name in names}, constexprs, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert f"wgmma.mma_async.sync.aligned.{instruction}.f32.e4m3.e4m3" in compiled.asm["ptx"], instruction
    assert compiled.metadata.shared <= 227 << 10
    # Two barriers a stage: the memory of one that nobody waits for is used for other things, which must not be.
    if kernel is moe_many.many:
        assert compiled.asm["ptx"].count("mbarrier.init") == 2 * many["STAGES"]
"""


FLASH = {"experts": 256, "inputs": 4096, "hidden": 2048}


@pytest.fixture(scope="module")
def flash_pool() -> ExpertPool:
    return fresh_pool(**FLASH)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 63, 300, 1000, 8192])
def test_flash(tokens: int, flash_pool: ExpertPool) -> None:
    check(flash_pool, *draw(tokens, flash_pool, 6), sample=5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [40, 3000])
def test_flash_all_tokens_on_the_same_experts(tokens: int, flash_pool: ExpertPool) -> None:
    check(flash_pool, *draw(tokens, flash_pool, 6, lambda picks: picks[:1].expand_as(picks)), sample=5)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("inputs", "hidden", "experts"), [(7168, 3072, 12), (256, 128, 12), (128, 384, 12), (384, 256, 12)]
)
@pytest.mark.parametrize("tokens", [1, 9, 200, 1000])
def test_other_shapes(inputs: int, hidden: int, experts: int, tokens: int, fp8: bool) -> None:
    check(pool := fresh_pool(experts, inputs, hidden, fp8), *draw(tokens, pool, 2), sample=5)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_flash_bits_do_not_depend_on_the_chunk(fp8: bool, flash_pool: ExpertPool) -> None:
    pool = fresh_pool(256, 4096, 2048, True) if fp8 else flash_pool
    x, picks, weights = draw(8192, pool, 6)
    together = run(x, picks, weights, pool)
    assert torch.equal(run(x, picks, weights, pool), together)
    for part in (slice(0, 1), slice(77, 78), slice(100, 164), slice(300, 600), slice(1000, 2024), slice(8000, 8192)):
        assert torch.equal(run(x, picks, weights, pool, part), together[part]), part


BUSY = """
import torch
x = torch.zeros(1 << 20, device="cuda")
print("busy", flush=True)
while True:
    for _ in range(100):
        x.add_(1)
    torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize(("fp8", "tokens"), [(False, 1500), (True, 8192)])
def test_bits_while_other_processes_use_the_gpu(fp8: bool, tokens: int) -> None:
    """Programs are then stopped and resumed anywhere in a kernel."""
    pool = fresh_pool(64, 4096, 2048, fp8)
    x, picks, weights = draw(tokens, pool, 6)
    want = run(x, picks, weights, pool)
    with ExitStack() as stack:
        for _ in range(4):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE))
            stack.callback(other.kill)
            assert other.stdout is not None and other.stdout.readline() == b"busy\n"
        other_bits = sum(not torch.equal(run(x, picks, weights, pool), want) for _ in range(500))
    assert not other_bits


@pytest.mark.gpu
def test_flash_in_a_graph(flash_pool: ExpertPool) -> None:
    """A captured call follows new tokens, choices and slots."""
    x, picks, weights = draw(1, flash_pool, 6)
    run(x, picks, weights, flash_pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routed_experts(x, picks, weights, flash_pool, LIMIT)
    fresh = draw(1, flash_pool, 6)
    x.data.copy_(fresh[0].data), x.scale.copy_(fresh[0].scale), picks.copy_(fresh[1]), weights.copy_(fresh[2])
    graph.replay()
    assert torch.equal(out, run(x, picks, weights, flash_pool))
