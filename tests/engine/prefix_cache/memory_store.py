"""A store in memory with what PrefixCache uses of PrefixStore, and a few ways to go wrong on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv4_engine.prefix_cache import Found, Key, Miss, Segment
from dsv4_engine.prefix_cache.objects import Kind


class MemoryStore:
    """refuses: kinds that cannot be written; deaf: keys and kinds that are listed and cannot be read."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Key, Kind], bytes] = {}
        self.links: dict[Key, Segment] = {}
        self.writable = True
        self.refuses: set[Kind] = set()
        self.unreadable: set[tuple[Key, Kind]] = set()
        self.reads: list[tuple[Key, Kind]] = []
        self.touched: list[Key] = []
        self.notices: list[str] = []

    def find(self, keys: Sequence[Key]) -> list[Found]:
        found = []
        for key in keys:
            kinds = frozenset(kind for kind in ("rows", "state") if (key, kind) in self.objects)
            if not kinds:
                break
            found.append(Found(key, kinds))
        return found

    def read(self, key: Key, kind: Kind) -> bytearray | None:
        self.reads.append((key, kind))
        payload = self.objects.get((key, kind))
        return None if payload is None or (key, kind) in self.unreadable else bytearray(payload)

    def write(self, segment: Segment, kind: Kind, payload: Sequence[memoryview]) -> bool:
        if kind in self.refuses:
            return False
        assert segment.start == 0 or segment.parent in self.links, "a segment without its parent"
        self.links[segment.key] = segment
        self.objects.setdefault((segment.key, kind), b"".join(payload))
        return True

    def discard(self, key: Key, kind: Kind) -> None:
        self.objects.pop((key, kind), None)

    def touch(self, keys: Iterable[Key]) -> None:
        self.touched += keys

    def miss(self, segment: Segment) -> Miss:
        return Miss("new", "these tokens were not seen before")

    def ends(self, kind: Kind) -> list[int]:
        """Where objects of a kind end, rising."""
        return sorted(self.links[key].end for key, of in self.objects if of == kind)
