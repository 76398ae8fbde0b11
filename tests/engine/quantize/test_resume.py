"""kill -9 at any moment, Ctrl-C, a full disk: the folder says that it is unfinished, and going on gives the same bytes.

Kills are real: a forked process counts every write, flush, rename and removal, and kills itself at the n-th, half-way
through where it is a write.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_engine import Engine
from dsv4_engine.errors import InputError
from dsv4_engine.quantize import DiskProblem, Paused, folder, job, quantize, run

from .quantize_common import contents, small_units, source

ROOT = Path(__file__).resolve().parents[3]
EVENTS = ("pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "ftruncate", "posix_fallocate")


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((job, "UNIT_VALUES"), (run, "STEP_VALUES"), (run, "SAVE_BYTES")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    small_units()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return source(tmp_path / "source")


@pytest.fixture
def whole(tmp_path: Path, checkpoint: Path) -> dict[str, bytes]:
    """The files of a job that nobody interrupted."""
    quantize(checkpoint, tmp_path / "whole")
    return contents(tmp_path / "whole")


def count_events(at: int, then: Callable[[], None]) -> Callable[[], int]:
    """Patch this process for good: ``then`` is called at event ``at``, half-way through if it is a write."""
    seen = 0

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == at:
                if name == "pwrite":
                    handle, data, offset = arguments
                    real(handle, data[: len(data) // 2], offset)
                then()
            return real(*arguments, **more)

        setattr(os, name, call)

    for name in EVENTS:
        counted(name)
    return lambda: seen


def killed_at(event: int, checkpoint: Path, out: Path, workers: int) -> bool:
    """Run the job in a forked process that dies at this event; whether it did, or came to its end before."""
    child = os.fork()
    if child == 0:
        count_events(event, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            quantize(checkpoint, out, workers=workers)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def all_events(checkpoint: Path, out: Path) -> int:
    """How many there are in an uninterrupted run."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            seen = count_events(0, lambda: None)
            quantize(checkpoint, out, workers=1)
            os.write(writer, str(seen()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        return int(said.read())


def loadable(out: Path) -> bool:
    try:
        Engine.load(out)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_anywhere(tmp_path: Path, checkpoint: Path, whole: dict[str, bytes], workers: int) -> None:
    total = all_events(checkpoint, tmp_path / "counted")
    assert contents(tmp_path / "counted") == whole and total > 100
    # Anywhere, and at the steps of the end, where files get their names.
    last = range(total - 30, total + 1, 2 if workers == 1 else 15)
    points = {1, 2, *random.Random(workers).sample(range(3, total - 30), 6), *last}
    whole_when_killed = 0
    for point in sorted(points):
        out = tmp_path / f"killed-{point}"
        died = killed_at(point, checkpoint, out, workers)
        assert died or workers > 1  # with several workers the number of flushes varies a little
        if loadable(out):
            left = contents(out)
            left.pop(folder.JOURNAL, None)
            assert left == whole
            whole_when_killed += 1
        if died:
            assert finish(checkpoint, out) == whole
    assert whole_when_killed <= 4


def finish(checkpoint: Path, out: Path) -> dict[str, bytes]:
    """Run the command again, which finds the result finished only if it was."""
    if (out / "config.json").exists() and not (out / folder.JOURNAL).exists():
        return contents(out)
    quantize(checkpoint, out, workers=2)
    return contents(out)


def test_killed_again_and_again(tmp_path: Path, checkpoint: Path, whole: dict[str, bytes]) -> None:
    """Each run gets a little further, for what is done is not done again."""
    out, numbers, runs = tmp_path / "out", random.Random(5), 0
    while killed_at(numbers.randrange(50, 110), checkpoint, out, workers=2):
        runs += 1
        assert runs < 60
    assert runs >= 2
    assert contents(out) == whole


def test_what_is_done_is_not_done_again(
    tmp_path: Path, checkpoint: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    units, real = list[tuple[int, int]](), run._do
    monkeypatch.setattr(run, "_do", lambda handle, unit: units.append(unit.key) or real(handle, unit))
    stop_at(tmp_path / "out", checkpoint, 0.6)
    first = set(units)
    units.clear()
    quantize(checkpoint, tmp_path / "out")
    again = first & set(units)
    everything = {unit.key for shard in job.plan_job(checkpoint, "published").shards for unit in shard.units()}
    assert first | set(units) == everything and 0 < len(first) < len(everything)
    assert len(again) <= 10  # what was under way and not yet counted as done
    assert contents(tmp_path / "out") == whole


def stop_at(out: Path, checkpoint: Path, share: float, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Ctrl-C after this share of the bytes."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise error

    with pytest.raises(error):
        quantize(checkpoint, out, workers=2, progress=progress)
    assert (out / folder.JOURNAL).is_file() and not (out / "config.json").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, checkpoint: Path, whole: dict[str, bytes]) -> None:
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told == 20:
            raise KeyboardInterrupt

    with pytest.raises(Paused) as caught:
        quantize(checkpoint, tmp_path / "out", progress=progress)
    assert "goes on" in caught.value.hint
    assert len((tmp_path / "out" / folder.JOURNAL).read_bytes().splitlines()) >= 19  # nothing finished is lost
    quantize(checkpoint, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_progress_goes_on_where_it_was(tmp_path: Path, checkpoint: Path) -> None:
    stop_at(tmp_path / "out", checkpoint, 0.5)
    told = list[int]()
    quantize(checkpoint, tmp_path / "out", progress=lambda done, total: told.append(done))
    assert told[0] > 0 and told == sorted(told)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_damaged_journal_costs_work_and_nothing_else(
    tmp_path: Path, checkpoint: Path, whole: dict[str, bytes], share: float
) -> None:
    """Cut anywhere, with rubbish at the end, or with zeros where a power cut lost the last lines."""
    for number, rubbish in enumerate((b"", b"[1,2", b"\0" * 100, b"\0\n[[\n")):
        out = tmp_path / str(number)
        stop_at(out, checkpoint, 0.8)
        journal = out / folder.JOURNAL
        text = journal.read_bytes()
        head = text.index(b"\n") + 1
        journal.write_bytes(text[: head + int(share * (len(text) - head))] + rubbish)
        quantize(checkpoint, out)
        assert contents(out) == whole


def test_a_lost_shard_is_made_again(tmp_path: Path, checkpoint: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    stop_at(out, checkpoint, 0.7)
    parts = sorted(out.glob("*.part"))
    assert len(parts) >= 2
    parts[0].unlink()
    with parts[1].open("r+b") as file:
        file.truncate(1000)
    quantize(checkpoint, out)
    assert contents(out) == whole


def test_unfinished_work_of_another_job_is_kept(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    stop_at(out, checkpoint, 0.5)
    before = contents(out)
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    other = source(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="unfinished work of another job") as caught:
        quantize(other, out)
    assert str(out) in caught.value.hint
    os.utime(file, ns=(1, 1))  # the same source, written again since
    with pytest.raises(InputError, match="unfinished work of another job"):
        quantize(checkpoint, out)
    assert contents(out) == before


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, checkpoint: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done > total / 2:
            os.utime(checkpoint / "model-00001-of-00003.safetensors", ns=(1, 1))

    with pytest.raises(InputError, match="was changed while it was read"):
        quantize(checkpoint, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_source_that_is_cut_while_it_is_read(tmp_path: Path, checkpoint: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done == 0:
            with (checkpoint / "model-00003-of-00003.safetensors").open("r+b") as file:
                file.truncate(20_000)

    with pytest.raises(InputError, match=r"model-00003.* became shorter"):
        quantize(checkpoint, tmp_path / "out", progress=progress)


# ---- a full disk -----------------------------------------------------------------------------------------------------

FULL_DISK = """
import os, shutil, sys
from pathlib import Path
from dsv4_engine.quantize import DiskProblem, quantize
from quantize_common import contents, small_units
disk, source, whole, reserves = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "reserves"
small_units()
if not reserves:
    import errno
    def refuse(*arguments): raise OSError(errno.EOPNOTSUPP, "no room can be reserved here")
    os.posix_fallocate = refuse
filler, out = disk / "filler", disk / "out"

def progress(done, total):
    if total / 4 < done and not filler.exists():
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)): pass
            except OSError: pass

try:
    quantize(source, out, progress=progress, workers=2)
except DiskProblem as error:
    assert "no space left" in str(error) and "same command" in error.hint, error
else:
    raise AssertionError("the disk never filled up")
assert not (out / "config.json").exists()
before = len((out / "quantize.journal").read_bytes().splitlines())
assert before > 1
try:  # still full: refused before anything is written
    quantize(source, out)
except (ValueError, DiskProblem) as error:
    print(error)
else:
    raise AssertionError("it cannot have fitted")
filler.unlink()
quantize(source, out)
assert contents(out) == contents(whole)
"""


@pytest.mark.parametrize("how", ["reserves", "does not reserve"])
def test_a_disk_that_fills_up(tmp_path: Path, checkpoint: Path, whole: dict[str, bytes], how: str) -> None:
    """A tmpfs in a mount namespace of its own, filled by somebody else half-way; with and without reserved room."""
    own = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-U", "-r", "-m"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to make a mount namespace with")
    tried = subprocess.run([*own, "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine allows no mounts: {tried.stderr.strip()}")
    paths = [str(ROOT / name) for name in (".", "engine", "kernels", "tests")] + [str(Path(__file__).parent)]
    command = 'mount -t tmpfs -o size=4m none "$1" && exec "$@"'
    script = [str(disk), str(checkpoint), str(tmp_path / "whole"), how]
    done = subprocess.run(
        [*own, "sh", "-c", f'disk="$1"; shift; {command.replace("$1", "$disk")}', "sh", str(disk), sys.executable,
         "-c", FULL_DISK, *script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "more on disk" in done.stdout


def test_no_space_is_told_beforehand(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    with pytest.raises(InputError, match=r"takes [\d.]+ KiB more on disk, and .*out has 1000 B free") as caught:
        quantize(checkpoint, tmp_path / "new" / "out")
    assert "Free " in caught.value.hint
    assert not (tmp_path / "new").exists()


def test_other_failures_of_the_disk(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = 0, os.pwrite

    def fail(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DiskProblem, match="input/output error"):
        quantize(checkpoint, tmp_path / "out")
    monkeypatch.undo()


def test_the_journal_is_small_and_readable(tmp_path: Path, checkpoint: Path) -> None:
    stop_at(tmp_path / "out", checkpoint, 0.5)
    lines = (tmp_path / "out" / folder.JOURNAL).read_text().splitlines()
    assert json.loads(lines[0])["scheme"] == "published"
    assert max(map(len, lines[1:])) < folder._LINE_BYTES
