"""What a terminal gets and what a pipe gets; the table of exceptions; sizes; the reference page."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from dsv4cli import errors, options, output
from dsv4cli.answering import Screen
from dsv4cli.reference import reference

from .conftest import Cli, environment

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_styles_and_control_characters_on_a_terminal_only() -> None:
    text = "a\x1b]0;title\x07b\r\x9bc\n\té"
    pipe, terminal = io.StringIO(), Terminal()
    output.write(text, pipe, "dim")
    output.write(text, terminal, "dim")
    assert pipe.getvalue() == text
    assert terminal.getvalue() == "\x1b[2ma\ufffd]0;title\ufffdb\ufffd\ufffdc\n\té\x1b[0m"


def test_progress_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream, drawn in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr("sys.stderr", stream)
        with output.progress_bar("reading the prompt", "tokens") as progress:
            progress(512, 1024)
        assert ("reading the prompt" in stream.getvalue()) is drawn
        assert ("512 of 1,024 tokens" in stream.getvalue()) is drawn


def test_table_is_plain_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    output.table("Things", ["name", "size"], [["[b]one[/b]", "5 B"], ["two" * 50, "1,024 B"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Things"
    assert lines[2].startswith("[b]one[/b] ")
    assert lines[2].endswith("  5 B".rjust(len(" 1,024 B")))
    assert lines[3] == "two" * 50 + "  1,024 B"


def test_thinking_and_answer_never_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(sys.stderr)
    screen.think("Hm.")
    screen.think(" So.")
    screen.answer("Yes")
    screen.answer(".\n")
    screen.close()
    assert capsys.readouterr().err == "Hm. So.\nYes.\n"


def test_numbers() -> None:
    assert output.file_size(0) == "0 B"
    assert output.file_size(1536) == "1.5 KiB"
    assert output.file_size(159_609_485_896) == "148.6 GiB"
    assert output.short_count(13_300_000_000) == "13.3 B"
    assert output.short_count(12) == "12"
    assert output.per_second(10, 0.0) == 0.0


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("128K", 131_072), ("1M", 1_048_576), ("1.5k", 1536)])
def test_sizes(text: str, tokens: int) -> None:
    assert options.parse_size(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "1G", "K", "1.0001K", "one", "1e6", "inf"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        options.parse_size(text)


def test_the_table_of_exceptions() -> None:
    import torch

    from dsv4_engine.errors import CheckpointError, DownloadError

    for error, code, words in [
        (errors.InputProblem("no", "Do."), 2, "no"),
        (CheckpointError("bad shard", "Again."), 2, "bad shard"),
        (DownloadError("line broke", "Again."), 1, "line broke"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "no such file or directory: x"),
        (OSError(28, "No space left on device"), 1, "no space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "memory ran out"),
        (MemoryError(), 1, "memory ran out"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "'x' is missing"),
        (KeyboardInterrupt(), 130, "stopped"),
        (AssertionError("odd\nsecond line"), 1, "dsv4 failed: AssertionError: odd"),
        (RuntimeError(), 1, "dsv4 failed: RuntimeError"),
    ]:
        report = errors.explain(error)
        assert (report.code, words in report.message) == (code, True), report
    assert errors.explain(CheckpointError("bad shard", "Again.")).hint == "Again."


def test_a_bug_is_one_line_and_a_traceback_on_request(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr("dsv4cli.files.read_paths", fail)
    done = cli("run", "Why?")
    assert done.code == 1
    assert done.err.splitlines()[0] == "error: dsv4 failed: RuntimeError: surprise"
    monkeypatch.setenv(errors.DEBUG_ENV, "1")
    assert "Traceback" in cli("run", "Why?").err


def test_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert page == reference(), "write it again: python -m dsv4cli.reference > docs/cli.md"


def test_help_has_examples(cli: Cli) -> None:
    for command in ("run", "chat", "download", "inspect", "doctor"):
        done = cli(command, "--help")
        assert done.code == 0
        assert "Examples:" in done.out
        assert f"dsv4 {command}" in done.out
    assert cli("--version").out.startswith("dsv4 ")


def test_module_and_a_terminal_that_knows_only_ascii() -> None:
    settings = {**environment(), "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", "dsv4cli", "--help"], env=settings, capture_output=True, check=True)
    assert b"Run DeepSeek-V4" in done.stdout
    assert os.linesep.encode() in done.stdout


def test_readme_has_the_two_commands_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for name, words in (("ask", "dsv4 run"), ("tests", "pytest")):
        command = re.search(rf"<!-- ci: {name} -->\s*```sh\n(.*?)```", text, re.S)
        assert command is not None
        assert words in command[1]
        assert "-c constraints.txt" in command[1]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_and_named_modules_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    rooms = [ROOT, *(ROOT / folder for folder in ("dsv4cli", "engine/dsv4_engine", "kernels/dsv4_kernels"))]
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any((room / name).exists() for room in rooms), name


def test_constraints_name_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["dev"]]
    while own := [line for line in lines if line.startswith("dsv4[")]:  # dev takes other extras in by name
        lines = [line for line in lines if line not in own]
        lines += [line for name in own for line in extras[name[len("dsv4[") : -1]]]
    wanted = {re.split(r"[<>=\[;]", line)[0] for line in lines}
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert {line.split("==")[0] for line in lines} == wanted
    assert "torch==2.13.0" in lines
