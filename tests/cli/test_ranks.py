"""One command in two processes of torchrun: rank 0 alone speaks, and an error ends them all."""

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import environment

ROOT = Path(__file__).resolve().parents[2]
FACT = "One of the special magic numbers for kettle is: 4829173.\nThe weather was fine.\n"
QUESTION = "What is the special magic number for kettle mentioned in the provided text?"


def dsv4(*arguments: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dsv4cli", *arguments],
        cwd=ROOT,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_one_answer_comes_from_two_processes_and_from_their_cache(tmp_path: Path) -> None:
    fact, cache = tmp_path / "fact.txt", tmp_path / "cache"
    fact.write_text(FACT)
    for _ in range(2):  # the second one starts from the state on the disk, which the other process is sent
        done = dsv4("run", QUESTION, "--file", str(fact), "--temperature", "0", "--cache-dir", str(cache))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("4829173") == 1
        assert done.stderr.count("tokens in") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "?", "--file", "no-such-file"), "no such file or folder"),
        (("run", "?", "--model", "no-such-model"), "unknown model 'no-such-model'"),
    ],
)
def test_an_error_is_said_once_and_ends_all(arguments: tuple[str, ...], message: str) -> None:
    done = dsv4(*arguments)
    assert done.returncode != 0
    assert done.stderr.count(f"error: {message}") == 1


@pytest.mark.slow
def test_a_count_that_does_not_divide_the_heads_is_refused() -> None:
    done = dsv4("run", "?", count=3)
    assert done.returncode != 0 and "3 processes cannot share" in done.stderr


@pytest.mark.slow
def test_help_ends() -> None:
    done = dsv4("--help")
    assert done.returncode == 0 and done.stdout.count("Usage") == 1
