"""The experts' products on the GPU at V4-Flash's shapes, against Humming's MXFP4 grouped product where it is installed.

    python -m benchmarks.kernels_moe [TOKENS ...]

256 experts of random FP4 codes and scales, so that no call finds its matrices in the cache; choices change from call
to call.  Outputs are compared first: with float64 on sampled pairs, and with the peer's, whose gate and up values go
through the activation here.  Medians of graph replays; rates count the chosen experts' bytes (share: of 4.26 TB/s) or,
in prefill, the products (share: of 1,302 TFLOP/s).  The peer's times include rounding its tokens, which are grouped
beforehand; ours include grouping (first line), activation and the rounding of its values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import COPY_CEILING, FP8_CEILING, HEADER, Row, peer, replay_ms, report
from dsv4_kernels.linear import Weight
from dsv4_kernels.rounding import round_fp8
from dsv4_kernels.triton import moe
from dsv4_kernels.triton.moe import ExpertPool, route, routed_experts
from dsv4_kernels.triton.moe_route import group
from dsv4_kernels.triton.rounded import Rounded, round_activations

EXPERTS, TOPK, INPUTS, HIDDEN, LIMIT = 256, 6, 4096, 2048, 10.0
# A hidden value near the middle of two e4m3 codes takes the one or the other: that is most of it.
TOLERANCE = 2e-2
# e4m3 rounds to 2.6e-2: the inputs, of which the peer's 4,096 of a token share a scale, and ours the values between.
PEER_TOLERANCE = 0.1
FEW_TOKENS = 512


def random_pool() -> ExpertPool:
    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device="cuda")

    w13, w2 = random(0, 256, EXPERTS, 2 * HIDDEN, INPUTS // 2), random(0, 256, EXPERTS, INPUTS, HIDDEN // 2)
    s13, s2 = random(118, 122, EXPERTS, 2 * HIDDEN, INPUTS // 32), random(118, 122, EXPERTS, INPUTS, HIDDEN // 32)
    return ExpertPool(w13, s13, w2, s2, torch.arange(EXPERTS, dtype=torch.int32, device="cuda"))


def draw(tokens: int) -> list[Tensor]:
    """Choices for as many calls as it takes to go through far more matrices than the cache holds."""
    if tokens * TOPK <= EXPERTS // 2:  # experts differ from call to call
        calls = EXPERTS // (tokens * TOPK)
        experts = torch.randperm(EXPERTS, device="cuda")[: calls * tokens * TOPK]
        return list(experts.int().view(calls, tokens, TOPK))
    return [torch.rand(tokens, EXPERTS, device="cuda").topk(TOPK, -1).indices.int() for _ in range(2)]


def worst_error(pool: ExpertPool, x: Rounded, chosen: Tensor, weights: Tensor, got: Tensor) -> float:
    worst = 0.0
    for t in range(0, len(chosen), max(1, len(chosen) // 4)):
        for k in (0, TOPK - 1):
            slot = int(pool.slot_of_expert[int(chosen[t, k])])
            w13 = Weight(pool.w13[slot], pool.s13[slot], "fp4").dequantised(torch.float32).double()
            w2 = Weight(pool.w2[slot], pool.s2[slot], "fp4").dequantised(torch.float32).double()
            gate, up = (w13 @ x.values()[t].double()).chunk(2)
            hidden = F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT) * weights[t, k]
            want = w2 @ round_fp8(hidden.float(), 128).double()
            worst = max(worst, float((got[t, k].double() - want).norm() / want.norm()))
    return worst


def humming_layer(codes: Tensor, scales: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The peer's grouped product with FP8 activations: (rows bf16 [P, I], first row of every expert) -> bf16 [P, O]."""
    module = peer("humming.layer")
    if module is None:
        return None
    experts, outputs, half = codes.shape
    layer = module.HummingLayer(
        shape_n=outputs, shape_k=2 * half, num_experts=experts, weight_config={"quant_method": "mxfp4"},
        input_config={"dtype": "float8e4m3"}, torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    layer.load_from_tensors({"weight": codes.clone(), "weight_scale": scales.clone()})
    layer.transform()
    return lambda rows, starts: layer(rows, expert_layout=starts, compute_config={"gemm_type": "grouped_contiguous"})


def natural(way: moe.Way, hidden: tuple[Tensor, Tensor | None], order: Tensor) -> Tensor:
    """What `gate_up` left for `down`, in ``order``, the pairs by expert: float32 [P, I]."""
    data, scale = hidden
    if scale is None:  # one token, by pair
        return data[order.long()]
    blocks = data.float().unflatten(-1, (-1, 128))
    if way.kernels == "many" and way.groups is not None:  # inputs in moe_few.py's order, scales by tile
        blocks = blocks.unflatten(-1, (4, 2, 4, 4)).permute(0, 1, 4, 2, 5, 3).reshape(blocks.shape)
        by_tile, counts = scale.transpose(1, 2), way.groups.tiles[:, 2].tolist()
        scale = torch.cat([by_tile[tile, :count] for tile, count in enumerate(counts)])
    return (blocks * scale[..., None]).flatten(1)


def measure(tokens: int, pool: ExpertPool, first_peer: Callable | None, second_peer: Callable | None) -> list[Row]:
    draws = draw(tokens)
    x_bf16 = torch.randn(tokens, INPUTS, device="cuda", dtype=torch.bfloat16) * 0.02
    x = round_activations(x_bf16)
    weights = torch.rand(tokens, TOPK, device="cuda") + 0.2
    out = torch.empty(tokens, TOPK, INPUTS, dtype=torch.bfloat16, device="cuda")
    ways = [moe.way_for(chosen, pool) for chosen in draws]
    used = sum(chosen.unique().numel() for chosen in draws) / len(draws)
    row_bytes = (INPUTS // 2 + INPUTS // 32) * 2 * HIDDEN
    name = f"{tokens} tokens x {TOPK}, {used:.0f} experts"

    got = torch.full_like(out, float("nan"))
    hidden = moe.gate_up(ways[0], x, draws[0], weights, pool, LIMIT)
    moe.down(ways[0], hidden, draws[0], pool, got)
    error = worst_error(pool, x, draws[0], weights, got)
    if got.isnan().any() or not error < TOLERANCE:
        raise SystemExit(f"{name}: off by {error:.1e}")
    if not torch.equal(got, routed_experts(x, draws[0], weights, pool, LIMIT)):
        raise SystemExit(f"{name}: two runs differ")

    def line(what: str, ms: float, bytes_read: float, operations: float, peer_ms: float | None) -> Row:
        if tokens <= FEW_TOKENS:
            rate, share = f"{bytes_read / ms / 1e9:.2f} TB/s", bytes_read / ms * 1e3 / COPY_CEILING
        else:
            rate, share = f"{operations / ms / 1e9:.0f} TFLOP/s", operations / ms * 1e3 / FP8_CEILING
        row = Row(what, name, ms, rate, share, error, peer_ms)
        print(row.line(), flush=True)
        return row

    peer_ms: list[float | None] = [None, None]
    order = [group(chosen, EXPERTS, 8).order for chosen in draws]
    starts = [F.pad(chosen.flatten().bincount(minlength=EXPERTS).cumsum(0), (1, 0)) for chosen in draws]
    if first_peer is not None and second_peer is not None:
        gathered = [x_bf16[o.long() // TOPK] for o in order]
        gate, up = first_peer(gathered[0], starts[0]).float().chunk(2, -1)
        theirs = F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT) * weights.flatten()[order[0].long()][:, None]
        apart = float((natural(ways[0], hidden, order[0]) - theirs).norm() / theirs.norm())
        if not apart < PEER_TOLERANCE:
            raise SystemExit(f"{name}: the peer's hidden values differ by {apart:.1e}")
        theirs = theirs.to(torch.bfloat16)
        apart = float((second_peer(theirs, starts[0]).float() - got.flatten(0, 1)[order[0].long()]).norm() / got.norm())
        if not apart < PEER_TOLERANCE:
            raise SystemExit(f"{name}: the peer's results differ by {apart:.1e}")
        runs = list(zip(gathered, starts, strict=True))
        peer_ms[0] = replay_ms(lambda: [first_peer(*run) for run in runs]) / len(runs)
        peer_ms[1] = replay_ms(lambda: [second_peer(theirs, start) for start in starts]) / len(runs)

    def both(chosen: Tensor) -> object:
        return moe.gate_up(moe.way_for(chosen, pool), round_activations(x_bf16), chosen, weights, pool, LIMIT)

    calls = list(zip(ways, draws, strict=True))
    operations = 2.0 * tokens * TOPK * INPUTS * HIDDEN
    rows = []
    ms = replay_ms(lambda: [both(chosen) for chosen in draws]) / len(draws)
    rows.append(line("rounding, gate and up", ms, used * row_bytes, 2 * operations, peer_ms[0]))
    ms = replay_ms(lambda: [moe.gate_up(way, x, c, weights, pool, LIMIT) for way, c in calls]) / len(draws)
    rows.append(line("gate and up alone", ms, used * row_bytes, 2 * operations, peer_ms[0]))
    ms = replay_ms(lambda: [moe.down(way, hidden, c, pool, out) for way, c in calls]) / len(draws)
    rows.append(line("down", ms, used * row_bytes / 2, operations, peer_ms[1]))
    ms = replay_ms(lambda: [routed_experts(x, c, weights, pool, LIMIT) for c in draws]) / len(draws)
    total = None if peer_ms[0] is None or peer_ms[1] is None else peer_ms[0] + peer_ms[1]
    rows.append(line("all of it", ms, used * row_bytes * 1.5, 3 * operations, total))
    logits, bias = torch.randn(tokens, EXPERTS, device="cuda"), torch.randn(EXPERTS, device="cuda")
    ms = replay_ms(lambda: route(logits, TOPK, 1.5, True, bias))
    print(f"{'routing':24}{name:48}{ms:9.4f} ms", flush=True)
    return rows


@torch.inference_mode()
def main() -> int:
    pool = random_pool()
    first_peer, second_peer = humming_layer(pool.w13, pool.s13), humming_layer(pool.w2, pool.s2)
    print(HEADER)
    rows = []
    for tokens in [int(number) for number in sys.argv[1:]] or (1, 8, 64, 256, 1024, 8192):
        rows += measure(tokens, pool, first_peer, second_peer)
    report(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
