"""Core attention of all three layer kinds: one softmax over the window, the compressed entries and a sink.

Keys are values (one shared KV head), so one matrix of rows serves both products.  Query tiles are sized from a
budget in bytes, so the working set does not grow with the chunk or the context.
Letters: S queries, H heads, C channels, R window rows, N entries, K entries selected per query, T tile of queries.
Source: report, section 2.3; facts on the sink and the window in the published inference code.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .tiling import tiling

NEG_INF = float("-inf")
ALIGNED = 16  # float32 values of a vector: MKL multiplies with 160 columns a quarter faster than with 159


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not take part in training later
def _window_bias(tile: int, rows: int, window: int, padded: int, device: torch.device) -> Tensor:
    """Additive mask [T, padded] for ``tile`` queries, the last of ``rows`` positions; nobody sees what follows."""
    query = torch.arange(rows - tile, rows, device=device)[:, None]
    distance = query - torch.arange(padded, device=device)
    return torch.zeros(distance.shape, device=device).masked_fill_((distance < 0) | (distance >= window), NEG_INF)


def _window_tile(window_RC: Tensor, start: int, end: int, queries: int, window: int) -> tuple[Tensor, Tensor, int]:
    """The window rows that queries [start, end) may see, rows of zeros behind them, and how many are seen.

    And the additive mask [T, rows] over them.  The first zero row is the sink's: it gets the sink's logit and adds
    nothing to the result.  With the others there are as many rows as vectors of a product hold.
    """
    before = window_RC.shape[0] - queries
    seen_RC = window_RC[max(0, start + before - window + 1) : end + before]
    seen = seen_RC.shape[0]
    rows_RC = seen_RC.new_zeros(_rounded_up(seen + 1), seen_RC.shape[1])
    rows_RC[:seen] = seen_RC
    return rows_RC, _window_bias(end - start, seen, window, rows_RC.shape[0], rows_RC.device), seen


def _rounded_up(rows: int) -> int:
    return -(-rows // ALIGNED) * ALIGNED


def window_attention(q_SHC: Tensor, window_RC: Tensor, sink_H: Tensor, window: int) -> Tensor:
    """Attention of S queries over the last ``window`` positions: float32 [S, H, C].

    q: float32 [S, H, C], already scaled by C^-0.5; window_RC: float32 rows whose last S belong to the queries, preceded
    by at most window - 1 earlier ones; sink: float32 [H].
    """
    return dense_attention(q_SHC, window_RC, window_RC[:0], None, sink_H, window)


def dense_attention(
    q_SHC: Tensor,
    window_RC: Tensor,
    entries_NC: Tensor,
    mask: Tensor | None,
    sink_H: Tensor,
    window: int,
    visible_S: Tensor | None = None,
) -> Tensor:
    """As `window_attention`, with compressed entries in the same softmax: float32 [S, H, C].

    entries: float32 [N, C].  Query t sees entries i < visible_S[t] (int64 on the host, where it bounds the loop, not
    decreasing; None: all entries), and of those, where ``mask`` (bool [S, N]) is given, the ones it marks.
    """
    queries, heads, channels = q_SHC.shape
    size, most = tiling(q_SHC.device), entries_NC.shape[0]
    tile = size.near(heads)
    tiles = list(size.tiles(queries, (heads * 4 + 8) * (tile + window + most), tile))
    out_SHC = torch.empty_like(q_SHC, memory_format=torch.contiguous_format)
    # One piece of memory for all tiles, the first the largest: it stays near the core, and fresh pages cost a tenth.
    scratch = q_SHC.new_empty(tiles[0][1] * heads * (_rounded_up(tiles[0][1] + window) + most))
    for start, end in tiles:
        rows_RC, bias, sink = _window_tile(window_RC, start, end, queries, window)
        near, far = rows_RC.shape[0], most
        if visible_S is not None:
            far = min(most, _rounded_up(int(visible_S[end - 1])))
        q_XC, out_XC = q_SHC[start:end].reshape(-1, channels), out_SHC[start:end].view(-1, channels)
        logits_XN = scratch[: q_XC.shape[0] * (near + far)].view(q_XC.shape[0], -1)
        logits_THN = logits_XN.view(end - start, heads, -1)
        torch.mm(q_XC, rows_RC.t(), out=logits_XN[:, :near])
        logits_THN[..., :near] += bias[:, None]
        logits_THN[..., sink] = sink_H
        if far:
            torch.mm(q_XC, entries_NC[:far].t(), out=logits_XN[:, near:])
            _hide(logits_THN[..., near:], start, end, mask, visible_S)
        torch.softmax(logits_XN, -1, out=logits_XN)
        torch.mm(logits_XN[:, :near], rows_RC, out=out_XC)
        if far:
            torch.addmm(out_XC, logits_XN[:, near:], entries_NC[:far], out=out_XC)
    return out_SHC


def _hide(logits_THN: Tensor, start: int, end: int, mask: Tensor | None, visible_S: Tensor | None) -> None:
    """-inf for the entries that queries [start, end) do not see, or that ``mask`` does not mark."""
    device, far = logits_THN.device, logits_THN.shape[-1]
    first = 0 if mask is not None or visible_S is None else int(visible_S[start])
    shown_TN = None if mask is None else mask[start:end, :far]
    if visible_S is not None and int(visible_S[start]) < far:
        seen_TN = torch.arange(first, far, device=device) < visible_S[start:end, None].to(device)
        shown_TN = seen_TN if shown_TN is None else shown_TN & seen_TN
    if shown_TN is not None:
        bias_TN = torch.zeros(shown_TN.shape, device=device).masked_fill_(~shown_TN, NEG_INF)
        logits_THN[..., first:] += bias_TN[:, None]


def gathered_attention(
    q_SHC: Tensor, window_RC: Tensor, entries_NC: Tensor, selected_SK: Tensor, sink_H: Tensor, window: int
) -> Tensor:
    """As `dense_attention` over entries picked per query: selected int64 [S, K] rows of ``entries``, -1 for none.

    Reads K rows a query instead of scoring all N; the better choice once N is many times K.
    """
    queries, heads, channels = q_SHC.shape
    size = tiling(q_SHC.device)
    out = torch.empty_like(q_SHC)
    picked = selected_SK.shape[1]
    for start, end in size.tiles(queries, 4 * picked * channels + 8 * heads * (size.queries + window + picked)):
        tile = end - start
        rows, bias, sink = _window_tile(window_RC, start, end, queries, window)
        index = selected_SK[start:end]
        keys_TKC = entries_NC.index_select(0, index.clamp_min(0).flatten()).view(tile, picked, channels)
        q_THC = q_SHC[start:end]
        near = (q_THC.reshape(-1, channels) @ rows.t()).view(tile, heads, -1)
        near += bias[:, None]
        near[..., sink] = sink_H
        far = torch.bmm(q_THC, keys_TKC.transpose(1, 2)).masked_fill_((index < 0)[:, None], NEG_INF)
        near_weights, far_weights = torch.cat([near, far], -1).softmax(-1).split([rows.shape[0], picked], -1)
        near_out = (near_weights.reshape(tile * heads, -1) @ rows).view(tile, heads, channels)
        out[start:end] = torch.baddbmm(near_out, far_weights, keys_TKC)
    return out
