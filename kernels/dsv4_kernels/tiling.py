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
    """queries: the most of a tile.  keys: index keys decoded and scored at a time.  working_set: bytes that a tile's
    intermediates may take.  rows: queries times heads that fill a product.  columns: keys scored in one product.
    """

    queries: int
    keys: int
    working_set: int
    rows: int
    columns: int

    def near(self, heads: int) -> int:
        """The most queries of a tile that reads T + window - 1 rows for window seen ones: small ones waste little."""
        return max(min(16, self.queries), min(self.queries, self.rows // heads))

    def tiles(self, queries: int, bytes_per_query: int, most: int | None = None) -> Iterator[tuple[int, int]]:
        """[start, end) of tiles of at most ``most`` queries, each within the working set (one query at least)."""
        size = max(1, min(most or self.queries, self.working_set // max(1, bytes_per_query)))
        for start in range(0, queries, size):
            yield start, min(start + size, queries)


CPU = Tiling(queries=64, keys=16_384, working_set=64 << 20, rows=512, columns=2048)
GPU = Tiling(queries=1024, keys=65_536, working_set=2 << 30, rows=65_536, columns=65_536)


def tiling(device: torch.device) -> Tiling:
    """The tiling for tensors on ``device``."""
    return CPU if device.type == "cpu" else GPU
