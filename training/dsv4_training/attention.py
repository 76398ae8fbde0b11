"""The trainer's attention over many positions: tiled, recomputed in the backward pass, never a [queries x entries]
matrix of all heads for a long sequence.

Owns the window, dense attention over compressed entries, attention over gathered entries, and the indexer's choice; a
document sees its own window and entries only.  Knows no weights.  Each part gives its log-sum-exp, by which
layers.merge_and_project joins them to one softmax.
Letters: B sequences, S positions, T positions of a tile, A blocks of 128, N = B*S, H heads, C channels, M entries of a
sequence, K chosen entries, Q sampled queries.
Source: report, sections 2.3.1 and 2.3.2; recomputation as in FlashAttention (arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rotary import rotate

BLOCK = 128
NEG_INF = float("-inf")
UNSEEN = -1e30
# Elements of float32 that one tile of logits may have: 1 GiB.
TILE_ELEMENTS = 1 << 28

Tile = Callable[..., Any]


def window_attention(
    q_NHC: Tensor, kv_NC: Tensor, before_NC: Tensor, first_A: Tensor, cos_AP: Tensor, sin_AP: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of each block of 128 queries over itself and the block before, 128 positions a query.

    before: kv moved on by 128; first_A: bool, true for blocks that open a document; cos, sin: the turn of the block
    before on where positions jump, so that the window stays as it is without the jump.  Returns the output [N, H, C]
    and its log-sum-exp [N, H].
    """
    tokens, heads, channels = q_NHC.shape
    before = rotate(before_NC.view(-1, BLOCK, channels), cos_AP[:, None], sin_AP[:, None])
    keys = torch.cat([before, kv_NC.view(-1, BLOCK, channels)], 1)
    q = (q_NHC * channels**-0.5).view(-1, BLOCK * heads, channels)
    logits = torch.bmm(q, keys.transpose(1, 2)).float().view(-1, BLOCK, heads, 2 * BLOCK)
    row = torch.arange(BLOCK, device=q.device)[:, None]
    column = torch.arange(2 * BLOCK, device=q.device)
    inside = (column > row) & (column <= row + BLOCK)
    inside = inside & ~(first_A[:, None, None] & (column < BLOCK))
    logits = logits.masked_fill(~inside[:, :, None], NEG_INF)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().to(keys.dtype)
    out = torch.bmm(weights.view(-1, BLOCK * heads, 2 * BLOCK), keys)
    return out.view(tokens, heads, channels), lse.view(tokens, heads)


def visible(low_BT: Tensor, high_T: Tensor, count: int) -> Tensor:
    """Which of the first ``count`` entries of its sequence a query sees, low <= entry < high: bool [B, T, count]."""
    entry = torch.arange(count, device=low_BT.device)
    return (entry >= low_BT[..., None]) & (entry < high_T[:, None])


# Dense attention over entries ----------------------------------------------------------------------------------------


def _dense_logits(q: Tensor, entries: Tensor, shown: Tensor) -> Tensor:
    batch, queries, heads, channels = q.shape
    flat = (q * channels**-0.5).reshape(batch, queries * heads, channels)
    logits = torch.bmm(flat, entries.transpose(1, 2)).float().view(batch, queries, heads, -1)
    return logits.masked_fill(~shown[:, :, None], UNSEEN)


def _shown(low: Tensor, high: Tensor, chosen: Tensor | None, count: int) -> Tensor:
    seen = visible(low, high, count)
    return seen if chosen is None else seen & chosen


