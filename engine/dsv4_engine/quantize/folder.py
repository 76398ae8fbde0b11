"""The result's folder while it is made: what may be written where, what is done already, and the last step to a whole.

Owns the files' names and their order.  Shards are written as NAME.part beside a journal of finished units; both are
flushed to the disk before a unit counts.  When all is done shards get their names, and config.json, without which
nobody loads the folder, comes last.  So whenever a run ends, by whatever means, the folder is either unfinished and
says so, or whole.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dsv4_engine.accounting import readable_bytes
from dsv4_engine.checkpoint import INDEX_NAME
from dsv4_engine.errors import InputError

from .job import Job, Shard
from .rows import write_all

JOURNAL = "quantize.journal"
REPORT = "quantize.json"
CONFIG = "config.json"
_PART = ".part"
_COPY_BYTES = 1 << 20
_LINE_BYTES = 256  # of the journal, a generous guess for the check of space
# Another form of the same weights, or something a program left behind: not for the result.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".part", ".tmp")

Key = tuple[int, int]


class Folder:
    """An open result folder; ``done`` holds what the journal says of each finished unit, by its key."""

    def __init__(self, path: Path, job: Job, journal: int, done: dict[Key, list[Any]]) -> None:
        self.path, self.job, self.done = path, job, done
        self._journal = journal

    @classmethod
    @contextmanager
    def open(cls, path: Path, job: Job) -> Iterator[Folder]:
        """Take the folder for this job alone: made when missing, gone on with when it holds the job's beginning.

        Raises InputError, and writes nothing, when it cannot be used (see `begins`) or another run uses it.
        """
        path = _absolute(path)
        begins(path, job)
        held = _held(path)
        path.mkdir(parents=True, exist_ok=True)
        journal = os.open(path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path} is being written by another run", "Wait for it, or stop it first.") from None
            folder = cls(path, job, journal, _read_journal(path, job, journal))
            folder._forget_lost_shards()
            if held:
                _check_space(path, job, folder._allocated())
            yield folder
        finally:
            os.close(journal)

    # ---- while it is made --------------------------------------------------------------------------------------------

    @contextmanager
    def part(self, shard: Shard) -> Iterator[int]:
        """A file descriptor of the shard's unfinished file, of its full size and with its header."""
        handle = os.open(self._part(shard), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            _allocate(handle, shard.size)
            write_all(handle, 0, shard.header)
            yield handle
        finally:
            os.close(handle)

    def save(self, handle: int, units: Mapping[Key, list[Any]]) -> None:
        """Units whose rows were written through ``handle`` count as done from here on, also after a power cut."""
        if not units:
            return
        os.fsync(handle)
        lines = "".join(json.dumps([*key, said], separators=(",", ":")) + "\n" for key, said in units.items())
        write_all(self._journal, os.lseek(self._journal, 0, os.SEEK_END), lines.encode())
        os.fsync(self._journal)
        self.done.update(units)

    # ---- the last step -----------------------------------------------------------------------------------------------

    def finish(self, report: Mapping[str, Any]) -> None:
        """Give every file its name, config.json at last, and remove the journal.  May be repeated."""
        for shard in self.job.shards:
            part = self._part(shard)
            if part.exists():
                with _opened(part) as handle:
                    os.fsync(handle)
                part.rename(self.path / shard.name)
        copied: set[Path] = set()
        for file, name in side_files(self.job.folder):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as content:
                _atomically(self.path / name, iter(partial(content.read, _COPY_BYTES), b""))
            copied.add((self.path / name).parent)
        for folder in copied:
            _fsync_folder(folder)
        _atomically(self.path / REPORT, [_json(report)])
        if self.job.indexed:
            _atomically(self.path / INDEX_NAME, [_json(self.job.index_json())])
        _fsync_folder(self.path)
        _atomically(self.path / CONFIG, [_json(self.job.config)])
        _fsync_folder(self.path)
        (self.path / JOURNAL).unlink(missing_ok=True)
        _fsync_folder(self.path)

    def _part(self, shard: Shard) -> Path:
        return self.path / (shard.name + _PART)

    def _file(self, shard: Shard) -> Path | None:
        """The shard's file, under whichever of its names, if it has its full size."""
        for file in (self._part(shard), self.path / shard.name):
            if file.is_file() and file.stat().st_size == shard.size:
                return file
        return None

    def _forget_lost_shards(self) -> None:
        """Units whose file somebody removed are to be done again."""
        for shard in self.job.shards:
            if self._file(shard) is None:
                lost = {piece.number for piece in shard.pieces}
                for key in [key for key in self.done if key[0] in lost]:
                    del self.done[key]

    def _allocated(self) -> int:
        files = (self._file(shard) for shard in self.job.shards)
        return sum(min(file.stat().st_blocks * 512, file.stat().st_size) for file in files if file is not None)


def begins(path: Path, job: Job) -> bool:
    """Whether a job in this folder begins; False where it goes on.

    Raises InputError, and writes nothing, when the folder is the source or in it or not empty, or the disk has no room.
    """
    path = _absolute(path)
    _apart(path, job.folder)
    held = _held(path)
    if JOURNAL in held:
        return False
    if held:
        raise _not_empty(path, held, job)
    _check_space(path, job, 0)
    return True


def finished(path: Path, job: Job) -> Mapping[str, Any] | None:
    """The report in ``path`` if that folder is the whole result of this job, else None."""
    path = path.expanduser()
    if (path / JOURNAL).exists() or not (path / CONFIG).is_file():
        return None
    try:
        report = json.loads((path / REPORT).read_bytes())
    except (OSError, ValueError):
        return None
    ours = isinstance(report, dict) and report.get("job") == job.identity
    return report if ours else None


def side_files(source: Path) -> list[tuple[Path, Path]]:
    """What goes along unchanged (tokenizer, model card, ...): files with their names relative to the folder.

    Weights, config.json, the index, the report of an earlier job, and hidden files and folders stay behind.
    """
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            relative = file.relative_to(source)
            ours = len(relative.parts) == 1 and name in (CONFIG, INDEX_NAME, REPORT, JOURNAL)
            if not (ours or name.startswith(".") or file.suffix in _NOT_COPIED) and file.is_file():
                found.append((file, relative))
    return found


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


# ---- refusals --------------------------------------------------------------------------------------------------------


def _apart(path: Path, source: Path) -> None:
    real, origin = path.resolve(), source.resolve()
    if real == origin or (path.exists() and path.samefile(source)):
        raise InputError(f"{path} is the source itself", "Name a new folder; the source is never changed.")
    if origin in real.parents:
        raise InputError(f"{path} lies inside the source {source}", "Name a folder outside of it.")


def _held(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise InputError(f"{path} is not a folder", "Name a new or empty folder.") from None


def _not_empty(path: Path, held: Sequence[str], job: Job) -> InputError:
    if finished(path, job) is not None:
        hint = "Use it, remove it, or name another folder; with --check TEXT it is compared with its source."
        return InputError(f"{path} holds the finished result of this very job", hint)
    some = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
    return InputError(f"{path} is not empty: it holds {some}", "Name a new or empty folder.")


def _check_space(path: Path, job: Job, allocated: int) -> None:
    units = sum(1 for shard in job.shards for _ in shard.units())
    needed = sum(shard.size for shard in job.shards) - allocated
    needed += sum(file.stat().st_size for file, _ in side_files(job.folder)) + units * _LINE_BYTES
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"the result takes {readable_bytes(needed)} more on disk, and {path} has {readable_bytes(free)} free",
            f"Free {readable_bytes(needed - free)}, or name a folder on a larger disk.",
        )


# ---- the journal -----------------------------------------------------------------------------------------------------


def _read_journal(path: Path, job: Job, journal: int) -> dict[Key, list[Any]]:
    """What is done, after a first line that names the job.  A line cut short by the end of a run is cut off.

    Raises InputError when the folder holds another job's work.
    """
    with os.fdopen(os.dup(journal), "rb") as file:
        file.seek(0)
        lines = file.read().split(b"\n")
    head = {"job": job.identity, "scheme": job.scheme}
    good, done = 0, dict[Key, list[Any]]()
    for number, line in enumerate(lines[:-1]):
        try:
            said = json.loads(line)
        except ValueError:
            break
        if number == 0:
            if not isinstance(said, dict) or "job" not in said:
                raise InputError(f"{path / JOURNAL} is no journal of this program", "Name a new or empty folder.")
            if said["job"] != job.identity:
                problem = f"{path} holds unfinished work of another job (scheme {said.get('scheme')})"
                hint = f"Remove {path}, or name another folder. A source that was changed makes another job, too."
                raise InputError(problem, hint)
        else:
            piece, first, what = said
            done[piece, first] = what
        good += len(line) + 1
    if not good:
        others = [name for name in _held(path) if name != JOURNAL]
        if others:
            raise InputError(f"{path / JOURNAL} is damaged", f"Remove {path}, or name another folder.")
        text = json.dumps(head, separators=(",", ":")).encode() + b"\n"
        os.ftruncate(journal, 0)
        write_all(journal, 0, text)
        os.fsync(journal)
        _fsync_folder(path)
        _fsync_folder(path.parent)
        return done
    os.ftruncate(journal, good)
    return done


# ---- files -----------------------------------------------------------------------------------------------------------


def _allocate(handle: int, size: int) -> None:
    """Make the file ``size`` bytes long; where the system can, with room on the disk for all of them."""
    before = os.fstat(handle).st_size
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            os.ftruncate(handle, before)  # give back what it got
            raise
    os.ftruncate(handle, size)


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _atomically(file: Path, data: Iterable[bytes]) -> None:
    """Write a file under its name only once it is whole and on the disk."""
    unfinished = file.with_name(file.name + _PART)
    with _opened(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW) as handle:
        end = 0
        for some in data:
            write_all(handle, end, some)
            end += len(some)
        os.fsync(handle)
    unfinished.replace(file)


@contextmanager
def _opened(file: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    handle = os.open(file, flags | os.O_CLOEXEC, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def _fsync_folder(folder: Path) -> None:
    with _opened(folder, os.O_RDONLY) as handle:
        os.fsync(handle)
