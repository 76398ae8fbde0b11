"""Routed experts that do not fit a GPU: a pool of slots there over memory, filled while the model computes.

Owns the copies and when they may overwrite a slot; which expert goes where is policy.py's business, and memory's
experts are store.py's.  `Residency` is what layer.py calls between a layer's routing and its experts.  The host serves
prompts, and single tokens where files stand behind memory; else those are apart_step.py's, without the host.
Letters: S tokens, K experts a token, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dsv4_kernels.triton.moe import ExpertPool as KernelPool

from ..config import ModelConfig
from ..offload.policy import Slots, Usage
from ..offload.store import ExpertStore
from .apart_step import StepPool
from .layer import Likely
from .stage import on
from .weights import PackedSource

EXACT_BINADES = 14  # that a matrix row's scales may span: FP4 codes become e4m3 relative to the largest
FEW = 64  # chosen experts up to which their numbers are read as they are; more are counted on the device


class GpuPool:
    """One GPU's slots for the experts of its layers, over a store in memory, which is filled if it has room for all."""

    def __init__(self, store: ExpertStore, device: torch.device, slots: int) -> None:
        self.store, self.device, self._complete = store, device, store.complete
        layers, experts = store.slots.layers, store.config.n_routed_experts
        self.slots = Slots(layers, experts, slots)
        self.pool = store.pool.layout.pool(slots, device)
        self._usage = Usage()
        self.step = StepPool(store, self.pool, self.slots) if self._complete else None
        self._stepping = False  # who knows what is where: the device's own table, or `slots`
        self._tables = torch.full((layers, experts), -1, dtype=torch.int32, device=device)
        if self.step is not None:
            self._tables = self.step.held.slot_of
        self._host = torch.full((layers, experts), -1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._counts = torch.zeros(experts, dtype=torch.int32, device=device)
        self._ids = torch.zeros(max(FEW, experts), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: list[int] = []  # by the layer that computes, and by what was copied ahead
        self._early: dict[tuple[int, int], int] = {}
        self._arrived: dict[int, torch.cuda.Event] = {}  # by layer: what was copied ahead for it is there
        self._parts = [(store.pool.tensors[name], self.pool.tensors[name]) for name in self.pool.tensors]

    def kernel_pool(self, layer: int) -> KernelPool:
        """What a layer's kernels read: the slots of all layers, and where its own experts are."""
        tensors = self.pool.tensors
        w13, w2 = tensors["w13"], tensors["w2"]
        if self.pool.layout.form == "fp4":
            w13, w2 = w13.view(torch.uint8), w2.view(torch.uint8)
        return KernelPool(w13, tensors["s13"], w2, tensors["s2"], self._tables[layer])

    @property
    def usage(self) -> Usage:
        """So far; waits for the device."""
        return self._usage if self.step is None else self._usage.plus(self.step.usage)

    def begin(self, tokens: int) -> None:
        """A pass over so many tokens begins: the table goes to whoever serves it."""
        step = self.step
        if step is None:
            return
        step.settle()
        if self._stepping == (tokens == 1):
            return
        if self._stepping:
            step.give(self.slots)
            self._pinned, self._early, self._arrived = [], {}, {}
        else:
            if self._copies is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._copies)
            step.take(self.slots)
        self._stepping = tokens == 1  # last: a handing over that was interrupted begins again

    def resident(self, layer: int, chosen_SK: Tensor, following: int | None, likely: Likely = None) -> None:
        """See that the chosen experts of a layer are there before what is launched next.

        following: the next layer with experts in this pool; a prompt's chunk needs most of them too.  likely: see
        layer.Chosen.
        """
        with self._whole():
            if self._stepping:
                assert self.step is not None
                self.step.resident(layer, chosen_SK, likely if following == layer + 1 else None)
            else:
                self._bring(layer, chosen_SK, following)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Slots are given and filled, or nothing is in any: an exception, also Ctrl-C, may come between the two."""
        try:
            yield
        except BaseException:
            rank, held = self.slots.held()
            self.slots.hold(rank, np.full_like(held, -1))
            self._pinned, self._early, self._arrived, self._stepping = [], {}, {}, False
            if self._copies is not None and not torch.cuda.is_current_stream_capturing():
                self._wait()  # what was launched reads slots that nothing pins any more
            raise

    def _bring(self, layer: int, chosen_SK: Tensor, following: int | None) -> None:
        """`resident`, by the host."""
        tokens = chosen_SK.shape[0]
        counts = self._read(chosen_SK)  # everything launched before is done once this is known
        for slot in self._pinned:
            self.slots.unpin(slot)
        self._pinned = []
        missing = self._pin(layer, counts)
        self._usage.hits += len(counts) - len(missing)
        self._usage.misses += len(missing)
        self._copy(layer, missing, tokens, counts)
        self._publish(layer, bool(missing))
        self.slots.used(layer, tokens, list(counts), list(counts.values()))
        for key in [key for key in self._early if key[0] == layer]:
            self.slots.unpin(self._early.pop(key))
        if following is not None and 2 * len(counts) > self.slots.experts:
            self._ahead(following, range(self.slots.experts))

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """These will be chosen: copy them behind what is wanted now."""
        with self._whole():
            self._ahead(layer, experts)

    def _read(self, chosen_SK: Tensor) -> dict[int, int]:
        """How many tokens chose each expert; waits for the device."""
        if chosen_SK.numel() <= FEW:
            ids = self._ids[: chosen_SK.numel()]
            ids.copy_(chosen_SK.flatten(), non_blocking=True)
            self._wait()
            counts: dict[int, int] = {}
            for expert in ids.tolist():
                counts[expert] = counts.get(expert, 0) + 1
            return counts
        chosen = chosen_SK.flatten().long()
        self._counts.zero_().index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        found = self._ids[: self.slots.experts]
        found.copy_(self._counts, non_blocking=True)
        self._wait()
        return {e: n for e, n in enumerate(found.tolist()) if n}

    def _wait(self) -> None:
        if self._copies is not None:
            torch.cuda.current_stream(self.device).synchronize()

    def _pin(self, layer: int, counts: Mapping[int, int]) -> list[int]:
        """Pin those that are there; returns the others."""
        slot_of, missing = self.slots.slot_of[layer], []
        for expert in counts:
            slot = int(slot_of[expert])
            if slot < 0:
                missing.append(expert)
            else:
                self.slots.pin(slot)
                self._pinned.append(slot)
        return missing

    def _copy(self, layer: int, missing: Sequence[int], tokens: int, counts: Mapping[int, int]) -> None:
        """Bring these into slots, pinned."""
        store = self.store
        absent = list(missing)
        if self._complete:
            sources = store.where(layer, missing)
            for expert, source in zip(missing, sources, strict=True):
                if source >= 0:
                    self._pinned.append(self._into_slot(layer, expert, source))
            absent = [expert for expert, source in zip(missing, sources, strict=True) if source < 0]
        if not absent:
            store.passed(layer)
            return
        before = time.perf_counter()
        for expert, source in store.use_slots(layer, tokens, {e: counts[e] for e in absent}):
            self._pinned.append(self._into_slot(layer, expert, source))
            if not self._complete and self._copies is not None:
                self._copies.synchronize()  # the slot in memory may be another's from now on
        self._usage.waited_s += time.perf_counter() - before

    def _into_slot(self, layer: int, expert: int, source: int) -> int:
        """Copy from a slot in memory; returns the slot here, which nothing uses that is not done."""
        slot = self.slots.claim(layer, expert)
        assert slot is not None, "the plan has room for all experts of a layer"
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            for memory, here in self._parts:
                here[slot].copy_(memory[source], non_blocking=True)
        self._usage.fetched += 1
        self._usage.bytes += self.pool.layout.nbytes
        return slot

    def _publish(self, layer: int, missed: bool) -> None:
        """Let the layer's kernels see where its experts are, once they are there."""
        self._host[layer].copy_(torch.from_numpy(self.slots.slot_of[layer]))
        early = self._arrived.pop(layer, None)
        if self._copies is not None and missed:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        elif early is not None:  # later layers' copies may go on
            torch.cuda.current_stream(self.device).wait_event(early)
        self._tables[layer].copy_(self._host[layer], non_blocking=True)

    def _ahead(self, layer: int, experts: Sequence[int]) -> None:
        """Copy experts for a later layer, as far as there are slots that nothing pins; they stay until it was run."""
        store = self.store
        absent = [e for e in experts if self.slots.slot_of[layer, e] < 0]
        if not self._complete:
            store.expect(layer, absent)
            return
        # Room for a whole layer stays, so that the one that comes first finds it whatever it chooses.
        room = self.slots.slots - self.slots.pinned - self.slots.experts
        for expert, source in zip(absent, store.where(layer, absent), strict=True):
            if source >= 0 and room > 0:
                room -= 1
                self._early[layer, expert] = self._into_slot(layer, expert, source)
        if self._copies is not None:
            self._arrived[layer] = self._copies.record_event()


class Residency:
    """Called between each layer's routing and its experts: makes the chosen ones resident."""

    def __init__(self, pools: Mapping[int, GpuPool], hashed: Mapping[int, np.ndarray]) -> None:
        """pools: by layer, of those whose experts are apart.  hashed: of these, the experts by token id, [V, K]."""
        self.pools, self.hashed = dict(pools), dict(hashed)
        self._each = list({id(pool): pool for pool in self.pools.values()}.values())
        layers = sorted(self.pools)
        self._following = {
            layer: after if self.pools[layer] is self.pools[after] else None for layer, after in pairwise(layers)
        }

    def __call__(self, layer: int, chosen_SK: Tensor, likely: Likely = None) -> None:
        pool = self.pools.get(layer)
        if pool is not None:
            pool.resident(layer, chosen_SK, self._following.get(layer), likely)

    def begin(self, token_ids_S: Tensor) -> None:
        """A forward pass over these ids begins: hash layers' experts are known already.

        They lie on the host; a single one anywhere, where nobody asks for it (`recorded`).
        """
        for pool in self._each:
            with on(pool.device):
                pool.begin(token_ids_S.shape[0])
        if token_ids_S.shape[0] == 1 and self.recorded:
            return
        for layer, table in self.hashed.items():
            experts = np.unique(table[token_ids_S.numpy()])
            self.pools[layer].expect(layer, experts.tolist())

    @property
    def recorded(self) -> bool:
        """Whether what is called for a single token only launches kernels, so that it may be part of a recording."""
        return all(pool.step is not None for pool in self._each)

    @property
    def usage(self) -> Usage:
        """Over all GPUs."""
        total = Usage()
        for pool in self._each:
            total = total.plus(pool.usage)
        return total


def with_pools(
    sources: Sequence[PackedSource],
    config: ModelConfig,
    ranges: Sequence[tuple[int, int]],
    apart: Sequence[int],
    slots: Sequence[int],
    store: ExpertStore,
) -> Residency:
    """Give each device's source a pool for its experts in the layers ``apart``; returns what keeps them filled."""
    pools: dict[int, GpuPool] = {}
    hashed: dict[int, np.ndarray] = {}
    for source, (first, last), number in zip(sources, ranges, slots, strict=True):
        mine = [layer for layer in apart if first <= layer < last]
        if not mine:
            continue
        pool = GpuPool(store, source.device, number)
        source.elsewhere = {f"layers.{layer}.ffn.": pool.kernel_pool(layer) for layer in mine}
        pools |= dict.fromkeys(mine, pool)
        for layer in mine:
            if layer < config.num_hash_layers:
                hashed[layer] = source.raw(f"layers.{layer}.ffn.gate.tid2eid").cpu().numpy()
    return Residency(pools, hashed)
