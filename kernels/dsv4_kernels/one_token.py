"""The operations of one decoded token on a CPU, in NumPy: the same equations as beside, for vectors.

A small model's step is hundreds of operations on a few hundred numbers, where the cost is the call: NumPy's is a
quarter of torch's, and its row-wise dot product reads a matrix three to four times faster than either library's
matrix-vector product (docs/performance.md).  Held against the torch references in tests/kernels/test_one_token.py.
Arrays are float32 unless said.  Letters: D hidden, J streams, M coefficients, H heads, C channels, O outputs, I inputs.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, sqrt, tanh
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .hyper_connection import sinkhorn_one
from .rounding import E2M1_LARGEST, E4M3_LARGEST, FP4_AMAX_FLOOR, FP8_AMAX_FLOOR, hadamard_matrix

Floats = NDArray[np.float32]
Turns = NDArray[np.complex64]
_CPU = torch.device("cpu")
# From this many multiplications on OpenBLAS shares a matrix product, or one of a matrix and a vector, among threads;
# where those sleep or the other cores are busy, that takes milliseconds.
MATRIX_PRODUCT, VECTOR_PRODUCT = (1 << 19) - 1, 9215
FEW_HEADS = 4
READ_AHEAD = 1 << 17  # numbers that stay in half of a core's cache
SAFE_EXPONENT = 40.0
LEAST_GATE = np.float32(-87.0)  # its exponential is still a float32; what comes out is 1e-36 where it would be less
_SMALLEST_NORMAL_E4M3 = np.float32(2.0**-6)
# Adding and taking away 1.5 * 2^23 units of a spacing rounds to that spacing, ties to even; e4m3 has 3 mantissa bits.
_ROUNDS_TO_3_BITS = np.float32(1.5 * 2.0**20)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_EXPONENT = np.int32(0x7F800000)


# product(W [O, I], x [I], out [O] or None) = W x: [O].  One dot product a row, which streams the matrix; also [G, O, I]
# and x [G, 1, I] -> [G, O].  The name of a NumPy call and no function: a decoded token has a hundred of them.
product = np.vecdot


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """norm.rms_norm of one vector [C]."""
    normed = x * (1.0 / sqrt(float(x.dot(x)) / x.size + eps))
    normed *= weight
    return normed


def rms_norm_heads(x_HC: Floats, eps: float) -> Floats:
    """norm.rms_norm of every row, without a weight."""
    return x_HC * inverse_norms(x_HC, eps, np.full(x_HC.shape[0], sqrt(x_HC.shape[1]), np.float32))[:, None]


def inverse_norms(x_HC: Floats, eps: float, scale_H: Floats) -> Floats:
    """What `norm.rms_norm` multiplies every row with, times C^-1/2 and a scale of its own: [H]."""
    norms = np.vecdot(x_HC, x_HC)
    norms += x_HC.shape[1] * eps
    np.sqrt(norms, out=norms)
    return np.divide(scale_H, norms, out=norms)


def widened(x: NDArray[Any]) -> Floats:
    """float32 itself, or the bits of bfloat16 (uint16), as float32."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


def rotate(x: Floats, phases: Turns, out: Floats | None = None) -> Floats:
    """rope.rotate: x [..., C], contiguous; phases complex64 [C / 2].  ``out`` may be x itself."""
    if out is None:
        return (x.view(np.complex64) * phases).view(np.float32)
    np.multiply(x.view(np.complex64), phases, out=out.view(np.complex64))
    return out


