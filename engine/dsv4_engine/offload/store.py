"""Routed experts in a bounded pool of memory over the checkpoint's files.

Owns the pool, the threads that read and what they are to read next.  Never takes memory beyond its slots: whoever
wants an expert gets it pinned in a slot, computes, and lets go.  What is known to be wanted soon is read meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from dsv4_engine.config import ModelConfig
from dsv4_engine.offload.layout import ExpertLayout, ExpertPool
from dsv4_engine.offload.policy import Slots, Usage
from dsv4_kernels.moe import Expert, streamed_mixture

READERS = 2  # threads: a disk is kept busy by one, memory that the system keeps of it by a few
WINDOW = 8  # experts that may lie read and not yet used: more would push out those that other layers use
MIN_SLOTS = 4

_Key = tuple[int, int]  # layer, expert


class Reader(Protocol):
    """Where experts come from: `disk.ExpertFiles`, or a benchmark's own."""

    layout: ExpertLayout
    layers: list[str]

    def read(self, layer: int, expert: int, pool: ExpertPool, slot: int) -> int: ...


class ExpertStore:
    """The routed experts of all layers.  One forward pass at a time; ``usage`` adds up over all of them."""

    def __init__(
        self,
        files: Reader,
        config: ModelConfig,
        slots: int,
        apart: Collection[int] | None = None,
        pinned: bool = False,
        own: range | None = None,
    ) -> None:
        """slots: experts held in memory at most, MIN_SLOTS at least.  apart: the layers it is for; None: all.

        pinned: in page-locked memory, for copies to a GPU.  own: the experts of each layer that this process computes;
        None: all.
        """
        assert slots >= MIN_SLOTS
        self.own = range(config.n_routed_experts) if own is None else own
        self.files, self.config, self.apart = files, config, apart
        self.pool = files.layout.pool(slots, pinned=pinned)
        self.slots = Slots(len(files.layers), config.n_routed_experts, slots)
        self.usage = Usage()
        self._window = min(WINDOW, slots // 3)
        self._experts: dict[int, Expert] = {}  # views of slots
        # Guards everything that follows, `slots` and `usage`; entered itself, since Ctrl-C within the condition's own
        # `__enter__` would leave it locked.
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._wanted: deque[_Key] = deque()  # by the layer that computes now
        self._ahead: deque[_Key] = deque()  # by later ones
        self._reading: set[_Key] = set()
        self._held: set[_Key] = set()  # read or being read, for nobody yet: each has one pin
        self._readers: set[threading.Thread] = set()
        self._pass = 0
        self._failed: Exception | None = None

    def layer(self, prefix: str) -> LayerExperts | None:
        """The experts of the layer with this prefix ("layers.0.ffn."); None where they are not apart."""
        number = self.files.layers.index(prefix)
        mtp = number >= self.config.num_hidden_layers
        return LayerExperts(self, number) if mtp or self._is_apart(number) else None

    @property
    def complete(self) -> bool:
        """Whether there is room for every expert, so that none ever leaves."""
        layers = self.slots.layers if self.apart is None else len(self.apart) + self.slots.layers
        layers -= 0 if self.apart is None else self.config.num_hidden_layers
        return self.pool.slots >= layers * len(self.own)

    def fill(self, seen: Callable[[int], object] | None = None) -> None:
        """Read every expert now, where there is room for all; seen(bytes) is called for each.

        Raises CheckpointError for what cannot be read.
        """
        assert self.complete
        everyone = dict.fromkeys(self.own, 1)
        for layer in filter(self._is_apart, range(self.config.num_hidden_layers)):
            for _ in self.use_slots(layer, 1, everyone):
                if seen is not None:
                    seen(self.pool.layout.nbytes)
        self.usage = Usage()

    def _is_apart(self, layer: int) -> bool:
        return layer < self.config.num_hidden_layers and (self.apart is None or layer in self.apart)

    # ---- what the model asks for -------------------------------------------------------------------------------------

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        """These will be wanted once ``layer`` computes: read them while nothing is more urgent."""
        with self._lock:
            self._queue_ahead(layer, experts)
            self._work()

    def use(self, layer: int, tokens: int, counts: Mapping[int, int]) -> Iterator[tuple[int, Expert]]:
        """Each of these experts once, those in memory first, the others as they come: (number, expert).

        An expert may be read until the next one is asked for.  counts: tokens routed to each, of ``tokens`` in all.
        Raises CheckpointError for what cannot be read.
        """
        for expert, slot in self.use_slots(layer, tokens, counts):
            if slot not in self._experts:
                self._experts[slot] = self.pool.expert(slot)
            yield expert, self._experts[slot]

    def use_slots(self, layer: int, tokens: int, counts: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """As `use`, but the slots where the experts are: (number, slot)."""
        number = self._settle()
        try:
            ready, coming = self._begin(layer, tokens, counts)
            while ready or coming:
                if not ready:
                    self._wait(layer, ready, coming)
                yield ready[-1]
                _, slot = ready.pop()
                with self._lock:
                    self.slots.unpin(slot)
                    self._work()
        finally:
            self._leave(layer, number)

    def _settle(self) -> int:
        """A pass begins, whose number this returns: what an interrupted one has left is taken back, wherever it was.

        Ctrl-C may come between any two operations of whoever computes; never in the threads that read.
        """
        with self._lock:
            self._wanted.clear()
            self._readers = {thread for thread in self._readers if thread.ident is not None}
            self.slots.pin_only(int(self.slots.slot_of[key]) for key in self._held | self._reading)
            self._pass += 1
            return self._pass

    def _begin(self, layer: int, tokens: int, counts: Mapping[int, int]) -> tuple[list[tuple[int, int]], set[int]]:
        ready: list[tuple[int, int]] = []
        coming: set[int] = set()
        with self._lock:
            self.slots.used(layer, tokens, list(counts), list(counts.values()))
            self._ahead = deque(key for key in self._ahead if key[0] != layer)
            self._let_go(key for key in self._held if key[0] == layer and key[1] not in counts)
            for expert in counts:
                key, slot = (layer, expert), int(self.slots.slot_of[layer, expert])
                if slot < 0 or key in self._reading:
                    coming.add(expert)
                    if slot < 0:
                        self._wanted.append(key)
                    else:
                        self._held.add(key)  # it may have been given up while it was read
                    continue
                if key in self._held:
                    self._held.remove(key)  # its pin is ours now
                else:
                    self.slots.pin(slot)
                ready.append((expert, slot))
            self.usage.hits += len(ready)
            self.usage.misses += len(coming)
            if 2 * len(counts) > len(self.own) and self._is_apart(layer + 1):
                self._queue_ahead(layer + 1, self.own)  # a prompt is read: the next layer needs most too
            self._work()
        return ready, coming

    def _wait(self, layer: int, ready: list[tuple[int, int]], coming: set[int]) -> None:
        """Move from ``coming`` to ``ready`` what has come, at least one."""
        before = time.perf_counter()
        with self._lock:
            while not (found := [e for e in coming if (layer, e) in self._held and (layer, e) not in self._reading]):
                if self._failed is not None:
                    raise self._failed
                self._turn.wait()
            for expert in found:
                self._held.remove((layer, expert))
                ready.append((expert, int(self.slots.slot_of[layer, expert])))
            coming.difference_update(found)
            self._work()
        self.usage.waited_s += time.perf_counter() - before

    def _leave(self, layer: int, number: int) -> None:
        """Let go of everything that was got for this layer in pass ``number``, computed or not."""
        with self._lock:
            if number != self._pass:  # a pass that was interrupted and is ended only now
                return
            self._wanted.clear()
            self._failed = None
            self._held = {key for key in self._held if key[0] != layer}
            self.slots.pin_only(int(self.slots.slot_of[key]) for key in self._held | self._reading)
            self._work()

    def where(self, layer: int, experts: Sequence[int]) -> list[int]:
        """The slots of those that are there, read to the end; -1 for the others.  They stay only if it is complete."""
        with self._lock:
            slots = self.slots.slot_of[layer, list(experts)].tolist()
            return [-1 if (layer, e) in self._reading else slot for e, slot in zip(experts, slots, strict=True)]

    def passed(self, layer: int) -> None:
        """The layer was computed without asking: what was read ahead for it may leave."""
        if self._held:
            self._leave(layer, self._pass)

    def _let_go(self, keys: Iterable[_Key]) -> None:
        """Nobody waits for these that were read, or are being read."""
        for key in list(keys):
            self._held.remove(key)
            if key not in self._reading:  # else the thread that reads it sees that nobody wants it any more
                self.slots.unpin(int(self.slots.slot_of[key]))

    def _queue_ahead(self, layer: int, experts: Iterable[int]) -> None:
        queued = {expert for at, expert in self._ahead if at == layer}
        absent = np.flatnonzero(self.slots.slot_of[layer] < 0).tolist()
        wanted = set(experts)
        self._ahead.extend((layer, e) for e in absent if e in wanted and e not in queued)

    # ---- the threads that read ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        """See that threads read while there is something to read and room for it.  They end when there is not."""
        while len(self._readers) < min(READERS, len(self._wanted) + len(self._ahead)) and self._room():
            thread = threading.Thread(target=self._read, name="experts", daemon=True)
            self._readers.add(thread)
            thread.start()

    def _room(self) -> bool:
        held = len(self._held)
        if self._wanted:  # what was read ahead must not keep out what is wanted now
            layer = self._wanted[0][0]
            held = sum(key[0] == layer for key in self._held)
        return held < self._window and self.slots.pinned < self.slots.slots

    def _next(self) -> tuple[_Key, int] | None:
        """What to read next, and the slot for it; None when there is nothing to do now."""
        while (queue := self._wanted or self._ahead) and self._room():
            key = queue.popleft()
            if self.slots.slot_of[key] < 0:
                slot = self.slots.claim(*key)
                assert slot is not None, "there is room"
                self._held.add(key)
                self._reading.add(key)
                return key, slot
        return None

    def _read(self) -> None:
        while True:
            with self._lock:
                job = self._next()
                if job is None:
                    self._readers.discard(threading.current_thread())
                    return
            (layer, expert), slot = job
            size, failed = 0, None
            try:
                size = self.files.read(layer, expert, self.pool, slot)
            except Exception as error:  # given to whoever waits for it
                failed = error
            with self._lock:
                self._reading.discard(job[0])
                self.usage.fetched += failed is None
                self.usage.bytes += size
                if failed is not None:
                    self.slots.drop(slot)
                    self._held.discard(job[0])
                    self.slots.unpin(slot)
                    self._failed = failed
                elif job[0] not in self._held:
                    self.slots.unpin(slot)
                self._turn.notify_all()


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts in a store."""

    store: ExpertStore
    layer: int

    def expect(self, chosen_SK: Tensor) -> None:
        """These experts will be chosen."""
        self.store.expect(self.layer, set(chosen_SK.flatten().tolist()).intersection(self.store.own))

    def mixture(self, u_SD: Tensor, chosen_SK: Tensor, weights_SK: Tensor, limit: float) -> Tensor:
        """As `dsv4_kernels.moe.mixture`, of this process' own experts: float32 [S, D]."""
        tokens, own = u_SD.shape[0], self.store.own

        def used(counts: Mapping[int, int]) -> Iterator[tuple[int, Expert]]:
            return self.store.use(self.layer, tokens, {e: n for e, n in counts.items() if e in own})

        return streamed_mixture(u_SD, used, chosen_SK, weights_SK, limit)
