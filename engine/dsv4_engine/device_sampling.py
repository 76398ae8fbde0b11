"""The draw of sampling.py where a GPU's logits lie, so that a decoded token waits for two numbers and not a vocabulary.

The arithmetic is the host's, in float64, but sums are added up in another order.  So a draw counts only where it lies
further from every boundary (of min-p, of top-p, between two tokens) than any order of sums could move it; elsewhere the
host decides, and the tokens are the host's in any case.  Letters: V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sampling import Sampling

_EPSILON = 2.0**-52


class Draw:
    """A token that is being drawn; `token` holds it on the device, int64 [1], long before the host knows it."""

    @torch.inference_mode()
    def __init__(self, logits_V: Tensor, sampling: Sampling, draw: float) -> None:
        """draw: see `sampling.sample`.  Waits for nothing."""
        if sampling.temperature == 0:
            largest, index = logits_V.max(0)  # documented to be the first of equal maxima
            certain = (largest - logits_V.min()).isfinite().double()
        else:
            index, certain = _drawn(logits_V.double(), sampling, draw)
        self.token = index.view(1)
        self.known: int | None = None  # the token, once `result` has found it certain
        # Twice what rounding can move a sum of V terms on either side, and some for the terms themselves.
        self._least = 4 * (len(logits_V) + 256) * _EPSILON
        found = torch.stack([index.double(), certain])
        self._found = torch.empty(2, dtype=torch.float64, pin_memory=found.is_cuda)
        self._found.copy_(found, non_blocking=True)
        self._done = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None

    def result(self) -> int | None:
        """What `sampling.sample` returns; None where that has to decide: near a boundary, or logits are not finite.

        Waits for the draw, and not for what the device has been given to do since.
        """
        if self._done is not None:
            self._done.synchronize()
        token, by = self._found.tolist()
        self.known = int(token) if by > self._least else None
        return self.known


def _drawn(logits_V: Tensor, sampling: Sampling, draw: float) -> tuple[Tensor, Tensor]:
    """The token, and the least distance from a boundary as a share of what the boundary cuts (NaN or 0: not finite)."""
    low, high = logits_V.aminmax()
    certain = (high - low).isfinite().double()
    weights = ((logits_V - high) / sampling.temperature).exp()
    if sampling.min_p > 0:
        off = (weights / sampling.min_p - 1).abs().masked_fill(logits_V == high, 1.0)  # the largest weight is exactly 1
        certain = torch.minimum(certain, off.min())
        weights = weights.masked_fill(weights < sampling.min_p, 0.0)
    if sampling.top_p < 1:
        total = weights.sum()
        order = logits_V.argsort(descending=True, stable=True)  # equals by place
        best = weights[order]
        before, enough = best.cumsum(0) - best, sampling.top_p * total
        certain = torch.minimum(certain, ((before - enough) / total).abs().min())
        weights = torch.zeros_like(weights).scatter_(0, order, best.masked_fill(before >= enough, 0.0))
    cumulative = weights.cumsum(0)
    total = cumulative[-1]
    target = draw * total
    index = torch.searchsorted(cumulative, target[None], right=True).clamp_max(len(weights) - 1)
    above = cumulative[index] - target
    below = target - torch.where(index > 0, cumulative[(index - 1).clamp_min(0)], 0.0)
    return index[0], torch.minimum(certain, torch.minimum(above, below)[0] / total)
