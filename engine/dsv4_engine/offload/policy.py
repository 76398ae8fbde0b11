"""Which expert lies in which slot of a pool: the same rule for memory over a disk and for a GPU over memory.

An expert's score is the number of tokens that were routed to it, each counting half as much for every HALF_LIFE tokens
that its layer has seen since: frequency and recency in one (LRFU, Lee et al., IEEE Trans. Computers 50, 2001).  The
lowest score leaves first, also when it came last, so that a pass over all experts does not empty the pool of those in
use.  Knows numbers only; moves nothing and takes no lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

HALF_LIFE = 128  # tokens; see docs/offload.md for the choice
_EMPTY = -1e18


@dataclass
class Usage:
    """Experts asked for, and what that cost.  hits: were there; misses: had to be fetched, or were on their way.

    fetched: experts moved, those nobody asked for in the end included.  bytes: moved.  waited_s: spent waiting.
    """

    hits: int = 0
    misses: int = 0
    fetched: int = 0
    bytes: int = 0
    waited_s: float = 0.0

    def plus(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)


class Slots:
    """The table of a pool with ``slots`` slots for ``layers`` x ``experts`` experts.

    slot_of: int32 [layers, experts], -1 where an expert is not there.
    """

    def __init__(self, layers: int, experts: int, slots: int, half_life: float = HALF_LIFE) -> None:
        assert slots > 0
        self.layers, self.experts, self.slots, self.half_life = layers, experts, slots, half_life
        self.slot_of = np.full((layers, experts), -1, np.int32)
        self._rank = np.full((layers, experts), -np.inf)  # log2 of the score now
        self._held = np.full(slots, -1, np.int64)  # layer * experts + expert
        self._pins = np.zeros(slots, np.int32)
        self._leaves = np.full(slots, _EMPTY)  # the rank of who is there: the lowest leaves first

    def used(self, layer: int, tokens: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Layer ``layer`` saw ``tokens`` more tokens; counts: how many of them were routed to each of ``experts``."""
        rank, at = self._rank[layer], np.asarray(experts, np.int64)
        rank -= tokens / self.half_life
        rank[at] = np.logaddexp2(rank[at], np.log2(counts))
        slots = self.slot_of[layer]
        there = slots >= 0
        self._leaves[slots[there]] = rank[there]

    def score(self, layer: int, expert: int) -> float:
        """Tokens that were routed to it, aged."""
        return float(2.0 ** self._rank[layer, expert])

    def claim(self, layer: int, expert: int) -> int | None:
        """A slot for an expert that is not there, pinned and its own from now on; whoever was in it is gone.

        None where every slot is pinned.
        """
        assert self.slot_of[layer, expert] < 0, "it is there"
        slot = int(np.where(self._pins == 0, self._leaves, np.inf).argmin())
        if self._pins[slot]:
            return None
        self.drop(slot)
        self._held[slot] = layer * self.experts + expert
        self.slot_of[layer, expert] = slot
        # Never used yet it still goes after an empty slot.
        self._leaves[slot] = max(self._rank[layer, expert], _EMPTY / 2)
        self._pins[slot] += 1
        return slot

    def pin(self, slot: int) -> None:
        """It must stay until `unpin` was called as often."""
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        assert self._pins[slot] > 0
        self._pins[slot] -= 1

    def pin_only(self, slots: Iterable[int]) -> None:
        """Each of these is pinned once, and nothing else is."""
        pins = np.zeros_like(self._pins)
        pins[list(slots)] = 1
        self._pins = pins  # at once: an interruption finds the old ones or these

    def drop(self, slot: int) -> None:
        """Empty a slot; its pins stay."""
        held = int(self._held[slot])
        if held >= 0:
            self.slot_of[divmod(held, self.experts)] = -1
        self._held[slot] = -1
        self._leaves[slot] = _EMPTY

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """All that the rule goes by: log2 of the scores [layers, experts], and who is in each slot (layer x experts +
        expert, -1: nobody), for whoever takes over (`hold` there or here).
        """
        return self._rank, self._held

    def hold(self, rank: np.ndarray, held: np.ndarray) -> None:
        """Go on from there, with nothing pinned."""
        self._rank, self._held = rank.astype(np.float64), held.astype(np.int64)
        self._pins[:] = 0
        there = np.flatnonzero(held >= 0)
        self.slot_of[:] = -1
        self.slot_of.reshape(-1)[held[there]] = there
        self._leaves[:] = _EMPTY
        self._leaves[there] = np.maximum(self._rank.reshape(-1)[held[there]], _EMPTY / 2)

    @property
    def pinned(self) -> int:
        """Slots that must stay."""
        return int(np.count_nonzero(self._pins))