def dense_tile(
    q_BTHC: Tensor, entries_BMC: Tensor, low_BT: Tensor, high_T: Tensor, chosen_BTM: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, C] and log-sum-exp [B, T, H] (-1e30 where nothing is seen)."""
    shown = _shown(low_BT, high_T, chosen_BTM, entries_BMC.shape[1])
    logits = _dense_logits(q_BTHC, entries_BMC, shown)
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak).exp().masked_fill(~shown[:, :, None], 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.clamp_min(1e-20)).to(q_BTHC.dtype)
    out = torch.bmm(weights.flatten(1, 2), entries_BMC).view(q_BTHC.shape)
    lse = torch.where(total > 0, peak + total.clamp_min(1e-20).log(), torch.full_like(total, UNSEEN))
    return out, lse.squeeze(-1)


def dense_tile_backward(
    q_BTHC: Tensor,
    entries_BMC: Tensor,
    low_BT: Tensor,
    high_T: Tensor,
    chosen_BTM: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of q [B, T, H, C] and of the entries [B, M, C], the latter in float32."""
    shown = _shown(low_BT, high_T, chosen_BTM, entries_BMC.shape[1])
    logits = _dense_logits(q_BTHC, entries_BMC, shown)
    weights = (logits - lse[..., None]).exp().masked_fill(~shown[:, :, None], 0.0)
    towards = torch.bmm(d_out.flatten(1, 2), entries_BMC.transpose(1, 2)).float().view(weights.shape)
    delta = (d_out.float() * out.float()).sum(-1) - d_lse
    d_logits = (weights * (towards - delta[..., None])).to(q_BTHC.dtype).flatten(1, 2)
    scale = q_BTHC.shape[-1] ** -0.5
    d_q = torch.bmm(d_logits, entries_BMC).view(q_BTHC.shape) * scale
    d_entries = torch.bmm(d_logits.transpose(1, 2), (q_BTHC * scale).flatten(1, 2)).float()
    d_entries = d_entries + torch.bmm(weights.to(q_BTHC.dtype).flatten(1, 2).transpose(1, 2), d_out.flatten(1, 2))
    return d_q, d_entries


