"""Norm, RoPE, mHC, pooling, linears and experts against their equations written out element by element."""

import cmath
import math

import pytest
import torch

from dsv4_kernels.compress import pool_blocks, pool_overlapping_blocks
from dsv4_kernels.hyper_connection import (
    head_mixing,
    mixing,
    read_streams,
    sinkhorn,
    spread_scales,
    write_streams,
)
from dsv4_kernels.linear import Weight, grouped_linear, linear, stack, stacked_linear
from dsv4_kernels.moe import Expert, expert_forward, mixture, route
from dsv4_kernels.norm import rms_norm
from dsv4_kernels.rope import rope_frequencies, rope_phases, rotate, yarn_frequencies
from dsv4_kernels.rounding import round_fp8


def test_rms_norm() -> None:
    x, w = torch.randn(3, 40), torch.randn(40)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    torch.testing.assert_close(rms_norm(x, w, 1e-6), want)
    assert rms_norm(x.bfloat16(), w, 1e-6).dtype == torch.bfloat16


def test_rope_turns_interleaved_pairs_of_the_last_channels() -> None:
    x = torch.randn(2, 3, 10)
    freqs = rope_frequencies(6, 100.0)
    got = rotate(x, rope_phases(torch.tensor([5, 1000]), freqs, 10)[:, None])
    assert torch.equal(got[..., :4], x[..., :4])
    for s, position in enumerate((5, 1000)):
        for i in range(3):
            turn = cmath.exp(1j * position * 100.0 ** (-2 * i / 6))
            pair = torch.view_as_complex(x[s, :, 4 + 2 * i : 6 + 2 * i].contiguous()) * turn
            torch.testing.assert_close(
                torch.view_as_complex(got[s, :, 4 + 2 * i : 6 + 2 * i].contiguous()), pair, atol=1e-4, rtol=1e-4
            )


def test_conjugate_phases_turn_back() -> None:
    x = torch.randn(4, 8)
    phases = rope_phases(torch.tensor([0, 1, 77_777, 1_048_575]), rope_frequencies(8, 1e4), 8)
    turned = rotate(x, phases)
    torch.testing.assert_close(rotate(turned, phases.conj()), x)
    assert rotate(x, phases, out=x) is x
    assert torch.equal(x, turned)


def test_yarn_keeps_fast_channels_and_slows_slow_ones() -> None:
    plain, yarn = rope_frequencies(64, 160_000.0), yarn_frequencies(64, 160_000.0, 16, 65_536, 32, 1)
    turns = 65_536 * plain / (2 * math.pi)
    assert torch.equal(yarn[turns > 80], plain[turns > 80])
    torch.testing.assert_close(yarn[turns < 0.5], plain[turns < 0.5] / 16)
    assert ((yarn <= plain) & (yarn >= plain / 16.0001)).all()


