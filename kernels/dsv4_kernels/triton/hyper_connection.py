"""Hyper-connections on the GPU: the write of one sub-layer and the read of the next, norm and rounding included.

Two launches.  The first adds up the new streams and their products with the coefficients' weights, a slice of the
channels a program; the second adds the slices up in their order, reads the streams, norms and rounds.  Reference:
dsv4_kernels.hyper_connection.

One reduction plan.  A token's products are summed over RANGE channels of all streams from zero, then over the ranges
0, n, 2n, .., over 1, n + 1, .., about SUBS each, then over these n sums: whoever adds them up, the bits are the same.
The weights are split into three bf16 parts whose sum they are, so products are exact; sums are fp32.
Letters: S tokens, J and K streams (4 of each), A routed results, M coefficients, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..hyper_connection import spread_scales
from .gpu import is_hopper
from .packing import PDL, check_inputs
from .rounded import Rounded
from .streams import _read, _write_and_project

STREAMS = 4
RANGE = 32  # channels of each stream that are summed from zero
SUBS = 16  # ranges in a sum of their own, which in prefill one program adds up; sums take turns with the ranges
TOKENS = 64  # a program of the first kernel: the rows of one tensor core instruction
WARPS, STAGES, MAXNREG = 8, 1, 128  # of the first kernel: two programs a multiprocessor, which beat longer pipelines
MANY = 1024  # tokens from which on streams_hopper.py has the first kernel, where it can
READ_WARPS = 8  # of the second
MIXING = 64  # tokens whose matrices one program normalises
COLUMNS = 32  # of partial sums: the coefficients, in column 24 the sum of squares, padding
FEW = 64  # programs of SUBS ranges that leave a GPU idle: then one range a program


@dataclass(frozen=True)
class Connection:
    """The weights of one hyper-connection, as the kernels read them.

    parts: bfloat16 [D / RANGE, 3, M, J * RANGE], the checkpoint's fn cut into three, in the order in which it is read;
    base, scale: float32 [M]; norm: float32 [D], of the sub-layer's input.  M is 24, or 4 for the read before the head.
    """

    parts: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor

    @classmethod
    def of(cls, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor) -> Connection:
        """From the checkpoint's tensors: fn [M, J*D], base [M], scale [3] (or [1] for the head), norm [D]."""
        coefficients, inputs = fn.shape
        hidden = inputs // STREAMS
        if coefficients not in (STREAMS, STREAMS * (2 + STREAMS)) or hidden % 128 or norm.shape != (hidden,):
            raise ValueError(
                f"hyper-connections on the GPU take {STREAMS} streams of a hidden size that 128 divides, got fn "
                f"{tuple(fn.shape)} and a norm of {tuple(norm.shape)}; use device='cpu'"
            )
        spread = scale.float().expand(STREAMS) if coefficients == STREAMS else spread_scales(scale.float(), STREAMS)
        parts = three_parts(fn).view(3, coefficients, STREAMS, hidden // RANGE, RANGE).permute(3, 0, 1, 2, 4)
        rest = (base.float().contiguous(), spread.float().contiguous(), norm.float().contiguous())
        return cls(parts.flatten(3).contiguous(), *rest)


def three_parts(x: Tensor) -> Tensor:
    """float32 [...] as three bfloat16 tensors whose sum it is: [3, ...].  Exact above 2^-110."""
    high = x.float().to(torch.bfloat16)
    rest = x.float() - high.float()
    middle = rest.to(torch.bfloat16)
    return torch.stack([high, middle, (rest - middle.float()).to(torch.bfloat16)])


@dataclass(frozen=True)
class Write:
    """What a sub-layer adds to the streams: X'_k = post_k f + sum_j comb[j, k] X_j.

    f = the routed results in their order, then result: bfloat16 [S, A, D] (or None) and [S, D]; the sum is rounded to
    bfloat16 once.  post: float32 [S, J], comb: float32 [S, J, K], both from the `connect` before the sub-layer.
    """

    result: Tensor
    post: Tensor
    comb: Tensor
    routed: Tensor | None = None


@dataclass(frozen=True)
class Connected:
    """streams: bfloat16 [S, J, D]; u, rounded: the sub-layer's input [S, D]; post and comb for its write."""

    streams: Tensor
    u: Tensor
    rounded: Rounded
    post: Tensor
    comb: Tensor


def _streams(x_SJD: Tensor, before: Write | None, out: Tensor | None) -> Tensor:
    """Where the streams go, after a look at everything that the first kernel reads."""
    tokens, streams, hidden = x_SJD.shape
    if streams != STREAMS or hidden % 128 or x_SJD.dtype != torch.bfloat16 or x_SJD.stride(2) != 1:
        raise ValueError(
            f"streams on the GPU are bfloat16 [S, {STREAMS}, D] with 128 dividing D, got {x_SJD.dtype} "
            f"{tuple(x_SJD.shape)}; use device='cpu'"
        )
    if before is None:
        return x_SJD
    if out is None:
        out = torch.empty(x_SJD.shape, dtype=x_SJD.dtype, device=x_SJD.device)
    routed = before.routed
    check_inputs(
        ("result", before.result, torch.bfloat16, (tokens, hidden)),
        ("routed", routed, torch.bfloat16, (tokens, 0 if routed is None else routed.shape[1], hidden)),
        ("post", before.post, torch.float32, (tokens, STREAMS)),
        ("comb", before.comb, torch.float32, (tokens, STREAMS, STREAMS)),
        ("out", out, torch.bfloat16, (tokens, STREAMS, hidden)),
    )
    return out


def _first(x_SJD: Tensor, before: Write | None, out: Tensor, weights: Connection | None) -> Tensor:
    """The first kernel: streams to ``out``; sums of products, float32 [parts, S, 32]."""
    tokens, _, hidden = x_SJD.shape
    if weights is not None and weights.norm.shape[0] != hidden:
        raise ValueError(f"streams are {hidden} wide, the hyper-connection's weights {weights.norm.shape[0]}")
    routed = before.routed if before is not None else None
    ranges, tiles = hidden // RANGE, triton.cdiv(tokens, TOKENS)
    parts = triton.cdiv(ranges, SUBS)
    if tiles * parts <= FEW:
        parts = ranges
    partial = torch.empty(parts, tokens if weights is not None else 0, COLUMNS, device=x_SJD.device)
    if weights is not None and tokens >= MANY and is_hopper(x_SJD.device):
        from .streams_hopper import takes, write_and_project_many

        if takes(x_SJD, before, weights.base.shape[0]):
            write_and_project_many(x_SJD, before, out, weights.parts, partial)
            return partial
    if tokens:
        _write_and_project[(parts, tiles)](
            x_SJD,
            x_SJD.stride(0),
            x_SJD.stride(1),
            before.result if before is not None else x_SJD,
            routed if routed is not None else x_SJD,
            before.post if before is not None else x_SJD,
            before.comb if before is not None else x_SJD,
            out,
            weights.parts if weights is not None else x_SJD,
            partial,
            tokens,
            parts,
            D=hidden,
            COEFFICIENTS=weights.base.shape[0] if weights is not None else 0,
            WRITE=before is not None,
            ROUTED=routed.shape[1] if routed is not None else 0,
            T=TOKENS,
            R=RANGE,
            N=16 if weights is not None and weights.base.shape[0] <= 16 else 32,
            num_warps=WARPS,
            num_stages=STAGES,
            maxnreg=MAXNREG,
            launch_pdl=PDL,
        )
    return partial


def connect(
    x_SJD: Tensor,
    before: Write | None,
    weights: Connection,
    *,
    iterations: int,
    hc_eps: float,
    norm_eps: float,
    out: Tensor | None = None,
) -> Connected:
    """The streams after ``before`` (unchanged if None), and what the sub-layer behind ``weights`` reads of them.

    x: bfloat16 [S, 4, D], contiguous in D, of any strides (the embedding may be expanded over the streams); out: where
    the new streams go, which may be x itself.  The streams and the read are rounded to bfloat16, as in the reference
    with that compute dtype; everything between is float32.  Raises ValueError for what the kernels do not take.
    Source: report, section 2.2.
    """
    tokens, _, hidden = x_SJD.shape
    streams = _streams(x_SJD, before, out)
    partial = _first(x_SJD, before, streams, weights)
    u = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=x_SJD.device)
    rounded = Rounded.empty(tokens, hidden, x_SJD.device)
    post = torch.empty(tokens, STREAMS, device=x_SJD.device)
    comb = torch.empty(tokens, STREAMS, STREAMS, device=x_SJD.device)
    if tokens:
        _second(streams, weights, partial, u, rounded, post, comb, iterations, hc_eps, norm_eps)
    return Connected(streams, u, rounded, post, comb)


