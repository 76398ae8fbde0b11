"""A decoded token's experts where all lie in memory: the GPU itself decides which go and fetches what is missing.

Owns the table on the device and its handing over: a prompt's chunks are served by the host (apart.py), single tokens
here, where nothing waits for it, so that a step stays one recorded graph.  While a layer's experts and the next one's
attention compute, the link brings what the next layer will likely choose; that ends where it turns out wrong.
Letters: K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv4_kernels.triton.moe_fetch import Held, fetch, fetch_ahead, place, propose

from ..offload.layout import ExpertPool
from ..offload.policy import Slots, Usage
from ..offload.store import ExpertStore


class StepPool:
    """The slots of one GPU's pool as its own kernels keep them."""

    def __init__(self, store: ExpertStore, pool: ExpertPool, slots: Slots) -> None:
        self._device = pool.tensors["w13"].device
        self._tensors, self._half_life = (store.pool.tensors, pool.tensors), slots.half_life
        self._bytes = pool.layout.nbytes
        self.held = Held.empty(slots.layers, slots.experts, slots.slots, self._device)
        self._source_of = torch.from_numpy(store.slots.slot_of).to(self._device, copy=True)
        self._asking, self._copying = self._stream(), self._stream()
        self._proposed: torch.cuda.Event | None = None
        self._begun = False
        self._kept: list[object] = []  # what those streams may still read; empty once they are waited for

    def take(self, slots: Slots) -> None:
        """Go on from the host's table."""
        rank, held = slots.held()
        self.held.rank.copy_(torch.from_numpy(rank))
        self.held.held.copy_(torch.from_numpy(held))
        self.held.slot_of.copy_(torch.from_numpy(slots.slot_of))

    def settle(self) -> None:
        """A pass begins: what one that was interrupted has begun beside it ends first."""
        if self._kept:
            self._wait_for(self._asking)
            self._wait_for(self._copying)
            self._begun, self._kept = False, []

    def give(self, slots: Slots) -> None:
        """Let the host go on; waits for the device."""
        slots.hold(self.held.rank.double().cpu().numpy(), self.held.held.long().cpu().numpy())

    def resident(self, layer: int, chosen_1K: Tensor, likely: Callable[[], Tensor] | None) -> None:
        """What is launched next finds a token's experts in their slots.

        likely: launches what tells the next layer's likely experts, int32 [1, K]; None if that is not in this pool.
        """
        before, begun = len(self._kept), self._begun
        if begun:
            self._wait_for(self._proposed)
        place(self.held, layer, chosen_1K, self._half_life, begun)
        self._begun = False
        if likely is not None:
            self._kept += [likely, chosen_1K]
            with self._beside(self._asking):
                likely_1K = likely()
                self._kept.append(likely_1K)
                propose(self.held, layer + 1, likely_1K, chosen_1K)
                self._proposed = self._asking.record_event() if self._asking is not None else None
            self._begun = True
        fetch(self.held, self._source_of, *self._tensors)
        if begun:
            self._wait_for(self._copying)
        del self._kept[:before]
        if likely is not None:
            with self._beside(self._copying, self._proposed):
                fetch_ahead(self.held, layer + 1, self._source_of, *self._tensors)

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device, -1) if self._device.type == "cuda" else None

    def _wait_for(self, other: torch.cuda.Stream | torch.cuda.Event | None) -> None:
        """What is launched next here waits for what was launched there."""
        if isinstance(other, torch.cuda.Stream):
            torch.cuda.current_stream(self._device).wait_stream(other)
        elif other is not None:
            torch.cuda.current_stream(self._device).wait_event(other)

    @contextmanager
    def _beside(self, stream: torch.cuda.Stream | None, behind: torch.cuda.Event | None = None) -> Iterator[None]:
        """On that stream, behind what has been launched here and ``behind``."""
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        if behind is not None:
            stream.wait_event(behind)
        with torch.cuda.stream(stream):
            yield

    @property
    def usage(self) -> Usage:
        """Of all tokens so far, but for the bytes of what was begun in vain; waits for the device."""
        hits, misses, begun, known = self.held.usage.tolist()
        return Usage(hits, misses, misses + begun - known, misses * self._bytes)
