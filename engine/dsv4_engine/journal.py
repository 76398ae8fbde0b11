"""One generation in a file while it goes on, so that it can be taken up again after it was killed.

Owns the file: a request, written and flushed before the first token, then the tokens one by one.  Knows neither models
nor text: a request is whatever its caller can put into JSON.

Lines: `dsv4-journal 1 CHECK REQUEST`, then `TOKEN CHECK` for each token.  Each check covers everything before it, so
what a damaged or torn file still says is a beginning of what was written.  Tokens are not flushed one by one: what the
system loses with the power is drawn again, alike.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

SUFFIX = ".journal"
MOST_UNFINISHED = 16  # older ones go when a new one begins
_MAGIC = "dsv4-journal 1"


@dataclass(frozen=True)
class Recorded:
    """What a journal says."""

    request: dict[str, Any]
    token_ids: tuple[int, ...]


class Journal:
    """An open journal.  Its file is locked for as long as it is open: what is locked belongs to somebody alive."""

    def __init__(self, path: Path, handle: int, check: str) -> None:
        self.path, self._handle, self._check = path, handle, check

    @classmethod
    def begin(cls, path: Path, request: Mapping[str, Any]) -> Journal:
        """A new journal at ``path``, whose folder is made; both are their owner's alone.  Durable when it returns.

        Raises OSError when it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps(request, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        check = _checked("", text)
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            _write(handle, f"{_MAGIC} {check} {text}\n")
            os.fsync(handle)
            _flush_folder(path.parent)
        except BaseException:
            os.close(handle)
            path.unlink(missing_ok=True)
            raise
        for old in unfinished(path.parent)[MOST_UNFINISHED:]:
            old.unlink(missing_ok=True)
        return cls(path, handle, check)

    @classmethod
    def take_up(cls, path: Path) -> tuple[Journal, Recorded]:
        """Go on with a journal; what is damaged or torn at its end is cut off.

        Raises InputError when it is another process', or holds no whole request (it is set aside then); OSError when it
        cannot be opened.
        """
        handle = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path} is being written by another process", "Wait until that ends.") from None
            parsed = _parse(path.read_bytes())
            if parsed is None:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                raise InputError(
                    f"{path} holds no request that can be taken up; it is set aside as {aside.name}",
                    "Ask again, or give --resume once more for the one before it.",
                )
            recorded, check, size = parsed
            os.ftruncate(handle, size)
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle, check), recorded

    def append(self, token_id: int) -> None:
        """Record the next token.  The process may be killed from then on.  Raises OSError when it cannot be written."""
        check = _checked(self._check, str(token_id))
        _write(self._handle, f"{token_id} {check}\n")
        self._check = check

    def close(self) -> None:
        """Leave the file for whoever takes it up."""
        os.close(self._handle)

    def remove(self) -> None:
        """Close it, with nothing left to take up."""
        self.path.unlink(missing_ok=True)
        self.close()


def unfinished(folder: Path) -> list[Path]:
    """The journals in ``folder`` that nobody is writing, the newest first."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:  # just removed, or not ours
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found.append((os.fstat(handle).st_mtime_ns, path))
        except BlockingIOError:
            continue
        finally:
            os.close(handle)
    return [path for _, path in sorted(found, reverse=True)]


def _parse(content: bytes) -> tuple[Recorded, str, int] | None:
    """What the file says, its last check, and how many of its bytes are whole; None without a whole request."""
    lines = _whole_lines(content)
    first = next(lines, "")
    magic, _, rest = first.partition(f"{_MAGIC} ")
    check, _, text = rest.partition(" ")
    if magic or not text or check != _checked("", text):
        return None
    size = len(first) + 1
    tokens: list[int] = []
    for line in lines:
        token, _, given = line.partition(" ")
        if given != _checked(check, token):
            break
        check, size = given, size + len(line) + 1
        tokens.append(int(token))
    return Recorded(json.loads(text), tuple(tokens)), check, size


def _whole_lines(content: bytes) -> Iterator[str]:
    """The lines that are ASCII and end; everything from the first other one on is left out."""
    start = 0
    while (end := content.find(b"\n", start)) >= 0:
        line = content[start:end]
        if not line.isascii():
            return
        yield line.decode("ascii")
        start = end + 1


def _checked(before: str, text: str) -> str:
    return hashlib.blake2b(f"{before} {text}".encode(), digest_size=8).hexdigest()


def _write(handle: int, text: str) -> None:
    """All of ``text``, in one call to the system where it takes it."""
    left = text.encode("ascii")
    while left:
        left = left[os.write(handle, left) :]


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
