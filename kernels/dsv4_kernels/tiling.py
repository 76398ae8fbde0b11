"""How large a piece of work is taken at a time, by kind of device.

A CPU wants a tile's intermediates near its caches; a GPU wants few launches, each wide enough to fill it.  Memory is
bounded either way: no tile depends on the length of the chunk or of the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiling:
    """queries: the most of an attention tile.  keys: index keys decoded and scored at a time.  working_set: bytes that
    a tile's intermediates may take.

    A tile of T queries reads T + window - 1 rows for window seen ones, so small tiles waste little.
    """

    queries: int
    keys: int
    working_set: int

    def tiles(self, queries: int, bytes_per_query: int) -> Iterator[tuple[int, int]]:
        """[start, end) of query tiles, each within the working set (one query at least)."""
        size = max(1, min(self.queries, self.working_set // max(1, bytes_per_query)))
        for start in range(0, queries, size):
            yield start, min(start + size, queries)


CPU = Tiling(queries=64, keys=16_384, working_set=64 << 20)
GPU = Tiling(queries=1024, keys=65_536, working_set=2 << 30)


def tiling(device: torch.device) -> Tiling:
    """The tiling for tensors on ``device``."""
    return CPU if device.type == "cpu" else GPU
