"""Random inputs of the indexer kernels and the exact choice.

Queries, keys and weights lie on grids so coarse that every sum is exact however it is taken, also in the about 14 bits
of FP8 tensor cores.  So ties are common, and choices can be compared bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_engine.formats import pack_index_keys, unpack_index_keys
from dsv4_kernels.index import index_scores
from dsv4_kernels.triton.rows import SEGMENT_ROWS, segment_table

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def grid_values(*shape: int, device: str) -> Tensor:
    """Random e2m1 values; every 32 hold a 6, so that their scale is 1."""
    x = GRID.to(device)[torch.randint(0, 8, shape, device=device)] * (torch.randint(0, 2, shape, device=device) * 2 - 1)
    x[..., ::32] = 6.0
    return x


@dataclass
class IndexCase:
    q: Tensor  # float32 [S, H, C], on the grid
    weights: Tensor  # float32 [S, H]
    position: Tensor
    ratio: int
    stored: list[list[Tensor]]  # packed keys of each sequence
    segments: Tensor

    @property
    def most(self) -> int:
        return int((self.position.max() + 1) // self.ratio) if len(self.position) else 0

    def keys(self, t: int) -> Tensor:
        """float32 [N, C]"""
        return unpack_index_keys(torch.cat(self.stored[t if len(self.stored) > 1 else 0]))

    def scores(self, t: int) -> Tensor:
        visible = int(self.position[t] + 1) // self.ratio
        return index_scores(self.q[t : t + 1], self.weights[t : t + 1], self.keys(t)[:visible])[0]

    def choice(self, t: int, topk: int) -> Tensor:
        """The entries that must be chosen, rising, then -1."""
        scores = self.scores(t)
        best = torch.sort(-scores, stable=True).indices[:topk].sort().values
        return torch.nn.functional.pad(best, (0, topk - best.numel()), value=-1)


def segmented(keys: Tensor) -> list[Tensor]:
    """Packed rows in segments that lie apart, with poisoned room behind the last."""
    segments = [part.clone() for part in pack_index_keys(keys).split(SEGMENT_ROWS)] or [pack_index_keys(keys)]
    if segments[-1].shape[0] < SEGMENT_ROWS:
        segments[-1] = torch.cat([segments[-1], segments[-1].new_full((7, segments[-1].shape[1]), 0xFF)])
    return segments


def index_case(
    positions: list[int], shared: bool, heads: int, channels: int, ratio: int, device: str, keys: Tensor | None = None
) -> IndexCase:
    """Queries at ``positions``, of one sequence (shared) or one each."""
    position = torch.tensor(positions, device=device, dtype=torch.int64)
    counts = [(p + 1) // ratio for p in positions]
    if shared:
        counts = [max(counts, default=0)]
    stored = []
    for count in counts:
        own = grid_values(count, channels, device=device) if keys is None else keys
        scale = torch.randint(-3, 3, (count, 1), device=device).float().exp2() if keys is None else 1.0
        stored.append(segmented(own * scale))
    width = max((len(s) for s in stored), default=1)
    table = torch.cat([torch.nn.functional.pad(segment_table(s), (0, width - len(s))) for s in stored])
    q = grid_values(len(positions), heads, channels, device=device)
    weights = torch.randint(-8, 9, (len(positions), heads), device=device) / 8
    return IndexCase(q, weights, position, ratio, stored, table)
