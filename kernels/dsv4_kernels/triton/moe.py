"""Mixture of experts over packed weights: every chosen expert's result for every token, without waiting for the host.

Owns the dispatch, and is what the engine imports; the experts are moe_pool.py, routing moe_route.py, the products
moe_few.py and moe_many.py (compute capability 9.0) and moe_gemm.py.  A token's bits do not depend on the others.
Reference: dsv4_kernels.moe.  Activations are rounded where its are; what comes between is float32, not the model's
dtype.  Letters: S tokens, D hidden, E experts, K experts a token, I expert hidden, P = S K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe_few, moe_gemm, moe_many
from .index import _code_values
from .moe_pool import ExpertPool, check_pool
from .moe_route import Groups, group, route
from .rounded import ROUND_BLOCK, Rounded, round_activations, round_block

__all__ = ["ExpertPool", "check_pool", "route", "routed_experts", "swiglu_round"]

SIDE_BY_SIDE = 8  # tiles that run at the same time, so that an expert's rows are read from memory once
FEW_PER_EXPERT = 4  # up to so many pairs an expert (on average) the matrices' bytes are what counts


def routed_experts(x: Rounded, chosen_SK: Tensor, weights_SK: Tensor, pool: ExpertPool, limit: float) -> Tensor:
    """w2(weight silu(min(w1 x, limit)) clamp(w3 x, +-limit)) of every token's experts: bfloat16 [S, K, D].

    chosen: int32 [S, K], each an expert of the pool that has a slot; weights: float32 [S, K]; results stand in the
    order of choice, for the caller to add up.  No host synchronisation; shapes alone decide what is launched.
    Raises ValueError for what the kernels do not take.  Source: as dsv4_kernels.moe.mixture.
    """
    tokens, topk = chosen_SK.shape
    if x.shape != (tokens, pool.inputs) or weights_SK.shape != chosen_SK.shape:
        raise ValueError(
            f"{tokens} tokens of {pool.inputs} inputs need activations of that shape and as many weights as choices, "
            f"got {tuple(x.shape)} and {tuple(weights_SK.shape)} for {tuple(chosen_SK.shape)}"
        )
    if chosen_SK.dtype != torch.int32 or weights_SK.dtype != torch.float32:
        raise ValueError(f"choices must be int32 and weights float32, got {chosen_SK.dtype} and {weights_SK.dtype}")
    if not all(t.is_contiguous() for t in (x.data, x.scale, chosen_SK, weights_SK)):
        raise ValueError("activations, choices and weights of experts must be contiguous")
    out = torch.empty(tokens, topk, pool.inputs, dtype=torch.bfloat16, device=x.data.device)
    if not tokens:
        return out
    way = way_for(chosen_SK, pool)
    return down(way, gate_up(way, x, chosen_SK, weights_SK, pool, limit), chosen_SK, pool, out)


@dataclass(frozen=True)
class Way:
    """How a call goes: by which kernels, and which pairs they take together (None: each pair by itself)."""

    kernels: Literal["few", "many", "portable"]
    groups: Groups | None


def way_for(chosen_SK: Tensor, pool: ExpertPool) -> Way:
    """The way for these choices; shapes alone decide, so it holds for every replay of a graph."""
    pairs, device = chosen_SK.numel(), chosen_SK.device
    each = pairs / pool.experts
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return Way("portable", group(chosen_SK, pool.experts, 16 if each <= 8 else 64))
    if each <= FEW_PER_EXPERT or pool.inputs % 256:  # moe_many.py writes 256 outputs a program
        return Way("few", None if chosen_SK.shape[0] == 1 else group(chosen_SK, pool.experts, 8))
    return Way("many", group(chosen_SK, pool.experts, 32 if each <= 16 else 64 if each <= 32 else 128))


def gate_up(
    way: Way, x: Rounded, chosen_SK: Tensor, weights_SK: Tensor, pool: ExpertPool, limit: float
) -> tuple[Tensor, Tensor | None]:
    """The values between an expert's two products, a row for every pair in the order of the groups, for `down`.

    Values float32 [P, I] and no scale (one token), or e4m3 and scales ("many": inputs in moe_few.py's order).
    """
    pairs, topk = chosen_SK.numel(), chosen_SK.shape[1]
    if way.kernels == "few":
        hidden = torch.empty(pairs, pool.hidden, dtype=torch.float32, device=chosen_SK.device)
        _launch_few(way, x.data, x.scale, weights_SK, chosen_SK, pool, limit, hidden)
        if way.groups is None:
            return hidden, None
        rounded = round_activations(hidden)  # once, where one token's programs round for themselves
        return rounded.data, rounded.scale
    rounded = Rounded.empty(pairs, pool.hidden, chosen_SK.device)
    if way.kernels == "many":
        _launch_many(way, reorder(x).data, x.scale, weights_SK, topk, pool, limit, rounded.data, rounded.scale)
        return rounded.data, rounded.scale
    assert way.groups is not None
    moe_gemm.gate_up[(way.groups.tiles.shape[0] * (pool.hidden // 128),)](
        x.data,
        x.scale,
        weights_SK,
        pool.w13,
        pool.s13,
        pool.slot_of_expert,
        way.groups.tiles,
        way.groups.order,
        rounded.data,
        rounded.scale,
        pool.inputs,
        pool.hidden,
        limit,
        K=topk,
        N=way.groups.size,
        COLUMNS=triton.next_power_of_2(pool.inputs),
        FP8=pool.fp8,
        num_warps=8,
    )
    return rounded.data, rounded.scale


def down(way: Way, hidden: tuple[Tensor, Tensor | None], chosen_SK: Tensor, pool: ExpertPool, out: Tensor) -> Tensor:
    """The second product of what `gate_up` gave the same way, into ``out``, bfloat16 [S, K, D]."""
    data, scale = hidden
    if way.kernels == "few":
        _launch_few(way, data, scale, None, chosen_SK, pool, 0.0, out)
    elif way.kernels == "many":
        _launch_many(way, data, scale, None, chosen_SK.shape[1], pool, 0.0, out, None)
    else:
        assert way.groups is not None
        moe_gemm.down[(way.groups.tiles.shape[0] * (pool.inputs // 128),)](
            data,
            scale,
            pool.w2,
            pool.s2,
            pool.slot_of_expert,
            way.groups.tiles,
            way.groups.order,
            out,
            pool.inputs,
            pool.hidden,
            N=way.groups.size,
            COLUMNS=triton.next_power_of_2(pool.hidden),
            FP8=pool.fp8,
            num_warps=8,
        )
    return out


def _launch_few(
    way: Way,
    x: Tensor,
    x_scale: Tensor | None,
    weights_SK: Tensor | None,
    chosen_SK: Tensor,
    pool: ExpertPool,
    limit: float,
    out: Tensor,
) -> None:
    """Bound by memory: every chosen expert's rows are read once, 64 of them a program.  With weights: gate and up."""
    gated = weights_SK is not None
    inputs, outputs = (pool.inputs, pool.hidden) if gated else (pool.hidden, pool.inputs)
    tiles, order = (chosen_SK, chosen_SK) if way.groups is None else (way.groups.tiles, way.groups.order)
    step = inputs // 128 & -(inputs // 128)
    moe_few.few[((chosen_SK.numel() if way.groups is None else len(tiles)) * (outputs // (32 if gated else 64)),)](
        x,
        x if x_scale is None else x_scale,
        weights_SK if gated else x,
        pool.w13 if gated else pool.w2,
        pool.s13 if gated else pool.s2,
        _code_values(out.device),
        pool.slot_of_expert,
        chosen_SK,
        tiles,
        order,
        out,
        outputs,
        limit,
        INPUTS=inputs,
        K=chosen_SK.shape[1],
        BLOCKS=min(8, step),
        WIDE=1 if pool.fp8 else min(2, step),
        STAGES=4,
        GATED=gated,
        ROUNDED=x_scale is not None,
        SORTED=way.groups is not None,
        FP8=pool.fp8,
        num_warps=4,
    )


def _launch_many(
    way: Way,
    x: Tensor,
    x_scale: Tensor | None,
    weights_SK: Tensor | None,
    topk: int,
    pool: ExpertPool,
    limit: float,
    out: Tensor,
    out_scale: Tensor | None,
) -> None:
    """Bound by the tensor cores: tiles of up to 128 pairs, two warp groups a program.  With weights: gate and up."""
    assert way.groups is not None
    gated = weights_SK is not None
    inputs, outputs = (pool.inputs, pool.hidden) if gated else (pool.hidden, pool.inputs)
    tiles = way.groups.tiles.shape[0]
    parts = outputs // (128 if gated else 256)
    moe_many.many[(triton.cdiv(tiles, SIDE_BY_SIDE) * SIDE_BY_SIDE * parts,)](
        x,
        x_scale,
        weights_SK if gated else x_scale,
        pool.w13 if gated else pool.w2,
        pool.s13 if gated else pool.s2,
        _code_values(out.device),
        pool.slot_of_expert,
        way.groups.tiles,
        way.groups.order,
        out,
        out_scale if gated else x_scale,
        tiles,
        outputs,
        limit,
        INPUTS=inputs,
        K=topk,
        N=way.groups.size,
        STAGES=4,
        GROUP=SIDE_BY_SIDE,
        GATED=gated,
        FP8=pool.fp8,
        num_warps=8,
    )


def reorder(x: Rounded) -> Rounded:
    """The same activations with the inputs of every 128 in the order of moe_few.py."""
    data, blocks = torch.empty_like(x.data), x.data.numel() // 128
    _reorder[(triton.cdiv(blocks, 64),)](x.data.view(torch.uint8), data.view(torch.uint8), blocks, ROWS=64)
    return Rounded(data, x.scale)


@triton.jit
def _reorder(x_ptr, out_ptr, blocks, ROWS: tl.constexpr):
    """Blocks of 128 inputs in the order of moe_few.py: 32q + 8c + 2j + h to 32c + 16h + 4q + j."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + place, mask=(block < blocks)[:, None], other=0)
    x = tl.permute(tl.reshape(x, [ROWS, 4, 4, 4, 2]), (0, 2, 4, 1, 3))
    tl.store(out_ptr + place, tl.reshape(x, [ROWS, 128]), mask=(block < blocks)[:, None])


@triton.jit
def _swiglu_round(y_ptr, data_ptr, scale_ptr, rows, hidden, limit, ROWS: tl.constexpr):
    """ROWS blocks of 128 values a program."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (block < rows * (hidden // 128))[:, None]
    t = block // (hidden // 128)
    place = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    gate = tl.load(y_ptr + place + t[:, None] * hidden, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y_ptr + place + (t[:, None] + 1) * hidden, mask=inside, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    data, scale = round_block(gate / (1.0 + tl.exp(-gate)) * up)
    tl.store(data_ptr + place, data, mask=inside)
    tl.store(scale_ptr + block, scale, mask=block < rows * (hidden // 128))


def swiglu_round(y: Tensor, limit: float) -> Rounded:
    """silu(min(gate, limit)) * clamp(up, +-limit), rounded, for the shared expert: [S, 2I] (gate | up) -> [S, I].

    y: bfloat16 or float32, contiguous; 128 divides I.  Raises ValueError for anything else.
    """
    tokens, hidden = y.shape[0], y.shape[1] // 2
    if y.dtype not in (torch.bfloat16, torch.float32) or not y.is_contiguous() or y.shape[1] % (2 * ROUND_BLOCK):
        raise ValueError(
            f"gate and up values must be contiguous bfloat16 or float32 [S, 2I], 128 dividing I, "
            f"got {y.dtype} {tuple(y.shape)}"
        )
    out = Rounded.empty(tokens, hidden, y.device)
    blocks = tokens * hidden // ROUND_BLOCK
    rows = 2 if blocks < 4096 else 16
    if blocks:
        _swiglu_round[(triton.cdiv(blocks, rows),)](
            y, out.data, out.scale, tokens, hidden, limit, ROWS=rows, num_warps=1 if rows == 2 else 4
        )
    return out
