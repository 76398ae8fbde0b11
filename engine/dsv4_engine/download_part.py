"""One file that grows while its bytes come, with its hash and with what all files together have got so far.

Knows neither the network nor where files belong.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .hub import HubFile, Stopped, WrongContent

READ = 4 << 20  # bytes

Progress = Callable[[int, int], None]


class Tally:
    """Bytes done, of how many, counted by several threads."""

    def __init__(self, total: int, progress: Progress = lambda done, total: None) -> None:
        self.done, self.total = 0, total
        self._progress, self._lock = progress, threading.Lock()

    def add(self, count: int, more: int = 0) -> None:
        """``count`` bytes are done; ``more`` turned out to be needed."""
        with self._lock:
            self.done += count
            self.total += more
            self._progress(self.done, self.total)


class Part:
    """A file that grows: hashes what is written, tells how much, and stops when it is told to.

    To huggingface_hub it is the binary file that it writes to.  at: bytes so far.
    """

    def __init__(self, file: HubFile, handle: BinaryIO, tally: Tally, stop: threading.Event) -> None:
        self.file, self.at = file, 0
        self._handle, self._tally, self._stop = handle, tally, stop
        self._hasher = file.hasher()
        if handle.seek(0, os.SEEK_END) > file.size:
            handle.truncate(0)
        handle.seek(0)
        while data := handle.read(READ):
            if stop.is_set():
                raise Stopped
            self._hasher.update(data)
            self.at += len(data)

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise Stopped
        if self.at + len(data) > self.file.size:
            raise WrongContent(f"has more than its {self.file.size:,} bytes there")
        left = memoryview(data)
        while left:  # an unbuffered file may take less than all
            written = self._handle.write(left)
            self._hasher.update(left[:written])
            self.at += written
            self._tally.add(written)
            left = left[written:]
        return len(data)

    def tell(self) -> int:
        return self.at

    def seek(self, at: int) -> int:
        """huggingface_hub goes back to the start, and no other place, when a server sends all instead of the rest."""
        assert at == 0
        self.restart()
        return at

    def truncate(self) -> int:
        return self.at

    def restart(self) -> None:
        """Forget what there is: it has to come again."""
        self._handle.seek(0)
        self._handle.truncate()
        self._tally.add(0, self.at)
        self._hasher, self.at = self.file.hasher(), 0

    def check(self) -> None:
        """Raise WrongContent unless this is the whole file."""
        if self._hasher.hexdigest() != self.file.etag:
            raise WrongContent(f"has the hash {self._hasher.hexdigest()} instead of {self.file.etag}")


def opened(path: Path) -> BinaryIO:
    """The file as it is, or a new one; every write goes to the system at once, so that a kill loses none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