def test_sinkhorn_mixing_is_doubly_stochastic_and_follows_the_equations() -> None:
    tokens, streams, hidden, eps = 3, 4, 10, 1e-6
    x = torch.randn(tokens, streams, hidden)
    fn, base, scales = torch.randn(24, 40), torch.randn(24), spread_scales(torch.tensor([0.7, 1.3, 0.9]), 4)
    pre, post, comb = mixing(x, fn, base, scales, iterations=20, hc_eps=eps, norm_eps=1e-6)
    for s in range(tokens):
        flat = x[s].flatten()
        m = (fn @ flat) / (flat.square().mean() + 1e-6).sqrt()
        torch.testing.assert_close(pre[s], torch.sigmoid(m[:4] * 0.7 + base[:4]) + eps)
        torch.testing.assert_close(post[s], 2 * torch.sigmoid(m[4:8] * 1.3 + base[4:8]))
        a = (m[8:] * 0.9 + base[8:]).view(4, 4).softmax(1) + eps
        a = a / (a.sum(0) + eps)
        for _ in range(19):
            a = a / (a.sum(1, keepdim=True) + eps)
            a = a / (a.sum(0) + eps)
        torch.testing.assert_close(comb[s], a, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(comb.sum(1), torch.ones(tokens, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(comb.sum(2), torch.ones(tokens, 4), atol=0.1, rtol=0)  # rows converge last


def test_mixing_does_not_depend_on_the_number_of_tokens() -> None:
    x = torch.randn(70, 4, 16)
    parts = (torch.randn(24, 64) * 0.1, torch.randn(24), torch.ones(24))
    kwargs = {"iterations": 20, "hc_eps": 1e-6, "norm_eps": 1e-6}
    whole = mixing(x, *parts, **kwargs)
    for t in (0, 33, 69):
        for got, want in zip(mixing(x[t : t + 1], *parts, **kwargs), whole, strict=True):
            torch.testing.assert_close(got[0], want[t], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("streams", [2, 4, 5])
@pytest.mark.parametrize("tokens", [1, 3])
def test_sinkhorn_of_one_token_and_of_many(tokens: int, streams: int) -> None:
    a = torch.rand(tokens, streams, streams) + 0.01
    want = a / (a.sum(1, keepdim=True) + 1e-3)
    for _ in range(6):
        want = want / (want.sum(2, keepdim=True) + 1e-3)
        want = want / (want.sum(1, keepdim=True) + 1e-3)
    torch.testing.assert_close(sinkhorn(a, 7, 1e-3), want)


def test_streams_are_read_and_written_as_the_equations_say() -> None:
    x, f, pre, post, comb = (
        torch.randn(2, 4, 6),
        torch.randn(2, 6),
        torch.rand(2, 4),
        torch.rand(2, 4),
        torch.rand(2, 4, 4),
    )
    torch.testing.assert_close(read_streams(x, pre), torch.einsum("sj,sjd->sd", pre, x))
    want = torch.einsum("sk,sd->skd", post, f) + torch.einsum("sjk,sjd->skd", comb, x)
    torch.testing.assert_close(write_streams(x, f, post, comb), want)
    fn, base, scale = torch.randn(4, 24), torch.randn(4), torch.tensor([1.5])
    m = torch.stack([(fn @ v) / (v.square().mean() + 1e-6).sqrt() for v in x.flatten(1)])
    torch.testing.assert_close(
        head_mixing(x, fn, base, scale, hc_eps=1e-6, norm_eps=1e-6), torch.sigmoid(m * 1.5 + base) + 1e-6
    )


def test_pooling_is_a_softmax_per_channel() -> None:
    kv, gate = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    want = torch.stack(
        [
            torch.stack([sum(torch.softmax(gate[n, :, c], 0)[r] * kv[n, r, c] for r in range(5)) for c in range(3)])
            for n in range(2)
        ]
    )
    torch.testing.assert_close(pool_blocks(kv, gate), want)


def test_overlapping_blocks_take_the_first_half_of_the_block_before() -> None:
    kv, gate = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    none_kv, none_gate = torch.zeros(4, 3), torch.full((4, 3), float("-inf"))
    got = pool_overlapping_blocks(kv, gate, none_kv, none_gate)
    torch.testing.assert_close(got[:1], pool_blocks(kv[:1, :, 3:], gate[:1, :, 3:]))
    for i in (1, 2):
        both_kv = torch.cat([kv[i - 1, :, :3], kv[i, :, 3:]])[None]
        both_gate = torch.cat([gate[i - 1, :, :3], gate[i, :, 3:]])[None]
        torch.testing.assert_close(got[i : i + 1], pool_blocks(both_kv, both_gate))
    later = pool_overlapping_blocks(kv[1:], gate[1:], kv[0, :, :3], gate[0, :, :3])
    torch.testing.assert_close(later, got[1:])


def packed_fp4(rows: int, columns: int) -> tuple[Weight, torch.Tensor]:
    codes = torch.randint(0, 16, (rows, columns))
    exponent = torch.randint(110, 135, (rows, columns // 32), dtype=torch.uint8)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    matrix = values * (2.0 ** (exponent.float() - 127)).repeat_interleave(32, 1)
    data = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    return Weight(data, exponent.view(torch.float8_e8m0fnu), "fp4", round_activations=True), matrix


def packed_fp8(rows: int, columns: int) -> tuple[Weight, torch.Tensor]:
    data = (torch.randn(rows, columns) * 50).to(torch.float8_e4m3fn)
    exponent = torch.randint(110, 135, (-(-rows // 128), -(-columns // 128)), dtype=torch.uint8)
    scale = (2.0 ** (exponent.float() - 127)).repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return Weight(data, exponent.view(torch.float8_e8m0fnu), "fp8", round_activations=True), data.float() * scale


@pytest.mark.parametrize("make", [packed_fp4, packed_fp8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_expand_exactly(make, dtype: torch.dtype) -> None:
    weight, matrix = make(200, 160)
    assert weight.shape == (200, 160)
    assert torch.equal(weight.dequantised(dtype).float(), matrix)
    x = torch.randn(7, 160)
    want = round_fp8(x, 128) @ matrix.t()
    torch.testing.assert_close(linear(x, weight), want)
    assert torch.equal(linear(x, weight), linear(x, weight.expanded(torch.float32)))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("outputs", [511, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_and_several_rows(rows: int, outputs: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(rows, 72, dtype=dtype), torch.randn(outputs, 72, dtype=dtype)
    want = x.double() @ w.double().t()
    got = linear(x, Weight(w))
    assert got.dtype == dtype and got.shape == (rows, outputs)
    torch.testing.assert_close(got.double(), want, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=1e-2)


def test_grouped_linear_is_block_diagonal() -> None:
    x, w = torch.randn(3, 2, 5), torch.randn(8, 5)
    want = torch.cat([x[:, 0] @ w[:4].t(), x[:, 1] @ w[4:].t()], 1)
    torch.testing.assert_close(grouped_linear(x, Weight(w)), want)


def random_expert(scale: float = 1.0) -> Expert:
    w1, w2, w3 = (Weight(torch.randn(*shape) * scale) for shape in ((6, 8), (8, 6), (6, 8)))
    return Expert(stack([w1, w3]), w2)


def test_stacked_weights_give_their_outputs_side_by_side() -> None:
    x = torch.randn(3, 160)
    parts = [packed_fp8(40, 160)[0], packed_fp4(24, 160)[0]]
    want = torch.cat([linear(x, w) for w in parts], 1)
    assert len(stack(parts)) == 2
    assert torch.equal(stacked_linear(x, stack(parts)), want)
    joined = stack([w.expanded(torch.float32) for w in parts])
    assert len(joined) == 1
    torch.testing.assert_close(stacked_linear(x, joined), want)


def test_routing_scores_bias_and_hash() -> None:
    u, gate, bias = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5) * 10
    scores = torch.nn.functional.softplus(u @ gate.t()).sqrt()
    chosen, weights = route(u, gate, topk=2, scaling=1.5, normalise=True, bias_E=bias)
    assert torch.equal(chosen.sort(1).values, (scores + bias).topk(2).indices.sort(1).values)
    picked = scores.gather(1, chosen)
    torch.testing.assert_close(weights, picked / picked.sum(1, keepdim=True) * 1.5)
    fixed = torch.tensor([[4, 0]] * 6)
    chosen, weights = route(u, gate, topk=2, scaling=1.0, normalise=False, chosen_SK=fixed)
    assert torch.equal(chosen, fixed)
    torch.testing.assert_close(weights, scores[:, [4, 0]])


def test_experts_clamp_weight_and_sum() -> None:
    torch.manual_seed(0)
    experts = [random_expert(scale=3.0) for _ in range(5)]
    u = torch.randn(9, 8) * 3
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    got = mixture(u, experts, chosen, weights, 10.0)
    for t in range(9):
        want = torch.zeros(8)
        for k in range(2):
            e = experts[chosen[t, k]]
            w1, w3 = e.w13[0].data.chunk(2)
            g, p = w1 @ u[t], w3 @ u[t]
            g, p = g.clamp(max=10), p.clamp(-10, 10)
            want += e.w2.data @ (g * torch.sigmoid(g) * p * weights[t, k])
        torch.testing.assert_close(got[t], want, atol=1e-3, rtol=1e-4)
    assert (u @ experts[0].w13[0].data.t()).max() > 10  # the clamp was at work
    alone = expert_forward(u, experts[0], 10.0)
    unit = mixture(u, experts, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1), 10.0)
    torch.testing.assert_close(alone, unit)


def test_mixture_of_no_tokens() -> None:
    experts = [random_expert() for _ in range(2)]
    none = torch.empty(0, 1, dtype=torch.int64)
    assert mixture(torch.empty(0, 8), experts, none, torch.empty(0, 1), 10.0).shape == (0, 8)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_the_mixture_does_not_depend_on_its_neighbours_to_the_last_bit(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        experts = [Expert((Weight(torch.randn(192, 64)),), Weight(torch.randn(64, 96))) for _ in range(8)]
        u, weights = torch.randn(256, 64), torch.rand(256, 3)
        chosen = torch.stack([torch.randperm(8)[:3] for _ in range(256)])
        whole = mixture(u, experts, chosen, weights, 10.0)
        other, elsewhere = u.clone(), chosen.clone()
        other[:128] = torch.randn(128, 64)
        elsewhere[:128] = torch.stack([torch.randperm(8)[:3] for _ in range(128)])
        elsewhere[:100] = torch.tensor([0, 1, 2])  # leaves single rows to some experts
        assert torch.equal(mixture(other, experts, elsewhere, weights, 10.0)[128:], whole[128:])
    finally:
        torch.set_num_threads(before)
