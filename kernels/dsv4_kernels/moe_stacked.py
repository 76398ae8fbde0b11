"""The mixture of experts over plain matrices held as one tensor: no loop over experts, nothing read by the host.

For devices where many small products and a host that waits for the router cost more than some padding.  Every
product has a fixed number of rows, so a token's result does not depend on which other tokens its experts served.
Letters: S tokens, D hidden, E experts, K experts a token, I expert hidden, X = S K pairs, B blocks, R rows a block.
Source: as moe.py, whose `mixture` this equals up to the order of sums inside a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import ACTIVATION_BLOCK, Weight
from .moe import Expert, swiglu
from .rounding import round_fp8

BLOCK_ROWS = 128


@dataclass(frozen=True)
class StackedExperts:
    """w13: gate and up, already turned for the product, [E, D, 2I]; w2 [E, I, D]; rounds: inputs are rounded to FP8."""

    w13_EDI: Tensor
    w2_EID: Tensor
    rounds: bool

    @classmethod
    def of(cls, experts: Sequence[Expert]) -> StackedExperts | None:
        """The experts stacked, or None where they are not all plain matrices."""
        if not experts or any(len(e.w13) > 1 or e.w13[0].fmt != "plain" or e.w2.fmt != "plain" for e in experts):
            return None
        w13 = torch.stack([e.w13[0].data.t() for e in experts])
        return cls(w13, torch.stack([e.w2.data.t() for e in experts]), experts[0].w2.round_activations)

    def views(self) -> list[Expert]:
        """The same experts one by one, over the same memory."""
        w13 = [Weight(data.t(), round_activations=self.rounds) for data in self.w13_EDI]
        w2 = [Weight(data.t(), round_activations=self.rounds) for data in self.w2_EID]
        return [Expert((a,), b) for a, b in zip(w13, w2, strict=True)]

    def bytes_read(self, tokens: int, topk: int) -> int:
        """Bytes of matrices that `stacked_mixture` lays side by side for a call."""
        blocks = topk if tokens == 1 else -(-tokens * topk // BLOCK_ROWS) + self.w13_EDI.shape[0]
        return blocks * (self.w13_EDI[0].nbytes + self.w2_EID[0].nbytes)


def stacked_mixture(
    u_SD: Tensor, experts: StackedExperts, chosen_SK: Tensor, weights_SK: Tensor, limit: float
) -> Tensor:
    """sum_k w2(swiglu(w1 u, w3 u) * weight_k) over each token's experts: float32 [S, D].

    Pairs of token and expert are sorted by expert into blocks of BLOCK_ROWS; an expert's last block is filled up with
    zeros.  Their number is bounded beforehand, so nothing waits for the counts.
    """
    tokens, topk = chosen_SK.shape
    u_SD = _rounded(u_SD, experts)
    if tokens == 1:
        slot_X, expert_B = torch.arange(topk, device=u_SD.device), chosen_SK[0]
        rows_BRD, weights_BR1 = u_SD.expand(topk, 1, -1), weights_SK.reshape(topk, 1, 1)
    else:
        slot_X, expert_B = _blocks(chosen_SK.flatten(), experts.w13_EDI.shape[0])
        blocks = expert_B.shape[0]
        rows_BRD = u_SD.new_zeros(blocks * BLOCK_ROWS, u_SD.shape[1])
        rows_BRD = rows_BRD.index_copy_(0, slot_X, u_SD.repeat_interleave(topk, 0)).unflatten(0, (blocks, -1))
        weights_BR1 = weights_SK.new_zeros(blocks * BLOCK_ROWS).index_copy_(0, slot_X, weights_SK.flatten())
        weights_BR1 = weights_BR1.view(blocks, -1, 1)
    gate_up = torch.bmm(rows_BRD, experts.w13_EDI.index_select(0, expert_B))
    hidden = _rounded((swiglu(gate_up, limit) * weights_BR1).to(u_SD.dtype), experts)
    results_XD = torch.bmm(hidden, experts.w2_EID.index_select(0, expert_B)).flatten(0, 1).index_select(0, slot_X)
    return results_XD.float().view(tokens, topk, u_SD.shape[1]).sum(1)


def _blocks(expert_X: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """For each pair its row among all blocks' rows: int64 [X]; for each block its expert: int64 [B].

    B = ceil(X / BLOCK_ROWS) + E blocks always suffice; those left over belong to the last expert and stay empty.
    """
    pairs, device = expert_X.shape[0], expert_X.device
    sorted_X, order_X = expert_X.sort(stable=True)
    starts_E = torch.searchsorted(sorted_X, torch.arange(experts + 1, device=device))
    blocks_E = (starts_E.diff() + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends_E = blocks_E.cumsum(0)
    block = torch.arange(-(-pairs // BLOCK_ROWS) + experts, device=device)
    expert_B = torch.searchsorted(ends_E, block, right=True).clamp_max_(experts - 1)
    rank_X = torch.arange(pairs, device=device) - starts_E[sorted_X]
    slot_X = torch.empty_like(order_X)
    slot_X[order_X] = (ends_E - blocks_E)[sorted_X] * BLOCK_ROWS + rank_X
    return slot_X, expert_B


def _rounded(x: Tensor, experts: StackedExperts) -> Tensor:
    return round_fp8(x, ACTIVATION_BLOCK) if experts.rounds else x
