"""Manifold-constrained hyper-connections (mHC): how a sub-layer reads from and writes to the residual streams.

Letters: S tokens, J and K streams (hc_mult of each), M coefficients, D hidden.  Coefficients are float32.
Source: report, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import constant, inverse_rms

SMALLEST = 1e-60  # of a matrix to normalise in float64: quotients of quotients stay finite


def _projected(x_SJD: Tensor, fn: Tensor, scale_M: Tensor, base_M: Tensor, norm_eps: float) -> Tensor:
    """(fn x) / rms(x) * scale + base over the flattened streams: float32 [S, M]."""
    flat = x_SJD.flatten(1).float()
    return torch.addcmul(base_M, F.linear(flat, fn) * inverse_rms(flat, norm_eps), scale_M)


def mixing(
    x_SJD: Tensor, fn: Tensor, base_M: Tensor, scale_M: Tensor, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of one sub-layer: pre [S, J], post [S, K], comb [S, J, K] (doubly stochastic), float32.

    x: [S, J, D]; fn: [M, J*D] with M = (2+J)*J; base: [M]; scale: [M], the checkpoint's three scales, each repeated
    over its own coefficients (`spread_scales`).
    """
    streams = x_SJD.shape[1]
    m_SM = _projected(x_SJD, fn, scale_M, base_M, norm_eps)
    gates = torch.sigmoid(m_SM[:, : 2 * streams])
    pre_SJ, post_SK = (
        gates[:, :streams] + constant(hc_eps, gates.device),
        gates[:, streams:] * constant(2.0, gates.device),
    )
    # Tokens last, here and in sinkhorn: the small matrices of all tokens are then normalised by long additions.
    comb_JKS = m_SM[:, 2 * streams :].t().unflatten(0, (streams, streams)).softmax(1) + constant(hc_eps, gates.device)
    return pre_SJ, post_SK, sinkhorn(comb_JKS.permute(2, 0, 1), iterations, hc_eps)


def spread_scales(scale: Tensor, streams: int) -> Tensor:
    """The checkpoint's scale [3] (pre, post, comb) repeated over their J, J and J*J coefficients: [M]."""
    return scale.repeat_interleave(torch.tensor([streams, streams, streams * streams], device=scale.device))


def sinkhorn(a_SJK: Tensor, iterations: int, eps: float) -> Tensor:
    """Divide by column sums + eps, then ``iterations`` - 1 times by row sums + eps and column sums + eps."""
    if a_SJK.shape == (1, 4, 4):  # also on a GPU: one round trip to the host takes less than 117 launches
        return torch.tensor([sinkhorn_one(a_SJK[0].tolist(), iterations, eps)], device=a_SJK.device)
    a_JKS, eps0 = a_SJK.permute(1, 2, 0).contiguous(), constant(eps, a_SJK.device)
    a_JKS = a_JKS / (a_JKS.sum(0, keepdim=True) + eps0)
    for _ in range(iterations - 1):
        a_JKS = a_JKS / (a_JKS.sum(1, keepdim=True) + eps0)
        a_JKS = a_JKS / (a_JKS.sum(0, keepdim=True) + eps0)
    return a_JKS.permute(2, 0, 1)


def sinkhorn_one(matrix: Sequence[Sequence[float]], iterations: int, eps: float) -> list[list[float]]:
    """`sinkhorn` of one 4x4 matrix in Python floats.

    Written out because a decoded token has two of these a layer: numbers in local variables take 14 us, the same 39
    normalisations as tensor operations 90 to 220 us (2 CPU cores), a fifth of the whole step.

    The normalised matrix is always A[r][c] / (x_r y_c): dividing by row sums + eps makes x_r the r-th row sum of
    A[r][c] / y_c, plus eps x_r; columns alike.  Factors may pass between A and x or y, so that A's first row and
    first column become ones, which need no products.
    """
    (a, b, c, d), (e, f, g, h), (i, j, k, l), (m, n, o, p) = matrix  # noqa: E741
    if a * b * c * d * e * i * m < SMALLEST and min(a, b, c, d, e, i, m) < SMALLEST:  # where no eps was added
        return sinkhorn_one([[max(value, SMALLEST) for value in row] for row in matrix], iterations, eps)
    x1, x2, x3, x4 = 1 / a, 1 / e, 1 / i, 1 / m
    y1, y2, y3, y4 = 1.0, a / b, a / c, a / d
    f, g, h = f * x2 * y2, g * x2 * y3, h * x2 * y4
    j, k, l = j * x3 * y2, k * x3 * y3, l * x3 * y4  # noqa: E741
    n, o, p = n * x4 * y2, o * x4 * y3, p * x4 * y4
    q, r, s, t = a, e, i, m  # 1 / x, and below u, v, w, z = 1 / y
    u = v = w = z = 0.0
    for turn in range(iterations):
        if turn:
            x1 = u + v + w + z + eps * x1
            x2 = u + f * v + g * w + h * z + eps * x2
            x3 = u + j * v + k * w + l * z + eps * x3
            x4 = u + n * v + o * w + p * z + eps * x4
            q = 1.0 / x1  # four statements and no tuple, 1.0 and not 1: a seventh of the time
            r = 1.0 / x2
            s = 1.0 / x3
            t = 1.0 / x4
        y1 = q + r + s + t + eps * y1
        y2 = q + f * r + j * s + n * t + eps * y2
        y3 = q + g * r + k * s + o * t + eps * y3
        y4 = q + h * r + l * s + p * t + eps * y4
        u = 1.0 / y1
        v = 1.0 / y2
        w = 1.0 / y3
        z = 1.0 / y4
    return [
        [q * u, q * v, q * w, q * z],
        [r * u, r * v * f, r * w * g, r * z * h],
        [s * u, s * v * j, s * w * k, s * z * l],
        [t * u, t * v * n, t * w * o, t * z * p],
    ]


def head_mixing(x_SJD: Tensor, fn: Tensor, base_J: Tensor, scale: Tensor, *, hc_eps: float, norm_eps: float) -> Tensor:
    """Coefficients of the final read before the head: float32 [S, J]; fn [J, J*D], base [J], scale [1]."""
    return torch.sigmoid(_projected(x_SJD, fn, scale, base_J, norm_eps)) + constant(hc_eps, x_SJD.device)


def read_streams(x_SJD: Tensor, pre_SJ: Tensor) -> Tensor:
    """u = sum_j pre_j X_j: [S, D] in x's dtype."""
    # torch multiplies batches of small matrices well only when they are contiguous, here and below.
    return torch.bmm(pre_SJ.contiguous()[:, None], x_SJD.float()).squeeze(1).to(x_SJD.dtype)


def write_streams(x_SJD: Tensor, f_SD: Tensor, post_SK: Tensor, comb_SJK: Tensor) -> Tensor:
    """X'_k = post_k f + sum_j comb[j, k] X_j: [S, K, D] in x's dtype."""
    mixed_SKD = torch.bmm(comb_SJK.transpose(1, 2).contiguous(), x_SJD.float())
    return torch.addcmul(mixed_SKD, post_SK[:, :, None], f_SD.float()[:, None]).to(x_SJD.dtype)
