"""Mixture of experts: routing, the clamped SwiGLU expert, and the weighted sum over a token's experts.

Letters: S tokens, D hidden, E experts, K experts a token.
Source: report, section 2.1; facts on the clamp and the place of the routing weight in the published inference code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import Weight, linear, linear_into, round_for, stacked_linear
from .tiling import tiling

STEADY_ROWS = 16


class _Run(NamedTuple):
    """Sorted rows [start, end) that go to one expert."""

    expert: int
    start: int
    end: int


@dataclass(frozen=True)
class Expert:
    """w1 (gate) [I, D] stacked on w3 (up) [I, D], and w2 (down) [D, I]."""

    w13: tuple[Weight, ...]
    w2: Weight


def route(
    u_SD: Tensor,
    gate_ED: Tensor,
    *,
    topk: int,
    scaling: float,
    normalise: bool,
    bias_E: Tensor | None = None,
    chosen_SK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts of each token and their weights: int64 [S, K] and float32 [S, K].

    Scores are sqrt(softplus(gate u)) in float32.  ``chosen`` (hash layers) fixes the experts; otherwise they are the
    ``topk`` of scores + bias, where the bias only selects.
    """
    scores = F.softplus(F.linear(u_SD.float(), gate_ED)).sqrt()
    if chosen_SK is None:
        chosen_SK = (scores if bias_E is None else scores + bias_E).topk(topk, dim=-1).indices
    weights = scores.gather(1, chosen_SK)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen_SK, weights * scaling


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) of [..., 2I] -> [..., I], computed in float32."""
    gate, up = gate_up.float().chunk(2, -1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def expert_forward(u_SD: Tensor, expert: Expert, limit: float) -> Tensor:
    """w2(swiglu(w1 u, w3 u)): [S, D] in u's dtype."""
    return linear(swiglu(stacked_linear(u_SD, expert.w13), limit).to(u_SD.dtype), expert.w2)


def _steady(x_XI: Tensor, least: int) -> Tensor:
    """``x`` with zero rows behind it up to ``least`` in all.

    A matrix product rounds a row alike whatever rows stand beside it, but for the fewest rows: those go other ways
    (MKL: below 4 with one thread, 12 with two).
    """
    return x_XI if x_XI.shape[0] >= least else F.pad(x_XI, (0, 0, 0, least - x_XI.shape[0]))


def _by_run(
    out_XO: Tensor, x_XI: Tensor, runs: Sequence[_Run], weights: Sequence[tuple[Weight, ...]], least: int
) -> None:
    """Every run's rows of ``x`` times its expert's weights, as if it had ``least`` rows; written to ``out``."""
    first = runs[0].start
    for expert, start, end in runs:
        x, out = x_XI[start - first : end - first], out_XO[start - first : end - first]
        if end - start >= least:
            linear_into(out, x, weights[expert])
        else:
            out[:] = stacked_linear(_steady(x, least), weights[expert], rounded=True)[: end - start]


def mixture(u_SD: Tensor, experts: Sequence[Expert], chosen_SK: Tensor, weights_SK: Tensor, limit: float) -> Tensor:
    """sum_k w2(swiglu(w1 u, w3 u) * weight_k) over each token's experts: float32 [S, D].

    Tokens are sorted by expert, each expert runs once over its rows, and every token then adds its K results in the
    order of its choice, so no result depends on which other tokens an expert served, to the last bit (see `_steady`).
    The weight enters before w2's rounding of its input.
    """
    tokens, topk = chosen_SK.shape
    u_SD = round_for(u_SD, experts[0].w13[0])
    order_X = chosen_SK.flatten().argsort(stable=True)
    ends = torch.bincount(chosen_SK.flatten(), minlength=len(experts)).cumsum(0).tolist()
    runs = [_Run(e, a, b) for e, (a, b) in enumerate(pairwise([0, *ends])) if a < b]
    if not runs:
        return torch.zeros(u_SD.shape, device=u_SD.device)
    token_X, weights_X1 = order_X // topk, weights_SK.flatten().index_select(0, order_X)[:, None]
    gates, downs = [expert.w13 for expert in experts], [(expert.w2,) for expert in experts]
    width, least = sum(weight.shape[0] for weight in gates[0]), 1 if tokens == 1 else STEADY_ROWS
    results_XD = u_SD.new_empty(tokens * topk, downs[0][0].shape[0])
    for some in _together(runs, tiling(u_SD.device).rows):
        part = slice(some[0].start, some[-1].end)
        rows_XD = u_SD.index_select(0, token_X[part])
        gate_up = rows_XD.new_empty(rows_XD.shape[0], width)
        _by_run(gate_up, rows_XD, some, gates, least)
        hidden = round_for((swiglu(gate_up, limit) * weights_X1[part]).to(u_SD.dtype), experts[0].w2)
        _by_run(results_XD[part], hidden, some, downs, least)
    back_X = torch.empty_like(order_X)
    back_X[order_X] = torch.arange(order_X.numel(), device=order_X.device)
    results = (results_XD.index_select(0, back_S).float() for back_S in back_X.view(tokens, topk).unbind(1))
    out_SD = next(results)
    for result_SD in results:  # one choice at a time stays near the core
        out_SD += result_SD
    return out_SD


def _together(runs: Sequence[_Run], rows: int) -> Iterator[Sequence[_Run]]:
    """Runs in groups of about so many rows, whose intermediates stay near the core."""
    first = 0
    for place in range(1, len(runs) + 1):
        if place == len(runs) or runs[place].end - runs[first].start > rows:
            yield runs[first:place]
            first = place


def streamed_mixture(
    u_SD: Tensor,
    fetch: Callable[[Mapping[int, int]], Iterable[tuple[int, Expert]]],
    chosen_SK: Tensor,
    weights_SK: Tensor,
    limit: float,
) -> Tensor:
    """As `mixture`, over experts that come one after another: float32 [S, D].

    fetch(tokens by expert) gives each of these experts once, in any order; one is done with when the next is asked for.
    Neither the order nor what was there before changes a bit of the result.  One that fetch leaves out adds nothing.
    """
    tokens, topk = chosen_SK.shape
    results_XD = torch.zeros(tokens * topk, u_SD.shape[1], device=u_SD.device)
    if not tokens:
        return results_XD
    order_X = chosen_SK.flatten().argsort(stable=True)
    found, counts = torch.unique_consecutive(chosen_SK.flatten()[order_X], return_counts=True)
    starts = [0, *counts.cumsum(0).tolist()]
    runs = {e: (a, b) for e, (a, b) in zip(found.tolist(), pairwise(starts), strict=True)}
    weights_X1 = weights_SK.flatten()[:, None]
    least = 1 if tokens == 1 else STEADY_ROWS
    rounded: Tensor | None = None
    for e, expert in fetch({e: b - a for e, (a, b) in runs.items()}):
        if rounded is None:
            rounded = round_for(u_SD, expert.w13[0])
        pairs = order_X[slice(*runs[e])]
        rows = _steady(rounded.index_select(0, pairs // topk), least)
        hidden = swiglu(stacked_linear(rows, expert.w13, rounded=True)[: len(pairs)], limit) * weights_X1[pairs]
        hidden = _steady(round_for(hidden.to(u_SD.dtype), expert.w2), least)
        results_XD[pairs] = linear(hidden, expert.w2, rounded=True)[: len(pairs)].float()
    return results_XD.view(tokens, topk, -1).sum(1)
