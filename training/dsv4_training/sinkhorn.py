"""mHC's doubly stochastic matrices, forward and backward: in Triton on a GPU, as plain operations elsewhere.

Twenty rounds on 4x4 matrices are 80 tiny operations, and twice that to go back: one kernel each instead.  The backward
kernel needs the sums by which was divided, and the result, from which it multiplies its way back.
Letters: N tokens, J rows, K columns.
Source: report, section 2.2 (Sinkhorn-Knopp); eps as in the published code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS = 64  # of a program


def sinkhorn(logits_NJK: Tensor, rounds: int, eps: float) -> Tensor:
    """softmax over K, + eps, columns to sum one, then ``rounds`` - 1 times rows and columns: float32 [N, J, K]."""
    if logits_NJK.is_cuda:
        out: Tensor = _Sinkhorn.apply(logits_NJK, rounds, eps)
        return out
    return plain(logits_NJK, rounds, eps)


def plain(logits_NJK: Tensor, rounds: int, eps: float) -> Tensor:
    comb = logits_NJK.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rounds: int, eps: float) -> Tensor:
        from .sinkhorn_triton import launch_forward

        out, sums = launch_forward(logits.contiguous(), rounds, eps)
        ctx.save_for_backward(out, sums)
        ctx.rounds, ctx.eps = rounds, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        from .sinkhorn_triton import launch_backward

        out, sums = ctx.saved_tensors
        return launch_backward(out, sums, grads[0].contiguous(), ctx.rounds, ctx.eps), None, None
