"""A run's lines in numbers: means by length, cell and depth, effective length, costs, and what diagnostics show.

Pure arithmetic on record lines.  A question that was too long or failed has no score and is in no mean; questions
whose right answer is "not there" are averaged apart from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from .record import FORMAT, STATUSES, Line, Run
from .stats import mean_of

# The share of the shortest length's score that a length must keep to count as mastered (RULER's idea of an effective
# length, relative to the model's own score instead of another model's).
EFFECTIVE_SHARE = 0.85
_COSTS = ("kv_bytes", "kv_bytes_v32", "flops", "flops_v32", "flops_raw", "flops_raw_v32")
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_SECONDS = ("context", "prefill", "decode")


def results(run: Run, lines: Sequence[Line]) -> dict[str, Any]:
    """The document of results.json (values are JSON values; shares and scores from 0 to 1)."""
    lines = sorted(lines, key=lambda line: line.ctx)
    by_length = [{"ctx": ctx, **_length(list(some))} for ctx, some in groupby(lines, lambda line: line.ctx)]
    means = [(row["ctx"], row["mean"]) for row in by_length]  # of no length in particular where samples have their own
    built = {line.cell: line.questions for line in lines}
    settled = dict.fromkeys(built, 0)
    for line in lines:
        settled[line.cell] += line.status != "error"
    done = sum(settled[cell] == count for cell, count in built.items())
    return {
        "format": f"{FORMAT}-results",
        "version": 1,
        "run": run.identity,
        "about": run.about,
        "finished": done == run.cells,
        "cells": {"planned": run.cells, "done": done},
        "questions": {"done": len(lines), **_statuses(lines)},
        "score": _mean(_positive(lines)),
        "negatives": _negatives(lines),
        "by_length": by_length,
        "by_cell": _grouped(lines, lambda line: {"params": _kind(line)}),
        "by_depth": _grouped(
            [line for line in lines if depth_of(line) is not None], lambda line: {"depth": depth_of(line)}
        ),
        "effective_length": effective_length(means) if run.identity.get("lengths") else None,
        "effective_share": EFFECTIVE_SHARE,
        "diagnostics": _diagnostics([line for line in _positive(lines) if line.diagnostics and line.score is not None]),
    }


def effective_length(means: Iterable[tuple[int, float | None]]) -> int | None:
    """The longest of these lengths up to which every one keeps EFFECTIVE_SHARE of the shortest one's score.

    None where the shortest has no score, or 0.
    """
    effective, first = None, None
    for ctx, mean in sorted(means):
        first = mean if first is None else first
        if not first or mean is None or mean < EFFECTIVE_SHARE * first:
            break
        effective = ctx
    return effective


def depth_of(line: Line) -> float | None:
    """The depth a line belongs to, in percent: its cell's own, else the middle of its question's tenth of the text."""
    if "depth" in line.params:
        return float(line.params["depth"])
    return min(9, line.facts["depth"] // 10) * 10 + 5.0 if "depth" in line.facts else None


def _positive(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if not line.negative]


def _negatives(lines: Iterable[Line]) -> dict[str, Any] | None:
    some = [line for line in lines if line.negative]
    return _mean(some) if some else None


def _mean(lines: Iterable[Line]) -> dict[str, Any]:
    scored = [(line.score, line.cell) for line in lines if line.score is not None]
    return asdict(mean_of([score for score, _ in scored], [cell for _, cell in scored]))


def _statuses(lines: Sequence[Line]) -> dict[str, int]:
    return {status: sum(line.status == status for line in lines) for status in STATUSES}


def _length(lines: Sequence[Line]) -> dict[str, Any]:
    """One row of the table by length; costs, tokens and seconds are means over the questions that were asked."""
    asked = [line for line in lines if line.completion_tokens]
    row = {**_mean(_positive(lines)), **_statuses(lines), "negatives": _negatives(lines)}
    row |= {name: _average([getattr(line, name) for line in asked]) for name in _TOKENS}
    first = [line for line in asked if line.question == 0]
    row["from_cache"] = _average([line.cached_tokens / line.prompt_tokens for line in first])
    row["measured_kv_bytes"] = _average([line.kv_bytes for line in asked])
    row |= {name: _average([line.cost[name] if line.cost else None for line in asked]) for name in _COSTS}
    row["seconds"] = {name: _average([line.seconds[name] for line in asked]) for name in _SECONDS}
    # The shared part is read once a sample, whichever of its questions comes first.
    samples = len({line.cell for line in asked})
    row["seconds"]["context"] = sum(line.seconds["context"] for line in asked) / samples if samples else None
    return row


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _kind(line: Line) -> dict[str, Any]:
    return {name: value for name, value in line.params.items() if name != "sample"}


def _grouped(lines: Iterable[Line], key: Callable[[Line], dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of positive lines that agree in length and key, in the order of their first line."""
    groups: dict[Hashable, tuple[dict[str, Any], list[Line]]] = {}
    for line in _positive(lines):
        shown = {"ctx": line.ctx, **key(line)}
        groups.setdefault(repr(shown), (shown, []))[1].append(line)
    return [{**shown, **_mean(some)} for shown, some in groups.values()]


def _diagnostics(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Scores split by how a needle lay, and by whether each layer's indexer chose its value."""
    found = [(line, line.diagnostics) for line in lines if line.diagnostics]
    if not found:
        return None

    def split(yes: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        sides = {name: [line for line, d in found if yes(d) == side] for name, side in (("yes", True), ("no", False))}
        return {name: _mean(side) for name, side in sides.items()}

    def layer_chose(place: int) -> Callable[[Mapping[str, Any]], bool]:
        return lambda d: bool(d["layers"][place]["value_found"])

    traced = [d["layers"] for _, d in found if d["layers"]]
    return {
        **{name: split(lambda d, name=name: bool(d[name])) for name in ("in_window", "straddles_4", "straddles_128")},  # type: ignore[misc]
        "mod_4": [_mean([line for line, d in found if d["mod_4"] == rest]) for rest in range(4)],
        "chosen": [{"layer": layer["layer"], **split(layer_chose(place))} for place, layer in enumerate(traced[0])]
        if len(traced) == len(found)
        else [],
    }
