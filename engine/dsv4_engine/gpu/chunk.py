"""The tokens of one pass on one device, and what every layer derives from their positions.

All of it is computed from tensors on the device by the same operations for one token as for a chunk, so that a recorded
step and a chunk agree to the last bit.  Letters: S tokens, P rotated pairs, N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.triton.phases import chunk_phases

from .state import RATIOS

WINDOW = 128  # positions that a token sees, itself included


@dataclass(frozen=True)
class Chunk:
    """Tokens that follow one another.

    token_ids: int64 [S]; position_S: int64; start: the first one's position on the host, None for a single token that
    is decoded (its position is known to the device alone).  base_S: int64, rows.WindowRows' for the block or ring that
    the window's rows are in.  phases: complex64 [S, P] by compress ratio; block_phases:
    complex64 [N, P], those of the first token of each block from the one the chunk begins in; most, by compress ratio:
    an upper bound of the entries that a token sees.
    """

    token_ids: Tensor
    position_S: Tensor
    start: int | None
    base_S: Tensor
    phases: Mapping[int, Tensor]
    block_phases: Mapping[int, Tensor]
    most: Mapping[int, int]

    @classmethod
    def at(cls, token_ids_S: Tensor, start: int, freqs: Mapping[int, Tensor]) -> Chunk:
        """A chunk that is prefilled; freqs: RoPE frequencies by compress ratio."""
        tokens = token_ids_S.shape[0]
        position_S = torch.arange(start, start + tokens, device=token_ids_S.device)
        return cls._of(token_ids_S, position_S, start, freqs, start + tokens)

    @classmethod
    def step(cls, token_1: Tensor, position_1: Tensor, freqs: Mapping[int, Tensor], ctx: int) -> Chunk:
        """One decoded token; ``ctx``: the most tokens the sequence holds with it."""
        return cls._of(token_1, position_1, None, freqs, ctx)

    @classmethod
    def _of(
        cls, token_ids_S: Tensor, position_S: Tensor, start: int | None, freqs: Mapping[int, Tensor], ctx: int
    ) -> Chunk:
        window, compress, *blocks = chunk_phases(position_S, freqs[0], freqs[4])
        base_S = torch.full_like(position_S, 0 if start is None else WINDOW - start)
        return cls(
            token_ids_S,
            position_S,
            start,
            base_S,
            {0: window, 4: compress, 128: compress},
            dict(zip(RATIOS, blocks, strict=True)),
            {ratio: ctx // ratio for ratio in RATIOS},
        )

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[0]
