"""Which experts a token goes to, and its tokens for every expert: routing, and a stable sort of pairs by expert.

Everything stays on the device and shapes alone decide what is launched, so a captured graph serves any choice.  Knows
nothing of weights.  Reference: dsv4_kernels.moe.route; the order of pairs is torch.argsort(stable=True)'s.
Letters: S tokens, E experts, K experts a token, P = S K pairs, T tiles (up to `size` pairs of one expert).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_PAIRS = 512  # as many are sorted by one program
PAIR_BLOCK = 512
TILE_BLOCK = 32
BLOCKS_AT_ONCE = 16


@triton.jit
def _score(logit):
    """sqrt(softplus(logit)), to a few units in the last place also where softplus is tiny."""
    e = tl.exp(-tl.abs(logit))
    # log(1 + e) = 2 atanh(z); z <= 1/3, so eight terms give float32.
    z = e / (2.0 + e)
    z2 = z * z
    series = 1.0 + z2 * (
        1 / 3 + z2 * (1 / 5 + z2 * (1 / 7 + z2 * (1 / 9 + z2 * (1 / 11 + z2 * (1 / 13 + z2 * (1 / 15))))))
    )
    return tl.sqrt_rn(tl.maximum(logit, 0.0) + 2.0 * z * series)


@triton.jit
def _route(
    logits_ptr,
    bias_ptr,
    table_ptr,
    token_ptr,
    chosen_ptr,
    weights_ptr,
    tokens,
    experts,
    scaling,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BIASED: tl.constexpr,
    HASHED: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = t < tokens
    rank = tl.arange(0, WIDTH)
    place = t[:, None] * K + rank[None, :]
    kept = real[:, None] & (rank < K)[None, :]
    row = t.to(tl.int64) * experts
    if HASHED:
        token = tl.load(token_ptr + t, mask=real, other=0).to(tl.int64)
        chosen = tl.load(table_ptr + token[:, None] * K + rank[None, :], mask=kept, other=0).to(tl.int32)
        picked = tl.where(kept, _score(tl.load(logits_ptr + row[:, None] + chosen, mask=kept, other=0.0)), 0.0)
    else:
        expert = tl.arange(0, EXPERTS)
        known = (expert < experts)[None, :]
        score = _score(tl.load(logits_ptr + row[:, None] + expert[None, :], mask=real[:, None] & known, other=0.0))
        value = score
        if BIASED:
            value += tl.load(bias_ptr + expert, mask=expert < experts, other=0.0)[None, :]
        value = tl.where(value == value, value, -3e38)  # NaN last, but before what is no expert
        value = tl.where(known, value, float("-inf"))
        chosen = tl.zeros([TOKENS, WIDTH], tl.int32)
        picked = tl.zeros([TOKENS, WIDTH], tl.float32)
        for k in tl.static_range(K):
            best = tl.max(value, 1)
            where = tl.min(tl.where(value == best[:, None], expert[None, :], EXPERTS - 1), 1)
            taken = expert[None, :] == where[:, None]
            chosen = tl.where(rank[None, :] == k, where[:, None], chosen)
            mine = tl.sum(tl.where(taken, score, 0.0), 1)
            picked = tl.where(rank[None, :] == k, mine[:, None], picked)
            value = tl.where(taken, float("-inf"), value)
    if NORMALISE:
        picked = picked / (tl.sum(picked, 1) + 1e-20)[:, None]
    tl.store(chosen_ptr + place, chosen, mask=kept)
    tl.store(weights_ptr + place, picked * scaling, mask=kept)


def route(
    logits_SE: Tensor,
    topk: int,
    scaling: float,
    normalise: bool,
    bias_E: Tensor | None = None,
    table: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts of each token and their weights: int32 [S, K] and float32 [S, K].

    logits: float32 [S, E], the gate's product.  Scores are sqrt(softplus(logits)); experts are the ``topk`` of scores +
    bias, the best first, equal ones in their order; the bias (float32 [E]) only selects.  Hash layers: experts are
    table[token id], table int [V, K], token_ids int [S].  Raises ValueError for what the kernel does not take.
    Source: as dsv4_kernels.moe.route.
    """
    tokens, experts = logits_SE.shape
    if logits_SE.dtype != torch.float32 or not logits_SE.is_contiguous() or not 0 < topk <= experts:
        raise ValueError(
            f"routing to {topk} experts needs contiguous float32 logits of at least as many experts, "
            f"got {logits_SE.dtype} {tuple(logits_SE.shape)}"
        )
    if (table is None) != (token_ids is None) or (table is not None and table.shape[1] != topk):
        raise ValueError(f"hash layers need token ids and a table of {topk} experts a token id")
    chosen = torch.empty(tokens, topk, dtype=torch.int32, device=logits_SE.device)
    weights = torch.empty(tokens, topk, dtype=torch.float32, device=logits_SE.device)
    if not tokens:
        return chosen, weights
    rows = 1 if tokens <= 1024 else 4
    _route[(triton.cdiv(tokens, rows),)](
        logits_SE,
        bias_E if bias_E is not None else logits_SE,
        table if table is not None else chosen,
        token_ids if token_ids is not None else chosen,
        chosen,
        weights,
        tokens,
        experts,
        scaling,
        K=topk,
        WIDTH=triton.next_power_of_2(topk),
        EXPERTS=triton.next_power_of_2(experts),
        TOKENS=rows,
        BIASED=bias_E is not None,
        HASHED=table is not None,
        NORMALISE=normalise,
        num_warps=1 if rows == 1 else 4,
    )
    return chosen, weights


