"""Means of scores and how far they can be trusted: Wilson's interval for right-or-wrong, the bootstrap for the rest.

Questions behind one context stand or fall together, so the context is the unit: shares get fewer effective
observations by their design effect, the bootstrap draws whole contexts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

Z95 = 1.959963984540054
RESAMPLES = 4000


@dataclass(frozen=True)
class Mean:
    """A mean score with its 95% interval.  count: scores in it; without any, all but the count is None."""

    mean: float | None
    low: float | None
    high: float | None
    count: int
    method: Literal["wilson", "bootstrap"] | None


def mean_of(scores: Sequence[float], groups: Sequence[Hashable]) -> Mean:
    """The mean of scores from 0 to 1.  groups: which context each score belongs to, in the same order."""
    if not scores:
        return Mean(None, None, None, 0, None)
    mean = math.fsum(scores) / len(scores)
    if all(score in (0.0, 1.0) for score in scores):
        low, high = wilson(mean, len(scores) / design_effect(scores, groups))
        return Mean(mean, low, high, len(scores), "wilson")
    low, high = bootstrap(scores, groups)
    return Mean(mean, low, high, len(scores), "bootstrap")


def wilson(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share of ``count`` independent observations, which need not be whole.

    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (0.0 if share == 0 else max(0.0, middle - half)), (1.0 if share == 1 else min(1.0, middle + half))


def design_effect(scores: Sequence[float], groups: Sequence[Hashable]) -> float:
    """How many of these scores are worth one independent score, at least 1 (Kish; Rao and Scott 1992).

    The variance of the mean over whole groups, divided by what independent scores would have.  One group, or
    scores that are all the same, show no such variance.
    """
    residuals: dict[Hashable, float] = {}
    mean = math.fsum(scores) / len(scores)
    for score, group in zip(scores, groups, strict=True):
        residuals[group] = residuals.get(group, 0.0) + score - mean
    alone = mean * (1 - mean) * len(scores)
    if len(residuals) in (1, len(scores)) or alone == 0:
        return 1.0
    together = math.fsum(r * r for r in residuals.values()) * len(residuals) / (len(residuals) - 1)
    return min(max(1.0, together / alone), float(len(scores)))


def bootstrap(scores: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """Percentile interval of the mean over 4,000 draws of whole groups, or of scores where there is one group only.

    A single score says nothing about others: the interval is everything.  The draws are the same each time.
    """
    import numpy as np

    if len(scores) == 1:
        return 0.0, 1.0
    members: dict[Hashable, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        members.setdefault(group, []).append(score)
    units = list(members.values()) if len(members) > 1 else [[score] for score in scores]
    sums, sizes = np.array([math.fsum(unit) for unit in units]), np.array([len(unit) for unit in units])
    draws = np.random.default_rng(0).integers(0, len(units), (RESAMPLES, len(units)))
    low, high = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(differences: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """95% interval of the mean of paired differences, each from -1 to 1: the bootstrap over whole contexts.

    Where all differences are the same there is nothing to draw from.  Wilson's bound then says how large a share of
    others could have been missed, each of them at worst 1 away.
    """
    if len(set(differences)) == 1:
        missed = wilson(0.0, len(set(groups)))[1]
        value = differences[0]
        return max(-1.0, value - missed), min(1.0, value + missed)
    return bootstrap(differences, groups)
