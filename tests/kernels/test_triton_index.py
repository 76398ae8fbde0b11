"""The indexer kernels against the exact choice; in Triton's interpreter where there is no GPU."""

import pytest
import torch

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.rounding import round_fp4
from dsv4_kernels.triton import index as kernel
from dsv4_kernels.triton.index import choose_entries, fold_queries
from support.index_case import IndexCase, grid_values, index_case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values


def choose(case: IndexCase, topk: int, queries: slice = slice(None), **options: int) -> torch.Tensor:
    q, weights = fold_queries(case.q[queries], case.weights[queries])
    table = case.segments[queries] if case.segments.shape[0] > 1 else case.segments
    return choose_entries(q, weights, case.position[queries], table, case.ratio, case.most, topk, **options)


def check(case: IndexCase, topk: int, sample: int = 10**9, **options: int) -> None:
    got = choose(case, topk, **options)
    for t in range(0, got.shape[0], max(1, got.shape[0] // sample)):
        assert torch.equal(got[t].long(), case.choice(t, topk)), f"query {t}"


@pytest.mark.parametrize(
    ("first", "queries", "heads", "channels", "topk"),
    [
        (0, 9, 2, 64, 2),  # from no entry on
        (1001, 3, 64, 128, 16),
        (62, 2, 4, 32, 40),  # all are chosen
        (900, 2, 3, 64, 100),
    ],
)
def test_choice(first: int, queries: int, heads: int, channels: int, topk: int) -> None:
    check(index_case(list(range(first, first + queries)), True, heads, channels, 4, DEVICE), topk)


def test_keys_of_several_sequences_are_unpacked_on_the_fly() -> None:
    check(index_case([1203, 20, 333], False, 4, 128, 4, DEVICE), 24)


def test_queries_in_several_slabs() -> None:
    case = index_case([700 + 3 * i for i in range(6)], True, 64, 64, 4, DEVICE)
    check(case, 12, scratch_bytes=1)


@pytest.mark.parametrize("positive", [True, False])
def test_equal_scores_go_to_the_lower_entry(positive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores equal: every entry is a candidate, more than a tile holds, in more groups than one holds."""
    monkeypatch.setattr(kernel, "CANDIDATES", 64)
    monkeypatch.setattr(kernel, "UNITS", 16)
    keys = grid_values(1, 64, device=DEVICE).expand(330, -1)
    case = index_case([4 * 330 - 1], True, 2, 64, 4, DEVICE, keys)
    case.weights[:] = 1.0 if positive else -1.0
    assert torch.equal(choose(case, 70)[0].long(), torch.arange(70, device=DEVICE))
    check(case, 70)


@pytest.mark.parametrize("count", [0, 39, 40, 41, 530])
def test_one_query_by_counting_and_step_by_step(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways choose alike, with ties (values on a grid) and without; the table may be made for more entries."""
    case = index_case([4 * count + 2], True, 4, 64, 4, DEVICE)
    for on_grid in (True, False):
        if not on_grid:
            case.q, case.weights = round_fp4(torch.randn_like(case.q)), torch.randn_like(case.weights)
        q, weights = fold_queries(case.q, case.weights)
        chosen = [choose_entries(q, weights, case.position, case.segments, 4, most, 40) for most in (count, count + 99)]
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "MOST", 0)
            chosen.append(choose_entries(q, weights, case.position, case.segments, 4, count, 40))
        assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])
        if on_grid:
            assert torch.equal(chosen[0][0].long(), case.choice(0, 40))


def test_no_queries() -> None:
    assert choose(index_case([], True, 2, 64, 4, DEVICE), 8).shape == (0, 8)


def test_a_choice_does_not_depend_on_the_neighbours() -> None:
    """Keys unpacked beforehand (several queries) and on the fly (one) give the same, in values off the grid too."""
    case = index_case([810, 811, 812], True, 4, 64, 4, DEVICE)
    case.q = round_fp4(torch.randn_like(case.q))
    case.weights = torch.randn_like(case.weights)
    together = choose(case, 30)
    for t in range(3):
        assert torch.equal(choose(case, 30, slice(t, t + 1))[0], together[t])


@pytest.mark.parametrize("spread", [0, 13])
def test_folding_is_exact(spread: int) -> None:
    x = round_fp4(
        torch.randn(5, 3, 128)
        * torch.randint(-spread, 1, (5, 3, 4, 1)).float().exp2().expand(-1, -1, -1, 32).flatten(2)
    )
    folded, weights = fold_queries(x, torch.ones(5, 3))
    back = folded.float() * weights[..., None]
    assert torch.equal(back[..., :64], x[..., 0::2]) and torch.equal(back[..., 64:], x[..., 1::2])


def test_refuses_other_queries() -> None:
    position = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="kv_dtype='mixed'"):
        choose_entries(torch.zeros(1, 2, 64), torch.zeros(1, 2), position, position[None], 4, 9, 2)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "queries"), [(63, 63), (9_000, 1000), (1_048_000, 300), (262_143, 2)])
def test_flash_shapes(first: int, queries: int) -> None:
    check(index_case(list(range(first, first + queries)), True, 64, 128, 4, DEVICE), 512, sample=40)


@pytest.mark.gpu
def test_decoding_a_batch() -> None:
    positions = [(977 * i * i) % 1_048_576 for i in range(40)]
    check(index_case(positions, False, 64, 128, 4, DEVICE), 512, sample=40)
    check(index_case([1_048_575], True, 64, 128, 4, DEVICE), 1024)


@pytest.mark.gpu
def test_all_equal_at_full_length() -> None:
    keys = grid_values(1, 128, device=DEVICE).expand(262_144, -1)
    case = index_case([1_048_575, 1_048_575], True, 64, 128, 4, DEVICE, keys)
    assert torch.equal(choose(case, 512), torch.arange(512, device=DEVICE, dtype=torch.int32).expand(2, -1))


@pytest.mark.gpu
def test_choices_do_not_depend_on_chunk_or_neighbours() -> None:
    """Random values, so that scores differ in their last bits: one query alone takes another path than many."""
    case = index_case(list(range(500_000, 500_150)), True, 64, 128, 4, DEVICE)
    case.q = round_fp4(torch.randn_like(case.q))
    case.weights = torch.randn_like(case.weights)
    together = choose(case, 512)
    assert torch.equal(choose(case, 512), together)
    for part in (slice(0, 1), slice(3, 10), slice(77, 78), slice(1, 150), slice(149, 150)):
        assert torch.equal(choose(case, 512, part), together[part])