@dataclass(frozen=True)
class Groups:
    """Pairs by expert.  order: int32 [P], the pairs (token x K + choice), those of an expert adjacent and in order.

    tiles: int32 [T, 3]: expert, first place in ``order``, number of pairs (1 .. size; 0: the tile is empty); an
    expert's tiles are adjacent.  T depends on shapes alone.
    """

    order: Tensor
    tiles: Tensor
    size: int


@triton.jit
def _write_tiles(tiles_ptr, tiles, counts, TILES: tl.constexpr, SIZE: tl.constexpr, EXPERTS: tl.constexpr):
    """The program's TILES rows of the table of tiles; counts: int32 [EXPERTS]."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.arange(0, EXPERTS)
    each = (counts + SIZE - 1) // SIZE
    ends = tl.cumsum(each, 0)
    starts = tl.cumsum(counts, 0) - counts
    begun = ends - each
    mine = (begun[None, :] <= tile[:, None]) & (tile[:, None] < ends[None, :])
    within = (tile[:, None] - begun[None, :]) * SIZE
    owner = tl.sum(tl.where(mine, expert[None, :], 0), 1)
    first = tl.sum(tl.where(mine, starts[None, :] + within, 0), 1)
    count = tl.sum(tl.where(mine, tl.minimum(counts[None, :] - within, SIZE), 0), 1)
    tl.store(tiles_ptr + tile * 3, owner, mask=tile < tiles)
    tl.store(tiles_ptr + tile * 3 + 1, first, mask=tile < tiles)
    tl.store(tiles_ptr + tile * 3 + 2, count, mask=tile < tiles)


@triton.jit
def _group_few(
    chosen_ptr,
    order_ptr,
    tiles_ptr,
    pairs,
    tiles,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Everything in one program a block of TILES tiles, the first of which also sorts."""
    pair = tl.arange(0, PAIRS)
    expert = tl.load(chosen_ptr + pair, mask=pair < pairs, other=EXPERTS)
    counts = tl.histogram(expert, EXPERTS, mask=pair < pairs)
    _write_tiles(tiles_ptr, tiles, counts, TILES, SIZE, EXPERTS)
    # Each program sorts a share of the pairs.
    SHARE: tl.constexpr = 32
    for start in range(tl.program_id(0) * SHARE, pairs, tl.num_programs(0) * SHARE):
        mine = start + tl.arange(0, SHARE)
        own = tl.load(chosen_ptr + mine, mask=mine < pairs, other=EXPERTS)
        before = (expert[None, :] < own[:, None]) | (
            (expert[None, :] == own[:, None]) & (pair[None, :] < mine[:, None])
        )
        tl.store(order_ptr + tl.sum(before.to(tl.int32), 1), mine, mask=mine < pairs)


