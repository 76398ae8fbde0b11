"""The lightning indexer: scores of compressed keys and the streamed choice of the best k.

Keys arrive in tiles, queries are taken in tiles, and only k candidates a query survive a tile, so memory does not
depend on the context.  Equal scores are settled towards the lower entry, which makes the choice independent of tiling.
Letters: S queries, H index heads, C index channels, N keys, K chosen.
Source: report, section 2.3.1 (equations 13-17).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .attention import NEG_INF
from .tiling import tiling


def index_scores(q_SHC: Tensor, weights_SH: Tensor, keys_NC: Tensor) -> Tensor:
    """score(t, s) = sum_h w[t, h] relu(q[t, h] . k[s]): float32 [S, N].  Scale factors are already in ``weights``."""
    queries, heads, channels = q_SHC.shape
    products = (q_SHC.reshape(-1, channels) @ keys_NC.t()).relu_().view(queries, heads, -1)
    return torch.bmm(weights_SH[:, None], products).squeeze(1)


def _best(scores_SM: Tensor, count: int) -> Tensor:
    """Places of the ``count`` best scores of each row, rising: int64 [S, count]; equal scores go to the lower place."""
    width = scores_SM.shape[1]
    if width == count:
        return torch.arange(width, device=scores_SM.device).expand_as(scores_SM)
    values, place = scores_SM.topk(count + 1, dim=1)
    place, last = place[:, :count], values[:, count - 1]
    # topk settles equal scores as it likes, which matters where the best one left out equals the last one taken.
    tied = (values[:, count] == last) & (last > NEG_INF)
    if bool(tied.any()):
        scores, last = scores_SM[tied], last[tied, None]
        falling = -torch.arange(width, dtype=torch.int32, device=scores.device)
        # Everything above the last one, then its equals by falling place.
        ranks = torch.where(scores == last, falling, -width).masked_fill_(scores > last, 1)
        place[tied] = ranks.topk(count, dim=1, sorted=False).indices
    return place.sort(1).values


def select_entries(
    q_SHC: Tensor,
    weights_SH: Tensor,
    key_tiles: Callable[[int], Iterable[tuple[int, Tensor]]],
    visible_S: Tensor,
    topk: int,
) -> Tensor:
    """Indices of the ``topk`` visible entries with the largest score: int64 [S, K], rising, then -1 where fewer exist.

    q: float32 [S, H, C]; weights: float32 [S, H]; visible: int64 [S] on the host, where it bounds the loops, not
    decreasing, query t sees entries i < visible[t]; key_tiles(count) yields (first entry, float32 keys [n, C]) covering
    entries 0..count-1 in order.  K = min(topk, visible of the last query).  The result does not depend on the tiling.
    """
    queries, heads, _ = q_SHC.shape
    device, size = q_SHC.device, tiling(q_SHC.device)
    seen_S1 = visible_S[:, None].to(device)
    total = int(visible_S[-1])
    if total <= topk:  # everything visible is chosen: no score is needed
        entry = torch.arange(total, device=device).expand(queries, -1)
        return torch.where(entry < seen_S1, entry, -1)
    # Candidates stand in the order of their entries, so the lower place is the lower entry; -inf fills up behind them.
    values_SK = torch.full((queries, topk), NEG_INF, device=device)
    chosen_SK = torch.full((queries, topk), -1, device=device)
    for first, keys_NC in key_tiles(total):
        count = keys_NC.shape[0]
        entry_N = torch.arange(first, first + count, device=device)
        held, kept, new = min(topk, first), min(topk, first + count), min(topk, count)
        for start, end in size.tiles(queries, count * (4 * heads + 24)):
            if int(visible_S[end - 1]) <= first:  # the causal mask empties this tile
                continue
            scores = index_scores(q_SHC[start:end], weights_SH[start:end], keys_NC)
            if int(visible_S[start]) < first + count:
                scores.masked_fill_(entry_N >= seen_S1[start:end], NEG_INF)
            place = _best(scores, new)
            values, entries = scores.gather(1, place), place + first
            if held:
                values = torch.cat([values_SK[start:end, :held], values], 1)
                entries = torch.cat([chosen_SK[start:end, :held], entries], 1)
                place = _best(values, kept)
                values, entries = values.gather(1, place), entries.gather(1, place)
            values_SK[start:end, :kept], chosen_SK[start:end, :kept] = values, entries
    return chosen_SK.masked_fill_(values_SK == NEG_INF, -1)
