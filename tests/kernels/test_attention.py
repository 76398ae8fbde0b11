"""Attention in its three forms against softmax attention written out query by query."""

from collections.abc import Iterator

import pytest
import torch

from dsv4_kernels import attention as kernel
from dsv4_kernels.attention import dense_attention, gathered_attention, window_attention
from dsv4_kernels.tiling import Tiling

RELATIVE_RMS = 2e-6


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_chance() -> Iterator[None]:
    """Memory that is taken without a value holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def written_out(q, rows, chosen, entries, sink, window):
    """chosen: per query the list of entries it sees."""
    queries, heads, channels = q.shape
    before = rows.shape[0] - queries
    out = torch.empty(queries, heads, channels, dtype=torch.float64)
    for t in range(queries):
        near = rows[max(0, t + before - window + 1) : t + before + 1].double()
        keys = torch.cat([near, entries.double()[chosen[t]]])
        logits = q[t].double() @ keys.t()
        weights = torch.cat([logits, sink.double()[:, None]], 1).softmax(1)[:, :-1]
        out[t] = weights @ keys
    return out


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert not got.isnan().any()
    assert ((got - want).norm() / want.norm()).item() < RELATIVE_RMS


def inputs(queries: int, before: int, entries: int, heads: int = 3, channels: int = 72):
    return (
        torch.randn(queries, heads, channels) * channels**-0.5,
        torch.randn(queries + before, channels),
        torch.randn(entries, channels),
        torch.randn(heads),
    )


@pytest.mark.parametrize(
    ("queries", "before", "window"), [(1, 0, 8), (1, 7, 8), (300, 0, 8), (140, 5, 32), (3, 31, 32)]
)
def test_window(queries: int, before: int, window: int) -> None:
    q, rows, entries, sink = inputs(queries, before, 0)
    close(window_attention(q, rows, sink, window), written_out(q, rows, [[]] * queries, entries, sink, window))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "before", "ratio"), [(1, 7, 4), (200, 7, 4), (5, 3, 128), (260, 0, 128)])
def test_dense_entries(queries: int, before: int, ratio: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernel, "tiling", lambda device: Tiling(queries=37, keys=1, working_set=1 << 26, rows=111, columns=1)
    )
    position = 500
    visible = (torch.arange(position, position + queries) + 1) // ratio
    q, rows, entries, sink = inputs(queries, before, int(visible[-1]))
    mask = torch.rand(queries, entries.shape[0]) < 0.3 if masked else None
    chosen = [[i for i in range(int(visible[t])) if mask is None or mask[t, i]] for t in range(queries)]
    got = dense_attention(q, rows, entries, mask, sink, 8, visible)
    close(got, written_out(q, rows, chosen, entries, sink, 8))


@pytest.mark.parametrize("queries", [1, 150])
def test_gathered_entries(queries: int) -> None:
    q, rows, entries, sink = inputs(queries, 7, 90)
    selected = torch.stack([torch.randperm(90)[:20] for _ in range(queries)])
    selected[0, 4:] = -1
    chosen = [[i for i in row.tolist() if i >= 0] for row in selected]
    got = gathered_attention(q, rows, entries, selected, sink, 8)
    close(got, written_out(q, rows, chosen, entries, sink, 8))


def test_a_query_with_no_entries_sees_its_window_only() -> None:
    q, rows, entries, sink = inputs(2, 0, 6)
    nothing = torch.full((2, 6), -1)
    torch.testing.assert_close(
        gathered_attention(q, rows, entries, nothing, sink, 8), window_attention(q, rows, sink, 8)
    )


def test_non_contiguous_queries() -> None:
    q, rows, _, sink = inputs(9, 0, 0)
    strided = torch.stack([q, q * 2], 1)[:, 0]
    torch.testing.assert_close(window_attention(strided, rows, sink, 8), window_attention(q, rows, sink, 8))


def test_a_large_logit_does_not_overflow() -> None:
    q, rows, _, sink = inputs(3, 0, 0)
    assert window_attention(q * 1e4, rows, sink, 8).isfinite().all()
