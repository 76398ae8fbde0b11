"""Linears on the GPU at V4-Flash's shapes: one token, 64 tokens and prefill, against torch's own products.

    python -m benchmarks.kernels_linear

Random data.  Outputs are compared first, with float64 sums of the same rounded values on sampled tokens, and with the
peer's.  Medians of graph replays.  For few tokens the share is of copying the weights at 4.26 TB/s, and weights rotate
over copies of 240 MB in all, so that none is in the L2 cache; for prefill it is of 1,302 TFLOP/s in FP8, 813 in bf16.
The peer in FP8 is torch._scaled_mm with the same scales, in bf16 torch.mm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.gpu import BF16_CEILING, COPY_CEILING, FP8_CEILING, HEADER, Row, replay_ms, report
from dsv4_kernels.triton.linear import Fp8Matrix, expanded, fp8_linear, grouped_linear, plain_linear
from dsv4_kernels.triton.rounded import Rounded, round_activations

COPIES_BYTES = 240e6
GROUPS = 8
TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float32: 1e-4}  # rounding to bf16 alone gives 1.7e-3
FP8_SHAPES = {
    "wq_a, wkv": (1536, 4096),
    "wq_b, indexer wq_b": (40960, 1024),
    "wo_b": (4096, 8192),
    "shared w1, w3": (4096, 4096),
    "shared w2": (4096, 2048),
}
WO_A = (8192, 4096)
PLAIN = (2624, 4096)  # compressors and the indexer's weights of a CSA layer
PLAIN_SHAPES = {"compressor": PLAIN, "HCA compressor": (1024, 4096), "router": (256, 4096)}
HEAD = (129_280, 4096)
PREFILL = 8192


def matrix(outputs: int, inputs: int) -> Fp8Matrix:
    data = (torch.randn(outputs, inputs, device="cuda") * 2).to(torch.float8_e4m3fn)
    scale = torch.randint(112, 120, (outputs // 128, inputs // 128), device="cuda", dtype=torch.uint8)
    return Fp8Matrix(data, scale)


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)


def copies(make: Callable[[], Fp8Matrix | Tensor]) -> list:
    first = make()
    return [first, *(make() for _ in range(int(COPIES_BYTES / first.nbytes)))]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def sampled(x: Tensor, w: Tensor, groups: int = 1) -> tuple[list[int], Tensor]:
    """Some tokens, and their exact products."""
    rows = sorted({0, len(x) // 3, len(x) - 1})
    x64, w64 = x[rows].double().view(len(rows), groups, -1), w.double().view(groups, -1, w.shape[1])
    return rows, torch.einsum("sgi,goi->sgo", x64, w64).flatten(1)


def measure(
    what: str,
    shape: str,
    weights: list,
    call: Callable[..., object],
    out: Tensor,
    expected: tuple[list[int], Tensor],
    work: float,
    ceiling: float,
    peer: Callable[[], Tensor] | None = None,
) -> Row:
    """One row; ``expected`` is of the first of ``weights``; ``work``: bytes, or operations where a peer could be."""
    out.fill_(float("nan"))
    call(weights[0], out)
    rows, want = expected
    off = error(out[rows], want)
    if not off < TOLERANCE[out.dtype] or out.isnan().any():
        raise SystemExit(f"{what}, {shape}: off by {off:.1e}")
    peer_ms = None
    if peer is not None:
        apart = error(peer(), out.double())
        if not apart < 2 * TOLERANCE[torch.bfloat16]:
            raise SystemExit(f"{what}, {shape}: the peer differs by {apart:.1e}")
        peer_ms = replay_ms(peer)
    turn = cycle(weights)
    ms = replay_ms(lambda: call(next(turn), out))
    rate = work / ms * 1e3
    text = f"{rate / 1e9:.0f} GB/s" if ceiling == COPY_CEILING else f"{rate / 1e12:.0f} TFLOP/s"
    row = Row(what, shape, ms, text, rate / ceiling, off, peer_ms)
    print(row.line(), flush=True)
    return row


def fp8_peer(x: Rounded, w: Fp8Matrix) -> Callable[[], Tensor] | None:
    """torch's product with scales of 1 x 128 and 128 x 128 (cuBLAS), or None where it does not take them."""
    token_scales, scales = x.scale.t().contiguous().t(), torch.exp2(w.scale.float() - 127).t()

    def run() -> Tensor:
        return torch._scaled_mm(x.data, w.data.t(), scale_a=token_scales, scale_b=scales, out_dtype=torch.bfloat16)

    try:
        run()
    except (RuntimeError, ValueError) as reason:
        print(f"no peer in FP8: {str(reason).splitlines()[0]}", file=sys.stderr)
        return None
    return run


