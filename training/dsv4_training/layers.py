"""The trainer's operations but attention itself: differentiable, over all tokens of a batch at once.

Owns the forms of the model's equations that training needs: straight-through rounding, residual streams, projections,
compression, dense experts.  Rounding and pooling are those of dsv4_kernels; its others are shaped for one sequence on a
CPU (tiles, cached constants, no gradients), and a test compares whole models instead.
Tokens of all sequences are flattened, so every function is the same graph for every sequence length; a sequence
length is a multiple of 128.
Letters: N tokens, D hidden, J and K streams, H heads, C channels, M compressed entries, E experts, I expert hidden.
Source: report, sections 2.2-2.4 and 5.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_kernels.compress import pool_blocks
from dsv4_kernels.rounding import (
    E4M3_LARGEST,
    FP8_AMAX_FLOOR,
    e4m3_to_float32,
    power_of_two_scale,
    round_fp4,
    round_fp8,
)

from .rotary import rotate

BLOCK = 128
NEG_INF = float("-inf")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32, returned in x's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Returns the rounded values and passes the gradient to the unrounded ones unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    out: Tensor = _StraightThrough.apply(x, rounded)
    return out


def fp8_ste(x: Tensor, block: int = 128) -> Tensor:
    """Activations as a quantised linear sees them: e4m3 per 1x``block``."""
    return straight_through(x, round_fp8(x.detach(), block))


def fp8_weight_ste(w_OI: Tensor) -> Tensor:
    """A weight [..., O, I] as stored in e4m3 with one power-of-two scale per 128x128 block (O, I multiples of 128)."""
    blocks = w_OI.detach().float().unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax((-3, -1), keepdim=True).clamp_min(FP8_AMAX_FLOOR)
    scale = power_of_two_scale(amax, E4M3_LARGEST)
    rounded = e4m3_to_float32((blocks / scale).to(torch.float8_e4m3fn)) * scale
    return straight_through(w_OI, rounded.flatten(-2).flatten(-3, -2))


def fp4_weight_ste(w_OI: Tensor) -> Tensor:
    """A weight [..., O, I] as stored in e2m1 with one power-of-two scale per 32 inputs."""
    return straight_through(w_OI, round_fp4(w_OI.detach()))


def bf16_weight_ste(w: Tensor) -> Tensor:
    """A weight as stored in bfloat16."""
    return straight_through(w, w.detach().to(torch.bfloat16).to(w.dtype))


def cache_rounding(x: Tensor, rope_dim: int, quantised: bool) -> Tensor:
    """A key-value row as the cache holds it: FP8 per 64 in its first channels, the rotated ones in bfloat16."""
    if not quantised:
        return x
    rounded = round_fp8(x.detach()[..., :-rope_dim], 64)
    tail = x.detach()[..., -rope_dim:].to(torch.bfloat16).to(x.dtype)
    return straight_through(x, torch.cat([rounded, tail], -1))


# Residual streams -----------------------------------------------------------------------------------------------


def _projected(x_NJD: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = x_NJD.flatten(1).float()
    return F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def read_residual(
    x_NJD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, hc_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sub-layer's normed input [N, D], and what writes its result back: post [N, K] and the logits [N, J, K] of the
    doubly stochastic mixing matrices (sinkhorn.py makes them so); both float32."""
    j = x_NJD.shape[1]
    pre, post, comb = _projected(x_NJD, fn, eps).split([j, j, j * j], -1)
    base_pre, base_post, base_comb = base.split([j, j, j * j])
    pre = torch.sigmoid(pre * scale[0] + base_pre) + hc_eps
    post = 2 * torch.sigmoid(post * scale[1] + base_post)
    logits = (comb * scale[2] + base_comb).unflatten(-1, (j, j))
    u = (pre[:, :, None] * x_NJD.float()).sum(1).to(x_NJD.dtype)
    return rms_norm(u, norm, eps), post, logits


def write_residual(x_NJD: Tensor, f_ND: Tensor, post_NK: Tensor, comb_NJK: Tensor) -> Tensor:
    """X'_k = post_k f + sum_j comb[j, k] X_j, as broadcast sums: on a GPU faster than a product of 4x4 matrices."""
    mixed = (comb_NJK[..., None] * x_NJD.float()[:, :, None]).sum(1)
    return (post_NK[..., None] * f_ND.float()[:, None] + mixed).to(x_NJD.dtype)


