"""A decoded token's experts where all lie in memory: the GPU itself decides which go and fetches what is missing.

Owns the table on the device and its handing over: a prompt's chunks are served by the host (apart.py), single tokens
here, where nothing waits for it, so that a step stays one recorded graph.
Letters: K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.triton.moe_fetch import Held, fetch, place

from ..offload.layout import ExpertPool
from ..offload.policy import Slots, Usage
from ..offload.store import ExpertStore


class StepPool:
    """The slots of one GPU's pool as its own kernels keep them."""

    def __init__(self, store: ExpertStore, pool: ExpertPool, slots: Slots) -> None:
        device = pool.tensors["w13"].device
        self._memory, self._pool, self._half_life, self._bytes = store.pool, pool, slots.half_life, pool.layout.nbytes
        self.held = Held.empty(slots.layers, slots.experts, slots.slots, device)
        self._source_of = torch.from_numpy(store.slots.slot_of).to(device, copy=True)

    def take(self, slots: Slots) -> None:
        """Go on from the host's table."""
        rank, held = slots.held()
        self.held.rank.copy_(torch.from_numpy(rank))
        self.held.held.copy_(torch.from_numpy(held))
        self.held.slot_of.copy_(torch.from_numpy(slots.slot_of))

    def give(self, slots: Slots) -> None:
        """Let the host go on; waits for the device."""
        slots.hold(self.held.rank.double().cpu().numpy(), self.held.held.long().cpu().numpy())

    def resident(self, layer: int, chosen_1K: Tensor) -> None:
        """What is launched next finds a token's experts in their slots."""
        place(self.held, layer, chosen_1K, self._half_life)
        fetch(self.held, layer, self._source_of, self._memory.tensors, self._pool.tensors)

    @property
    def usage(self) -> Usage:
        """Of all tokens so far; waits for the device."""
        hits, misses = self.held.usage.tolist()
        return Usage(hits, misses, misses, misses * self._bytes)
