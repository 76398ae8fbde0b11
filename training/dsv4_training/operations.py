"""The operations that a forward pass is made of, compiled or not, in pieces of one size.

Compiling takes far longer than a step, and a compiled function is for one shape: so rows of long batches go through the
same functions in pieces of PIECE tokens, and every length of the curriculum shares them.  Attention's tiles, whose
other side grows with the length, are compiled once for all shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import attention, layers

PIECE = 16384  # tokens
# Of each operation on rows of tokens, which arguments are rows.
ROWS: dict[str, tuple[int, ...]] = {
    "read_residual": (0,),
    "write_residual": (0, 1, 2, 3),
    "read_head": (0,),
    "project": (0, 6, 7),
    "window_attention": (0, 1, 2, 3, 4, 5),
    "merge_and_project": (0, 1, 2, 3, 5, 6),
    "compress_project": (0,),
    "compress_pool": (0, 1, 2, 3, 5, 6),
    "cache_rounding": (0,),
    "index_rounding": (0,),
    "index_queries": (0, 1, 4, 5),
    "experts": (0, 3),
    "mtp_input": (0, 1),
}
TILES = ("dense_tile", "dense_tile_backward", "masked_scores", "index_scores", "index_loss")
FIXED_TILES = ("gathered_tile", "gathered_tile_backward")


class Operations:
    """compiled: each function compiled on its own (worth it on a GPU only)."""

    def __init__(self, compiled: bool = False) -> None:
        def made(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
            return torch.compile(function, dynamic=dynamic) if compiled else function

        self._rows = {n: made(getattr(layers, n, None) or getattr(attention, n), False) for n in ROWS}
        self._tiles = {n: made(getattr(attention, n), True) for n in TILES}
        self._tiles |= {n: made(getattr(attention, n), False) for n in FIXED_TILES}

    def tile(self, name: str) -> Callable[..., Any]:
        return self._tiles[name]

    def rows(self, name: str, pieces: int, *arguments: Any) -> Any:
        """The operation on all rows; what it returns are rows too."""
        function = self._rows[name]
        if pieces == 1:
            return function(*arguments)
        split = {i: arguments[i].chunk(pieces) for i in ROWS[name] if arguments[i] is not None}
        parts = [function(*(split[i][n] if i in split else a for i, a in enumerate(arguments))) for n in range(pieces)]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def pieces_of(batch: int, length: int) -> int:
    """Into how many pieces a batch goes: of PIECE tokens, each whole sequences or a part of one; else one."""
    whole = batch * length % PIECE == 0 and (PIECE % length == 0 or length % PIECE == 0)
    return batch * length // PIECE if whole else 1
