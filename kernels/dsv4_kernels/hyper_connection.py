"""Manifold-constrained hyper-connections (mHC): how a sub-layer reads from and writes to the residual streams.

Letters: S tokens, J and K streams (hc_mult of each), M coefficients, D hidden.  Coefficients are float32.
Source: report, section 2.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import constant, inverse_rms


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
    comb_SJK = m_SM[:, 2 * streams :].unflatten(1, (streams, streams)).softmax(2) + constant(hc_eps, gates.device)
    return pre_SJ, post_SK, sinkhorn(comb_SJK, iterations, hc_eps)


def spread_scales(scale: Tensor, streams: int) -> Tensor:
    """The checkpoint's scale [3] (pre, post, comb) repeated over their J, J and J*J coefficients: [M]."""
    return scale.repeat_interleave(torch.tensor([streams, streams, streams * streams], device=scale.device))


def sinkhorn(a_SJK: Tensor, iterations: int, eps: float) -> Tensor:
    """Divide by column sums + eps, then ``iterations`` - 1 times by row sums + eps and column sums + eps."""
    if a_SJK.shape == (1, 4, 4):  # also on a GPU: one round trip to the host takes less than 117 launches
        return torch.tensor([sinkhorn_one(a_SJK[0].tolist(), iterations, eps)], device=a_SJK.device)
    # Tokens last: the small matrices of all tokens are then normalised by long contiguous additions.
    a_JKS, eps0 = a_SJK.permute(1, 2, 0).contiguous(), constant(eps, a_SJK.device)
    a_JKS = a_JKS / (a_JKS.sum(0, keepdim=True) + eps0)
    for _ in range(iterations - 1):
        a_JKS = a_JKS / (a_JKS.sum(1, keepdim=True) + eps0)
        a_JKS = a_JKS / (a_JKS.sum(0, keepdim=True) + eps0)
    return a_JKS.permute(2, 0, 1)


def sinkhorn_one(matrix: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    """`sinkhorn` of one 4x4 matrix in Python floats.

    Written out because a decoded token has two of these a layer: 16 numbers in local variables take 15 us, the same
    39 normalisations as tensor operations 90 to 220 us (2 CPU cores), a fifth of the whole step.
    """
    (a, b, c, d), (e, f, g, h), (i, j, k, l), (m, n, o, p) = matrix  # noqa: E741
    for turn in range(iterations):
        if turn:
            s, t, u, v = (
                1 / (a + b + c + d + eps),
                1 / (e + f + g + h + eps),
                1 / (i + j + k + l + eps),
                1 / (m + n + o + p + eps),
            )
            a, b, c, d, e, f, g, h = a * s, b * s, c * s, d * s, e * t, f * t, g * t, h * t
            i, j, k, l, m, n, o, p = i * u, j * u, k * u, l * u, m * v, n * v, o * v, p * v  # noqa: E741
        s, t, u, v = (
            1 / (a + e + i + m + eps),
            1 / (b + f + j + n + eps),
            1 / (c + g + k + o + eps),
            1 / (d + h + l + p + eps),
        )
        a, e, i, m, b, f, j, n = a * s, e * s, i * s, m * s, b * t, f * t, j * t, n * t
        c, g, k, o, d, h, l, p = c * u, g * u, k * u, o * u, d * v, h * v, l * v, p * v  # noqa: E741
    return [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]]


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
