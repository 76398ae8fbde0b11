"""The indexer's choice against a full sort, with ties, tiles and the causal mask."""

import pytest
import torch

from dsv4_kernels import index as kernel
from dsv4_kernels.index import index_scores, select_entries
from dsv4_kernels.tiling import Tiling


def tiled(keys: torch.Tensor, size: int):
    return lambda count: ((s, keys[s : min(s + size, count)]) for s in range(0, count, size))


def written_out(scores: torch.Tensor, visible: torch.Tensor, topk: int) -> list[list[int]]:
    return [
        sorted(range(int(v)), key=lambda i, row=row: (-float(row[i]), i))[:topk]
        for row, v in zip(scores, visible, strict=True)
    ]


def test_scores_follow_the_equation() -> None:
    q, w, k = torch.randn(5, 3, 16), torch.randn(5, 3), torch.randn(11, 16)
    want = torch.stack([sum(w[t, h] * (k @ q[t, h]).relu() for h in range(3)) for t in range(5)])
    torch.testing.assert_close(index_scores(q, w, k), want)


@pytest.mark.parametrize("tile", [7, 64, 1000])
@pytest.mark.parametrize(("queries", "topk"), [(1, 10), (90, 16), (33, 200), (20, 500)])
def test_choice_equals_a_full_sort(tile: int, queries: int, topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernel, "tiling", lambda device: Tiling(queries=64, keys=tile, working_set=1 << 14, rows=64, columns=5)
    )
    visible = (torch.arange(900, 900 + queries) + 1) // 4
    # Small integers: scores are exact whatever the tiling, and tie often.
    q, w = torch.randint(-2, 3, (queries, 2, 8)).float(), torch.randint(-1, 2, (queries, 2)).float()
    keys = torch.randint(-2, 3, (int(visible[-1]), 8)).float()
    got = select_entries(q, w, tiled(keys, tile), visible, topk)
    want = written_out(index_scores(q, w, keys), visible, topk)
    assert got.shape == (queries, min(topk, int(visible[-1])))
    for row, wanted in zip(got.tolist(), want, strict=True):
        picked = [i for i in row if i >= 0]
        assert picked == sorted(wanted)
        assert row[len(picked) :] == [-1] * (len(row) - len(picked))


def test_minus_zero_ties_with_zero() -> None:
    q = torch.ones(1, 1, 4)
    keys = -torch.ones(8, 4)  # every product is cut to 0, and w = -1 makes it -0
    keys[5] = 0.0
    got = select_entries(q, -torch.ones(1, 1), tiled(keys, 3), torch.tensor([8]), 4)
    assert got.tolist() == [[0, 1, 2, 3]]


def test_first_queries_see_nothing() -> None:
    visible = torch.tensor([0, 0, 1, 3])
    got = select_entries(torch.randn(4, 1, 4), torch.ones(4, 1), tiled(torch.randn(3, 4), 2), visible, 2)
    assert got[0].tolist() == [-1, -1]
    assert sorted(got[2].tolist()) == [-1, 0]
    assert (got[3] >= 0).all()


@pytest.mark.parametrize("tile", [3, 100])
def test_a_score_that_is_no_number_is_chosen_and_so_shows(tile: int) -> None:
    q, w, keys = torch.randn(5, 2, 4), torch.rand(5, 2) + 0.1, torch.randn(40, 4)
    keys[[7, 30]] = torch.nan
    got = select_entries(q, w, tiled(keys, tile), torch.full((5,), 40), 6)
    assert all({7, 30} <= set(row) and len(set(row)) == 6 for row in got.tolist())
    assert (got.diff(dim=1) > 0).all()
