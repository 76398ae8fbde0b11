"""A run on disk: resumed after any kill, refused when it is another run, and never torn."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dsv4_evals.errors import RunError
from dsv4_evals.record import Line, Record, read_run

IDENTITY: dict[str, Any] = {"task": "needle", "seed": 0, "model": {"name": "fake", "fingerprint": "f"}}


def line(cell: str = "a", question: int = 0, **changes: Any) -> Line:
    base = Line(
        cell=cell, question=question, questions=2, task="needle", ctx=4096, seed=0, params={"sample": 0}, facts={},
        expected="7", prompt="00", status="ok", score=1.0, answer="7\u2028\x85 ok", reasoning="", finish="stop",
        message="", max_tokens=128, prompt_tokens=10, cached_tokens=0, completion_tokens=3,
        seconds={"build": 0.0, "context": 0.0, "prefill": 0.0, "decode": 0.0}, kv_bytes=1, cost=None, diagnostics=None,
    )  # fmt: skip
    return replace(base, **changes)


def start(folder: Path, identity: dict[str, Any] = IDENTITY, cells: int = 3) -> Record:
    return Record.open(folder, identity, 4096, cells, {"device": "none"})


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    with start(tmp_path / "out") as record:
        for new in (line(), line(question=1), line("b", score=None, status="error", message="down")):
            record.add(new)
    run, lines = read_run(tmp_path / "out")
    assert lines == [line(), line(question=1), line("b", score=None, status="error", message="down")]
    assert (run.identity, run.ctx, run.cells, run.about) == (IDENTITY, 4096, 3, {"device": "none"})


def test_a_second_start_knows_what_is_settled(tmp_path: Path) -> None:
    with start(tmp_path) as record:
        record.add(line())
        record.add(line(question=1, status="error", score=None))
        record.add(line("b", status="no_answer", score=0.0))
    with start(tmp_path) as record:
        assert record.settled("a", 0)
        assert not record.settled("a", 1)
        assert not record.cell_settled("a")
        assert not record.cell_settled("b")  # it has a second question
        assert not record.cell_settled("c")
        record.add(line(question=1))
        assert record.cell_settled("a")
        assert len(record.run.starts) == 2
    assert [found.status for found in read_run(tmp_path)[1]] == ["ok", "ok", "no_answer"]


def test_a_kill_at_any_byte_loses_at_most_the_last_line(tmp_path: Path) -> None:
    with start(tmp_path) as record:
        record.add(line())
        record.add(line(question=1))
    whole = (tmp_path / "samples.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (0, 1, first - 1, first, first + 1, first + 40, len(whole) - 1, len(whole)):
        (tmp_path / "samples.jsonl").write_bytes(whole[:cut])
        with start(tmp_path) as record:
            assert len(record.lines) == (cut >= first) + (cut == len(whole))
            record.add(line("z"))
        rows = (tmp_path / "samples.jsonl").read_bytes().splitlines()
        assert json.loads(rows[-1])["cell"] == "z"
        assert all(json.loads(row) for row in rows)


def test_ctrl_c_between_a_line_and_its_count_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes longest, so that is where Ctrl-C falls."""
    with start(tmp_path) as record:
        record.add(line())
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                record.add(line(question=1))
        record.reread()
        assert record.lines == read_run(tmp_path)[1] == [line(), line(question=1)]
        record.add(line("z"))
    assert read_run(tmp_path)[1] == [line(), line(question=1), line("z")]


def interrupted(descriptor: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("left", [["samples.jsonl"], [".run.json.part"], ["samples.jsonl", ".run.json.part"], []])
def test_a_kill_in_the_first_moment_leaves_nothing_in_the_way(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("", "utf-8")
    start(tmp_path).close()
    assert read_run(tmp_path)[1] == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"task": "kv"}, 'task was "needle", now it is "kv"'),
        ({"model": {"name": "fake", "fingerprint": "g"}}, 'model.fingerprint was "f"'),
        ({"more": 1}, "more was null"),
    ],
)
def test_another_run_is_refused_and_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with start(tmp_path) as record:
        record.add(line())
    before = (tmp_path / "samples.jsonl").read_bytes(), (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunError, match="holds another run") as caught:
        start(tmp_path, {**IDENTITY, **change})
    assert named in str(caught.value)
    assert ((tmp_path / "samples.jsonl").read_bytes(), (tmp_path / "run.json").read_bytes()) == before


def test_two_processes_cannot_write_the_same_run(tmp_path: Path) -> None:
    with start(tmp_path), pytest.raises(RunError, match="another process"):
        start(tmp_path)
    start(tmp_path).close()


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("", "utf-8")
    with pytest.raises(RunError, match=r"not empty.*thesis\.tex"):
        start(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        start(tmp_path / "thesis.tex")
    with pytest.raises(RunError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "damage", ["{}", "null", "not json", json.dumps({**asdict(line()), "status": "fine"}), '{"cell": "a"}']
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    with start(tmp_path) as record:
        record.add(line())
    with (tmp_path / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(damage + "\n")
    with pytest.raises(RunError, match="line 2"):
        start(tmp_path)
    with pytest.raises(RunError, match="line 2"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}', '{"format": "dsv4-eval", "version": 2}'])
def test_a_damaged_or_foreign_run_file_is_an_error(tmp_path: Path, content: str) -> None:
    start(tmp_path).close()
    (tmp_path / "run.json").write_text(content, "utf-8")
    with pytest.raises(RunError, match=r"run\.json"):
        start(tmp_path)


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    with start(tmp_path) as record:
        record.write_results({"a": 1})
        record.write_results({"b": 2})
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == {"b": 2}
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".part")]