def tile_length(queries: int, per_query: int) -> int:
    """Positions of a tile, whole blocks, such that its logits stay below TILE_ELEMENTS."""
    return min(queries, max(BLOCK, TILE_ELEMENTS // max(1, per_query) // BLOCK * BLOCK))


class DenseAttention(torch.autograd.Function):
    """`dense_tile` over all positions, tile by tile; the backward pass computes the weights anew."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        entries: Tensor,
        low: Tensor,
        high: Tensor,
        chosen: Tensor | None,
        forward: Tile,
        backward: Tile,
    ) -> tuple[Tensor, Tensor]:
        ctx.tile = tile_length(q.shape[1], q.shape[0] * q.shape[2] * entries.shape[1])
        ctx.backward_tile = backward
        parts = [
            forward(q[:, s], entries, low[:, s], high[s], None if chosen is None else chosen[:, s, : entries.shape[1]])
            for s in _slices(q.shape[1], ctx.tile)
        ]
        out, lse = (_join(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(q, entries, low, high, chosen, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, entries, low, high, chosen, out, lse = ctx.saved_tensors
        d_out, d_lse = grads[0].to(q.dtype).contiguous(), grads[1].contiguous()
        d_q, d_entries = [], torch.zeros_like(entries, dtype=torch.float32)
        for s in _slices(q.shape[1], ctx.tile):
            picked = None if chosen is None else chosen[:, s]
            dq, de = ctx.backward_tile(
                q[:, s], entries, low[:, s], high[s], picked, out[:, s], lse[:, s], d_out[:, s], d_lse[:, s]
            )
            d_q.append(dq)
            d_entries += de
        return _join(d_q), d_entries.to(entries.dtype), None, None, None, None, None


def _slices(length: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def _join(parts: Any) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


# Attention over gathered entries -------------------------------------------------------------------------------------


def _gathered_logits(q: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    logits = torch.bmm(q * q.shape[-1] ** -0.5, rows.transpose(1, 2)).float()
    return logits.masked_fill(~seen[:, None], UNSEEN)


def gathered_tile(q_THC: Tensor, rows_TKC: Tensor, seen_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each query over rows of its own: output [T, H, C] and log-sum-exp [T, H]."""
    logits = _gathered_logits(q_THC, rows_TKC, seen_TK)
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak).exp().masked_fill(~seen_TK[:, None], 0.0)
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm((weights / total.clamp_min(1e-20)).to(q_THC.dtype), rows_TKC)
    lse = torch.where(total > 0, peak + total.clamp_min(1e-20).log(), torch.full_like(total, UNSEEN))
    return out, lse.squeeze(-1)


def gathered_tile_backward(
    q_THC: Tensor, rows_TKC: Tensor, seen_TK: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q [T, H, C] and of the rows [T, K, C], the latter in float32."""
    logits = _gathered_logits(q_THC, rows_TKC, seen_TK)
    weights = (logits - lse[..., None]).exp().masked_fill(~seen_TK[:, None], 0.0)
    towards = torch.bmm(d_out, rows_TKC.transpose(1, 2)).float()
    delta = (d_out.float() * out.float()).sum(-1) - d_lse
    d_logits = (weights * (towards - delta[..., None])).to(q_THC.dtype)
    scale = q_THC.shape[-1] ** -0.5
    d_q = torch.bmm(d_logits, rows_TKC) * scale
    both = torch.cat([d_logits, weights.to(q_THC.dtype)], 1)
    d_rows = torch.bmm(both.transpose(1, 2), torch.cat([q_THC * scale, d_out], 1))
    return d_q, d_rows.float()


class GatheredAttention(torch.autograd.Function):
    """Attention of q [B, S, H, C] over the entries [B, M, C] that chosen [B, S, K] names, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        entries: Tensor,
        low: Tensor,
        high: Tensor,
        chosen: Tensor,
        forward: Tile,
        backward: Tile,
    ) -> tuple[Tensor, Tensor]:
        batch, length, _, channels = q.shape
        ctx.tile = tile_length(batch * length, chosen.shape[2] * channels)
        ctx.backward_tile = backward
        seen = ((chosen >= low[..., None]) & (chosen < high[:, None])).flatten(0, 1)
        first = torch.arange(batch, device=q.device)[:, None, None] * entries.shape[1]
        flat = (chosen + first).flatten(0, 1)
        queries, table = q.flatten(0, 1), entries.flatten(0, 1)
        parts = [forward(queries[s], _rows(table, flat[s]), seen[s]) for s in _slices(batch * length, ctx.tile)]
        out, lse = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        ctx.save_for_backward(q, entries, flat, seen, out, lse)
        return out.view(q.shape), lse.view(q.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, entries, flat, seen, out, lse = ctx.saved_tensors
        d_out, d_lse = grads[0].to(q.dtype).flatten(0, 1), grads[1].flatten(0, 1)
        queries, table = q.flatten(0, 1), entries.flatten(0, 1)
        d_q, d_table = [], torch.zeros_like(table, dtype=torch.float32)
        for s in _slices(queries.shape[0], ctx.tile):
            rows = _rows(table, flat[s])
            dq, d_rows = ctx.backward_tile(queries[s], rows, seen[s], out[s], lse[s], d_out[s], d_lse[s])
            d_q.append(dq)
            d_table.index_add_(0, flat[s].flatten(), d_rows.flatten(0, 1))
        d_entries = d_table.view(entries.shape).to(entries.dtype)
        return torch.cat(d_q).view(q.shape), d_entries, None, None, None, None, None


def _rows(table: Tensor, flat_TK: Tensor) -> Tensor:
    return table.index_select(0, flat_TK.flatten()).view(*flat_TK.shape, -1)


# The indexer ---------------------------------------------------------------------------------------------------------


def index_scores(q_BQHC: Tensor, weights_BQH: Tensor, keys_BMC: Tensor) -> Tensor:
    """score(t, s) = sum_h w relu(q_h . k_s): float32 [B, Q, M]."""
    batch, queries, heads, channels = q_BQHC.shape
    # Rounded operands are exact in bfloat16, and the products are accumulated in float32.
    dots = torch.bmm(q_BQHC.reshape(batch, queries * heads, channels), keys_BMC.transpose(1, 2))
    return (dots.view(batch, queries, heads, -1).relu() * weights_BQH[..., None]).sum(2)


def masked_scores(q_BTHC: Tensor, weights_BTH: Tensor, keys_BMC: Tensor, low_BT: Tensor, high_T: Tensor) -> Tensor:
    """`index_scores` with -1e30 for what a query does not see, in the keys' dtype (the report rounds to bfloat16)."""
    scores = index_scores(q_BTHC, weights_BTH, keys_BMC)
    return scores.masked_fill(~visible(low_BT, high_T, keys_BMC.shape[1]), UNSEEN).to(keys_BMC.dtype)


@torch.no_grad()
def select_entries(
    q_BSHC: Tensor, weights_BSH: Tensor, keys_BMC: Tensor, low_BS: Tensor, high_S: Tensor, topk: int, score: Tile
) -> Tensor:
    """The ``topk`` (at most M) entries with the largest scores: int64 [B, S, K], unseen ones where fewer are seen.

    score: `masked_scores`, compiled or not; the last position sees all entries, of four tokens each.  Tiles grow to
    the right along the diagonal, so that half is never computed.
    """
    batch, length, heads, _ = q_BSHC.shape
    entries = keys_BMC.shape[1]
    picked = []
    for s in _slices(length, tile_length(length, batch * heads * entries)):
        width = max(topk, entries - (length - s.stop) // 4)
        scores = score(q_BSHC[:, s], weights_BSH[:, s], keys_BMC[:, :width], low_BS[:, s], high_S[s])
        picked.append(scores.topk(topk, -1, sorted=False).indices)
    return _join(picked)


def index_loss(
    q_BQHC: Tensor,
    base_BQH: Tensor,
    entries_BMC: Tensor,
    scores_BQM: Tensor,
    shown_BQM: Tensor,
    topk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL divergence of the indexer's softmax from the heads' attention to all visible entries, summed over the queries.

    The target of a query is its heads' summed attention; its mass (how much it looks at entries at all) is its
    weight, and the mean is the sum by the sum of the masses, which comes second.
    base: the log-sum-exp of what else the heads see (window and sink); q, base and entries carry no gradient.
    Also returns, detached, [recall of the target's top k, share of the attention on the indexer's top k] over queries
    that see more than k entries, each 1 where none does.  Source: report, sections 2.3.1 and 4.2 (warm-up).
    """
    channels = q_BQHC.shape[-1]
    unseen = ~shown_BQM[:, :, None]
    logits = torch.einsum("bqhc,bmc->bqhm", q_BQHC * channels**-0.5, entries_BMC).float().masked_fill(unseen, UNSEEN)
    total = torch.logaddexp(base_BQH.float(), logits.logsumexp(-1))
    target = (logits - total[..., None]).exp().masked_fill(unseen, 0.0).sum(2)
    scores = scores_BQM.masked_fill(~shown_BQM, UNSEEN)
    log_picked = scores.log_softmax(-1).masked_fill(~shown_BQM, 0.0)
    mass = target.sum(-1)
    entropy = -(target * (target / mass.clamp_min(1e-9)[..., None]).clamp_min(1e-12).log()).sum(-1)
    summed = (-(target * log_picked).sum(-1) - entropy).sum()
    return summed, mass.sum(), _recall(target.detach(), scores.detach(), shown_BQM, topk)


@torch.no_grad()
def _recall(target: Tensor, scores: Tensor, shown: Tensor, topk: int) -> Tensor:
    if target.shape[-1] <= topk:
        return torch.ones(2, device=target.device)
    choice = (shown.sum(-1) > topk).float()
    best = target.topk(topk, -1, sorted=False).indices
    picked = torch.zeros_like(scores).scatter_(-1, scores.topk(topk, -1, sorted=False).indices, 1.0)
    found = picked.gather(-1, best).mean(-1)
    held = (target * picked).sum(-1) / target.sum(-1).clamp_min(1e-20)
    count = choice.sum()
    shares = torch.stack([(found * choice).sum(), (held * choice).sum()]) / count.clamp_min(1.0)
    return torch.where(count > 0, shares, torch.ones_like(shares))