def head_read(
    x_SJD: Tensor,
    before: Write | None,
    weights: Connection,
    *,
    hc_eps: float,
    norm_eps: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The streams after ``before`` and the input of the output head: bfloat16 [S, 4, D], float32 [S, D].

    The latter's values are those of bfloat16, as in the reference.  Arguments as of `connect`.
    """
    streams = _streams(x_SJD, before, out)
    partial = _first(x_SJD, before, streams, weights)
    h = torch.empty(x_SJD.shape[0], x_SJD.shape[2], device=x_SJD.device)
    if x_SJD.shape[0]:
        _second(streams, weights, partial, h, None, h, h, 0, hc_eps, norm_eps)
    return streams, h


def write_streams(x_SJD: Tensor, before: Write, out: Tensor | None = None) -> Tensor:
    """The streams after ``before`` alone: bfloat16 [S, 4, D]; ``out`` may be x itself."""
    streams = _streams(x_SJD, before, out)
    _first(x_SJD, before, streams, None)
    return streams


def _second(
    x_SJD: Tensor,
    weights: Connection,
    partial: Tensor,
    u: Tensor,
    rounded: Rounded | None,
    post: Tensor,
    comb: Tensor,
    iterations: int,
    hc_eps: float,
    norm_eps: float,
) -> None:
    tokens, _, hidden = x_SJD.shape
    coefficients = weights.base.shape[0]
    mixing = 0 if coefficients == STREAMS else triton.cdiv(tokens, MIXING)
    groups = triton.cdiv(hidden // RANGE, SUBS)
    _read[(mixing + tokens,)](
        x_SJD,
        x_SJD.stride(0),
        x_SJD.stride(1),
        partial,
        weights.base,
        weights.scale,
        weights.norm,
        u,
        rounded.data if rounded is not None else u,
        rounded.scale if rounded is not None else u,
        post,
        comb,
        tokens,
        iterations,
        hc_eps,
        norm_eps,
        D=hidden,
        BLOCKS=triton.next_power_of_2(hidden // 128),
        COEFFICIENTS=coefficients,
        PARTS=partial.shape[0],
        GROUPS=groups,
        SUMS=triton.next_power_of_2(groups),
        T=MIXING,
        num_warps=READ_WARPS,
        launch_pdl=PDL,
    )
