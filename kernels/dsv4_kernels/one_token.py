"""The operations of one decoded token on a CPU, in NumPy: the same equations as beside, for vectors.

A small model's step is hundreds of operations on a few hundred numbers, where the cost is the call: NumPy's is a
quarter of torch's, and its row-wise dot product reads a matrix three to four times faster than either library's
matrix-vector product (docs/performance.md).  Held against the torch references in tests/kernels/test_one_token.py.
Arrays are float32 unless said.  Letters: D hidden, J streams, M coefficients, H heads, C channels, O outputs, I inputs.
"""

from __future__ import annotations

from math import exp, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from .hyper_connection import sinkhorn_one
from .rounding import E2M1_LARGEST, E4M3_LARGEST, FP4_AMAX_FLOOR, FP8_AMAX_FLOOR, hadamard_matrix

Floats = NDArray[np.float32]
_CPU = torch.device("cpu")
_SMALLEST_NORMAL_E4M3 = np.float32(2.0**-6)
# Adding and taking away 1.5 * 2^23 units of a spacing rounds to that spacing, ties to even; e4m3 has 3 mantissa bits.
_ROUNDS_TO_3_BITS = np.float32(1.5 * 2.0**20)
_EXPONENT = np.int32(0x7F800000)


def product(weight_OI: Floats, x_I: Floats, out_O: Floats | None = None) -> Floats:
    """W x: [O].  One dot product a row, which streams the matrix; also [G, O, I] and x [G, 1, I] -> [G, O]."""
    return np.vecdot(weight_OI, x_I, out_O)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """norm.rms_norm of one vector [C]."""
    return x * (1.0 / sqrt(float(np.dot(x, x)) / x.size + eps)) * weight


def rms_norm_heads(x_HC: Floats, eps: float) -> Floats:
    """norm.rms_norm of every row, without a weight."""
    inverse = 1.0 / np.sqrt(np.vecdot(x_HC, x_HC) / np.float32(x_HC.shape[1]) + np.float32(eps))
    return x_HC * inverse[:, None]


def rotate(x: Floats, phases: NDArray[np.complex64]) -> Floats:
    """rope.rotate: x [..., C], contiguous; phases complex64 [C / 2]."""
    return (x.view(np.complex64) * phases).view(np.float32)


