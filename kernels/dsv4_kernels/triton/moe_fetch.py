"""Experts in slots that the GPU itself keeps filled from page-locked memory: nobody waits for the host.

`place` decides for one token which slots its missing experts take, `fetch` copies them there.  Until the next layer's
are known, `propose` and `fetch_ahead` begin with one that is likely, where the link would be idle: `place` ends that if
it was wrong, and leaves it the rest if it was right.  All may stand in a captured graph.  Nothing waits for a value in
memory: whatever one of them reads, kernels in front of it in the order of streams have written, so none can hang, and
whether `fetch_ahead` hears early or late that it should end changes times only.  The rule is
dsv4_engine.offload.policy's: an expert's score is the number of tokens routed to it, each counting half as much for
every ``half_life`` tokens of its layer since; the lowest score leaves, the lower slot among equals.  Knows nothing of
routing or products.  Letters: L layers, E experts, N slots, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-1e18)  # the rank of an expert that is there and was never chosen: above an empty slot's
PROGRAMS = 8  # that copy: four already fill the link, and what computes beside them suffers from more
CHUNK = 8192  # elements that a program copies at a time
NAMES = ("w13", "s13", "w2", "s2")


@dataclass(frozen=True)
class Held:
    """Which expert is in which slot, on the device.

    slot_of: int32 [L, E], -1 where it is not there; rank: float32 [L, E], log2 of the score; held: int32 [N], layer x
    E + expert, -1: empty.  todo: int32 [1 + 2E], how many experts `place` wants fetched, then of each its number as in
    ``held`` and its slot.  ahead: int32 [L, 4], of the one fetched ahead for a layer: whether to end, its number or -1,
    its slot, nothing.  usage: int64 [4], choices that were there and that were missing so far, experts begun ahead and
    of these chosen.
    """

    slot_of: Tensor
    rank: Tensor
    held: Tensor
    todo: Tensor
    ahead: Tensor
    usage: Tensor

    @classmethod
    def empty(cls, layers: int, experts: int, slots: int, device: torch.device) -> Held:
        """Nothing is there yet."""
        return cls(
            slot_of=torch.full((layers, experts), -1, dtype=torch.int32, device=device),
            rank=torch.full((layers, experts), -torch.inf, dtype=torch.float32, device=device),
            held=torch.full((slots,), -1, dtype=torch.int32, device=device),
            todo=torch.zeros(1 + 2 * experts, dtype=torch.int32, device=device),
            ahead=torch.full((layers, 4), -1, dtype=torch.int32, device=device),
            usage=torch.zeros(4, dtype=torch.int64, device=device),
        )


@triton.jit
def _leaving(held_ptr, rank_ptr, slots, SLOTS: tl.constexpr):
    """Who is in each slot, and the rank by which it leaves."""
    n = tl.arange(0, SLOTS)
    holds = tl.load(held_ptr + n, mask=n < slots, other=-1)
    leaves = tl.load(rank_ptr + holds, mask=holds >= 0, other=0.0)
    leaves = tl.where(holds < 0, float("-inf"), tl.maximum(leaves, LEAST))
    return holds, tl.where(n < slots, leaves, float("inf"))


@triton.jit
def _first(leaves, SLOTS: tl.constexpr):
    """The slot that is left first."""
    return tl.min(tl.where(leaves == tl.min(leaves, 0), tl.arange(0, SLOTS), SLOTS - 1), 0)


@triton.jit(do_not_specialize=["layer"])
def _place(
    chosen_ptr,
    slot_of_ptr,
    rank_ptr,
    held_ptr,
    todo_ptr,
    ahead_ptr,
    usage_ptr,
    layer,
    experts,
    slots,
    age,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BEGUN: tl.constexpr,
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

    # Who leaves first; the chosen must stay.
    holds, leaves = _leaving(held_ptr, rank_ptr, slots, SLOTS)
    for i in tl.static_range(K):
        leaves = tl.where(holds == row + tl.load(chosen_ptr + i), float("inf"), leaves)
    begun = 0
    known = 0
    if BEGUN:
        likely = tl.load(ahead_ptr + 1)
        slot = tl.load(ahead_ptr + 2)
        right = missing & (row + e == likely)
        begun = (likely >= 0).to(tl.int32)
        known = tl.sum(right.to(tl.int32), 0)
        tl.store(ahead_ptr, 1 - known)
        # A wrong one's slot stays empty: until that has ended, it may still be written.
        leaves = tl.where(n == slot, float("inf"), leaves)
        missing = missing & ~right
    fetched = misses - known
    order = tl.cumsum(missing.to(tl.int32), 0)
    tl.debug_barrier()  # all have read the tables
    tl.store(rank_ptr + row + e, rank, mask=e < experts)
    if BEGUN:
        tl.store(slot_of_ptr + likely, slot, mask=known > 0)
        tl.store(held_ptr + slot, likely, mask=known > 0)
    for i in range(fetched):
        expert = row + tl.sum(tl.where(missing & (order == i + 1), e, 0), 0)
        slot = _first(leaves, SLOTS)
        gone = tl.load(held_ptr + slot)
        leaves = tl.where(n == slot, float("inf"), leaves)
        tl.debug_barrier()  # all have read whom the slot held
        tl.store(slot_of_ptr + gone, -1, mask=gone >= 0)
        tl.store(slot_of_ptr + expert, slot)
        tl.store(held_ptr + slot, expert)
        tl.store(todo_ptr + 1 + 2 * i, expert)
        tl.store(todo_ptr + 2 + 2 * i, slot)
    tl.store(todo_ptr, fetched)
    there = tl.sum(wanted.to(tl.int32), 0) - misses
    i = tl.arange(0, 4)
    more = tl.where(i == 0, there, tl.where(i == 1, misses, tl.where(i == 2, begun, known)))
    tl.store(usage_ptr + i, tl.load(usage_ptr + i) + more)


@triton.jit(do_not_specialize=["layer"])
def _propose(
    likely_ptr,
    chosen_ptr,
    slot_of_ptr,
    rank_ptr,
    held_ptr,
    ahead_ptr,
    layer,
    experts,
    slots,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = layer * experts
    holds, leaves = _leaving(held_ptr, rank_ptr, slots, SLOTS)
    for i in tl.static_range(K):  # what is computed now, and what is likely and there already
        leaves = tl.where(holds == row - experts + tl.load(chosen_ptr + i), float("inf"), leaves)
        leaves = tl.where(holds == row + tl.load(likely_ptr + i), float("inf"), leaves)
    number = -1
    for i in tl.static_range(K):
        expert = row + tl.load(likely_ptr + i)
        number = tl.where((number < 0) & (tl.load(slot_of_ptr + expert) < 0), expert, number)
    slot = _first(leaves, SLOTS)
    gone = tl.load(held_ptr + slot)
    tl.debug_barrier()  # all have read the tables
    tl.store(slot_of_ptr + gone, -1, mask=(number >= 0) & (gone >= 0))
    tl.store(held_ptr + slot, -1, mask=number >= 0)
    tl.store(ahead_ptr, 0)
    tl.store(ahead_ptr + 1, number)
    tl.store(ahead_ptr + 2, tl.where(number >= 0, slot, -1))


def place(held: Held, layer: int, chosen_1K: Tensor, half_life: float, begun: bool = False) -> None:
    """Give the experts of one token slots in place of the least used ones; what is to be copied is in ``todo``.

    chosen_1K: int32 [1, K] on the device, K at most N.  Each launch counts as a token that its layer has seen.
    begun: `propose` was asked for this layer of this token.
    """
    topk, width, warps = _checked(held, layer, chosen_1K)
    _place[(1,)](
        chosen_1K,
        held.slot_of,
        held.rank,
        held.held,
        held.todo,
        held.ahead[layer],
        held.usage,
        layer,
        held.slot_of.shape[1],
        held.held.shape[0],
        1.0 / half_life,
        K=topk,
        WIDTH=triton.next_power_of_2(topk),
        EXPERTS=triton.next_power_of_2(held.slot_of.shape[1]),
        SLOTS=width,
        BEGUN=begun,
        num_warps=warps,
    )


def propose(held: Held, layer: int, likely_1K: Tensor, chosen_1K: Tensor) -> None:
    """Take a slot for the first likely expert of a layer that is not there, before it is known to be chosen.

    likely_1K: int32 [1, K], the likeliest first; chosen_1K: of the layer before, which may be computed meanwhile.
    """
    topk, width, warps = _checked(held, layer, likely_1K)
    _propose[(1,)](
        likely_1K,
        chosen_1K,
        held.slot_of,
        held.rank,
        held.held,
        held.ahead[layer],
        layer,
        held.slot_of.shape[1],
        held.held.shape[0],
        K=topk,
        SLOTS=width,
        num_warps=warps,
    )


def _checked(held: Held, layer: int, chosen_1K: Tensor) -> tuple[int, int, int]:
    """K, N rounded up, and warps."""
    topk, (layers, experts), slots = chosen_1K.numel(), held.slot_of.shape, held.held.shape[0]
    if chosen_1K.dtype != torch.int32 or chosen_1K.shape[0] != 1 or not chosen_1K.is_contiguous():
        raise ValueError(f"choices must be contiguous int32 [1, K], got {chosen_1K.dtype} {tuple(chosen_1K.shape)}")
    if topk > min(slots, experts) or not 0 <= layer < layers:
        raise ValueError(f"{topk} experts of layer {layer} do not go into {slots} slots of {layers} layers")
    width = triton.next_power_of_2(slots)
    return topk, width, min(32, max(8, width // 1024))


@triton.jit
def _copy(from_ptr, to_ptr, source, slot, chunk, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of an expert's part of SIZE elements."""
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(from_ptr + source * SIZE + place, mask=place < SIZE)
    tl.store(to_ptr + slot * SIZE + place, values, mask=place < SIZE)


