"""What is known about the objects, in SQLite: which there are, who follows whom, hits, recency, totals.

The files are the truth and this is a summary of them: whatever is wrong with it, it can be made again from their
headers, and no byte of it ever reaches a model.  Knows no payload.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .folder import Folder
from .keys import KEY_BYTES, Key, Origin, Segment
from .objects import KINDS, Header, Kind

BUSY_SECONDS = 10.0
MOST_TOMBSTONES = 100_000
_MOST_STRANGERS = 16
_SIZES = ", ".join(f"{kind} INTEGER NOT NULL DEFAULT 0" for kind in KINDS)
TABLES = (
    "CREATE TABLE origin(id INTEGER PRIMARY KEY, model TEXT NOT NULL, row_format TEXT NOT NULL, name TEXT NOT NULL,"
    " UNIQUE(model, row_format))",
    # One row a segment; the last columns hold the file sizes of its objects, 0 where there is none.
    "CREATE TABLE segment(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, parent BLOB NOT NULL,"
    " tokens BLOB NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, origin INTEGER NOT NULL,"
    f" hits INTEGER NOT NULL, used REAL NOT NULL, {_SIZES})",
    # Why a key is no longer there.
    "CREATE TABLE gone(key BLOB PRIMARY KEY, reason TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID",
    # kept: bytes of all objects; written, removed: bytes over the store's life.
    "CREATE TABLE total(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
)
INDEXES = (
    "CREATE INDEX segment_parent ON segment(parent)",
    "CREATE INDEX segment_tokens ON segment(tokens)",
    "CREATE INDEX gone_at ON gone(at)",
)
TOTALS = ("kept", "written", "removed")
_SUM = " + ".join(KINDS)
# Which kinds there are, by which sizes are not 0: made once, as a long prompt asks for hundreds.
_HELD = {
    held: frozenset(kind for kind, there in zip(KINDS, held, strict=True) if there)
    for held in itertools.product((False, True), repeat=len(KINDS))
}


class IndexDamaged(sqlite3.DatabaseError):
    """The index holds something that was never written to it."""


@dataclass(frozen=True)
class Entry:
    """A kept segment: tokens [start, end), file sizes by kind, how often and when (Unix seconds) it was used."""

    key: Key
    parent: Key
    start: int
    end: int
    origin: Origin
    sizes: dict[Kind, int]
    hits: int
    used: float

    @property
    def size(self) -> int:
        return sum(self.sizes.values())


Trouble = Literal["busy", "full", "damaged"]
# What questions to an index raise.  Python cannot decode the messages about some damaged ones.
IndexErrors = (sqlite3.Error, UnicodeDecodeError)


def trouble(error: Exception) -> Trouble:
    """What an error of SQLite means here.  All that is neither a lock nor a full disk is cured by a new index."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "busy"
    return "full" if code == sqlite3.SQLITE_FULL else "damaged"