def rope_phases(position: int, freqs: Floats, channels: int) -> NDArray[np.complex64]:
    """rope.rope_phases of one position: complex64 [channels / 2]."""
    phases = np.ones(channels // 2, np.complex64)
    angle = np.float32(position) * freqs
    turning = phases[channels // 2 - freqs.size :]
    turning.real, turning.imag = np.cos(angle), np.sin(angle)
    return phases


def _power_of_two_scale(amax: Floats, largest: float) -> Floats:
    bits = (amax / np.float32(largest)).view(np.int32)
    return ((bits + np.int32(0x7FFFFF)) & _EXPONENT).view(np.float32)


def round_fp8(x: Floats, block: int) -> Floats:
    """rounding.round_fp8: [..., C] rounded to e4m3 in blocks of the last dim; a shorter last block is its own."""
    width = x.shape[-1]
    if width % block:
        padded = np.zeros((*x.shape[:-1], width + -width % block), np.float32)  # zeros leave a block's maximum alone
        padded[..., :width] = x
        return np.ascontiguousarray(round_fp8(padded, block)[..., :width])
    x_NB = x.reshape(-1, block)
    scale = _power_of_two_scale(np.maximum(np.abs(x_NB).max(1), np.float32(FP8_AMAX_FLOOR)), E4M3_LARGEST)[:, None]
    v_NB = x_NB / scale
    magic = np.maximum((v_NB.view(np.int32) & _EXPONENT).view(np.float32), _SMALLEST_NORMAL_E4M3) * _ROUNDS_TO_3_BITS
    return (((v_NB + magic) - magic) * scale).reshape(x.shape)


def round_fp4(x: Floats, block: int = 32) -> Floats:
    """rounding.round_fp4: [..., C] rounded to e2m1 in blocks of the last dim, which ``block`` must divide."""
    x_NB = x.reshape(-1, block)
    scale = _power_of_two_scale(np.maximum(np.abs(x_NB).max(1), np.float32(FP4_AMAX_FLOOR)), E2M1_LARGEST)[:, None]
    v_NB = x_NB / scale
    # e2m1 has 1 mantissa bit: spacing 2^(e-1), and 1/2 below 1.
    magic = np.maximum((v_NB.view(np.int32) & _EXPONENT).view(np.float32), np.float32(1.0)) * np.float32(1.5 * 2.0**22)
    return (((v_NB + magic) - magic) * scale).reshape(x.shape)


def hadamard(x: Floats) -> Floats:
    """rounding.hadamard of rows [H, C]."""
    return x @ hadamard_matrix(x.shape[-1], _CPU).numpy()


def round_bf16(x: Floats) -> Floats:
    """float32 -> bfloat16's values, ties to even; finite values only."""
    bits = x.view(np.int32)
    return ((bits + np.int32(0x7FFF) + ((bits >> 16) & np.int32(1))) & np.int32(-0x10000)).view(np.float32)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)); the exponential may overflow to infinity, which gives the right 0."""
    return np.float32(1.0) / (np.exp(-x) + np.float32(1.0))


def mixing(
    x_JD: Floats, fn: Floats, base_M: Floats, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Floats, Floats, Floats]:
    """hyper_connection.mixing of one token with 4 streams: pre [J], post [K, 1], and comb turned over, [K, J].

    fn comes times the scales.

    From the 24 projections on in Python's numbers (float64): fewer calls than any array of them.
    """
    m = _projected(x_JD, fn, base_M, norm_eps).tolist()
    gates = [1.0 / (1.0 + exp(-g)) if g > -80.0 else 0.0 for g in m[:8]]
    rows = []
    for i in (8, 12, 16, 20):
        a, b, c, d = m[i : i + 4]
        top = max(a, b, c, d)
        a, b, c, d = exp(a - top), exp(b - top), exp(c - top), exp(d - top)
        share = 1.0 / (a + b + c + d)
        rows.append([a * share + hc_eps, b * share + hc_eps, c * share + hc_eps, d * share + hc_eps])
    comb_KJ = np.array(sinkhorn_one(rows, iterations, hc_eps), np.float32).T
    pre, post = [g + hc_eps for g in gates[:4]], [[2.0 * g] for g in gates[4:]]
    return np.array(pre, np.float32), np.array(post, np.float32), comb_KJ


def head_mixing(x_JD: Floats, fn: Floats, base_J: Floats, *, hc_eps: float, norm_eps: float) -> Floats:
    """hyper_connection.head_mixing of one token: [J]."""
    return sigmoid(_projected(x_JD, fn, base_J, norm_eps)) + np.float32(hc_eps)


def _projected(x_JD: Floats, fn: Floats, base_M: Floats, norm_eps: float) -> Floats:
    flat = x_JD.reshape(-1)
    inverse = 1.0 / sqrt(float(np.dot(flat, flat)) / flat.size + norm_eps)
    return np.vecdot(fn, flat) * inverse + base_M


def swiglu(gate_up: Floats, limit: float) -> Floats:
    """moe.swiglu: [..., 2I] -> [..., I]."""
    half = gate_up.shape[-1] // 2
    gate = np.minimum(gate_up[..., :half], np.float32(limit))
    up = np.minimum(np.maximum(gate_up[..., half:], np.float32(-limit)), np.float32(limit))
    return gate * sigmoid(gate) * up


def router_scores(logits_E: Floats) -> Floats:
    """sqrt(softplus(logits)): as torch has it, the identity above 20."""
    return np.sqrt(np.where(logits_E > 20, logits_E, np.log1p(np.exp(np.minimum(logits_E, np.float32(20))))))


def softmax(logits_HX: Floats) -> Floats:
    """softmax over the last dim, in place."""
    logits_HX -= logits_HX.max(1)[:, None]
    np.exp(logits_HX, logits_HX)
    logits_HX *= 1.0 / logits_HX.sum(1)[:, None]
    return logits_HX


def pool(kv_RC: Floats, gate_RC: Floats) -> Floats:
    """compress.pool_blocks of one block: [C]."""
    weights = np.exp(gate_RC - gate_RC.max(0))
    return (weights * kv_RC).sum(0) / weights.sum(0)


def largest(scores_N: Floats, count: int) -> NDArray[np.intp]:
    """Entries of the ``count`` largest scores, rising; of equal scores the lower entries."""
    least = np.sort(scores_N)[scores_N.size - count]  # np.partition is five times slower where many scores are 0
    above = scores_N > least
    tied = np.flatnonzero(scores_N == least)
    above[tied[: count - int(np.count_nonzero(above))]] = True
    return np.flatnonzero(above)


def best(scores_E: Floats, count: int) -> list[int]:
    """Indices of the ``count`` largest, largest first, the lower index among equals."""
    return np.argsort(-scores_E, kind="stable")[:count].tolist()
