"""What a run's lines come to: means by length, cell and depth, negatives apart, effective length, diagnostics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from dsv4_evals.record import Line, Run
from dsv4_evals.results import effective_length, results


def line(ctx: int, score: float | None, sample: int = 0, question: int = 0, **changes: Any) -> Line:
    values: dict[str, Any] = {
        "cell": f"t/{ctx}/{changes.get('params')}/{sample}", "question": question, "questions": 1, "task": "t",
        "ctx": ctx, "seed": 0, "params": {}, "facts": {}, "expected": "", "prompt": "", "status": "ok", "score": score,
        "answer": "x", "reasoning": "", "finish": "stop", "message": "", "max_tokens": 8, "prompt_tokens": ctx - 8,
        "cached_tokens": 0, "completion_tokens": 4,
        "seconds": {"build": 0.0, "context": 2.0 if question == 0 else 0.0, "prefill": 0.5, "decode": 1.5},
        "kv_bytes": 10 * ctx, "cost": None, "diagnostics": None,
    }  # fmt: skip
    values |= changes
    values["params"] = {**values["params"], "sample": sample}
    return Line(**values)


def found(lines: Sequence[Line], cells: int | None = None, lengths: Sequence[int] = (4096,)) -> dict[str, Any]:
    run = Run(
        {"task": "t", "lengths": list(lengths)},
        1 << 20,
        len({one.cell for one in lines}) if cells is None else cells,
        [{"about": {}}],
    )
    document = results(run, lines)
    json.dumps(document, allow_nan=False)
    return document


@pytest.mark.parametrize(
    ("means", "length"),
    [
        ([(4096, 1.0), (8192, 0.9), (16384, 0.86), (32768, 0.2)], 16384),
        ([(4096, 1.0), (8192, 0.84), (16384, 1.0)], 4096),  # a length in between counts too
        ([(8192, 0.9), (4096, 0.5)], 8192),
        ([(4096, 0.8), (8192, 0.68)], 8192),  # exactly 85%
        ([(4096, 0.0), (8192, 1.0)], None),
        ([(4096, None), (8192, 1.0)], None),
        ([(4096, 1.0), (8192, None)], 4096),
        ([], None),
    ],
)
def test_effective_length(means: list[tuple[int, float | None]], length: int | None) -> None:
    assert effective_length(means) == length


def test_means_by_length_and_cell() -> None:
    lines = [line(8192, float(i < 3), i, params={"depth": 50}) for i in range(4)]
    lines += [line(4096, 1.0, i, params={"depth": depth}) for i in range(4) for depth in (0, 50)]
    document = found(lines)
    assert [(row["ctx"], row["mean"], row["count"]) for row in document["by_length"]] == [
        (4096, 1.0, 8),
        (8192, 0.75, 4),
    ]
    assert [(row["ctx"], row["params"], row["mean"], row["count"]) for row in document["by_cell"]] == [
        (4096, {"depth": 0}, 1.0, 4), (4096, {"depth": 50}, 1.0, 4), (8192, {"depth": 50}, 0.75, 4)
    ]  # fmt: skip
    assert [(row["depth"], row["mean"]) for row in document["by_depth"]] == [(0.0, 1.0), (50.0, 1.0), (50.0, 0.75)]
    assert document["score"]["mean"] == pytest.approx(11 / 12)
    assert document["effective_length"] == 4096
    assert document["finished"]


def test_samples_that_have_the_size_they_have_have_no_effective_length() -> None:
    lines = [line(4096, 1.0), line(8192, 1.0)]
    assert found(lines)["effective_length"] == 8192
    assert found(lines, lengths=())["effective_length"] is None


def test_depths_of_questions_are_taken_by_tenths() -> None:
    depths = [*(i * 5 + 2.5 for i in range(20)), 0, 100]
    lines = [line(4096, float(i % 2), 0, i, questions=22, facts={"depth": depth}) for i, depth in enumerate(depths)]
    rows = found(lines, cells=1)["by_depth"]
    assert [(row["depth"], row["count"]) for row in rows] == [
        (10.0 * i + 5, 3 if i in (0, 9) else 2) for i in range(10)
    ]


def test_statuses_are_counted_and_unscored_questions_are_in_no_mean() -> None:
    lines = [
        line(4096, 1.0, 0),
        line(4096, 0.0, 1, status="no_answer"),
        line(4096, None, 2, status="too_long", completion_tokens=0),
        line(4096, None, 3, status="error", completion_tokens=0),
    ]
    document = found(lines)
    (row,) = document["by_length"]
    assert (row["mean"], row["count"]) == (0.5, 2)
    assert [row[status] for status in ("ok", "no_answer", "too_long", "error")] == [1, 1, 1, 1]
    assert row["prompt_tokens"] == 4088  # of what was asked
    assert not document["finished"]  # the error is tried again
    assert document["cells"] == {"planned": 4, "done": 3}


def test_negatives_are_averaged_apart() -> None:
    lines = [line(4096, 1.0), line(4096, 0.0, 0, 1, facts={"negative": True})]
    document = found(lines, cells=1)
    assert (document["score"]["mean"], document["negatives"]["mean"]) == (1.0, 0.0)
    (row,) = document["by_length"]
    assert (row["mean"], row["negatives"]["count"]) == (1.0, 1)
    assert document["by_cell"][0]["count"] == 1
    assert found([line(4096, 1.0)])["negatives"] is None


def test_reading_is_counted_once_a_sample() -> None:
    (row,) = found([line(4096, 1.0, 0, 0), line(4096, 1.0, 0, 1), line(4096, 1.0, 1, 0)])["by_length"]
    assert row["seconds"] == {"context": 2.0, "prefill": 0.5, "decode": 1.5}
    assert row["measured_kv_bytes"] == 40960
    assert row["kv_bytes"] is None  # this model's costs are not known


def test_a_run_that_is_not_through_says_so() -> None:
    document = found([line(4096, 1.0)], cells=5)
    assert (document["finished"], document["cells"]) == (False, {"planned": 5, "done": 1})
    assert found([], cells=5)["score"]["mean"] is None


def diagnosis(chosen: bool, mod: int) -> dict[str, Any]:
    layers = [{"layer": 2, "value_found": chosen}, {"layer": 4, "value_found": True}]
    return {"in_window": False, "straddles_4": mod == 3, "straddles_128": False, "mod_4": mod, "layers": layers}


def test_diagnostics_split_the_scores() -> None:
    lines = [line(4096, float(i % 2), i, diagnostics=diagnosis(i % 2 == 1, i % 4)) for i in range(8)]
    split = found(lines)["diagnostics"]
    assert (split["in_window"]["yes"]["count"], split["in_window"]["no"]["count"]) == (0, 8)
    assert (split["straddles_4"]["yes"]["mean"], split["straddles_4"]["no"]["count"]) == (1.0, 6)
    assert [mean["mean"] for mean in split["mod_4"]] == [0.0, 1.0, 0.0, 1.0]
    first, second = split["chosen"]
    assert (first["layer"], first["yes"]["mean"], first["no"]["mean"]) == (2, 1.0, 0.0)
    assert (second["layer"], second["yes"]["mean"], second["no"]["count"]) == (4, 0.5, 0)
    assert found([line(4096, 1.0)])["diagnostics"] is None
