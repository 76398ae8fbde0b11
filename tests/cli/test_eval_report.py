"""`dsv4 eval report` and `compare` over runs on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv4_evals.record import Line, Record
from dsv4cli.main import app

SETTINGS = {"max_tokens": None, "temperature": 0.0, "top_p": 1.0, "thinking": "none", "thinking_tokens": 0}


def _write(folder: Path, scores: dict[tuple[int, int], float], task: str = "needle", seed: int = 0) -> Path:
    identity: dict[str, Any] = {
        "task": task, "lengths": [1024, 4096], "samples": 1, "seed": seed, "options": {}, "settings": SETTINGS,
        "haystack": None, "model": {"name": "tiny", "fingerprint": "0" * 64},
    }  # fmt: skip
    with Record.open(folder, identity, 1 << 20, len(scores), {"device": "cpu"}) as record:
        for (ctx, depth), score in scores.items():
            cell = f"{task}/ctx={ctx}/seed={seed}/depth={depth}"
            record.add(
                Line(
                    cell,
                    0,
                    1,
                    task,
                    ctx,
                    seed,
                    {"depth": depth},
                    {},
                    ["1"],
                    cell,
                    "ok",
                    score,
                    "1",
                    "",
                    "stop",
                    "",
                    32,
                    ctx - 32,
                    0,
                    5,
                    {"build": 0.0, "context": 1.0, "prefill": 0.1, "decode": 0.2},
                    1000,
                    None,
                    None,
                )
            )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    scores = {(1024, 0): 1.0, (1024, 50): 0.0, (4096, 0): 1.0, (4096, 50): 0.0}
    return _write(tmp_path / "a", scores), _write(tmp_path / "b", scores | {(1024, 50): 1.0})


def _dsv4(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_report_shows_tables_and_writes_page_and_plot(runs: tuple[Path, Path]) -> None:
    done = _dsv4("report", runs[0])
    assert done.exit_code == 0, done.output
    assert "1,024" in done.output and "50.0%" in done.output and "depth" in done.output
    assert (runs[0] / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert (runs[0] / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(_dsv4("report", runs[0], "--json").stdout)
    assert found["score"]["mean"] == 0.5 and found["out"] == str(runs[0])


def test_compare(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = _dsv4("compare", *runs, "--html", page)
    assert done.exit_code == 0, done.output
    assert "+50.0" in done.output and "+25.0" in done.output
    assert "+25.0" in page.read_text("utf-8")
    found = json.loads(_dsv4("compare", *runs, "--json").stdout)
    assert found["all"]["better"] == 1 and found["all"]["worse"] == 0


def test_wrong_folders_and_other_tasks(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = _write(tmp_path / "c", {(1024, 0): 1.0}, task="kv")
    for arguments, words in (
        (("report", tmp_path), "holds no run"),
        (("compare", runs[0], tmp_path / "none"), "holds no run"),
        (("compare", runs[0], other), "of one task"),
        (("compare", runs[0], _write(tmp_path / "d", {(1024, 0): 1.0}, seed=1)), "same --ctx"),
        (("compare", *runs, "--html", tmp_path / "none" / "page.html"), "there is no folder"),
    ):
        done = _dsv4(*arguments)
        assert done.exit_code == 2 and words in done.output, done.output
