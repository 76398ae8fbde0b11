"""A store's folder and index together, kept usable whatever happens to either.

Owns when the index is opened, found damaged and made again, when writing stops, and what the user is told, each thing
once.  Nothing here raises for the state of the disk: a cache that fails is a cache that finds nothing.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from . import objects
from .folder import File, Folder
from .index import Index, IndexErrors, trouble
from .index_files import create_index, newest_index
from .keys import Key
from .objects import DamagedObject, Header, Kind

T = TypeVar("T")
# A disk that spoils each new index will spoil the next one too.
MOST_REBUILDS = 2
# Errors of this process, not of the file that it wanted to open.
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Keeper:
    """writable: whether objects can be kept; readable: whether there is anything to read from."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.readable = self.writable = False
        self.notices: list[str] = []
        self.lock = threading.RLock()
        self.bad: set[tuple[Key, Kind]] = set()
        self._told: set[str] = set()
        self._index: Index | None = None
        self._index_off = self._frozen = False
        self._rebuilds = 0

    def open(self) -> None:
        """Make or find the folder, and decide what can be done with it.  Raises NotADirectoryError, FileExistsError."""
        try:
            self.folder.make()
        except (FileExistsError, NotADirectoryError):
            raise
        except OSError as error:
            if not os.path.isdir(self.folder.root):
                self.tell("off", f"nothing is cached: {says(error)}")
                return
        try:
            distrust = self.folder.distrust()
        except OSError as error:
            distrust = f"cannot be looked into ({says(error)})"
        if not distrust and not self.folder.readable:
            distrust = "may not be read"
        if distrust:
            self.tell("off", f"nothing is cached: {self.folder.root} {distrust}")
            return
        self.readable = True
        self.writable = self.folder.writable
        self._frozen = not self.writable
        if not self.writable:
            self.tell("read-only", f"the prefix cache {self.folder.top} cannot be written to; it is only read")

    def close(self) -> None:
        with self.lock:
            self._drop_index()
            self.readable = self.writable = False
            self.folder.end_session()

    def tell(self, about: str, text: str) -> None:
        """A notice, unless there was one about the same thing."""
        with self.lock:
            if about not in self._told:
                self._told.add(about)
                self.notices.append(text)

    def stop_writing(self, error: Exception) -> None:
        """Keep nothing more in this process; what is there can still be read."""
        self.writable = False
        self.tell("stopped", f"nothing more is cached: {says(error)}")

    # ---- index -------------------------------------------------------------------------------------------------------

    def ask(self, action: Callable[[Index], T]) -> T | None:
        """The answer of the index; None when it has none to give.  A damaged one is made again and asked again.

        Raises OSError only where ``action`` itself touches files.
        """
        with self.lock:
            while self.readable and not self._index_off:
                asked = None
                try:
                    if self._index is None or not self._index.current:
                        self._drop_index()
                        try:
                            asked = newest_index(self.folder)
                        except OSError as error:
                            self._index_off = True
                            self.stop_writing(error)
                            return None
                        self._index = Index(asked, self._frozen) if asked else None
                    if self._index is not None:
                        asked = self._index.path
                        return action(self._index)
                except IndexErrors as error:
                    kind = trouble(error)
                    if kind == "busy":
                        self.tell("busy", "the index of the prefix cache is busy; something was not cached")
                        return None
                    if kind == "full":
                        self.stop_writing(error)
                        return None
                self.renew_index(asked)
            return None

    def renew_index(self, damaged: Path | None) -> None:
        """Make the index anew from the objects, unless another process did; or go on without.

        damaged: the index that cannot be used, or None where there is none.
        """
        with self.lock:
            self._drop_index()
            self._rebuilds += damaged is not None
            if not self.writable:
                self._index_off = True
                return
            if self._rebuilds > MOST_REBUILDS:
                self._index_off = True
                self.stop_writing(ValueError(f"the index in {self.folder.root} is damaged again and again"))
                return
            try:
                self.folder.make()
                with self.folder.locked():
                    if newest_index(self.folder) == damaged:
                        self._index = create_index(self.folder, self._headers())
                        if damaged is not None:
                            self.tell("index", "the index of the prefix cache was damaged and has been made again")
            except (OSError, sqlite3.Error) as error:
                self._index_off = True
                self.stop_writing(error)

    def empty_index(self) -> None:
        """Begin a new index for a folder without objects.  Raises OSError and sqlite3.Error."""
        with self.lock, self.folder.locked():
            self._drop_index()
            self._index = create_index(self.folder, ())

    @property
    def indexed(self) -> bool:
        """Whether the index can be trusted to know everything: not so on a disk that cannot be written to."""
        return self.readable and not self._frozen and not self._index_off

    @property
    def index_path(self) -> Path | None:
        return self._index.path if self._index is not None else None

    def _drop_index(self) -> None:
        index, self._index = self._index, None
        if index is not None:
            with suppress(sqlite3.Error):  # closing writes the log back, which can wait for the next process
                index.close()

    # ---- objects -----------------------------------------------------------------------------------------------------

    def attempt(self, key: Key, kind: Kind, action: Callable[[Path], T], forget: bool = True) -> T | None:
        """What ``action`` makes of an object's file; None when there is none, or a bad one that is now set aside.

        forget: tell the index.
        """
        if not self.readable or (key, kind) in self.bad:
            return None
        path = self.folder.path(key, kind)
        try:
            return action(path)
        except FileNotFoundError:
            if forget and self.forget(key, kind):
                self.tell("vanished", f"an object of the prefix cache has vanished ({path.name[:8]}.{kind})")
        except DamagedObject as error:
            self.set_aside(key, kind, str(error), forget)
        except OSError as error:
            if error.errno in _OURS:
                self.tell("ours", f"something cached could not be read: {says(error)}")
            else:
                self.set_aside(key, kind, says(error), forget)
        return None

    def header(self, key: Key, kind: Kind, forget: bool = True) -> Header | None:
        """The header of an object that may be there."""
        return self.attempt(key, kind, lambda path: objects.read_header(path, key, kind), forget)

    def _headers(self) -> Iterator[tuple[Header, Path]]:
        """Every sound header in the folder."""
        for item in self.folder.scan():
            if isinstance(item, File):
                header = self.header(item.key, item.kind, forget=False)
                if header is not None:
                    yield header, self.folder.path(item.key, item.kind)

    def set_aside(self, key: Key, kind: Kind, reason: str, forget: bool = True) -> None:
        """Never again take this file for the object."""
        path = self.folder.path(key, kind)
        self.bad.add((key, kind))
        self.tell("bad", f"a damaged object of the prefix cache is set aside ({path.name[:8]}.{kind}: {reason})")
        if not self.writable:
            return
        try:
            with self.folder.changing((key, kind)):
                with suppress(FileNotFoundError):  # another process was first
                    self.folder.set_aside(path)
                self.bad.discard((key, kind))
                if forget:
                    self.forget(key, kind, "damaged")
        except OSError as error:
            self.tell("aside", f"a damaged object could not be moved away: {says(error)}")

    def forget(self, key: Key, kind: Kind, reason: str = "") -> bool:
        """Drop an object without a file from the index.  Returns whether the index knew it."""
        if not self.writable:
            return False
        path = self.folder.path(key, kind)
        return bool(self.ask(lambda index: index.drop(key, kind, path, reason)))


def says(error: Exception) -> str:
    """An error as part of a sentence."""
    if isinstance(error, OSError):
        name = f" ({error.filename})" if error.filename else ""
        return f"{(error.strerror or str(error)).lower()}{name}"
    return str(error)
