"""What goes first when the store is over its budget.

Owns the order only: pure functions over entries, no file and no clock.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from .index import Entry
from .keys import Key

# One use more is worth as much as having been used this much later.
HALF_LIFE_SECONDS = 2 * 86_400.0


def value(entry: Entry, now: float) -> float:
    """How much a segment is worth a byte: log2 of (1 + hits) x 0.5^(age / half-life) / bytes.

    The age is counted from ``now``, but the order of two segments does not depend on it; a time in the future (a clock
    was wrong) counts as now.
    """
    age = max(now - entry.used, 0.0)
    return math.log2(1 + entry.hits) - age / HALF_LIFE_SECONDS - math.log2(max(entry.size, 1))


def victims(entries: Iterable[Entry], keep: int, protect: Collection[Key], now: float) -> Iterator[Entry]:
    """Segments to remove, in order, until at most ``keep`` bytes are left: always one that no kept segment follows.

    protect: keys that stay; their ancestors then stay too.
    """
    by_key = {entry.key: entry for entry in entries}
    followers = Counter(entry.parent for entry in by_key.values())
    left = sum(entry.size for entry in by_key.values())
    # Of equals the one further from the start goes first, then the order of keys: the same store, the same victims.
    leaves = [
        (value(entry, now), -entry.end, entry.key)
        for entry in by_key.values()
        if not followers[entry.key] and entry.key not in protect
    ]
    heapq.heapify(leaves)
    while left > keep and leaves:
        entry = by_key[heapq.heappop(leaves)[2]]
        yield entry
        left -= entry.size
        followers[entry.parent] -= 1
        parent = by_key.get(entry.parent)
        if parent is not None and not followers[parent.key] and parent.key not in protect:
            heapq.heappush(leaves, (value(parent, now), -parent.end, parent.key))