class Index:
    """One connection to the newest index of a folder.  Not thread-safe: its owner holds a lock.

    Every method raises IndexErrors; see `trouble`.
    """

    def __init__(self, path: Path, frozen: bool = False) -> None:
        """frozen: on a disk that cannot be written to; what lies in the log is not seen then."""
        self.path = path
        self._db = connect(path, "mode=ro&immutable=1" if frozen else "mode=rw")
        try:
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA cell_size_check = ON")
            if not frozen and self._db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise IndexDamaged("the index cannot keep a write-ahead log")
            found = {row[0] for row in self._db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
            if found != {*TABLES, *INDEXES}:
                raise IndexDamaged("the index has another layout")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    @property
    def current(self) -> bool:
        """Whether the file is still there; another process may have found it damaged."""
        return os.path.exists(self.path)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is alone from its start, so that what it reads stays true until it is done."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                with suppress(*IndexErrors):  # the first error is the one to hear of
                    self._db.execute("ROLLBACK")
            raise

    # ---- questions ---------------------------------------------------------------------------------------------------

    def kinds(self, keys: Sequence[Key]) -> dict[Key, frozenset[Kind]]:
        """Which objects each of the leading known keys of a chain has."""
        found: dict[Key, frozenset[Kind]] = {}
        select = f"SELECT id, {', '.join(KINDS)} FROM segment WHERE key = ?"
        place = 0
        while place < len(keys):
            row = self._db.execute(select, (keys[place],)).fetchone()
            if row is None:
                break
            found[keys[place]] = _HELD[tuple(map(bool, row[1:]))]
            place = self._follow(row[0], keys, place + 1, found)
        return found

    def _follow(self, number: int, keys: Sequence[Key], place: int, found: dict[Key, frozenset[Kind]]) -> int:
        """Go on with the rows behind one: a prompt is entered in order, so its segments lie side by side, where keys
        lie anywhere.  Ends where others have come between.  Returns the first place in ``keys`` that is left."""
        strangers = 0
        select = f"SELECT key, {', '.join(KINDS)} FROM segment WHERE id > ? ORDER BY id"
        with closing(self._db.execute(select, (number,))) as rows:
            while place < len(keys) and strangers < _MOST_STRANGERS and (row := next(rows, None)) is not None:
                if row[0] == keys[place]:
                    found[row[0]] = _HELD[tuple(map(bool, row[1:]))]
                    place, strangers = place + 1, 0
                else:
                    strangers += 1
        return place

    def kept(self) -> int:
        """Bytes of all objects, as files."""
        return self.totals()["kept"]

    def totals(self) -> dict[str, int]:
        found = dict(self._db.execute("SELECT name, value FROM total"))
        if set(found) != set(TOTALS) or not all(isinstance(value, int) for value in found.values()):
            raise IndexDamaged("the totals make no sense")
        return found

    def entries(self) -> list[Entry]:
        """All segments."""
        origins = {number: Origin(*rest) for number, *rest in self._db.execute("SELECT * FROM origin")}
        columns = f"key, parent, first, last, origin, hits, used, {', '.join(KINDS)}"
        return [_entry(row, origins) for row in self._db.execute(f"SELECT {columns} FROM segment")]

    def sizes(self) -> dict[tuple[Key, Kind], int]:
        """Bytes of every object."""
        found = {}
        for key, *sizes in self._db.execute(f"SELECT key, {', '.join(KINDS)} FROM segment"):
            for kind, size in zip(KINDS, sizes, strict=True):
                if not isinstance(size, int) or not isinstance(key, bytes) or len(key) != KEY_BYTES:
                    raise IndexDamaged("a segment makes no sense")
                if size:
                    found[key, kind] = size
        return found

    def parent_kept(self, segment: Segment) -> bool:
        return _parent_kept(self._db, segment.parent, segment.origin)

    def gone(self, key: Key) -> tuple[str, float] | None:
        """Why and when a key left the store, where that is still known."""
        row = self._db.execute("SELECT reason, at FROM gone WHERE key = ?", (key,)).fetchone()
        if row is not None and not (isinstance(row[0], str) and isinstance(row[1], float)):
            raise IndexDamaged("a tombstone makes no sense")
        return row

    def elsewhere(self, tokens: Key) -> list[Origin]:
        """Under which origins the same tokens are known."""
        rows = self._db.execute(
            "SELECT model, row_format, name FROM origin WHERE id IN (SELECT origin FROM segment WHERE tokens = ?)",
            (tokens,),
        ).fetchall()
        if not all(isinstance(value, str) for row in rows for value in row):
            raise IndexDamaged("an origin makes no sense")
        return [Origin(*row) for row in rows]

    def problems(self) -> list[str]:
        """What SQLite's own check finds wrong."""
        return [str(row[0]) for row in self._db.execute("PRAGMA integrity_check(5)") if row[0] != "ok"]

    # ---- changes -----------------------------------------------------------------------------------------------------

    def add(self, header: Header, path: Path, written: int) -> bool:
        """Enter an object whose file lies at ``path``, durable.  written: bytes it took to get there.

        False when the segment's parent is not there, or the file is gone again.
        """
        with self._writing() as db:
            if not os.path.exists(path) or not _parent_kept(db, header.parent, header.origin):
                return False
            _enter(db, header, time.time())
            db.execute("UPDATE total SET value = value + ? WHERE name = 'written'", (written,))
            return True

    def adopt(self, headers: Iterable[tuple[Header, Path]]) -> int:
        """Enter objects found on the disk; those whose file is gone again are left out.  Returns how many entered."""
        count = 0
        with self._writing() as db:
            for header, path in headers:
                with suppress(FileNotFoundError):
                    _enter(db, header, min(path.stat().st_mtime, time.time()))
                    count += 1
        return count

    def drop(self, key: Key, kind: Kind, path: Path, reason: str = "") -> bool:
        """Forget an object unless its file is (again) there.  reason: what `gone` shall say; "" nothing.

        Returns whether it was known.
        """
        with self._writing() as db:
            if os.path.exists(path):
                return False
            known = _remove(db, key, kind)
            if reason:
                _bury(db, key, reason)
                _trim_tombstones(db)
            return known

    def discard(self, key: Key, kind: Kind, path: Path) -> None:
        """Remove an object and its file, under one lock."""
        with self._writing() as db:
            path.unlink(missing_ok=True)
            _remove(db, key, kind)

    def evict(self, victims: Sequence[Entry], folder: Folder) -> tuple[int, int]:
        """Remove segments with their files, those that still have no follower and were not used meanwhile.

        Files and rows go under one lock, so no other process can chain to a segment while it goes.  Returns how many
        segments went and their bytes.
        """
        count = freed = 0
        with self._writing() as db:
            for entry in victims:
                row = db.execute(f"SELECT used, {_SUM} FROM segment WHERE key = ?", (entry.key,)).fetchone()
                if row is None or row[0] != entry.used:
                    continue
                if db.execute("SELECT 1 FROM segment WHERE parent = ? LIMIT 1", (entry.key,)).fetchone():
                    continue
                for kind in KINDS:
                    folder.path(entry.key, kind).unlink(missing_ok=True)
                db.execute("DELETE FROM segment WHERE key = ?", (entry.key,))
                _count(db, "kept", row[1], -1)
                _count(db, "removed", row[1])
                _bury(db, entry.key, "evicted")
                count, freed = count + 1, freed + row[1]
            _trim_tombstones(db)
        return count, freed

    def touch(self, keys: Sequence[Key], now: float) -> None:
        """One more hit for each, now."""
        with self._writing() as db:
            db.executemany("UPDATE segment SET hits = hits + 1, used = ? WHERE key = ?", [(now, key) for key in keys])

    def add_up(self) -> None:
        """Set the total of kept bytes to what the rows say."""
        with self._writing() as db:
            add_up(db)


def connect(path: Path, how: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{how}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        db.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        db.close()
        raise
    return db


def _parent_kept(db: sqlite3.Connection, parent: Key, origin: Origin) -> bool:
    if parent == origin.key:
        return True
    return db.execute("SELECT 1 FROM segment WHERE key = ?", (parent,)).fetchone() is not None


def _enter(db: sqlite3.Connection, header: Header, used: float) -> None:
    """Enter an object, and count it."""
    row = db.execute(f"SELECT {header.kind} FROM segment WHERE key = ?", (header.key,)).fetchone()
    _count(db, "kept", row[0] if row else 0, -1)
    _count(db, "kept", add_object(db, header, used, {}))
    db.execute("DELETE FROM gone WHERE key = ?", (header.key,))


def add_object(db: sqlite3.Connection, header: Header, used: float, origins: dict[Origin, int]) -> int:
    """Enter an object; totals and tombstones are left as they are.  origins: the numbers of those known to be there.

    Returns its size.
    """
    origin, kind, size = header.origin, header.kind, header.size
    if origin not in origins:
        named = (origin.model, origin.row_format)
        db.execute("INSERT OR IGNORE INTO origin(model, row_format, name) VALUES (?, ?, ?)", (*named, origin.name))
        row = db.execute("SELECT id FROM origin WHERE model = ? AND row_format = ?", named).fetchone()
        origins[origin] = row[0]
    db.execute(
        f"INSERT INTO segment(key, parent, tokens, first, last, origin, hits, used, {kind})"
        " VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?)"
        f" ON CONFLICT(key) DO UPDATE SET {kind} = excluded.{kind}, used = MAX(used, excluded.used)",
        (header.key, header.parent, header.tokens, header.start, header.end, origins[origin], used, size),
    )
    return size


def add_up(db: sqlite3.Connection) -> None:
    db.execute(f"UPDATE total SET value = (SELECT COALESCE(SUM({_SUM}), 0) FROM segment) WHERE name = 'kept'")


def _remove(db: sqlite3.Connection, key: Key, kind: Kind) -> bool:
    """Forget one object; the segment with its last one.  Returns whether it was known."""
    row = db.execute(f"SELECT {kind} FROM segment WHERE key = ?", (key,)).fetchone()
    if row is None or row[0] == 0:
        return False
    _count(db, "kept", row[0], -1)
    _count(db, "removed", row[0])
    db.execute(f"UPDATE segment SET {kind} = 0 WHERE key = ?", (key,))
    db.execute(f"DELETE FROM segment WHERE key = ? AND {_SUM} = 0", (key,))
    return True


def _count(db: sqlite3.Connection, name: str, amount: Any, sign: int = 1) -> None:
    if not isinstance(amount, int):
        raise IndexDamaged("a size makes no sense")
    db.execute("UPDATE total SET value = value + ? WHERE name = ?", (sign * amount, name))


def _bury(db: sqlite3.Connection, key: Key, reason: str) -> None:
    db.execute("INSERT OR REPLACE INTO gone VALUES (?, ?, ?)", (key, reason, time.time()))


def _trim_tombstones(db: sqlite3.Connection) -> None:
    oldest = "SELECT at FROM gone ORDER BY at DESC LIMIT 1 OFFSET ?"
    db.execute(f"DELETE FROM gone WHERE at < ({oldest})", (MOST_TOMBSTONES,))


def _entry(row: Sequence[Any], origins: dict[int, Origin]) -> Entry:
    """A row as it must be; one byte changed on the disk can make anything of it."""
    key, parent, start, end, number, hits, used, *sizes = row
    blobs = all(isinstance(value, bytes) and len(value) == KEY_BYTES for value in (key, parent))
    numbers = all(isinstance(value, int) and value >= 0 for value in (start, end, hits, *sizes))
    if not blobs or not numbers or not start < end or not isinstance(used, float) or number not in origins:
        raise IndexDamaged("a segment makes no sense")
    origin = origins[number]
    if not all(isinstance(value, str) for value in (origin.model, origin.row_format, origin.name)):
        raise IndexDamaged("an origin makes no sense")
    held = {kind: size for kind, size in zip(KINDS, sizes, strict=True) if size}
    return Entry(key, parent, start, end, origin, held, hits, used)
