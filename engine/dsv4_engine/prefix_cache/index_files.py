"""The index as a file: which one counts, and making it anew from the objects.

An index made anew gets a new name, because SQLite finds the log of a database by name, and a process that still holds
the old one must not meet the new one's.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from .folder import Folder, sync_folder
from .index import INDEXES, TABLES, TOTALS, Index, add_object, add_up, connect
from .keys import Key, Origin
from .objects import Header, sync

_CACHE_KIB = 65_536
_NAME = re.compile(r"index-\d{8}-[0-9a-f]{8}\.sqlite")


def newest_index(folder: Folder) -> Path | None:
    """The index that counts: numbers grow, and only a whole one is ever given its name."""
    try:
        with os.scandir(folder.root) as entries:
            found = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file()]
    except FileNotFoundError:
        return None
    return folder.root / max(found) if found else None


def create_index(folder: Folder, found: Iterable[tuple[Header, Path]]) -> Index:
    """Make a new index of the objects given and open it; older ones are removed.  The caller holds `Folder.locked`."""
    before = newest_index(folder)
    number = 1 + (int(before.name[6:14]) if before else 0)
    path = folder.root / f"index-{number:08}-{secrets.token_hex(4)}.sqlite"
    making = path.with_suffix(".making")
    for stale in folder.root.glob("index-*.making*"):
        stale.unlink(missing_ok=True)
    os.close(os.open(making, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))  # SQLite alone would ask the umask
    try:
        with closing(connect(making, "mode=rw")) as db:
            db.execute("PRAGMA synchronous = OFF")
            db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            db.execute("BEGIN")
            for statement in TABLES:
                db.execute(statement)
            db.executemany("INSERT INTO total VALUES (?, 0)", [(name,) for name in TOTALS])
            origins: dict[Origin, int] = {}
            for header, file in _in_chains(found):
                with suppress(FileNotFoundError):
                    add_object(db, header, min(file.stat().st_mtime, time.time()), origins)
            add_up(db)
            for statement in INDEXES:  # faster than keeping them up row by row
                db.execute(statement)
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL")
        handle = os.open(making, os.O_RDWR | os.O_CLOEXEC)
        try:
            sync(handle)
        finally:
            os.close(handle)
        os.rename(making, path)
    except BaseException:
        for stale in folder.root.glob(f"{making.name}*"):
            stale.unlink(missing_ok=True)
        raise
    sync_folder(folder.root)
    for old in folder.root.glob("index-*-*.sqlite*"):
        if not old.name.startswith(path.name) and old.is_file():
            old.unlink(missing_ok=True)
    return Index(path)


def _in_chains(found: Iterable[tuple[Header, Path]]) -> Iterator[tuple[Header, Path]]:
    """Objects in the order in which prompts were written, where folders give them in any."""
    segments: dict[Key, list[tuple[Header, Path]]] = {}
    followers: dict[Key, list[Key]] = {}
    for header, path in found:
        if header.key not in segments:
            followers.setdefault(header.parent, []).append(header.key)
        segments.setdefault(header.key, []).append((header, path))
    left = [key for key, objects in segments.items() if objects[0][0].parent not in segments]
    while left:
        key = left.pop()
        yield from segments[key]
        left += followers.get(key, ())