def read_head(
    x_NJD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, hc_eps: float, eps: float
) -> Tensor:
    """The normed read of the streams before the head [N, D]."""
    pre = torch.sigmoid(_projected(x_NJD, fn, eps) * scale + base) + hc_eps
    return rms_norm((pre[:, :, None] * x_NJD.float()).sum(1).to(x_NJD.dtype), norm, eps)


# Attention --------------------------------------------------------------------------------------------------------


def project(
    h_ND: Tensor,
    wq_a: Tensor,
    q_norm: Tensor,
    wq_b: Tensor,
    wkv: Tensor,
    kv_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    quantised: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, C], kv [N, C] and the low-rank query [N, q_lora]; weights already rounded and in h's dtype."""
    h = fp8_ste(h_ND) if quantised else h_ND
    low = rms_norm(F.linear(h, wq_a), q_norm, eps)
    q = F.linear(fp8_ste(low) if quantised else low, wq_b).unflatten(-1, (heads, -1))
    q = rotate(rms_norm(q, None, eps), cos[:, None], sin[:, None])
    kv = rotate(rms_norm(F.linear(h, wkv), kv_norm, eps), cos, sin)
    return q, cache_rounding(kv, 2 * cos.shape[-1], quantised), low


def merge_and_project(
    near: Tensor,
    near_lse: Tensor,
    far: Tensor | None,
    far_lse: Tensor | None,
    sink_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    groups: int,
    quantised: bool,
) -> Tensor:
    """One softmax over window, entries and sink out of the parts' log-sum-exps, then the grouped output projection.

    near, far: [N, H, C]; returns the sub-layer's result [N, D].
    """
    sink = sink_H.expand_as(near_lse)
    lse = torch.logaddexp(near_lse, sink)
    if far is not None and far_lse is not None:
        lse = torch.logaddexp(lse, far_lse)
    out = near.float() * (near_lse - lse).exp()[..., None]
    if far is not None and far_lse is not None:
        out = out + far.float() * (far_lse - lse).exp()[..., None]
    out = rotate(out.to(near.dtype), cos[:, None], -sin[:, None])
    out_GNI = out.flatten(1).unflatten(-1, (groups, -1)).transpose(0, 1)
    low = torch.bmm(out_GNI, wo_a.unflatten(0, (groups, -1)).transpose(1, 2)).transpose(0, 1).flatten(1)
    return F.linear(fp8_ste(low) if quantised else low, wo_b)


def compress_project(h_ND: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor) -> tuple[Tensor, Tensor]:
    """What compressed entries are pooled from: values and gate logits [N / R, R, channels] in float32, R =
    ape.shape[0]."""
    h = h_ND.float()
    blocks = (-1, ape.shape[0])
    return F.linear(h, wkv).unflatten(0, blocks), F.linear(h, wgate).unflatten(0, blocks) + ape


def earlier_halves(kv_MRE: Tensor, gate_MRE: Tensor, first_M: Tensor) -> tuple[Tensor, Tensor]:
    """The first halves of the channels of the block before each, which overlapping blocks (R = 4) are pooled with too.

    first_M: bool, true for blocks that open a document; they get no weight there.
    """
    channels, opens = kv_MRE.shape[-1] // 2, first_M[:, None, None]
    kv = kv_MRE[..., :channels].roll(1, 0).masked_fill(opens, 0.0)
    return kv, gate_MRE[..., :channels].roll(1, 0).masked_fill(opens, NEG_INF)