@triton.jit
def _copy_chunk(
    parts,
    source,
    slot,
    chunk,
    W13: tl.constexpr,
    S13: tl.constexpr,
    W2: tl.constexpr,
    S2: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of all of an expert's parts, one after the other."""
    SECOND: tl.constexpr = (W13 + CHUNK - 1) // CHUNK
    THIRD: tl.constexpr = SECOND + (S13 + CHUNK - 1) // CHUNK
    FOURTH: tl.constexpr = THIRD + (W2 + CHUNK - 1) // CHUNK
    if chunk < SECOND:
        _copy(parts[0], parts[4], source, slot, chunk, W13, CHUNK)
    elif chunk < THIRD:
        _copy(parts[1], parts[5], source, slot, chunk - SECOND, S13, CHUNK)
    elif chunk < FOURTH:
        _copy(parts[2], parts[6], source, slot, chunk - THIRD, W2, CHUNK)
    else:
        _copy(parts[3], parts[7], source, slot, chunk - FOURTH, S2, CHUNK)


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
    chunks,
    W13: tl.constexpr,
    S13: tl.constexpr,
    W2: tl.constexpr,
    S2: tl.constexpr,
    CHUNK: tl.constexpr,
):
    parts = (w13_from, s13_from, w2_from, s2_from, w13_to, s13_to, w2_to, s2_to)
    for i in range(tl.load(todo_ptr)):
        source = tl.load(source_of_ptr + tl.load(todo_ptr + 1 + 2 * i)).to(tl.int64)
        slot = tl.load(todo_ptr + 2 + 2 * i).to(tl.int64)
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            _copy_chunk(parts, source, slot, chunk, W13, S13, W2, S2, CHUNK)


