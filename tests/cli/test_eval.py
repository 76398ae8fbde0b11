"""`dsv4 eval`: runs with the random model, tables and JSON, resuming, and every kind of wrong input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv4_evals.record import Line, Record, read_run
from dsv4_evals.task import Cell
from dsv4_evals.tasks.needle import Needle
from dsv4cli import eval_run
from dsv4cli.output import duration
from support.fake_model import FakeModel

from .conftest import Cli, environment


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A haystack of one's own: byte tokens make 1K of context a few sentences."""
    file = tmp_path / "notes.txt"
    file.write_text("\n\n".join(f"On day {i} nothing much happened. It rained. We read a book." for i in range(99)))
    return file


SHORT = ("--ctx", "1K", "--depths", "0,100", "--max-tokens", "4")


def test_a_run_leaves_a_table_and_files(cli: Cli, model: Path, notes: Path) -> None:
    done = cli("eval", "needle", "--model", model, "--file", notes, *SHORT, "--out", "out")
    assert done.code == 0, done.err
    for words in ("needle · model", "1,024", "0.0%", "95%", "absent", "of V3.2", "FLOPs", "samples and results: out"):
        assert words in done.out.replace(str(model), "model")
    run, lines = read_run(Path("out"))
    assert len(lines) == 4
    assert run.identity["options"] == {"depths": [0, 100]}
    assert (run.identity["haystack"]["name"], run.identity["settings"]["max_tokens"]) == ("files", 4)
    assert {line.completion_tokens for line in lines} <= {1, 2, 3, 4}
    found = json.loads(Path("out/results.json").read_text("utf-8"))
    assert found["finished"] and found["questions"]["done"] == 4


def test_json_is_one_document_and_its_folder(cli: Cli, model: Path, notes: Path) -> None:
    done = cli("eval", "needle", "--model", model, "--file", notes, *SHORT, "--json")
    assert done.code == 0
    found = done.json
    assert re.fullmatch(r"dsv4-eval/needle-model\w*-[0-9a-f]{8}", found["out"])
    on_disk = json.loads(Path(found["out"], "results.json").read_text("utf-8"))
    assert {**on_disk, "out": found["out"]} == found
    (row,) = found["by_length"]
    assert (row["ctx"], row["count"], row["negatives"]["count"]) == (1024, 2, 2)
    assert row["measured_kv_bytes"] > 0 and row["kv_bytes_v32"] > row["kv_bytes"] > 0


def test_the_same_command_goes_on_and_another_begins_anew(cli: Cli, model: Path, notes: Path) -> None:
    command = ("eval", "needle", "--model", model, "--file", notes, *SHORT)
    first = cli(*command, "--json").json
    again = cli(*command, "--json")
    assert "2 of 2 samples are done" in again.err
    assert again.json["out"] == first["out"]
    assert len(again.json) == len(first)
    assert cli(*command, "--seed", "1", "--json").json["out"] != first["out"]
    refused = cli(*command, "--seed", "1", "--out", first["out"])
    assert (refused.code, "seed was 0, now it is 1" in refused.err) == (2, True)


def test_a_batch_asks_all_needles_behind_one_reading(cli: Cli, model: Path) -> None:
    done = cli("eval", "needle-batch", "--model", model, "--ctx", "2K", "--needles", "6", "--max-tokens", "2", "--json")
    assert done.code == 0, done.err
    assert done.json["questions"]["ok"] + done.json["questions"]["no_answer"] == 6
    lines = read_run(Path(done.json["out"]))[1]
    assert [line.seconds["context"] > 0 for line in lines] == [True] + [False] * 5
    assert [line.cached_tokens > 0 for line in lines] == [False] + [True] * 5
    assert all(
        line.diagnostics and [layer["layer"] for layer in line.diagnostics["layers"]] == [1, 3] for line in lines
    )