def few(tokens: int) -> list[Row]:
    rows = []
    shape = f"{tokens} token{'s' * (tokens > 1)}"
    for what, (o, i) in FP8_SHAPES.items():
        weights, x = copies(partial(matrix, o, i)), round_activations(bf16(tokens, i))
        out = torch.empty(tokens, o, dtype=torch.bfloat16, device="cuda")
        want = sampled(x.values(), expanded(weights[0]))
        rows.append(
            measure(
                what,
                f"{shape}, FP8 {o} x {i}",
                weights,
                partial(fp8_linear, x),
                out,
                want,
                weights[0].nbytes,
                COPY_CEILING,
            )
        )
    weights, o_in = copies(partial(matrix, *WO_A)), bf16(tokens, GROUPS, WO_A[1])
    out = torch.empty(tokens, WO_A[0], dtype=torch.bfloat16, device="cuda")
    want = sampled(o_in.flatten(1), expanded(weights[0]), GROUPS)
    text = f"{shape}, FP8 weights, {GROUPS} x {WO_A[0] // GROUPS} x {WO_A[1]}"
    rows.append(
        measure("wo_a", text, weights, partial(grouped_linear, o_in), out, want, weights[0].nbytes, COPY_CEILING)
    )
    for what, (o, i) in PLAIN_SHAPES.items():
        plain, y = copies(partial(bf16, o, i)), bf16(tokens, i)
        out = torch.empty(tokens, o, device="cuda")
        text, want = f"{shape}, bf16 {o} x {i}", sampled(y, plain[0])
        rows.append(measure(what, text, plain, partial(plain_linear, y), out, want, plain[0].nbytes, COPY_CEILING))
    return rows


def layer() -> Row:
    """The seven products of a layer for one token, in turn, over the weights of five layers; not compared again."""
    layers = [[matrix(o, i) for o, i in [*FP8_SHAPES.values(), WO_A]] for _ in range(5)]
    plain = [bf16(*PLAIN) for _ in layers]
    inputs = [round_activations(bf16(1, i)) for _, i in FP8_SHAPES.values()]
    x, y = bf16(1, GROUPS, WO_A[1]), bf16(1, PLAIN[1])
    turn = cycle(range(len(layers)))

    def run() -> None:
        number = next(turn)
        for rounded, w in zip(inputs, layers[number], strict=False):
            fp8_linear(rounded, w)
        grouped_linear(x, layers[number][-1])
        plain_linear(y, plain[number])

    ms = replay_ms(run)
    size = sum(w.nbytes for w in layers[0]) + plain[0].nbytes
    rate = size / ms * 1e3
    row = Row("all of a CSA layer", "1 token", ms, f"{rate / 1e9:.0f} GB/s", rate / COPY_CEILING, 0.0)
    print(row.line(), flush=True)
    return row


def head() -> Row:
    w, h = bf16(*HEAD), bf16(1, HEAD[1])
    out = torch.empty(1, HEAD[0], device="cuda")
    text = f"1 token, bf16 {HEAD[0]} x {HEAD[1]}"
    call = partial(plain_linear, h)
    return measure("output head", text, [w], call, out, sampled(h, w), w.nbytes, COPY_CEILING)


def prefill() -> list[Row]:
    rows = []
    for what, (o, i) in FP8_SHAPES.items():
        w, x = matrix(o, i), round_activations(bf16(PREFILL, i))
        out = torch.empty(PREFILL, o, dtype=torch.bfloat16, device="cuda")
        text, work = f"{PREFILL} tokens, FP8 {o} x {i}", 2.0 * PREFILL * o * i
        want = sampled(x.values(), expanded(w))
        rows.append(measure(what, text, [w], partial(fp8_linear, x), out, want, work, FP8_CEILING, fp8_peer(x, w)))
    w, o_in = matrix(*WO_A), bf16(PREFILL, GROUPS, WO_A[1])
    out = torch.empty(PREFILL, WO_A[0], dtype=torch.bfloat16, device="cuda")
    text, work = f"{PREFILL} tokens, {GROUPS} x {WO_A[0] // GROUPS} x {WO_A[1]}", 2.0 * PREFILL * WO_A[0] * WO_A[1]
    wide = expanded(w).view(GROUPS, -1, WO_A[1]).transpose(1, 2)

    def bmm() -> Tensor:
        return torch.bmm(o_in.transpose(0, 1), wide).transpose(0, 1).flatten(1)

    want = sampled(o_in.flatten(1), expanded(w), GROUPS)
    rows.append(measure("wo_a", text, [w], partial(grouped_linear, o_in), out, want, work, BF16_CEILING, bmm))
    rounded = Rounded.empty(PREFILL, WO_A[0], "cuda")
    ms = replay_ms(lambda: grouped_linear(o_in, w, rounded, rounded=True))
    same = torch.equal(rounded.values(), round_activations(out).values())
    if not same:
        raise SystemExit("wo_a, rounded: not the rounding of what it writes otherwise")
    row = Row("wo_a, rounded", text, ms, f"{work / ms / 1e9:.0f} TFLOP/s", work / ms * 1e3 / BF16_CEILING, 0.0)
    rows.append(row)
    print(row.line(), flush=True)
    y, v = bf16(PREFILL, PLAIN[1]), bf16(*PLAIN)
    out = torch.empty(PREFILL, PLAIN[0], device="cuda")
    text, work = f"{PREFILL} tokens, bf16 {PLAIN[0]} x {PLAIN[1]}", 2.0 * PREFILL * PLAIN[0] * PLAIN[1]
    mm = partial(torch.mm, y, v.t())
    rows.append(measure("compressor", text, [v], partial(plain_linear, y), out, sampled(y, v), work, BF16_CEILING, mm))
    return rows


@torch.inference_mode()
def main() -> int:
    torch.manual_seed(0)
    print(HEADER)
    rows = [*few(1), layer(), head(), *few(64), *prefill()]
    report(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