@triton.jit
def _fetch_ahead(
    ahead_ptr,
    source_of_ptr,
    w13_from,
    s13_from,
    w2_from,
    s2_from,
    w13_to,
    s13_to,
    w2_to,
    s2_to,
    chunks,
    W13: tl.constexpr,
    S13: tl.constexpr,
    W2: tl.constexpr,
    S2: tl.constexpr,
    CHUNK: tl.constexpr,
):
    parts = (w13_from, s13_from, w2_from, s2_from, w13_to, s13_to, w2_to, s2_to)
    number = tl.load(ahead_ptr + 1)
    slot = tl.load(ahead_ptr + 2).to(tl.int64)
    source = tl.load(source_of_ptr + number, mask=number >= 0, other=0).to(tl.int64)
    chunk = tl.program_id(0)
    if number < 0:
        chunk = chunks
    while chunk < chunks:
        # Atomic, because one thread asks and all hear; relaxed, because it only says when to end.
        if tl.atomic_add(ahead_ptr, 0, sem="relaxed") == 0:
            _copy_chunk(parts, source, slot, chunk, W13, S13, W2, S2, CHUNK)
            chunk += tl.num_programs(0)
        else:
            chunk = chunks


def fetch(held: Held, source_of: Tensor, memory: Mapping[str, Tensor], pool: Mapping[str, Tensor]) -> None:
    """Copy what `place` has listed.  source_of: int32 [L, E], where each expert is in ``memory``.

    memory, pool: w13, s13, w2, s2 by name, [slots, ...] each, contiguous; memory page-locked, so that the device reads
    it over the link by itself.
    """
    _fetch[_programs(held)](held.todo, source_of, *_parts(memory, pool), CHUNK=CHUNK, num_warps=8)


def fetch_ahead(
    held: Held, layer: int, source_of: Tensor, memory: Mapping[str, Tensor], pool: Mapping[str, Tensor]
) -> None:
    """Copy what `propose` took a slot for, unless `place` finds it wrong; otherwise as `fetch`.

    What reads the layer's experts, and the next one, must wait for it.
    """
    _fetch_ahead[_programs(held)](held.ahead[layer], source_of, *_parts(memory, pool), CHUNK=CHUNK, num_warps=8)


def _programs(held: Held) -> tuple[int]:
    return (PROGRAMS if held.held.is_cuda else 2,)


def _parts(memory: Mapping[str, Tensor], pool: Mapping[str, Tensor]) -> tuple[Tensor | int, ...]:
    """From where to where, the chunks of an expert, and the elements of its parts."""
    tensors = [_words(each[name]) for each in (memory, pool) for name in NAMES]
    sizes = [tensor.shape[1] for tensor in tensors[4:]]
    return *tensors, sum(triton.cdiv(size, CHUNK) for size in sizes), *sizes


def _words(tensor: Tensor) -> Tensor:
    """[slots, elements], elements as wide as divides a slot's bytes."""
    flat = tensor.view(torch.uint8).flatten(1)
    return flat.view(torch.int32) if flat.shape[1] % 16 == 0 else flat
