"""Where the store's files lie, who may read them, and what a killed process left behind.

    v1/objects/ab/ab...64 hex digits.rows    v1/staging/    v1/quarantine/    v1/index-N-xxxxxxxx.sqlite

Everything of one file format lies under its own ``v1``, so two versions of dsv4 can share a cache folder and never
touch each other's files.  A process that changes anything holds a lock on a file of its own in staging, which names
what it is changing; a lock that nobody holds is that of a process which died.  Knows no index.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from . import objects
from .keys import Key
from .objects import KINDS, VERSION, Kind

CURRENT = f"v{VERSION}"
# Damaged files are kept for whoever wants to know what happened, the latest ones, up to both limits.
MOST_QUARANTINED = 16
MOST_QUARANTINED_BYTES = 64 << 20
_OBJECT = re.compile(rf"([0-9a-f]{{64}})\.({'|'.join(KINDS)})")


class File(NamedTuple):
    """An object's file as a listing shows it.  written: Unix seconds."""

    key: Key
    kind: Kind
    size: int
    written: float


def default_folder() -> Path:
    """$DSV4_CACHE_DIR, else dsv4/prefix in $XDG_CACHE_HOME, else in ~/.cache.  Raises RuntimeError without a home."""
    if chosen := os.environ.get("DSV4_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "dsv4" / "prefix"


def parse_bytes(text: str) -> int:
    """Bytes written as 500M, 20G or 1.5T, in binary units; a plain number is bytes.  Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"{text!r} is not a size", "Write it like 500M, 20G or 1.5T.")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


class _Session(NamedTuple):
    """This process's lock in staging: who it is, where, open as what, and the length of its first line."""

    name: str
    path: Path
    handle: int
    start: int


class Folder:
    """The files of one store.  Methods raise OSError as the system does; nothing is caught that is not named here."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = top / CURRENT
        self.objects, self.staging, self.quarantine = (
            self.root / name for name in ("objects", "staging", "quarantine")
        )
        self._session: _Session | None = None
        self._sessions = threading.Lock()
        self._changes = 0

    # ---- making and judging ------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Create what is missing, readable by the owner alone."""
        self.top.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.root, self.objects, self.staging, self.quarantine):
            path.mkdir(mode=0o700, exist_ok=True)

    def distrust(self) -> str:
        """Why these files cannot be believed, or "".  What others may write to, others may have written.

        Only who can read is repaired here: the folder was made private, so something opened it since.
        """
        found = self.root.stat()
        if found.st_uid != os.geteuid():
            return "belongs to another user"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "can be written to by other users"
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) and os.access(self.root, os.W_OK):
            self.root.chmod(0o700)
        return ""

    @property
    def readable(self) -> bool:
        return all(os.access(path, os.R_OK | os.X_OK) for path in (self.root, self.objects))

    @property
    def writable(self) -> bool:
        return all(os.access(path, os.R_OK | os.W_OK | os.X_OK) for path in (self.root, self.objects, self.staging))

    def free(self) -> int:
        """Bytes that this user may still write on the disk."""
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    # ---- objects -----------------------------------------------------------------------------------------------------

    def path(self, key: Key, kind: Kind) -> Path:
        name = key.hex()
        return Path(f"{self.objects}/{name[:1]}/{name}.{kind}")

    def place(self, session: str, key: Key, kind: Kind, parts: Sequence[memoryview]) -> None:
        """Write an object so that it is there whole and durable, or not at all.  session: of `changing`."""
        staged = at = self.staging / f"{session}-{secrets.token_hex(6)}.part"
        final = self.path(key, kind)
        try:
            objects.write_durably(staged, parts)
            if not final.parent.exists():
                final.parent.mkdir(mode=0o700, exist_ok=True)
                sync_folder(self.objects)
            os.rename(staged, final)
            at = final
            sync_folder(final.parent)
        except BaseException:
            at.unlink(missing_ok=True)
            raise

    def scan(self) -> Iterator[File | Path]:
        """Every object's file; anything else that lies among them as a path."""
        for group in _entries(self.objects):
            if not group.is_dir(follow_symlinks=False):
                yield Path(group.path)
                continue
            for entry in _entries(group.path):
                named = _object_named(entry.name)
                if named is None or entry.name[:1] != group.name or entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path)
                    continue
                with suppress(FileNotFoundError):  # another process removed it meanwhile
                    status = entry.stat(follow_symlinks=False)
                    yield File(*named, status.st_size, status.st_mtime)

    def set_aside(self, path: Path) -> None:
        """Move a file out of the way, then remove the oldest of those that exceed the quarantine's limits."""
        os.rename(path, self.quarantine / f"{secrets.token_hex(4)}-{path.name}")
        kept = self.quarantined()
        while len(kept) > MOST_QUARANTINED or sum(size for _, size in kept) > MOST_QUARANTINED_BYTES:
            _remove(kept.pop(0)[0])

    def quarantined(self) -> list[tuple[Path, int]]:
        """What was set aside and its bytes, the oldest first (a rename sets the change time)."""
        found = []
        for entry in _entries(self.quarantine):
            with suppress(FileNotFoundError):  # another process keeps the limits too
                path = Path(entry.path)
                size = tree_bytes(path) if entry.is_dir(follow_symlinks=False) else path.lstat().st_size
                found.append((path.lstat().st_ctime_ns, path, size))
        return [(path, size) for _, path, size in sorted(found)]

    def empty_quarantine(self) -> None:
        for path, _ in self.quarantined():
            _remove(path)

    # ---- processes ---------------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self, *names: tuple[Key, Kind]) -> Iterator[str]:
        """Around every change of files and index: whoever finds this process dead finds what it was about.

        Without names it is about everything.  Yields what the names of staged files begin with.
        """
        text = "".join(f"{key.hex()}.{kind}\n" for key, kind in names) or "*\n"
        with self._sessions:
            session = self._begin_session()
            _note(session.handle, text)
            self._changes += 1
        try:
            yield session.name
        finally:
            with self._sessions:
                self._changes -= 1
                if not self._changes and self._session is session:
                    os.ftruncate(session.handle, session.start)

    def _begin_session(self) -> _Session:
        if self._session is not None and not self._session.path.exists():
            self.end_session()  # somebody removed the folder under us
        while self._session is None:
            name = f"{os.getpid()}x{secrets.token_hex(4)}"
            path = self.staging / f"{name}.lock"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            handle = os.open(path, flags, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Between the two lines another process may have taken it for a dead one's, and removed it.
            if path.exists():
                self._session = _Session(name, path, handle, _note(handle, f"{_boot()}\n"))
            else:
                os.close(handle)
        return self._session

    def end_session(self) -> None:
        """Say that this process is done with its changes: nothing is left to clean up after it."""
        if self._session is not None:
            session, self._session = self._session, None
            session.path.unlink(missing_ok=True)
            os.close(session.handle)

    @contextmanager
    def dead_sessions(self) -> Iterator[set[tuple[Key, Kind]] | None]:
        """What processes that died were about to change; None when it may be anything.

        Their staged files are gone on entry, the signs of them on exit: if the cleaning up in between is killed too,
        the next one finds them again.
        """
        held: list[tuple[Path, int]] = []
        try:
            # Staged files first: whoever made one of these holds a lock by now, or is gone.
            staged = [Path(entry.path) for entry in _entries(self.staging) if entry.name.endswith(".part")]
            locks = [Path(entry.path) for entry in _entries(self.staging) if entry.name.endswith(".lock")]
            held = [(path, handle) for path in locks if (handle := _take(path)) is not None]
            alive = {path.stem for path in locks} - {path.stem for path, _ in held}
            for path in staged:
                if path.name.partition("-")[0] not in alive:
                    path.unlink(missing_ok=True)
            left = [_left_by(path) for path, _ in held]
            known = [names for names in left if names is not None]
            yield set().union(*known) if len(known) == len(left) else None
            for path, _ in held:
                path.unlink(missing_ok=True)
        finally:
            for _, handle in held:
                os.close(handle)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all processes; for making an index anew."""
        handle = os.open(self.root / "rebuild.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    # ---- what else is there ------------------------------------------------------------------------------------------

    def staged_bytes(self) -> int:
        """Of files that are being written."""
        found = 0
        for entry in _entries(self.staging):
            with suppress(FileNotFoundError):  # done, and moved to its place
                found += entry.stat(follow_symlinks=False).st_size if entry.name.endswith(".part") else 0
        return found

    def other_versions(self) -> list[Path]:
        """Stores of other versions beside this one."""
        return [
            Path(entry.path)
            for entry in _entries(self.top)
            if re.fullmatch(r"v\d+", entry.name) and entry.name != CURRENT and entry.is_dir(follow_symlinks=False)
        ]

    def remove_other_versions(self) -> None:
        for path in self.other_versions():
            shutil.rmtree(path)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        objects.sync(handle)
    finally:
        os.close(handle)


def tree_bytes(path: Path) -> int:
    """Bytes of all files under a folder."""
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names)


def _entries(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return list(found)
    except FileNotFoundError:
        return []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _object_named(name: str) -> tuple[Key, Kind] | None:
    """Key and kind of an object's file name, or None."""
    found = _OBJECT.fullmatch(name)
    return (bytes.fromhex(found[1]), found[2]) if found else None  # type: ignore[return-value]


def _boot() -> str:
    """Which start of the system this is, or "" where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _note(handle: int, text: str) -> int:
    """Write a note for whoever finds this process dead.  A full disk must not keep anyone from removing things."""
    try:
        return os.write(handle, text.encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return 0


def _left_by(path: Path) -> set[tuple[Key, Kind]] | None:
    """What the dead process of a lock was changing; None when it may be anything.

    That is so after the system itself went down, which may have lost what was long done.
    """
    boot, *lines = path.read_text("ascii", errors="replace").split("\n")
    if lines and (boot != _boot() or not boot or "*" in lines):
        return None
    named = [_object_named(line) for line in lines]  # a line that is cut short was not acted on
    return {item for item in named if item is not None}


def _take(path: Path) -> int | None:
    """A handle that holds the lock of a process that died, or None."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
