"""The store as its callers see it: find, read, write, touch, and why something is not there.

Files are the truth: an object is there when its file is, and no byte is handed out that its checksum does not cover.
A chain is written in order and removed from its end, so what is kept begins at the start of a prompt.  Safe for several
processes and threads.  Knows bytes and keys, no tensor.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from . import objects, upkeep
from .folder import Folder, default_folder, parse_bytes
from .index import Entry, Index
from .keeper import Keeper
from .keys import Key, Origin, Segment
from .objects import KINDS, Buffer, Header, Kind
from .upkeep import Progress, Pruned, Stats, Verified

# The budget where none is given: this share of what the disk could hold of the store.
BUDGET_SHARE = 0.25
# What an eviction frees beyond the object at hand, so that the next ones need none.
_SLACK = 0.05
# Left free beside an object that is written: the index needs room too.
_SPARE_BYTES = 1 << 16


@dataclass(frozen=True)
class Found:
    """A key of which something is kept, and what."""

    key: Key
    kinds: frozenset[Kind]


@dataclass(frozen=True)
class Miss:
    """Why a segment is not there, or ("policy", which the store cannot say) of no use.

    text goes after "because"; other: the origin under which its tokens are known.
    """

    reason: Literal["new", "model", "format", "evicted", "damaged", "off", "policy"]
    text: str
    other: Origin | None = None


class PrefixStore:
    """Opened with `open`, a context manager.  budget: bytes; notices: what went wrong, each thing once."""

    def __init__(self, keeper: Keeper, budget: int) -> None:
        self._keeper, self.budget = keeper, budget
        self._wasted = 0

    @classmethod
    def open(cls, folder: Path | None = None, budget: int | None = None) -> PrefixStore:
        """Open the store in ``folder`` (by default `default_folder`), creating it where it can be.

        budget: most bytes of objects; by default $DSV4_CACHE_BUDGET, else a quarter of the free disk and the store
        together.  A folder that cannot be used gives a store that finds nothing, and a notice.  Raises InputError when
        it is not a folder or not known, or the variable is not a size.
        """
        chosen = os.environ.get("DSV4_CACHE_BUDGET")
        if budget is None and chosen:
            budget = parse_bytes(chosen)
        try:
            top = (folder if folder is not None else default_folder()).expanduser()
        except RuntimeError as error:
            raise InputError(f"there is no cache folder: {error}", "Give one with --cache-dir.") from error
        keeper = Keeper(Folder(top))
        try:
            keeper.open()
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"the cache folder {top} is not a folder", "Give another one with --cache-dir.") from error
        upkeep.recover(keeper)
        if budget is None:
            kept = keeper.ask(Index.kept) or 0
            budget = int(BUDGET_SHARE * (kept + keeper.folder.free())) if keeper.readable else 0
        return cls(keeper, budget)

    @property
    def folder(self) -> Path:
        return self._keeper.folder.top

    @property
    def writable(self) -> bool:
        return self._keeper.writable

    @property
    def notices(self) -> list[str]:
        return self._keeper.notices

    def close(self) -> None:
        self._keeper.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- lookups -----------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[Key]) -> list[Found]:
        """What is kept of the leading keys of a chain; ends before the first of which nothing is."""
        known = self._keeper.ask(lambda index: index.kinds(keys)) or {}
        bad = self._keeper.bad
        found = []
        for key in keys:
            kinds = known.get(key)
            if kinds and bad:
                kinds = frozenset(kind for kind in kinds if (key, kind) not in bad)
            # What the index does not know may still be there: written by a process that was killed, or on a disk
            # that cannot be written to.
            kinds = kinds or self._probe(key)
            if not kinds:
                break
            found.append(Found(key, kinds))
        return found

    def _probe(self, key: Key) -> frozenset[Kind]:
        """Which objects of a key lie on the disk; the index learns of them."""
        folder = self._keeper.folder
        headers = []
        for kind in KINDS:
            path = folder.path(key, kind)
            if self._keeper.readable and os.path.exists(path):
                header = self._keeper.header(key, kind)
                if header is not None:
                    headers.append((header, path))
        if headers and self.writable:
            self._keeper.ask(lambda index: index.adopt(headers))
        return frozenset(header.kind for header, _ in headers)

    def read(self, key: Key, kind: Kind) -> bytearray | None:
        """The payload, its checksum verified.  None when it is not there, or was bad and is now set aside."""
        return self._keeper.attempt(key, kind, lambda path: objects.read_payload(path, key, kind))

    def tokens(self, key: Key) -> list[int] | None:
        """The tokens of a segment whose rows are kept, checked against the key."""
        return self._keeper.attempt(key, "rows", lambda path: objects.read_ids(path, key))

    def path(self, key: Key) -> list[Entry]:
        """The chain from the first segment of a prompt to this one; empty when a link is missing."""
        kept = {entry.key: entry for entry in self.entries()}
        chain: list[Entry] = []
        while (entry := kept.get(key)) is not None:
            # Towards its start a chain only gets shorter; a damaged index must not lead in circles.
            if chain and entry.end != chain[-1].start:
                break
            chain.append(entry)
            if entry.start == 0:
                return chain[::-1]
            key = entry.parent
        return []

    def touch(self, keys: Iterable[Key]) -> None:
        """Count one use of each now; what is used stays longer."""
        used = list(keys)
        if used and self.writable:
            self._keeper.ask(lambda index: index.touch(used, time.time()))

    def miss(self, segment: Segment) -> Miss:
        """Why this segment, the first that `find` did not find, is not there."""
        if not self._keeper.readable:
            return Miss("off", "the prefix cache cannot be used")
        gone = self._keeper.ask(lambda index: index.gone(segment.key))
        if gone is not None:
            reason, at = gone
            if reason == "damaged":
                return Miss("damaged", "what was kept of it was damaged")
            return Miss("evicted", f"it was removed {_ago(time.time() - at)} ago to make room")
        others = self._keeper.ask(lambda index: index.elsewhere(segment.tokens)) or []
        others = [other for other in others if other != segment.origin]
        for other in others:
            if other.model == segment.origin.model:
                return Miss("format", _difference(other.row_format, segment.origin.row_format), other)
        if others:
            return Miss("model", f"it is kept for another model ({others[0].name or others[0].model})", others[0])
        return Miss("new", "these tokens were not seen before")

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, segment: Segment, kind: Kind, payload: Buffer | Sequence[Buffer]) -> bool:
        """Keep an object; durable when this returns True.  payload: C-contiguous buffers, one after the other.

        What is already there is not written again.  False when it could not be kept: the disk or the budget is full,
        the store cannot be written to, or the segment's parent is not in it.
        """
        assert kind in KINDS
        if not self.writable:
            return False
        keeper, key = self._keeper, segment.key
        known = keeper.ask(lambda index: (index.kinds([key]).get(key, ()), index.parent_kept(segment), index.kept()))
        if known is None:
            return False
        kinds, chained, kept = known
        if os.path.exists(keeper.folder.path(key, kind)) and (kind in kinds or kind in self._probe(key)):
            return True
        if not chained:
            return False
        header, parts = objects.compose(segment, kind, payload)
        try:
            if not self._room(segment, header.size, kept):
                return False
            try:
                return self._keep(header, parts)
            except FileNotFoundError:  # somebody removed the folder; with it went what it held, and nothing else
                keeper.folder.make()
                return self._keep(header, parts)
        except OSError as error:
            keeper.stop_writing(error)
        return False

    def _keep(self, header: Header, parts: Sequence[memoryview]) -> bool:
        keeper, key, kind = self._keeper, header.key, header.kind
        path = keeper.folder.path(key, kind)
        with keeper.folder.changing((key, kind)) as session:
            keeper.folder.place(session, key, kind, parts)
            if keeper.ask(lambda index: index.add(header, path, header.size + self._wasted)):
                self._wasted = 0
                keeper.bad.discard((key, kind))
                return True
            # Its parent went meanwhile, or the index takes nothing: what nobody can find must not stay.
            self._wasted += header.size
            path.unlink(missing_ok=True)
        return False

    def discard(self, key: Key, kind: Kind) -> None:
        """Remove an object that nothing needs any more, such as a state that a newer one replaces; if it is there."""
        keeper = self._keeper
        if not self.writable:
            return
        path = keeper.folder.path(key, kind)
        try:
            with keeper.folder.changing((key, kind)):
                keeper.ask(lambda index: index.discard(key, kind, path))
        except OSError as error:
            keeper.stop_writing(error)

    def _room(self, segment: Segment, size: int, kept: int) -> bool:
        """Whether an object of ``size`` bytes fits, after less valuable segments have gone."""
        keeper = self._keeper
        if kept + size > self.budget:
            keep = self.budget - max(size, int(self.budget * _SLACK))
            if keep >= 0:
                pruned = upkeep.evict(keeper, keep, {segment.key, segment.parent})
                if pruned is None:
                    return False
                kept = pruned.kept
            if kept + size > self.budget:
                keeper.tell("budget", f"the prefix cache is full ({self.budget:,} bytes); the rest is not cached")
                return False
        if keeper.folder.free() < size + _SPARE_BYTES:
            keeper.tell("full", f"the disk of the prefix cache is full ({self.folder}); the rest is not cached")
            return False
        return True

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        return upkeep.stats(self._keeper, self.budget)

    def entries(self) -> list[Entry]:
        """Every kept segment, in no order."""
        return upkeep.entries(self._keeper)

    def verify(self, progress: Progress | None = None) -> Verified:
        """Read everything; what is bad is set aside.  progress(done, total) counts bytes."""
        return upkeep.verify(self._keeper, progress)

    def prune(self, budget: int | None = None, trial: bool = False) -> Pruned:
        """Remove the least valuable segments until ``budget`` bytes (by default the store's) are left.

        trial: only say what would go.  Raises InputError when the store cannot be written to.
        """
        if not self.writable:
            raise self._cannot_write()
        keep = self.budget if budget is None else budget
        if trial:
            return upkeep.plan(self._keeper, keep)
        upkeep.recover(self._keeper)
        pruned = upkeep.evict(self._keeper, keep)
        if pruned is None:
            raise self._cannot_write()
        return pruned

    def clear(self) -> int:
        """Remove everything, also other versions' stores.  Returns the bytes freed of this one's objects.

        Raises InputError when the store cannot be written to.
        """
        # Not self.writable: on a disk that is full to the last byte, this is what helps.
        if not self._keeper.readable or not self._keeper.folder.writable:
            raise self._cannot_write()
        try:
            return upkeep.clear(self._keeper)
        except sqlite3.Error as error:
            raise InputError(f"no new index can be made in {self.folder}: {error}", "Delete that folder.") from error

    def _cannot_write(self) -> InputError:
        hint = "Make the folder writable, or some room on its disk; `dsv4 cache clear` removes everything."
        return InputError("; ".join(self.notices) or f"the prefix cache {self.folder} is closed", hint)


def _difference(there: str, here: str) -> str:
    """What differs between two row formats of the form "name=value name=value"."""
    kept, wanted = (dict(part.partition("=")[::2] for part in text.split()) for text in (there, here))
    names = [name for name in {**kept, **wanted} if kept.get(name) != wanted.get(name)]
    if not names:
        return "it is kept in another format"
    shown = ", ".join(f"{name} {kept.get(name, '-')} instead of {wanted.get(name, '-')}" for name in names)
    return f"it is kept in another format ({shown})"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{int(seconds / size)} {unit}"
    return "moments"
