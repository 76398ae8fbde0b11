"""The trainer's tiled attention against plain softmax attention, values and gradients; and the indexer's choice."""

import pytest
import torch
from torch import Tensor

from dsv4_training import attention, layers
from dsv4_training.attention import DenseAttention, GatheredAttention


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE_ELEMENTS", 1)  # tiles of one block


def plain(q: Tensor, entries: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the shown entries; zero and -1e30 where there are none."""
    logits = torch.einsum("bshc,bmc->bshm", q, entries) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~shown[:, :, None], -1e30)
    weights = logits.softmax(-1).masked_fill(~shown[:, :, None], 0.0)
    lse = torch.where(shown.any(-1)[..., None], logits.logsumexp(-1), torch.full((), -1e30))
    return torch.einsum("bshm,bmc->bshc", weights, entries), lse


def inputs(length: int = 384) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sequences, the second of which holds a document that begins at 128."""
    torch.manual_seed(0)
    q = torch.randn(2, length, 2, 16, requires_grad=True)
    entries = torch.randn(2, length // 4, 16, requires_grad=True)
    low = torch.zeros(2, length, dtype=torch.int64)
    low[1, 128:] = 32
    return q, entries, low, (torch.arange(length) + 1) // 4


def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], leaves: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    weight, weight_lse = torch.randn_like(ours[0]), torch.randn_like(ours[1])
    found = []
    for out, lse in (ours, theirs):
        seen = lse > -1e29
        ((out * weight).sum() + (lse * weight_lse)[seen].sum()).backward(retain_graph=True)
        found.append([leaf.grad.clone() for leaf in leaves])  # type: ignore[union-attr]
        for leaf in leaves:
            leaf.grad = None
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chosen", [False, True])
def test_dense_attention_equals_softmax(chosen: bool) -> None:
    q, entries, low, high = inputs()
    shown = attention.visible(low, high, entries.shape[1])
    mask = torch.rand(shown.shape, generator=torch.Generator().manual_seed(2)) < 0.3 if chosen else None
    ours = DenseAttention.apply(q, entries, low, high, mask, attention.dense_tile, attention.dense_tile_backward)
    agree(ours, plain(q, entries, shown if mask is None else shown & mask), (q, entries))


def test_gathered_attention_equals_softmax_over_what_was_chosen() -> None:
    q, entries, low, high = inputs()
    chosen = torch.stack(
        [torch.randperm(96, generator=torch.Generator().manual_seed(i))[:12] for i in range(2 * 384)]
    ).view(2, 384, 12)
    shown = attention.visible(low, high, 96)
    mask = torch.zeros_like(shown).scatter_(-1, chosen, True) & shown
    ours = GatheredAttention.apply(
        q, entries, low, high, chosen, attention.gathered_tile, attention.gathered_tile_backward
    )
    agree(ours, plain(q, entries, mask), (q, entries))


def test_no_tile_is_as_large_as_all_queries_by_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64K a tile of all heads' logits stays within its bound, whatever the length."""
    monkeypatch.undo()
    for length in (65536, 1048576):
        per_query = 4 * length // 4
        tile = attention.tile_length(length, per_query)
        assert tile % 128 == 0
        assert tile * per_query <= attention.TILE_ELEMENTS < length * per_query


def test_window_attention_sees_the_window_and_nothing_else() -> None:
    torch.manual_seed(0)
    q, kv = torch.randn(512, 2, 16), torch.randn(512, 16)
    first = torch.tensor([True, False, True, False])  # two documents of 256
    still = torch.ones(4, 4), torch.zeros(4, 4)
    out, lse = attention.window_attention(q, kv, kv.roll(128, 0), first, *still)
    for t in (0, 100, 255, 256, 300, 511):
        rows = kv[max(t - 127, 256 * (t // 256)) : t + 1]
        logits = q[t] @ rows.t() / 4
        torch.testing.assert_close(out[t], logits.softmax(-1) @ rows, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[t], logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_parts_of_attention_merge_into_one_softmax() -> None:
    torch.manual_seed(1)
    q, rows, entries = torch.randn(128, 2, 128), torch.randn(128, 128), torch.randn(1, 4, 128)
    high = torch.full((128,), 4)
    high[:10] = 0
    still = torch.ones(1, 32), torch.zeros(1, 32)
    near, near_lse = attention.window_attention(q, rows, rows, torch.tensor([True]), *still)
    far, far_lse = attention.dense_tile(q[None], entries, torch.zeros(1, 128, dtype=torch.int64), high, None)
    sink = torch.randn(2)
    cos, sin = torch.ones(128, 32), torch.zeros(128, 32)
    wo_a, wo_b = torch.eye(256), torch.eye(256)
    out = layers.merge_and_project(near, near_lse, far[0], far_lse[0], sink, cos, sin, wo_a, wo_b, 1, False)
    for t in (0, 9, 10, 127):
        keys = torch.cat([rows[: t + 1], entries[0][: int(high[t])], torch.zeros(1, 128)])
        logits = q[t] @ keys.t() * 128**-0.5
        logits[:, -1] = sink
        torch.testing.assert_close(out[t].view(2, 128), logits.softmax(-1) @ keys, atol=1e-5, rtol=1e-4)


def test_the_best_visible_entries_are_chosen() -> None:
    torch.manual_seed(2)
    _, _, low, high = inputs()
    q, weights, keys = torch.randn(2, 384, 2, 8), torch.rand(2, 384, 2), torch.randn(2, 96, 8)
    chosen = attention.select_entries(q, weights, keys, low, high, 8, attention.masked_scores)
    scores = attention.index_scores(q, weights, keys)
    shown = attention.visible(low, high, 96)
    for b, t in ((0, 40), (0, 200), (1, 140), (1, 383)):
        seen = [e for e in chosen[b, t].tolist() if shown[b, t, e]]
        wanted = min(8, int(shown[b, t].sum()))
        best = scores[b, t].masked_fill(~shown[b, t], -1e30).topk(wanted).values
        assert len(set(seen)) == wanted
        torch.testing.assert_close(scores[b, t, seen].sort(descending=True).values, best, atol=1e-5, rtol=1e-5)


def test_index_loss_is_least_for_the_attentions_own_distribution_and_recall_counts() -> None:
    torch.manual_seed(3)
    q, entries = torch.randn(1, 20, 2, 16), torch.randn(1, 40, 16)
    base = torch.full((1, 20, 2), -1.0)
    shown = torch.ones(1, 20, 40, dtype=torch.bool)
    logits = torch.einsum("bqhc,bmc->bqhm", q, entries) / 4
    total = torch.logaddexp(base, logits.logsumexp(-1))
    own = (logits - total[..., None]).exp().sum(2)
    best, weight, (recall, mass) = attention.index_loss(q, base, entries, own.log(), shown, 8)
    assert abs(float(best)) < 1e-4
    torch.testing.assert_close(weight, own.sum())
    assert float(recall) == 1.0
    top = own.topk(8, -1).values.sum(-1) / own.sum(-1)
    torch.testing.assert_close(mass, top.mean(), atol=1e-4, rtol=1e-4)
    worse, _, (none, little) = attention.index_loss(q, base, entries, -own.log(), shown, 8)
    assert float(worse) > 1
    assert float(none) < 0.1
    assert float(little) < float(mass)
    everything = attention.index_loss(q, base, entries, own.log(), shown, 40)[2]
    assert everything.tolist() == [1.0, 1.0]
