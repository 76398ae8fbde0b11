"""Two runs of the same task, question by question: who is better, by how much, and how sure that is.

Only questions that both runs scored are compared, and each with itself: what makes a sample hard for both cancels.
Pure arithmetic on record lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from .errors import RunError
from .record import Line, Run
from .stats import paired_difference

# Parts of a run's identity that may differ: the thing compared, and how much was asked.
_WHAT_IS_COMPARED = {"model", "settings", "lengths", "samples", "haystack"}


def compare(first: tuple[Run, Sequence[Line]], second: tuple[Run, Sequence[Line]]) -> dict[str, Any]:
    """The second run against the first, as JSON values.

    "difference" is second minus first with its 95% interval; "better", "worse", "equal" count questions; "negatives"
    are questions whose right answer is that there is none, and in no other row; "unpaired" those that only one run
    scored; "other_prompts" pairs whose prompts were not the same tokens (another tokenizer, or another text to hide
    things in).  Raises RunError for other tasks, and when no question is in both.
    """
    (run_a, lines_a), (run_b, lines_b) = first, second
    tasks = run_a.identity["task"], run_b.identity["task"]
    if tasks[0] != tasks[1]:
        raise RunError(f"one run is of {tasks[0]}, the other of {tasks[1]}", "Compare two runs of one task.")
    scored_a, scored_b = _scored(lines_a), _scored(lines_b)
    both = sorted(scored_a.keys() & scored_b.keys(), key=lambda key: (scored_a[key].ctx, key))
    if not both:
        raise RunError(
            "the two runs have no scored question in common",
            "Run both with the same --ctx, --samples and --seed.",
        )
    pairs = [(scored_a[key], scored_b[key]) for key in both]
    there = [pair for pair in pairs if not pair[0].negative]
    absent = [pair for pair in pairs if pair[0].negative]
    return {
        "format": "dsv4-eval-comparison",
        "version": 1,
        "task": tasks[0],
        "first": run_a.identity,
        "second": run_b.identity,
        "other_options": sorted(
            name
            for name in {*run_a.identity, *run_b.identity} - _WHAT_IS_COMPARED
            if run_a.identity.get(name) != run_b.identity.get(name)
        ),
        "unpaired": len(scored_a.keys() ^ scored_b.keys()),
        "other_prompts": sum(a.prompt != b.prompt for a, b in pairs),
        "all": _row(there) if there else None,
        "negatives": _row(absent) if absent else None,
        "by_length": [{"ctx": ctx, **_row(list(some))} for ctx, some in groupby(there, lambda pair: pair[0].ctx)],
        "changed": [
            {"cell": a.cell, "question": a.question, "first": a.score, "second": b.score}
            for a, b in pairs
            if a.score != b.score
        ],
    }


def _scored(lines: Sequence[Line]) -> dict[tuple[str, int], Line]:
    return {(line.cell, line.question): line for line in lines if line.score is not None}


def _row(pairs: Sequence[tuple[Line, Line]]) -> Mapping[str, Any]:
    firsts, seconds = [a.score or 0.0 for a, _ in pairs], [b.score or 0.0 for _, b in pairs]
    differences = [b - a for a, b in zip(firsts, seconds, strict=True)]
    low, high = paired_difference(differences, [a.cell for a, _ in pairs])
    return {
        "count": len(pairs),
        "first": sum(firsts) / len(pairs),
        "second": sum(seconds) / len(pairs),
        "difference": sum(differences) / len(pairs),
        "low": low,
        "high": high,
        "better": sum(d > 0 for d in differences),
        "worse": sum(d < 0 for d in differences),
        "equal": sum(d == 0 for d in differences),
    }
