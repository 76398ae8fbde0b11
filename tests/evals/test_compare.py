"""Paired comparisons and the pages of runs: numbers by hand, nothing taken for what it is not."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from dsv4_evals.compare import compare
from dsv4_evals.errors import RunError
from dsv4_evals.page import SHOWN_CHARACTERS, SHOWN_FAILURES, comparison_page, heat_map, run_page
from dsv4_evals.record import Line, Run
from dsv4_evals.results import results
from dsv4_evals.stats import paired_difference, wilson

SETTINGS = {"max_tokens": None, "temperature": 0.0, "top_p": 1.0, "thinking": "none", "thinking_tokens": 0}


def _run(model: str = "a", **changes: Any) -> Run:
    identity = {
        "task": "needle", "lengths": [1024, 4096], "samples": 1, "seed": 0, "options": {}, "settings": SETTINGS,
        "haystack": None, "model": {"name": model, "fingerprint": model * 64},
    }  # fmt: skip
    return Run(identity | changes, 1 << 20, 4, [{"at": "2026-01-01T00:00:00+00:00", "about": {"device": "cpu"}}])


def _line(ctx: int, depth: int, score: float | None, **changes: Any) -> Line:
    values: dict[str, Any] = {
        "cell": f"needle/ctx={ctx}/seed=0/depth={depth}", "question": 0, "questions": 1, "task": "needle", "ctx": ctx,
        "seed": 0, "params": {"depth": depth}, "facts": {}, "expected": ["1234567"], "prompt": f"{ctx}-{depth}",
        "status": "error" if score is None else "ok", "score": score, "answer": "7654321", "reasoning": "",
        "finish": "stop", "message": "", "max_tokens": 32, "prompt_tokens": ctx - 32, "cached_tokens": 0,
        "completion_tokens": 5, "seconds": {"build": 0.0, "context": 1.0, "prefill": 0.1, "decode": 0.2},
        "kv_bytes": 1000, "cost": None, "diagnostics": None,
    }  # fmt: skip
    return Line(**values | changes)


def test_pairs_are_compared_with_themselves() -> None:
    first = [_line(1024, 0, 1.0), _line(1024, 50, 0.0), _line(4096, 0, 0.0), _line(4096, 50, 1.0), _line(4096, 99, 1.0)]
    second = [_line(1024, 0, 1.0), _line(1024, 50, 1.0), _line(4096, 0, 0.5), _line(4096, 50, 0.0)]
    found = compare((_run("a"), first), (_run("b"), second))
    assert [row["ctx"] for row in found["by_length"]] == [1024, 4096]
    short, long = found["by_length"]
    assert (short["first"], short["second"], short["difference"]) == (0.5, 1.0, 0.5)
    assert (short["better"], short["worse"], short["equal"]) == (1, 0, 1)
    assert long["difference"] == pytest.approx(-0.25)
    assert found["all"]["difference"] == pytest.approx(0.125)
    assert found["all"]["low"] <= found["all"]["difference"] <= found["all"]["high"]
    assert found["unpaired"] == 1 and found["other_prompts"] == 0 and found["other_options"] == []
    assert {row["cell"] for row in found["changed"]} == {first[1].cell, first[2].cell, first[3].cell}
    json.dumps(found, allow_nan=False)


def test_absent_needles_are_a_row_of_their_own_and_failures_are_no_scores() -> None:
    lines = [_line(1024, 0, 1.0), _line(1024, 50, 0.0, facts={"negative": True}), _line(4096, 0, None)]
    found = compare((_run(), lines), (_run(), lines))
    assert found["all"]["count"] == 1 and found["negatives"]["count"] == 1 and found["unpaired"] == 0


def test_other_prompts_and_options_are_said() -> None:
    found = compare(
        (_run("a"), [_line(1024, 0, 1.0)]), (_run("b", options={"x": 1}), [_line(1024, 0, 1.0, prompt="other")])
    )
    assert found["other_prompts"] == 1 and found["other_options"] == ["options"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(RunError, match="ruler"):
        compare((_run(), [_line(1024, 0, 1.0)]), (_run(task="ruler"), [_line(1024, 0, 1.0)]))
    with pytest.raises(RunError, match="in common"):
        compare((_run(), [_line(1024, 0, 1.0)]), (_run(), [_line(1024, 5, 1.0)]))
    with pytest.raises(RunError, match="in common"):
        compare((_run(), [_line(1024, 0, 1.0)]), (_run(), [_line(1024, 0, None)]))


def test_equal_differences_leave_room_for_what_was_missed() -> None:
    low, high = paired_difference([0.0] * 10, range(10))
    assert (low, high) == (-wilson(0, 10)[1], wilson(0, 10)[1])
    assert paired_difference([1.0] * 10, range(10))[1] == 1.0
    # Ten questions behind one context are one observation.
    assert paired_difference([0.0] * 10, [0] * 10)[1] == wilson(0, 1)[1]
    low, high = paired_difference([1.0, 0.0] * 50, range(100))
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_the_page_of_a_run_is_whole_self_contained_and_escaped() -> None:
    evil = "<script>alert(1)</script>" + "x" * SHOWN_CHARACTERS
    lines = [_line(1024, 0, 1.0), _line(1024, 50, 0.0, answer=evil), _line(4096, 0, 1.0), _line(4096, 50, None)]
    page = run_page(results(_run(), lines), lines)
    parsed = _Page(page)
    assert parsed.outside == [] and "<script" not in page and "url(" not in page
    assert "<script>alert(1)</script>" in parsed.text  # as text
    assert f"up to {SHOWN_CHARACTERS} characters" in parsed.text and "…" in parsed.text
    assert re.search(r"1,024\s*50\.0%", parsed.text) and re.search(r"4,096\s*100\.0%", parsed.text)
    assert "needle/ctx=1024/seed=0/depth=50" in parsed.text


def test_many_failures_are_cut_and_counted() -> None:
    lines = [_line(1024, depth, 0.0) for depth in range(SHOWN_FAILURES + 7)]
    text = _Page(run_page(results(_run(), lines), lines)).text
    assert f"{SHOWN_FAILURES} of {SHOWN_FAILURES + 7}; samples.jsonl has all" in text


def test_a_run_without_a_score_has_a_page_too() -> None:
    lines = [_line(1024, 0, None, message="the endpoint is down")]
    assert "the endpoint is down" in _Page(run_page(results(_run(), lines), lines)).text
    assert _Page(run_page(results(_run(), []), [])).text


def test_the_page_of_a_comparison() -> None:
    lines = [_line(1024, 0, 1.0), _line(4096, 0, 0.0)]
    better = [_line(1024, 0, 1.0), _line(4096, 0, 1.0)]
    parsed = _Page(comparison_page(compare((_run("a"), lines), (_run("b"), better))))
    assert parsed.outside == [] and "+50.0" in parsed.text


def test_the_heat_map_leaves_out_what_was_not_asked() -> None:
    cells = [{"ctx": 4096, "depth": 50.0, "mean": 0.5}, {"ctx": 1024, "depth": 0.0, "mean": 1.0}]
    assert heat_map(cells) is None  # half of it would be empty
    assert heat_map([*cells, {"ctx": 4096, "depth": 0.0, "mean": 0.0}]) == {
        "lengths": [1024, 4096], "depths": [0.0, 50.0], "values": [[1.0, 0.0], [None, 0.5]],
    }  # fmt: skip
    assert heat_map(cells[:1]) is None
