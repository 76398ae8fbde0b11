"""`dsv4 eval` with every native task but the needles: its flags reach the task, and wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4_evals.record import read_run
from dsv4_evals.tasks import TASKS

from .conftest import Cli, write_model

# A length that holds a sample in tokens of a byte, flags that change it, what the record then says, and its questions.
OWN = {
    "ruler": ("2K", ("--tasks", "niah_single_2,fwe"), {"tasks": ["niah_single_2", "fwe"]}, 2),
    "graphwalks": ("5K", ("--operations", "bfs", "--bfs-depth", "2"), {"operations": ["bfs"], "bfs_depth": 2}, 1),
    "kv": ("2K", ("--depths", "0,100"), {"depths": [0, 100]}, 2),
    "passkey": ("1K", ("--depths", "50", "--digits", "7"), {"depths": [50], "digits": 7}, 1),
    "variable-tracking": ("1K", ("--chains", "2", "--hops", "1"), {"chains": 2, "hops": 1}, 1),
    "mrcr-style": ("3K", ("--needles", "2"), {"needles": 2}, 2),
    "corpus-agg": ("3K", ("--reports", "10"), {"reports": 10}, 4),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers noise, with room for samples in tokens of a byte."""
    return write_model(tmp_path_factory.mktemp("long_model"), max_position_embeddings=8192)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_native_tasks_are_commands_and_tested_here(cli: Cli) -> None:
    assert set(TASKS) == {"needle", "needle-batch", *OWN}
    shown = cli("eval", "--help").out
    assert all(name in shown for name in (*TASKS, "mrcr"))


@pytest.mark.parametrize("name", OWN)
def test_a_run_of_each_task_is_recorded_with_its_options(name: str, cli: Cli, model: Path) -> None:
    ctx, flags, options, questions = OWN[name]
    done = cli("eval", name, "--model", model, "--ctx", ctx, *flags, "--max-tokens", "2", "--out", "out", "--json")
    assert done.code == 0, done.err
    run, lines = read_run(Path("out"))
    assert run.identity["options"] == options and run.identity["task"] == name
    assert (run.identity["haystack"] is None) == (name in ("graphwalks", "kv"))
    assert len(lines) == questions == done.json["questions"]["done"]
    assert all(line.status in ("ok", "no_answer") and line.prompt_tokens > line.ctx / 2 for line in lines)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("ruler", "--tasks", "niah_single_9"), "niah_single_9"),
        (("graphwalks", "--operations", "dfs"), "dfs"),
        (("graphwalks", "--bfs-depth", "9"), "--bfs-depth"),
        (("kv", "--depths", "101"), "101"),
        (("passkey", "--digits", "2"), "--digits"),
        (("variable-tracking", "--hops", "0"), "--hops"),
        (("mrcr-style", "--needles", "1"), "--needles"),
        (("corpus-agg", "--reports", "9"), "--reports"),
        (("mrcr", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("mrcr",), "--data"),
    ],
)
def test_wrong_flags_are_refused_and_named(command: tuple[str, ...], said: str, cli: Cli, model: Path) -> None:
    done = cli("eval", *command, "--model", model)
    assert done.code == 2 and said in done.err and not Path("dsv4-eval").exists()


def test_a_length_that_is_too_short_says_which(cli: Cli, model: Path) -> None:
    done = cli("eval", "mrcr-style", "--model", model, "--ctx", "1K", "--out", "out")
    assert done.code == 2 and "mrcr-style/ctx=1024" in done.err and "does not fit" in done.err


def mrcr_file(path: Path) -> Path:
    messages = [
        {"role": "user", "content": "write a poem about tapirs"},
        {"role": "assistant", "content": "Tapirs in the sun. " * 250},
        {"role": "user", "content": "write a poem about tapirs"},
        {"role": "assistant", "content": "Tapirs in the rain."},
        {"role": "user", "content": "Prepend aYooSG8CQg to the 2nd (1 indexed) poem about tapirs."},
    ]
    record = {
        "prompt": json.dumps(messages),
        "answer": "aYooSG8CQgTapirs in the rain.",
        "random_string_to_prepend": "aYooSG8CQg",
        "n_needles": 2,
        "desired_msg_index": 2,
        "total_messages": 5,
        "n_chars": 5000,
    }
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


def test_official_mrcr_files_are_asked_by_bins(cli: Cli, model: Path) -> None:
    command = ("eval", "mrcr", "--model", model, "--data", mrcr_file(Path("mrcr.jsonl")), "--max-tokens", "3")
    done = cli(*command, "--ctx", "8K", "--needles", "2", "--samples", "5", "--json")
    assert done.code == 0, done.err
    assert done.json["questions"]["done"] == 1 and done.json["run"]["haystack"] is None
    _, (line,) = read_run(Path(done.json["out"]))
    assert (line.ctx, line.facts["record"], line.expected["prefix"]) == (8192, "mrcr.jsonl:1", "aYooSG8CQg")
    refused = cli(*command, "--ctx", "8K", "--needles", "4")
    assert refused.code == 2 and "no record with 4 needles" in refused.err
    refused = cli(*command, "--ctx", "5K", "--needles", "2")
    assert refused.code == 2 and "no bin of MRCR" in refused.err