@triton.jit
def _count(chosen_ptr, counts_ptr, pairs, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    expert = tl.load(chosen_ptr + pair, mask=pair < pairs, other=EXPERTS)
    counts = tl.histogram(expert, EXPERTS, mask=pair < pairs)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit
def _plan(
    counts_ptr,
    places_ptr,
    tiles_ptr,
    blocks,
    tiles,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Each program writes TILES tiles; the first also the place of every block's first pair of every expert."""
    expert = tl.arange(0, EXPERTS)[None, :]
    total = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, blocks, AT_ONCE):
        block = start + tl.arange(0, AT_ONCE)[:, None]
        total += tl.sum(tl.load(counts_ptr + block * EXPERTS + expert, mask=block < blocks, other=0), 0)
    _write_tiles(tiles_ptr, tiles, total, TILES, SIZE, EXPERTS)
    if tl.program_id(0) == 0:
        running = tl.cumsum(total, 0) - total
        for start in range(0, blocks, AT_ONCE):
            block = start + tl.arange(0, AT_ONCE)[:, None]
            counts = tl.load(counts_ptr + block * EXPERTS + expert, mask=block < blocks, other=0)
            places = running[None, :] + tl.cumsum(counts, 0) - counts
            tl.store(places_ptr + block * EXPERTS + expert, places, mask=block < blocks)
            running += tl.sum(counts, 0)


@triton.jit
def _sort(chosen_ptr, places_ptr, order_ptr, pairs, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    first = tl.program_id(0) * PAIRS
    pair = tl.arange(0, PAIRS)
    expert = tl.load(chosen_ptr + first + pair, mask=first + pair < pairs, other=EXPERTS)
    SHARE: tl.constexpr = 64
    for start in range(0, PAIRS, SHARE):
        mine = start + tl.arange(0, SHARE)
        real = first + mine < pairs
        own = tl.load(chosen_ptr + first + mine, mask=real, other=0)
        before = (expert[None, :] == own[:, None]) & (pair[None, :] < mine[:, None])
        place = tl.load(places_ptr + tl.program_id(0) * EXPERTS + own, mask=real, other=0)
        tl.store(order_ptr + place + tl.sum(before.to(tl.int32), 1), first + mine, mask=real)


def group(chosen_SK: Tensor, experts: int, size: int) -> Groups:
    """Pairs of token and choice sorted by expert, in tiles of at most ``size``.

    chosen: int32 [S, K], contiguous, each of 0 .. experts - 1.  T = min(P, ceil(P / size) + experts).
    """
    pairs, device = chosen_SK.numel(), chosen_SK.device
    tiles = min(pairs, triton.cdiv(pairs, size) + experts)
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    table = torch.empty(tiles, 3, dtype=torch.int32, device=device)
    width = triton.next_power_of_2(experts)
    programs = triton.cdiv(tiles, TILE_BLOCK)
    if 0 < pairs <= FEW_PAIRS:
        _group_few[(programs,)](
            chosen_SK,
            order,
            table,
            pairs,
            tiles,
            PAIRS=max(16, triton.next_power_of_2(pairs)),
            EXPERTS=width,
            SIZE=size,
            TILES=TILE_BLOCK,
            num_warps=8,
        )
    elif pairs:
        blocks = triton.cdiv(pairs, PAIR_BLOCK)
        counts = torch.empty(blocks, width, dtype=torch.int32, device=device)
        places = torch.empty_like(counts)
        _count[(blocks,)](chosen_SK, counts, pairs, PAIRS=PAIR_BLOCK, EXPERTS=width, num_warps=8)
        _plan[(programs,)](
            counts,
            places,
            table,
            blocks,
            tiles,
            EXPERTS=width,
            SIZE=size,
            TILES=TILE_BLOCK,
            AT_ONCE=BLOCKS_AT_ONCE,
            num_warps=8,
        )
        _sort[(blocks,)](chosen_SK, places, order, pairs, PAIRS=PAIR_BLOCK, EXPERTS=width, num_warps=8)
    return Groups(order, table, size)
