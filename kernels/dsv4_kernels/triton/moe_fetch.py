"""Experts in slots that the GPU itself keeps filled from page-locked memory: nobody waits for the host.

`place` decides for one token which slots its missing experts take, `fetch` copies them there; both may stand in a
captured graph.  The rule is dsv4_engine.offload.policy's: an expert's score is the number of tokens routed to it, each
counting half as much for every ``half_life`` tokens of its layer since; the lowest score leaves, the lower slot among
equals.  Knows nothing of routing or products.  Letters: L layers, E experts, N slots, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-1e18)  # the rank of an expert that is there and was never chosen: above an empty slot's
PROGRAMS = 16  # that copy; more keep no more bytes on their way, and what computes beside them suffers
NAMES = ("w13", "s13", "w2", "s2")


@dataclass(frozen=True)
class Held:
    """Which expert is in which slot, on the device.

    slot_of: int32 [L, E], -1 where it is not there; rank: float32 [L, E], log2 of the score; held: int32 [N], layer x
    E + expert, -1: empty.  todo: int32 [L, 1 + 2E], how many experts `place` found missing last, then of each its
    number as in ``held`` and its slot.  usage: int64 [2], choices that were there and that were missing so far.
    """

    slot_of: Tensor
    rank: Tensor
    held: Tensor
    todo: Tensor
    usage: Tensor

    @classmethod
    def empty(cls, layers: int, experts: int, slots: int, device: torch.device) -> Held:
        """Nothing is there yet."""
        return cls(
            torch.full((layers, experts), -1, dtype=torch.int32, device=device),
            torch.full((layers, experts), -torch.inf, dtype=torch.float32, device=device),
            torch.full((slots,), -1, dtype=torch.int32, device=device),
            torch.zeros(layers, 1 + 2 * experts, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )


@triton.jit
def _place(
    chosen_ptr,
    slot_of_ptr,
    rank_ptr,
    held_ptr,
    todo_ptr,
    usage_ptr,
    layer,
    experts,
    slots,
    age,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    k = tl.arange(0, WIDTH)
    e = tl.arange(0, EXPERTS)
    n = tl.arange(0, SLOTS)
    row = layer * experts
    chosen = tl.load(chosen_ptr + k, mask=k < K, other=-1)
    count = tl.sum((chosen[:, None] == e[None, :]).to(tl.int32), 0)
    wanted = count > 0
    rank = tl.load(rank_ptr + row + e, mask=e < experts, other=float("-inf")) - age
    tokens = tl.log2(tl.maximum(count, 1).to(tl.float32))
    most = tl.maximum(rank, tokens)
    rank = tl.where(wanted, most + tl.log2(1.0 + tl.exp2(tl.minimum(rank, tokens) - most)), rank)
    missing = wanted & (tl.load(slot_of_ptr + row + e, mask=e < experts, other=0) < 0)
    misses = tl.sum(missing.to(tl.int32), 0)
    order = tl.cumsum(missing.to(tl.int32), 0)

    # Who leaves first; the chosen must stay.
    holds = tl.load(held_ptr + n, mask=n < slots, other=-1)
    leaves = tl.load(rank_ptr + holds, mask=holds >= 0, other=0.0)
    leaves = tl.where(holds < 0, float("-inf"), tl.maximum(leaves, LEAST))
    leaves = tl.where(n < slots, leaves, float("inf"))
    for i in tl.static_range(K):
        leaves = tl.where(holds == row + tl.load(chosen_ptr + i), float("inf"), leaves)
    tl.debug_barrier()  # all have read the ranks
    tl.store(rank_ptr + row + e, rank, mask=e < experts)
    for i in range(misses):
        least = tl.min(leaves, 0)
        slot = tl.min(tl.where(leaves == least, n, SLOTS), 0)
        gone = tl.load(held_ptr + slot)
        expert = row + tl.sum(tl.where(missing & (order == i + 1), e, 0), 0)
        leaves = tl.where(n == slot, float("inf"), leaves)
        tl.debug_barrier()  # all have read whom the slot held
        tl.store(slot_of_ptr + gone, -1, mask=gone >= 0)
        tl.store(slot_of_ptr + expert, slot)
        tl.store(held_ptr + slot, expert)
        tl.store(todo_ptr + 1 + 2 * i, expert)
        tl.store(todo_ptr + 2 + 2 * i, slot)
    tl.store(todo_ptr, misses)
    there = tl.sum(wanted.to(tl.int32), 0) - misses
    hits = tl.load(usage_ptr)
    missed = tl.load(usage_ptr + 1)
    tl.debug_barrier()
    tl.store(usage_ptr, hits + there)
    tl.store(usage_ptr + 1, missed + misses)


def place(held: Held, layer: int, chosen_1K: Tensor, half_life: float) -> None:
    """Give the experts of one token slots in place of the least used ones; what is to be copied is in ``todo``.

    chosen_1K: int32 [1, K] on the device, K at most N.  Each launch counts as a token that its layer has seen.
    """
    topk, (layers, experts), slots = chosen_1K.numel(), held.slot_of.shape, held.held.shape[0]
    if chosen_1K.dtype != torch.int32 or chosen_1K.shape[0] != 1 or not chosen_1K.is_contiguous():
        raise ValueError(f"choices must be contiguous int32 [1, K], got {chosen_1K.dtype} {tuple(chosen_1K.shape)}")
    if topk > min(slots, experts) or not 0 <= layer < layers:
        raise ValueError(f"{topk} experts of layer {layer} do not go into {slots} slots of {layers} layers")
    width = triton.next_power_of_2(slots)
    _place[(1,)](
        chosen_1K,
        held.slot_of,
        held.rank,
        held.held,
        held.todo[layer],
        held.usage,
        layer,
        experts,
        slots,
        1.0 / half_life,
        K=topk,
        WIDTH=triton.next_power_of_2(topk),
        EXPERTS=triton.next_power_of_2(experts),
        SLOTS=width,
        num_warps=min(32, max(8, width // 1024)),
    )


@triton.jit
def _move(from_ptr, to_ptr, source, slot, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """An expert's part of SIZE elements; this program's share of it."""
    offset = tl.arange(0, BLOCK)
    from_ptr += source * SIZE
    to_ptr += slot * SIZE
    for start in range(tl.program_id(0) * BLOCK, SIZE, tl.num_programs(0) * BLOCK):
        place = start + offset
        tl.store(to_ptr + place, tl.load(from_ptr + place, mask=place < SIZE), mask=place < SIZE)


@triton.jit
def _fetch(
    todo_ptr,
    source_of_ptr,
    w13_from,
    s13_from,
    w2_from,
    s2_from,
    w13_to,
    s13_to,
    w2_to,
    s2_to,
    W13: tl.constexpr,
    S13: tl.constexpr,
    W2: tl.constexpr,
    S2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for i in range(tl.load(todo_ptr)):
        source = tl.load(source_of_ptr + tl.load(todo_ptr + 1 + 2 * i)).to(tl.int64)
        slot = tl.load(todo_ptr + 2 + 2 * i).to(tl.int64)
        _move(w13_from, w13_to, source, slot, W13, BLOCK)
        _move(s13_from, s13_to, source, slot, S13, BLOCK)
        _move(w2_from, w2_to, source, slot, W2, BLOCK)
        _move(s2_from, s2_to, source, slot, S2, BLOCK)


def fetch(held: Held, layer: int, source_of: Tensor, memory: Mapping[str, Tensor], pool: Mapping[str, Tensor]) -> None:
    """Copy what `place` found missing of a layer.  source_of: int32 [L, E], where each expert is in ``memory``.

    memory, pool: w13, s13, w2, s2 by name, [slots, ...] each, contiguous; memory page-locked, so that the device reads
    it over the link by itself.
    """
    sources, targets = ([_words(tensors[name]) for name in NAMES] for tensors in (memory, pool))
    sizes = {name.upper(): target.shape[1] for name, target in zip(NAMES, targets, strict=True)}
    programs = PROGRAMS if held.held.is_cuda else 1
    _fetch[(programs,)](held.todo[layer], source_of, *sources, *targets, **sizes, BLOCK=4096, num_warps=4)


def _words(tensor: Tensor) -> Tensor:
    """[slots, elements], elements as wide as divides a slot's bytes."""
    flat = tensor.view(torch.uint8).flatten(1)
    return flat.view(torch.int32) if flat.shape[1] % 16 == 0 else flat
