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
    keys, step = keys_NC.shape[0], tiling(q_SHC.device).columns
    q_XC, scores_SN = q_SHC.reshape(-1, channels), q_SHC.new_empty(queries, keys)
    scratch = q_SHC.new_empty(queries * heads * min(step, keys))  # small, so that a product is summed near the core
    for first in range(0, keys, step):
        some_NC = keys_NC[first : first + step]
        products = scratch[: q_XC.shape[0] * some_NC.shape[0]].view(q_XC.shape[0], -1)
        torch.mm(q_XC, some_NC.t(), out=products)
        weighted_S1N = torch.bmm(weights_SH[:, None], products.relu_().view(queries, heads, -1))
        scores_SN[:, first : first + step] = weighted_S1N.squeeze(1)
    return scores_SN


def _best(scores_SM: Tensor, count: int) -> Tensor:
    """Places of the ``count`` best scores of each row, rising: int64 [S, count]; equal scores go to the lower place.

    A score that is no number comes first, so that it shows.
    """
    rows, width = scores_SM.shape
    if width == count:
        return torch.arange(width, device=scores_SM.device).expand_as(scores_SM)
    # The places of a mask come out in order; sorting them takes several times as long as finding the last one taken.
    row, column = (scores_SM >= _bound(scores_SM, count)).nonzero().unbind(1)
    found_S = torch.bincount(row, minlength=rows)
    least, most = (int(x) for x in found_S.aminmax())
    if least == most == count:
        return column.view(rows, count)
    if least < count:  # only where scores are no numbers
        return _best(scores_SM.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=NEG_INF), count)
    if most < width // 2:  # what reaches the bound stands close together, and the choice is made among that
        slot = torch.arange(row.shape[0], device=row.device) - (found_S.cumsum(0) - found_S).index_select(0, row)
        near_SM, column_SM = scores_SM.new_full((rows, most), NEG_INF), column.new_zeros(rows, most)
        near_SM[row, slot], column_SM[row, slot] = scores_SM[row, column], column
        return column_SM.gather(1, _best(near_SM, count))
    last_S1 = _last(scores_SM, count)
    above, equal = scores_SM > last_S1, scores_SM == last_S1
    taken = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    return taken.nonzero()[:, 1].view(rows, count)


def _bound(scores_SM: Tensor, count: int) -> Tensor:
    """A number that at least ``count`` scores of each row reach, and not many more: [S, 1].

    Of several groups of scores the best are compared first: where ``count`` groups' best reach a number, as many scores
    do.  With four times as many groups as scores wanted, about an eighth too many reach it.
    """
    per_group = scores_SM.shape[1] // (4 * count)
    if per_group < 2:
        return _last(scores_SM, count)
    groups = scores_SM.shape[1] // per_group
    return _last(scores_SM[:, : groups * per_group].unflatten(1, (per_group, groups)).amax(1), count)


def _last(scores_SM: Tensor, count: int) -> Tensor:
    """The ``count``-th best score of each row: [S, 1]."""
    return scores_SM.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)


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
        for start, end in size.tiles(queries, 24 * count + 4 * heads * min(count, size.columns), size.rows // heads):
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
