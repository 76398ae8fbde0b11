"""kill -9 at any moment: what was acknowledged is there, what was not is either whole or absent, nothing piles up."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dsv4_engine.prefix_cache import Kind, PrefixStore

from .store_common import chain, consistent, fill, object_files, payload, right, script

# Writes chains until it is killed; says which object is safe after each.
WRITER = """
import os, random, sys
from pathlib import Path
from dsv4_engine.prefix_cache import PrefixStore
from store_common import chain, payload
folder, seed, budget = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
numbers = random.Random(seed)
with PrefixStore.open(folder, budget=budget) as store:
    os.write(1, b"ready\\n")
    while True:
        number = numbers.randrange(1000)
        for position, link in enumerate(chain(number, 6)):
            for kind in ("rows", "state"):
                if store.write(link, kind, payload(link.key, kind)):
                    os.write(1, f"{number} {position} {kind}\\n".encode())
            if numbers.random() < 0.1:
                store.touch([link.key])
            if numbers.random() < 0.1:
                os.write(1, f"{number} {position} discarded\\n".encode())  # from here on it may be gone
                store.discard(link.key, "state")
"""


def killed_writer(folder: Path, seed: int, budget: int, safe: set[tuple[int, int, Kind]]) -> None:
    """Run the writer and kill it at a random moment.  ``safe`` is brought up to what it had said to be safe."""
    process = script(WRITER, folder, seed, budget)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(random.Random(seed).random() ** 2 * 0.25)
    process.kill()
    said = process.stdout.read().decode().split("\n")[:-1]
    assert process.wait() == -signal.SIGKILL
    for line in said:
        number, position, what = line.split()
        if what == "discarded":
            safe.discard((int(number), int(position), "state"))
        else:
            safe.add((int(number), int(position), "rows" if what == "rows" else "state"))


def kill_often(folder: Path, rounds: int) -> None:
    plenty, tight = 10**9, 400_000
    safe: set[tuple[int, int, Kind]] = set()
    for seed in range(rounds):
        # Every third one also evicts, which takes from what earlier ones had made safe.
        budget = tight if seed % 3 == 2 else plenty
        killed_writer(folder, seed, budget, safe)
        with PrefixStore.open(folder, budget=plenty) as store:
            assert store.notices == []
            if budget == tight:
                safe.clear()
            for number, position, kind in safe:
                link = chain(number, position + 1)[position]
                assert store.read(link.key, kind) == payload(link.key, kind)
            for number in range(0, 1000, 50):
                right(store, chain(number, 6))
        consistent(folder)


def test_ten_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, 10)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    kill_often(tmp_path, 200)


# ---- at every line ---------------------------------------------------------------------------------------------------


def dies_at(line: int, work: Callable[[], None]) -> bool:
    """Do ``work`` in a forked process that kills itself at the ``line``-th executed line of the store's own code.

    Returns whether it got so far.
    """
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if "prefix_cache" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        code = 1
        try:
            sys.settrace(trace)
            work()
            sys.settrace(None)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"the work itself failed, to be killed at line {line}"
    return False


def sweep(tmp_path: Path, name: str, work: Callable[[PrefixStore], None], step: int) -> None:
    """Kill at each ``step``-th line from opening to closing a store that holds a chain, and look at what is left."""
    held, written = chain(1, 3), chain(2, 3)
    line, reached = 1, True
    while reached:
        folder = tmp_path / f"{name}{line}"
        with PrefixStore.open(folder) as store:
            fill(store, held)

        def all_of_it(folder: Path = folder) -> None:
            with PrefixStore.open(folder) as store:
                work(store)

        reached = dies_at(line, all_of_it)
        with PrefixStore.open(folder) as store:
            assert store.notices == []
            if name != "evict":
                assert right(store, held) == 3
            right(store, written)
            unfinished = [path for path in (folder / "v1/staging").iterdir() if path.suffix == ".part"]
            assert unfinished == []
        consistent(folder)
        with PrefixStore.open(folder) as store:
            fill(store, [*held, *written])
            assert right(store, held) == right(store, written) == 3
            assert store.notices == []
        line += step
    assert line > 300


WORK: dict[str, Callable[[PrefixStore], None]] = {
    "write": lambda store: fill(store, chain(2, 2)),
    "evict": lambda store: store.prune(1000) and None,
    "discard": lambda store: [store.discard(link.key, "state") for link in chain(1, 3)] and None,  # type: ignore[func-returns-value]
}


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("name", sorted(WORK))
def test_killed_at_some_lines(tmp_path: Path, name: str) -> None:
    sweep(tmp_path, name, WORK[name], 97)


@pytest.mark.slow
@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("name", sorted(WORK))
def test_killed_at_every_line(tmp_path: Path, name: str) -> None:
    sweep(tmp_path, name, WORK[name], 1)


@pytest.mark.usefixtures("unsynced")
def test_killed_while_the_index_is_made_again(tmp_path: Path) -> None:
    links = chain(1, 3)
    line, reached = 1, True
    while reached:
        folder = tmp_path / str(line)
        with PrefixStore.open(folder) as store:
            fill(store, links)
        for path in (folder / "v1").glob("index*"):
            path.write_bytes(b"broken" * 2000)

        def look(folder: Path = folder) -> None:
            with PrefixStore.open(folder) as store:
                store.find([links[0].key])

        reached = dies_at(line, look)
        with PrefixStore.open(folder) as store:
            assert right(store, links) == 3
        consistent(folder)
        assert {path.suffix for path in (folder / "v1").glob("index*")} == {".sqlite"}
        line += 61
    assert line > 200


# ---- several processes -----------------------------------------------------------------------------------------------

SAME = """
import os, sys
from pathlib import Path
from dsv4_engine.prefix_cache import PrefixStore
from store_common import chain, fill, right
folder, budget = Path(sys.argv[1]), int(sys.argv[2])
with PrefixStore.open(folder, budget=budget) as store:
    os.write(1, b"ready\\n")
    sys.stdin.readline()
    for number in range(8):
        links = chain(number, 6)
        if budget > 10**6:
            fill(store, links)
            assert right(store, links) == 6
        else:
            for link in links:
                store.write(link, "rows", link.key * 500)
            for entry in store.find([link.key for link in links]):
                content = store.read(entry.key, "rows")
                assert content in (None, entry.key * 500)
        store.touch([link.key for link in links])
    assert not [text for text in store.notices if "full" not in text], store.notices
"""


@pytest.mark.parametrize("budget", [10**9, 200_000])
def test_processes_write_the_same_prefixes(tmp_path: Path, budget: int) -> None:
    """Also where each evicts what the others wrote."""
    processes = [script(SAME, tmp_path, budget) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None and select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.communicate(b"go\n")
    assert [process.returncode for process in processes] == [0, 0, 0]
    consistent(tmp_path)
    with PrefixStore.open(tmp_path) as store:
        if budget == 10**9:
            assert all(right(store, chain(number, 6)) == 6 for number in range(8))
            assert len(object_files(tmp_path)) == 8 * 6 * 2
        else:
            # Each looks at the budget before it writes, so three together may exceed it by two objects.
            assert store.stats().size <= budget + 2 * 17_000


def test_one_is_killed_while_others_write(tmp_path: Path) -> None:
    for seed in range(2):
        other = script(SAME, tmp_path, 10**9)
        killed_writer(tmp_path, seed, 10**9, set())
        assert other.communicate(b"go\n") is not None
        assert other.returncode == 0
    consistent(tmp_path)
