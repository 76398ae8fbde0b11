"""Intervals against published values and simulation, and against each other at their edges."""

from __future__ import annotations

import random

import pytest

from dsv4_evals.stats import bootstrap, design_effect, mean_of, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3, without continuity correction
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0),
    ],
)  # fmt: skip
def test_wilson_agrees_with_published_intervals(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right / count, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_no_scores_have_no_mean() -> None:
    found = mean_of([], [])
    assert (found.mean, found.low, found.high, found.count, found.method) == (None, None, None, 0, None)


def test_the_method_follows_the_scores() -> None:
    assert mean_of([1.0, 0.0, 1.0], ["a", "b", "c"]).method == "wilson"
    assert mean_of([1.0, 0.5, 1.0], ["a", "b", "c"]).method == "bootstrap"


def test_questions_that_stand_and_fall_together_count_as_one() -> None:
    scores = [1.0] * 10 + [0.0] * 10
    groups = ["a"] * 10 + ["b"] * 10
    assert design_effect(scores, groups) == 20.0  # the contexts differ as much as can be
    apart = mean_of(scores, list(range(20)))
    together = mean_of(scores, groups)
    assert apart.mean == together.mean == 0.5
    assert together.low is not None and apart.low is not None and together.low < apart.low - 0.1


def test_independent_questions_in_groups_keep_most_of_their_number() -> None:
    rng = random.Random(1)
    scores = [float(rng.random() < 0.7) for _ in range(400)]
    assert design_effect(scores, [i // 10 for i in range(400)]) < 1.8
    assert design_effect(scores, list(range(400))) == 1.0
    assert design_effect(scores, [0] * 400) == 1.0
    assert design_effect([1.0] * 10, [0, 1] * 5) == 1.0


def test_wilson_over_groups_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(7)
    covered = 0
    for _ in range(400):
        scores, groups = [], []
        for group in range(12):  # each context has its own share of right answers
            share = min(1.0, max(0.0, rng.gauss(0.6, 0.2)))
            scores += [float(rng.random() < share) for _ in range(15)]
            groups += [group] * 15
        found = mean_of(scores, groups)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert 0.88 <= covered / 400 <= 0.99


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(8)
    covered = 0
    for _ in range(150):
        scores = [rng.betavariate(2, 3) for _ in range(40)]
        low, high = bootstrap(scores, list(range(40)))
        covered += low <= 0.4 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_the_bootstrap_draws_whole_groups_and_repeats_itself() -> None:
    scores = [0.2, 0.2, 0.2, 0.9, 0.9, 0.9]
    low, high = bootstrap(scores, list("aaabbb"))
    assert (low, high) == (pytest.approx(0.2), pytest.approx(0.9))
    assert bootstrap(scores, list("aaabbb")) == (low, high)
    narrow = bootstrap(scores, list("abcdef"))
    assert narrow[0] > 0.25 and narrow[1] < 0.85


def test_one_score_says_nothing_about_others() -> None:
    found = mean_of([0.4], ["a"])
    assert (found.mean, found.low, found.high) == (0.4, 0.0, 1.0)
