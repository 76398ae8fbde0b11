"""The two kernels of sinkhorn.py.  4x4 matrices, float32; a program takes 64 tokens.

sums [2 * rounds - 1, N, 4]: what was divided by, columns first, then rows and columns in turn.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 64


@triton.jit
def _forward(logits_ptr, out_ptr, sums_ptr, count, eps, ROUNDS: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    four = tl.arange(0, 4)
    place = token[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
    inside = token < count
    x = tl.load(logits_ptr + place, mask=inside[:, None, None], other=0.0)
    x = tl.exp(x - tl.max(x, axis=2)[:, :, None])
    x = x / tl.sum(x, axis=2)[:, :, None] + eps
    sums = sums_ptr + token[:, None] * 4 + four[None, :]
    total = tl.sum(x, axis=1) + eps
    tl.store(sums, total, mask=inside[:, None])
    x = x / total[:, None, :]
    for _ in range(ROUNDS - 1):
        sums += count * 4
        total = tl.sum(x, axis=2) + eps
        tl.store(sums, total, mask=inside[:, None])
        x = x / total[:, :, None]
        sums += count * 4
        total = tl.sum(x, axis=1) + eps
        tl.store(sums, total, mask=inside[:, None])
        x = x / total[:, None, :]
    tl.store(out_ptr + place, x, mask=inside[:, None, None])


@triton.jit
def _backward(out_ptr, sums_ptr, d_out_ptr, d_logits_ptr, count, eps, ROUNDS: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    four = tl.arange(0, 4)
    place = token[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
    inside = token < count
    shown = inside[:, None, None]
    y = tl.load(out_ptr + place, mask=shown, other=0.0)
    d = tl.load(d_out_ptr + place, mask=shown, other=0.0)
    sums = sums_ptr + (2 * ROUNDS - 2) * count.to(tl.int64) * 4 + token[:, None] * 4 + four[None, :]
    for _ in range(ROUNDS - 1):
        total = tl.load(sums, mask=inside[:, None], other=1.0)
        d = (d - tl.sum(d * y, axis=1)[:, None, :]) / total[:, None, :]
        y = y * total[:, None, :]
        sums -= count * 4
        total = tl.load(sums, mask=inside[:, None], other=1.0)
        d = (d - tl.sum(d * y, axis=2)[:, :, None]) / total[:, :, None]
        y = y * total[:, :, None]
        sums -= count * 4
    total = tl.load(sums, mask=inside[:, None], other=1.0)
    d = (d - tl.sum(d * y, axis=1)[:, None, :]) / total[:, None, :]
    y = y * total[:, None, :] - eps  # the softmax
    d = y * (d - tl.sum(d * y, axis=2)[:, :, None])
    tl.store(d_logits_ptr + place, d, mask=shown)


def launch_forward(logits_NJK: Tensor, rounds: int, eps: float) -> tuple[Tensor, Tensor]:
    """The result [N, 4, 4] and the sums [2 * rounds - 1, N, 4]."""
    count = logits_NJK.shape[0]
    if logits_NJK.shape[1:] != (4, 4):
        raise ValueError(f"the kernel is for 4x4 matrices, got {tuple(logits_NJK.shape[1:])}")
    out = torch.empty_like(logits_NJK)
    sums = torch.empty(2 * rounds - 1, count, 4, dtype=torch.float32, device=out.device)
    _forward[(triton.cdiv(count, TOKENS),)](logits_NJK, out, sums, count, eps, rounds, TOKENS, num_warps=2)
    return out, sums


def launch_backward(out_NJK: Tensor, sums: Tensor, d_out_NJK: Tensor, rounds: int, eps: float) -> Tensor:
    count = out_NJK.shape[0]
    d_logits = torch.empty_like(out_NJK)
    grid = (triton.cdiv(count, TOKENS),)
    _backward[grid](out_NJK, sums, d_out_NJK, d_logits, count, eps, rounds, TOKENS, num_warps=2)
    return d_logits