def compress_pool(
    kv: Tensor,
    gate: Tensor,
    earlier_kv: Tensor | None,
    earlier_gate: Tensor | None,
    norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Tensor:
    """Compressed entries [M, C], rotated; cos, sin: at their positions; earlier: None where blocks do not overlap."""
    if earlier_kv is not None and earlier_gate is not None:
        channels = kv.shape[-1] // 2
        kv = torch.cat([earlier_kv, kv[..., channels:]], 1)
        gate = torch.cat([earlier_gate, gate[..., channels:]], 1)
    return rotate(rms_norm(pool_blocks(kv, gate), norm, eps), cos, sin)


def mtp_input(
    e_ND: Tensor,
    x_NJD: Tensor,
    enorm: Tensor,
    hnorm: Tensor,
    e_proj: Tensor,
    h_proj: Tensor,
    eps: float,
    quantised: bool,
) -> Tensor:
    """The MTP block's streams [N, J, D] from the next token's embedding and the model's streams."""
    e, h = rms_norm(e_ND, enorm, eps), rms_norm(x_NJD, hnorm, eps)
    if quantised:
        e, h = fp8_ste(e), fp8_ste(h)
    return F.linear(e, e_proj)[:, None] + F.linear(h, h_proj)


# Indexer ------------------------------------------------------------------------------------------------------------


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last dim (a power of two), scaled by C^-0.5.

    The matrix is made here: dsv4_kernels' cached one may not take part in training once the engine has made it.
    """
    size = x.shape[-1]
    i = torch.arange(size, device=x.device)
    common = i[:, None] & i
    for shift in (8, 4, 2, 1):  # parity of the bits in common
        common = common ^ (common >> shift)
    signs = 1.0 - 2.0 * (common & 1).float()
    return ((x.float() @ signs) * size**-0.5).to(x.dtype)


def index_rounding(x: Tensor, quantised: bool) -> Tensor:
    """Index queries and keys after the Hadamard turn and FP4 rounding."""
    turned = hadamard(x)
    return straight_through(turned, round_fp4(turned.detach())) if quantised else turned


def index_queries(
    low: Tensor, h_ND: Tensor, wq_b: Tensor, weights_proj: Tensor, cos: Tensor, sin: Tensor, heads: int, quantised: bool
) -> tuple[Tensor, Tensor]:
    """Index queries [N, heads, C] and the heads' weights [N, heads], scale factors included."""
    q = F.linear(fp8_ste(low) if quantised else low, wq_b).unflatten(-1, (heads, -1)).float()
    q = index_rounding(rotate(q, cos[:, None], sin[:, None]), quantised)
    weights = F.linear(h_ND.float(), weights_proj.float()) * (q.shape[-1] ** -0.5 * heads**-0.5)
    return q, weights


# Experts ------------------------------------------------------------------------------------------------------------


def experts(
    h_ND: Tensor,
    gate_ED: Tensor,
    bias_E: Tensor | None,
    chosen_NK: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    topk: int,
    scaling: float,
    normalise: bool,
    limit: float,
    quantised: bool,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result [N, D], the choice [N, K], and of ``parts`` equal parts of N each expert's share of tokens and of scores.

    w1, w3 [E + shared, I, D] and w2 [E + shared, D, I], the shared experts last.  All experts run on all tokens and
    the unchosen ones get weight zero: at this size that is one product, faster than sorting tokens.  chosen_NK: the
    choice where it is made elsewhere (hash layers; older parameters).  The shares [parts, E] are the means that
    `balance` wants.
    """
    count = gate_ED.shape[0]
    scores = F.softplus(F.linear(h_ND.float(), gate_ED)).sqrt()
    ranked = scores if bias_E is None else scores + bias_E
    chosen = chosen_NK if chosen_NK is not None else ranked.topk(topk, -1).indices
    weights = scores.gather(1, chosen)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * scaling
    dense = torch.zeros(h_ND.shape[0], count, device=h_ND.device).scatter(1, chosen, weights)
    served = (dense.detach() > 0).float().unflatten(0, (parts, -1)).mean(1)
    shares = (scores / scores.sum(-1, keepdim=True)).unflatten(0, (parts, -1)).mean(1)
    dense = torch.cat([dense, dense.new_ones(h_ND.shape[0], w1.shape[0] - count)], 1)
    h = fp8_ste(h_ND) if quantised else h_ND
    gate = F.linear(h, w1.flatten(0, 1)).float().clamp(max=limit)
    hidden = F.silu(gate) * F.linear(h, w3.flatten(0, 1)).float().clamp(-limit, limit)
    hidden = (hidden.unflatten(-1, (w1.shape[0], -1)) * dense[..., None]).to(h.dtype)
    if quantised:
        hidden = fp8_ste(hidden)
    return F.linear(hidden.flatten(1), w2.transpose(0, 1).flatten(1)), chosen, served, shares


def balance(served_PE: Tensor, shares_PE: Tensor, sequences: int, topk: int) -> Tensor:
    """The sequence balance loss: sum over E of f P, mean over the sequences (arXiv 2412.19437, equations 17-20).

    f: an expert's share of tokens times E / topk; P: its mean share of the scores; P parts, as many for each sequence.
    """
    f = served_PE.unflatten(0, (sequences, -1)).mean(1) * (served_PE.shape[1] / topk)
    return (f * shares_PE.unflatten(0, (sequences, -1)).mean(1)).sum(-1).mean()
