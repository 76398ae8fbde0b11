"""The NumPy operations of one token against the torch references: roundings and choices to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4_kernels import attention, compress, hyper_connection, moe, norm, one_token, rope, rounding

CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def _random(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape) * torch.exp2(torch.randint(-20, 12, shape[-1:]).float() * spread)


def _equal(ours: np.ndarray, reference: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    assert torch.equal(torch.from_numpy(ours), reference)


def _close(ours: np.ndarray, reference: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(ours), reference, **CLOSE)


@pytest.mark.parametrize("width", [64, 128, 200, 448, 1000])
@pytest.mark.parametrize("block", [64, 128])
def test_fp8_rounding_is_bit_equal(width: int, block: int) -> None:
    for x in (_random(5, width), torch.zeros(1, width), torch.full((1, width), 448.0), _random(3, width) * 1e-9):
        _equal(one_token.round_fp8(x.numpy(), block), rounding.round_fp8(x, block))
        _equal(one_token.round_fp8(x[0].numpy(), block), rounding.round_fp8(x[0], block))


def test_fp4_and_bf16_rounding_are_bit_equal() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(16).view(4, 32)
    for x in (_random(6, 128), ties, -ties, torch.zeros(2, 64)):
        _equal(one_token.round_fp4(x.numpy()), rounding.round_fp4(x))
        _equal(one_token.round_bf16(x.numpy()), x.to(torch.bfloat16).float())


def test_norms_rope_and_hadamard() -> None:
    x, weight, freqs = torch.randn(7, 128), torch.randn(128), rope.rope_frequencies(64, 10000.0)
    _close(one_token.rms_norm(x[0].numpy(), weight.numpy(), 1e-6), norm.rms_norm(x[0], weight, 1e-6))
    _close(one_token.rms_norm_heads(x.numpy(), 1e-6), norm.rms_norm(x, None, 1e-6))
    _close(one_token.hadamard(x.numpy()), rounding.hadamard(x))
    for position in (0, 1, 4095, 1_048_575):
        phases = rope.rope_phases(torch.tensor([position]), freqs, 128)
        ours = one_token.rope_phases(position, freqs.numpy(), 128)
        _close(ours.view(np.float32), torch.view_as_real(phases[0]).flatten())
        _close(one_token.rotate(x.numpy(), ours), rope.rotate(x, phases))


def test_hyper_connection() -> None:
    x, fn, base = torch.randn(1, 4, 96), torch.randn(24, 4 * 96) * 0.1, torch.randn(24)
    scale = hyper_connection.spread_scales(torch.tensor([0.3, 0.7, 1.3]), 4)
    options = {"hc_eps": 1e-6, "norm_eps": 1e-6}
    pre, post, comb = hyper_connection.mixing(x, fn, base, scale, iterations=20, **options)
    scaled = (fn * scale[:, None]).numpy()
    read, write = one_token.mixing(x[0].numpy(), scaled, base.numpy(), iterations=20, **options)
    _close(read, pre[0])
    _close(write[:, 4], post[0])
    torch.testing.assert_close(torch.from_numpy(write[:, :4].copy()), comb[0].T.contiguous(), rtol=2e-5, atol=2e-6)
    f = torch.randn(1, 96)
    written = write.dot(torch.cat((x[0], f)).numpy())
    torch.testing.assert_close(
        torch.from_numpy(written), hyper_connection.write_streams(x, f, post, comb)[0], rtol=2e-5, atol=2e-5
    )
    head = hyper_connection.head_mixing(x, fn[:4], base[:4], torch.tensor([0.4]), **options)
    _close(one_token.head_mixing(x[0].numpy(), (fn[:4] * 0.4).numpy(), base[:4].numpy(), **options), head[0])


def test_a_gate_far_below_zero_is_zero_without_overflow() -> None:
    x, fn, base = torch.randn(4, 32), torch.zeros(24, 128), torch.full((24,), -5000.0)
    with np.errstate(all="raise"):
        pre, write = one_token.mixing(x.numpy(), fn.numpy(), base.numpy(), iterations=20, hc_eps=1e-6, norm_eps=1e-6)
    np.testing.assert_allclose(pre, 1e-6, rtol=1e-6)
    assert not write[:, 4].any() and np.isfinite(write).all()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_sinkhorn_of_one_matrix_is_the_general_one(eps: float, spread: float) -> None:
    for zeros in ((), ((0, 1), (3, 3)), ((0, 0), (2, 0), (1, 2))):
        matrices = (torch.randn(2, 4, 4, dtype=torch.float64) * spread).softmax(2) + eps
        for row, column in zeros:
            matrices[:, row, column] = 0.0
        ours = hyper_connection.sinkhorn_one(matrices[0].tolist(), 20, eps)
        torch.testing.assert_close(torch.tensor(ours).double(), hyper_connection.sinkhorn(matrices, 20, eps)[0])


@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("rows", [(1,), (127, 3), (128, 700)])
@pytest.mark.parametrize("spread", [1.0, 200.0])  # scores that exponentials can take as they are, and others
def test_attention(heads: int, rows: tuple[int, ...], spread: float) -> None:
    q = torch.nn.functional.normalize(torch.randn(heads, 128))
    parts, sink = [torch.randn(count, 128) * spread for count in rows], torch.randn(heads) * spread
    logits = one_token.Sink(sink.numpy(), 200.0 if spread > 1.0 else 12.0)
    ours = one_token.attend(q.numpy(), [part.numpy() for part in parts], logits)
    entries = torch.cat(parts[1:]) if len(parts) > 1 else torch.empty(0, 128)
    reference = attention.dense_attention(q[None], parts[0], entries, None, sink, 128)[0]
    close = 2e-6 if spread == 1.0 else 0.02  # the exponential of a score of hundreds is that much less exact
    torch.testing.assert_close(torch.from_numpy(ours), reference, rtol=2e-5, atol=close)


@pytest.mark.parametrize("heads", [1, 2, 16, 64])
@pytest.mark.parametrize("keys", [1, 513, 2500])
def test_index_scores(heads: int, keys: int) -> None:
    q, k, weights = torch.randn(heads, 128), torch.randn(keys, 128), torch.randn(heads)
    ours = one_token.index_scores(q.numpy(), k.numpy(), weights.numpy())
    reference = ((q.double() @ k.double().T).relu() * weights[:, None].double()).sum(0)
    torch.testing.assert_close(torch.from_numpy(ours).double(), reference, rtol=1e-5, atol=1e-4)


def test_experts_and_pooling() -> None:
    gate_up = torch.randn(6, 256) * 20
    _close(one_token.swiglu(gate_up.numpy(), 10.0), moe.swiglu(gate_up, 10.0))
    logits = torch.tensor([-60.0, -3.0, 0.0, 5.0, 19.9, 20.1, 80.0])
    _close(one_token.router_scores(logits.numpy()), torch.nn.functional.softplus(logits).sqrt())
    kv, gate = torch.randn(1, 8, 64), torch.randn(1, 8, 64)
    gate[:, :4] = float("-inf")  # the first block of a sequence has none before it
    _close(one_token.pool(kv[0].numpy(), gate[0].numpy()), compress.pool_blocks(kv, gate)[0])
    weight, x = torch.randn(33, 96) * 96**-0.5, torch.randn(96)  # sums of about 1, whose terms cancel
    _close(one_token.product(weight.numpy(), x.numpy()), torch.mv(weight, x))


def test_choices_settle_ties_towards_the_lower_index() -> None:
    scores = np.array([0, 3, 1, 3, 0, 2, 0, 0], np.float32)
    assert one_token.largest(scores, 5).tolist() == [0, 1, 2, 3, 5]
    assert one_token.largest(scores, 8).tolist() == list(range(8))
    assert one_token.best(scores, 3) == [1, 3, 5]
    many = torch.randn(5000).numpy()
    before = many.copy()
    assert one_token.largest(many, 512).tolist() == torch.from_numpy(many).topk(512).indices.sort().values.tolist()
    assert np.array_equal(many, before)


@pytest.mark.parametrize("rows", [6, 40])  # read in order first, and not
def test_chosen_rows_below_the_window(rows: int) -> None:
    random = np.random.default_rng(0)
    window, entries = random.standard_normal((3, 16), np.float32), random.standard_normal((rows, 16), np.float32)
    got = one_token.below(window, entries, np.array([0, 2, 3, 5]))
    assert np.array_equal(got, np.concatenate((window, entries[[0, 2, 3, 5]])))
