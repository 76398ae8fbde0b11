"""What keeps a store in order: index against disk, budget, verification, statistics, emptying.

Owns the passes over everything; a single lookup, read or write is the store's.  Knows no payload.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from . import objects
from .eviction import victims
from .folder import File, tree_bytes
from .index import TOTALS, Entry, Index
from .keeper import Keeper, says
from .keys import Key, Origin
from .objects import KINDS, Kind

Progress = Callable[[int, int], None]
# Segments removed under one lock: other processes wait for it.
_BATCH = 64


@dataclass(frozen=True)
class Reconciled:
    """adopted: objects that the index did not know; vanished: objects that it knew and that are not there."""

    adopted: int
    vanished: int


@dataclass(frozen=True)
class Pruned:
    """Segments and bytes removed, bytes kept."""

    segments: int
    freed: int
    kept: int


@dataclass(frozen=True)
class Verified:
    """objects, size: files that are sound and their bytes; damaged: names of what is not, and why; index: what was
    wrong with it; unreachable: segments behind a gap in their chain, of use again once the gap is filled."""

    objects: int
    size: int
    damaged: dict[str, str]
    index: list[str]
    adopted: int
    vanished: int
    unreachable: int

    @property
    def sound(self) -> bool:
        return not self.damaged and not self.index and not self.vanished


@dataclass(frozen=True)
class Share:
    """What one origin takes: segments, tokens in them, bytes."""

    origin: Origin
    segments: int
    tokens: int
    size: int


@dataclass(frozen=True)
class Stats:
    """Bytes unless said otherwise.  tokens: of segments with rows; written, removed: since the index began."""

    folder: str
    writable: bool
    budget: int
    free: int
    segments: int
    tokens: int
    size: int
    objects: dict[Kind, int] = field(default_factory=dict)
    sizes: dict[Kind, int] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)
    written: int = 0
    removed: int = 0
    staged: int = 0
    quarantined: int = 0
    quarantined_files: int = 0
    other_versions: int = 0

    @property
    def write_amplification(self) -> float | None:
        """Bytes of objects written for each that was entered; None before the first."""
        entered = self.size + self.removed
        return self.written / entered if entered and self.written else None


def entries(keeper: Keeper) -> list[Entry]:
    """Every segment, in no order; from the files themselves where there is no index to ask."""
    known = keeper.ask(Index.entries) if keeper.indexed else None
    if known is not None:
        return known
    found: dict[Key, Entry] = {}
    if not keeper.readable:
        return []
    for item in keeper.folder.scan():
        if not isinstance(item, File) or (header := keeper.header(item.key, item.kind)) is None:
            continue
        sizes = {item.kind: item.size}
        if before := found.get(item.key):
            sizes = {**before.sizes, **sizes}
        place = header.parent, header.start, header.end, header.origin
        found[item.key] = Entry(item.key, *place, sizes, 0, item.written)
    return list(found.values())


def reconcile(keeper: Keeper) -> Reconciled:
    """Enter what lies on the disk and is not known, forget what is known and not there, add up the sizes again."""
    indexed = keeper.ask(Index.sizes)
    if indexed is None or not keeper.writable:
        return Reconciled(0, 0)
    lost = []
    for item in keeper.folder.scan():
        if isinstance(item, File):
            if indexed.pop((item.key, item.kind), None) != item.size:
                lost.append(item)
        else:
            try:
                keeper.folder.set_aside(item)
            except FileNotFoundError:
                continue
    adopted = 0
    while lost:
        headers = [(item, keeper.header(item.key, item.kind)) for item in lost[-1000:]]
        del lost[-1000:]
        sound = [(header, keeper.folder.path(item.key, item.kind)) for item, header in headers if header is not None]
        adopted += keeper.ask(partial(Index.adopt, headers=sound)) or 0
    vanished = sum(keeper.forget(key, kind) for key, kind in indexed)
    keeper.ask(Index.add_up)
    return Reconciled(adopted, vanished)


def evict(keeper: Keeper, keep: int, protect: Collection[Key] = ()) -> Pruned | None:
    """Remove the least valuable segments until at most ``keep`` bytes are left or nothing may go.

    None when the index cannot be asked.  Raises OSError.
    """
    reconcile(keeper)
    known = keeper.ask(Index.entries)
    if known is None:
        return None
    chosen = victims(known, keep, protect, time.time())
    segments = freed = 0
    while batch := list(itertools.islice(chosen, _BATCH)):
        with keeper.folder.changing(*((entry.key, kind) for entry in batch for kind in entry.sizes)):
            count, size = keeper.ask(partial(Index.evict, victims=batch, folder=keeper.folder)) or (0, 0)
        segments, freed = segments + count, freed + size
    kept = keeper.ask(Index.kept)
    return None if kept is None else Pruned(segments, freed, kept)


def plan(keeper: Keeper, keep: int) -> Pruned:
    """What `evict` would do."""
    known = entries(keeper)
    going = list(victims(known, keep, (), time.time()))
    return Pruned(len(going), _bytes(going), _bytes(known) - _bytes(going))


def recover(keeper: Keeper) -> None:
    """After a process died while writing: its unfinished files go, its finished ones enter the index."""
    if not keeper.writable:
        return
    try:
        with keeper.folder.dead_sessions() as left:
            if left is None:
                reconcile(keeper)
            for key, kind in left or ():
                header = keeper.header(key, kind, forget=False)
                if header is None:
                    keeper.forget(key, kind)
                else:
                    keeper.ask(partial(Index.adopt, headers=[(header, keeper.folder.path(key, kind))]))
    except OSError as error:
        keeper.stop_writing(error)


def verify(keeper: Keeper, progress: Progress | None = None) -> Verified:
    """Read every object and hold it against its checksum and its name, and the index against the objects."""
    problems = keeper.ask(Index.problems) if keeper.indexed else None
    if problems:
        keeper.renew_index(keeper.index_path)
    damaged: dict[str, str] = {}
    sound = size = done = 0
    items = list(keeper.folder.scan()) if keeper.readable else []
    total = sum(item.size for item in items if isinstance(item, File))
    for item in items:
        if not isinstance(item, File):
            damaged[item.name] = "it is no object of this store"
            continue
        try:
            objects.check(keeper.folder.path(item.key, item.kind), item.key, item.kind)
            sound, size = sound + 1, size + item.size
        except FileNotFoundError:
            continue  # evicted meanwhile
        except (objects.DamagedObject, OSError) as error:
            damaged[f"{item.key.hex()}.{item.kind}"] = says(error)
            keeper.set_aside(item.key, item.kind, says(error))
        done += item.size
        if progress is not None:
            progress(done, total)
    found = reconcile(keeper)
    return Verified(sound, size, damaged, problems or [], found.adopted, found.vanished, _unreachable(entries(keeper)))


def _unreachable(kept: list[Entry]) -> int:
    reached: set[Key] = set()
    count = 0
    for entry in sorted(kept, key=lambda entry: entry.start):
        if entry.start == 0 or entry.parent in reached:
            count += 1
            if "rows" in entry.sizes:  # without them nothing behind can be used
                reached.add(entry.key)
    return len(kept) - count


def stats(keeper: Keeper, budget: int) -> Stats:
    """Counts and sizes of everything in the folder."""
    kept = entries(keeper)
    folder = keeper.folder
    free = folder.free() if keeper.readable else 0
    origins: dict[Origin, list[Entry]] = {}
    for entry in kept:
        origins.setdefault(entry.origin, []).append(entry)
    shares = [Share(origin, len(own), _tokens(own), _bytes(own)) for origin, own in origins.items()]
    counts = {kind: sum(kind in entry.sizes for entry in kept) for kind in KINDS}
    sizes = {kind: sum(entry.sizes.get(kind, 0) for entry in kept) for kind in KINDS}
    totals = keeper.ask(Index.totals) or dict.fromkeys(TOTALS, 0)
    aside = folder.quarantined() if keeper.readable else []
    return Stats(
        folder=os.fspath(folder.top),
        writable=keeper.writable,
        budget=budget,
        free=free,
        segments=len(kept),
        tokens=_tokens(kept),
        size=_bytes(kept),
        objects=counts,
        sizes=sizes,
        shares=sorted(shares, key=lambda share: -share.size),
        written=totals["written"],
        removed=totals["removed"],
        staged=folder.staged_bytes() if keeper.readable else 0,
        quarantined=sum(size for _, size in aside),
        quarantined_files=len(aside),
        other_versions=sum(tree_bytes(path) for path in folder.other_versions()) if keeper.readable else 0,
    )


def _tokens(kept: list[Entry]) -> int:
    return sum(entry.end - entry.start for entry in kept if "rows" in entry.sizes)


def _bytes(kept: list[Entry]) -> int:
    return sum(entry.size for entry in kept)


def clear(keeper: Keeper) -> int:
    """Remove everything that was kept, also by other versions.  Returns the bytes of this version's objects.

    Raises OSError and sqlite3.Error.
    """
    freed = 0
    folder = keeper.folder
    with folder.changing():
        for item in list(folder.scan()):
            if isinstance(item, File):
                folder.path(item.key, item.kind).unlink(missing_ok=True)
                freed += item.size
            else:
                folder.set_aside(item)
        keeper.empty_index()
    with folder.dead_sessions():
        folder.empty_quarantine()
        folder.remove_other_versions()
    return freed