def test_a_dry_run_counts_and_writes_nothing(cli: Cli, model: Path, notes: Path) -> None:
    command = ("eval", "needle", "--model", model, "--file", notes, "--ctx", "1K,4K", "--samples", "3", "--dry-run")
    planned = cli(*command)
    assert planned.code == 0, planned.err
    for words in ("planned", "1,024", "4,096", "30 samples", "tokens to read", "memory: up to"):
        assert words in planned.out
    found = cli(*command, "--json").json
    assert (found["samples"], found["questions"], len(found["cells"])) == (30, 60, 30)
    assert found["seconds"] > 0 and found["memory"]["available"] > 0
    assert [row["ctx"] for row in found["by_length"]] == [1024, 4096]
    assert not Path("dsv4-eval").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("neddle",), "No such command 'neddle'"),
        (("needle", "--ctx", "4Q"), "'4Q' is not a number of tokens"),
        (("needle", "--ctx", "4K,4K"), "names something twice"),
        (("needle", "--ctx", "0"), "not a whole number of at least 1"),
        (("needle", "--depths", "0,101"), "'101' is not a number from 0 to 100"),
        (("needle", "--depths", "-1"), "'-1' is not a number from 0 to 100"),
        (("needle", "--depths", "deep"), "'deep' is not a number"),
        (("needle", "--samples", "0"), "greater than or equal to 1"),
        (("needle", "--needles", "5"), "No such option"),
        (("needle", "--temperature", "3"), "'3' is not a number from 0 to 2"),
        (("needle", "--endpoint-body", "[1]"), "not a JSON object"),
        (("needle-batch", "--needles", "20000"), "20000"),
        (("needle", "--file", "/nowhere.txt"), "no such file"),
        (("needle", "--model", "/nowhere"), "/nowhere"),
    ],
)
def test_wrong_input_is_told_and_costs_nothing(cli: Cli, arguments: tuple[str, ...], told: str) -> None:
    done = cli("eval", *arguments)
    assert done.code == 2
    assert told in " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.err).split())
    assert not Path("dsv4-eval").exists()


def test_lengths_beyond_the_model_are_refused_with_what_it_holds(cli: Cli, model: Path) -> None:
    done = cli("eval", "needle", "--model", model, "--ctx", "1K,8K")
    assert done.code == 2
    assert "8,192 tokens are more than the 4,096" in done.err
    assert "hint:" in done.err
    assert not Path("dsv4-eval").exists()


def test_a_length_that_holds_no_sample_is_refused(cli: Cli, model: Path, notes: Path) -> None:
    done = cli("eval", "needle", "--model", model, "--file", notes, "--ctx", "256")
    assert done.code == 2
    assert "does not fit" in done.err and "Give at least" in done.err


def test_a_folder_of_something_else_is_refused(cli: Cli, model: Path, notes: Path) -> None:
    done = cli("eval", "needle", "--model", model, "--file", notes, *SHORT, "--out", notes.parent)
    assert done.code == 2
    assert "not empty and holds no run" in done.err