def rope_phases(position: int | NDArray[np.int64], freqs: Floats, channels: int) -> Turns:
    """rope.rope_phases: complex64 [.., channels / 2]; positions [P] or one, freqs [R] or several sets [.., R]."""
    angle = np.multiply.outer(np.asarray(position, np.float32), freqs)
    phases = np.ones((*angle.shape[:-1], channels // 2), np.complex64)
    turning = phases[..., channels // 2 - freqs.shape[-1] :]
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


def mixing(
    x_JD: Floats, fn: Floats, base_M: Floats, *, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Floats, Floats]:
    """hyper_connection.mixing of one token with 4 streams: pre [J], and what makes the new streams [K, J + 1] of the
    old ones and, behind them, the sub-layer's output: comb turned over, and post.

    fn comes times the scales.

    From the 24 projections on in Python's numbers (float64): fewer calls than any array of them.
    """
    a, b, c, d, e, f, g, h, i, j, k, z, m, n, o, p, q, r, s, t, u, v, w, x = _projected(x_JD, fn, base_M, norm_eps)
    rows = (
        _softmax(i, j, k, z, hc_eps),
        _softmax(m, n, o, p, hc_eps),
        _softmax(q, r, s, t, hc_eps),
        _softmax(u, v, w, x, hc_eps),
    )
    (i, j, k, z), (m, n, o, p), (q, r, s, t), (u, v, w, x) = sinkhorn_one(rows, iterations, hc_eps)
    half = 0.5 + hc_eps  # the logistic function of g is (1 + tanh(g / 2)) / 2, which nothing overflows
    all_M = np.array((
        half + 0.5 * tanh(0.5 * a), half + 0.5 * tanh(0.5 * b), half + 0.5 * tanh(0.5 * c), half + 0.5 * tanh(0.5 * d),
        i, m, q, u, 1.0 + tanh(0.5 * e),
        j, n, r, v, 1.0 + tanh(0.5 * f),
        k, o, s, w, 1.0 + tanh(0.5 * g),
        z, p, t, x, 1.0 + tanh(0.5 * h),
    ), np.float32)  # fmt: skip
    return all_M[:4], all_M[4:].reshape(4, 5)


def _softmax(a: float, b: float, c: float, d: float, more: float) -> tuple[float, float, float, float]:
    """Softmax of four numbers, and ``more`` added to each."""
    top = max(a, b, c, d)
    a, b, c, d = exp(a - top), exp(b - top), exp(c - top), exp(d - top)
    share = 1.0 / (a + b + c + d)
    return a * share + more, b * share + more, c * share + more, d * share + more


def head_mixing(x_JD: Floats, fn: Floats, base_J: Floats, *, hc_eps: float, norm_eps: float) -> Floats:
    """hyper_connection.head_mixing of one token: [J]."""
    half = 0.5 + hc_eps
    return np.array([half + 0.5 * tanh(0.5 * g) for g in _projected(x_JD, fn, base_J, norm_eps)], np.float32)


def _projected(x_JD: Floats, fn: Floats, base_M: Floats, norm_eps: float) -> list[float]:
    flat = x_JD.reshape(-1)
    projected = np.vecdot(fn, flat)
    projected *= 1.0 / sqrt(float(flat.dot(flat)) / flat.size + norm_eps)
    projected += base_M
    return projected.tolist()


def swiglu(gate_up_KE: Floats, limit: float) -> Floats:
    """moe.swiglu of gate and up one behind the other in every row: [K, 2 I] -> [K, I]."""
    width = gate_up_KE.shape[1] // 2
    cut_KE = np.minimum(gate_up_KE, limit)
    gate, up = np.maximum(cut_KE[:, :width], LEAST_GATE), np.maximum(cut_KE[:, width:], -limit)
    up *= gate
    np.negative(gate, out=gate)
    np.exp(gate, out=gate)
    gate += _ONE
    up /= gate
    return up


def router_scores(logits_E: Floats) -> Floats:
    """sqrt(softplus(logits)); torch's is the identity above 20, where the two are the same float32."""
    return np.sqrt(np.logaddexp(_ZERO, logits_E))


@lru_cache(maxsize=1024)
def _ones(count: int) -> Floats:
    return np.ones(count, np.float32)


class Sink:
    """The sinks [H] of an attention in which no score and no sink is beyond +-``largest``."""

    def __init__(self, sink_H: Floats, largest: float) -> None:
        # Exponentials need no common factor taken out then.
        self.bounded = largest < SAFE_EXPONENT
        self.logits_H, self.weights_H = sink_H, np.exp(sink_H) if self.bounded else None


def attend(q_HC: Floats, parts: list[Floats], sink: Sink) -> Floats:
    """attention.dense_attention of one token: rows [R, C] in parts, queries already scaled -> [H, C]."""
    most, q_CH, tiles = max(1, MATRIX_PRODUCT // q_HC.size), np.ascontiguousarray(q_HC.T), []
    if len(parts) > 1 and sum(part.shape[0] for part in parts) <= most:
        parts = [np.concatenate(parts)]
    for part in parts:
        rows = part.shape[0]
        if rows <= most:
            tiles.append(part)
        else:
            step = -(-rows // -(-rows // most))  # tiles of about one size
            tiles += [part[i : i + step] for i in range(0, rows, step)]
    weights = [tile.dot(q_CH) for tile in tiles]
    total_H = sink.weights_H
    if total_H is None:
        top_H = np.maximum.reduce([sink.logits_H, *(np.maximum.reduce(weights_RH) for weights_RH in weights)])
        for weights_RH in weights:
            weights_RH -= top_H
        total_H = np.exp(sink.logits_H - top_H)
    out_HC: Floats | None = None
    for tile, weights_RH in zip(tiles, weights, strict=True):
        np.exp(weights_RH, out=weights_RH)
        total_H = total_H + _ones(tile.shape[0]).dot(weights_RH)
        some_HC = weights_RH.T.dot(tile)
        out_HC = some_HC if out_HC is None else np.add(out_HC, some_HC, out=out_HC)
    assert out_HC is not None
    out_HC /= total_H[:, None]
    return out_HC


def pool(kv_RC: Floats, gate_RC: Floats) -> Floats:
    """compress.pool_blocks of one block: [C]."""
    weights = np.exp(gate_RC - gate_RC.max(0))
    return (weights * kv_RC).sum(0) / weights.sum(0)


def index_scores(q_HC: Floats, keys_NC: Floats, weights_H: Floats) -> Floats:
    """The lightning indexer's scores, sum_h w_h relu(q_h k): [N]."""
    keys, heads = keys_NC.shape[0], q_HC.shape[0]
    scores_N, q_CH = np.empty(keys, np.float32), np.ascontiguousarray(q_HC.T)
    most = max(1, min(MATRIX_PRODUCT // q_HC.size, VECTOR_PRODUCT // heads))
    read, ahead = 0, max(most, READ_AHEAD // keys_NC.shape[1])
    for first in range(0, keys, most):
        some_NC = keys_NC[first : first + most]
        if heads <= FEW_HEADS:
            scores_NH = np.vecdot(some_NC[:, None], q_HC)
        else:
            if first + most > read:  # in order they come faster than the product would fetch them
                np.maximum.reduce(keys_NC[first : first + ahead], None)
                read = first + ahead
            scores_NH = some_NC.dot(q_CH)
        np.maximum(scores_NH, _ZERO, out=scores_NH)
        scores_NH.dot(weights_H, scores_N[first : first + most])
    return scores_N


def largest(scores_N: Floats, count: int) -> NDArray[np.intp]:
    """Entries of the ``count`` largest scores, rising; of equal scores the lower entries."""
    rising = scores_N.copy()
    rising.sort()  # np.partition is five times slower where many scores are 0
    least = rising[scores_N.size - count]
    chosen = (scores_N >= least).nonzero()[0]
    if chosen.size == count:
        return chosen
    above = scores_N > least
    tied = (scores_N == least).nonzero()[0]
    above[tied[: count - int(np.count_nonzero(above))]] = True
    return above.nonzero()[0]


def below(window_RC: Floats, rows_NC: Floats, chosen: NDArray[np.intp]) -> Floats:
    """The chosen rows below the window: [R + K, C]."""
    window = window_RC.shape[0]
    out = np.empty((window + chosen.size, window_RC.shape[1]), np.float32)
    out[:window] = window_RC
    if rows_NC.shape[0] < 3 * chosen.size:
        np.maximum.reduce(rows_NC, None)  # all, read in order, come faster than these one by one
    rows_NC.take(chosen, 0, out[window:], "clip")  # any other mode goes through a copy
    return out


def best(scores_E: Floats, count: int) -> list[int]:
    """Indices of the ``count`` largest, largest first, the lower index among equals."""
    return (-scores_E).argsort(kind="stable")[:count].tolist()