def test_text_that_runs_out_is_said(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words stand here.\n" * 5)
    done = cli("eval", "needle", "--model", model, "--file", "short.txt", *SHORT)
    assert done.code == 0
    assert "longer samples repeat it" in done.err


def test_ctrl_c_keeps_what_was_answered_and_the_same_command_ends_it(model: Path, notes: Path, cli: Cli) -> None:
    command = ["eval", "needle", "--model", str(model), "--file", str(notes), *SHORT, "--samples", "12"]
    whole = cli(*command, "--out", "whole", "--json").json
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4cli", *command, "--out", "cut", "--no-cache"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    samples = Path("cut/samples.jsonl")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (samples.exists() and samples.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "cut keeps what was answered" in err
    kept = len(read_run(Path("cut"))[1])
    assert 0 < kept < 48
    found = cli(*command, "--out", "cut", "--json")
    assert found.json["by_cell"] == whole["by_cell"]
    assert sorted((line.cell, line.question, line.prompt, line.answer) for line in read_run(Path("cut"))[1]) == sorted(
        (line.cell, line.question, line.prompt, line.answer) for line in read_run(Path("whole"))[1]
    )


def test_ctrl_c_while_the_first_answer_goes_to_the_disk_keeps_it(
    model: Path, notes: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == "samples.jsonl":
            monkeypatch.setattr("os.fsync", fsync)
            raise KeyboardInterrupt
        fsync(descriptor)

    fsync = os.fsync
    monkeypatch.setattr("os.fsync", once)
    done = cli("eval", "needle", "--model", model, "--file", notes, *SHORT, "--out", "cut")
    assert done.code == 130
    assert "cut keeps what was answered" in done.err
    assert json.loads(Path("cut/results.json").read_text("utf-8"))["questions"]["done"] == 1


def test_help_names_every_task_with_an_example(cli: Cli) -> None:
    overview = cli("eval", "--help")
    for name in ("needle", "needle-batch"):
        assert name in overview.out
        assert f"dsv4 eval {name}" in cli("eval", name, "--help").out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min 00 s"), (260, "4 min 20 s"), (11_100, "3 h 05 min")]
)
def test_durations_are_told_to_the_precision_that_matters(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_folder_name_follows_from_the_run_alone() -> None:
    identity = {"task": "kv", "seed": 1, "model": {"name": "/models/v4/flash/", "fingerprint": "x"}}
    name = eval_run.folder_of(identity)
    assert name == eval_run.folder_of(dict(reversed(list(identity.items()))))
    assert str(name).startswith("dsv4-eval/kv-flash-")
    assert eval_run.folder_of({**identity, "seed": 2}) != name


class Clock:
    """A time that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(eval_run.time, "monotonic", lambda: self.now)


def screen(tmp_path: Path, shown: list[tuple[float, str, str]] | None) -> tuple[eval_run._Screen, list[Cell], Record]:
    cells = Needle().cells([1000, 3000], 1, 0, {"depths": [0, 50]})
    record = Record.open(tmp_path / "run", {}, 1 << 20, len(cells), {})
    update = None if shown is None else lambda share, doing, left: shown.append((share, doing, left))
    model = FakeModel()
    model.cost = lambda prompt, completion: None  # type: ignore[method-assign, assignment]  # work is counted in tokens
    return eval_run._Screen(cells, model, record, update), cells, record


def answered(cell: Cell, score: float) -> Line:
    return Line(
        cell.id, 0, 1, "needle", cell.ctx, 0, cell.params, {}, "", "", "ok", score, "", "", "stop", "", 8, 9, 0, 2,
        {}, None, None, None,
    )  # fmt: skip


def test_the_time_left_follows_the_work_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(monkeypatch), []
    watch, cells, record = screen(tmp_path, shown)
    with record:
        watch.begins(cells[0])
        assert shown[-1] == (0.0, "sample 1 of 4, building", "")
        watch.reads(0, 1000)
        clock.now += 9
        watch.reads(1000, 1000)  # nine tenths of 1,000 of 8,000 tokens' work in 9 s
        assert shown[-1] == (pytest.approx(0.9 / 8), "sample 1 of 4, 1,000 of 1,000 tokens", "1 min 11 s left")
        clock.now += 1
        watch.answered(answered(cells[0], 1.0))
        assert shown[-1] == (pytest.approx(1 / 8), "sample 1 of 4, 1 of 1 answers", "1 min 10 s left")
        watch.ends(cells[0])
        watch.begins(cells[1])
        watch.reads(500, 1000)  # the cache had half of it: no time passed, and what is left got less
        assert shown[-1] == (pytest.approx(1.45 / 8), "sample 2 of 4, 500 of 1,000 tokens", "1 min 06 s left")
        clock.now += 5.5
        watch.reads(1000, 1000)
        watch.answered(answered(cells[1], 0.0))
        watch.ends(cells[1])
        watch.begins(cells[2])
        assert shown[-1] == (pytest.approx(2 / 8), "sample 3 of 4, building", "1 min 00 s left")


def test_without_a_terminal_each_sample_is_a_line_and_so_is_each_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    watch, cells, record = screen(tmp_path, None)
    with record:
        watch.begins(cells[0])
        watch.reads(0, 1000)
        clock.now += 59
        watch.reads(500, 1000)
        assert capsys.readouterr().err == ""
        clock.now += 2
        watch.reads(600, 1000)
        assert capsys.readouterr().err.startswith(f"1/4 {cells[0].id}: 600 of 1,000 tokens, ")
        watch.answered(answered(cells[0], 1.0))
        watch.ends(cells[0])
        assert capsys.readouterr().err == f"1/4 {cells[0].id}: 1.00, 7 min 07 s left\n"
