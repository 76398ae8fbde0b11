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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import moe_few, moe_gemm, moe_many
from .gpu import is_hopper, processors_of
from .index import _code_values
from .moe_pool import ExpertPool, check_pool
from .moe_route import Groups, group, route
from .rounded import ROUND_BLOCK, Rounded, round_activations, round_block

__all__ = ["ExpertPool", "check_pool", "route", "routed_experts", "swiglu_round"]

SIDE_BY_SIDE = 8  # tiles that run at the same time, so that an expert's rows are read from memory once
SHARED_BYTES = 224 << 10  # of a multiprocessor, less what small things take
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
    if not is_hopper(device):
        return Way("portable", group(chosen_SK, pool.experts, 16 if each <= 8 else 64))
    if each <= FEW_PER_EXPERT:
        return Way("few", None if chosen_SK.shape[0] == 1 else group(chosen_SK, pool.experts, 8))
    size = next((size for size in (16, 32, 64, 128) if each <= size * 3 / 4), 256)
    return Way("many", group(chosen_SK, pool.experts, size))


def gate_up(
    way: Way, x: Rounded, chosen_SK: Tensor, weights_SK: Tensor, pool: ExpertPool, limit: float
) -> tuple[Tensor, Tensor | None]:
    """The values between an expert's two products, a row for every pair in the order of the groups, for `down`.

    Values float32 [P, I] and no scale (one token), or e4m3 and scales float32 [P, I/128] ("many": inputs in
    moe_few.py's order, scales by tile, [T, I/128, at least 32]).
    """
    pairs, topk = chosen_SK.numel(), chosen_SK.shape[1]
    if way.kernels == "few":
        hidden = torch.empty(pairs, pool.hidden, dtype=torch.float32, device=chosen_SK.device)
        _launch_few(way, x.data, x.scale, weights_SK, chosen_SK, pool, limit, hidden)
        if way.groups is None:
            return hidden, None
        rounded = round_activations(hidden)  # once, where one token's programs round for themselves
        return rounded.data, rounded.scale
    assert way.groups is not None
    if way.kernels == "many":
        data, scale = gathered(x, way.groups, topk)
        out, out_scale = _room(way.groups, pool.hidden, chosen_SK.device)
        _launch_many(way.groups, data, scale, weights_SK, pool, limit, out, out_scale)
        return out, out_scale
    rounded = Rounded.empty(pairs, pool.hidden, chosen_SK.device)
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
        assert way.groups is not None and scale is not None
        _launch_many(way.groups, data, scale, None, pool, 0.0, out, scale)
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
    """Bound by memory: every chosen expert's rows are read once.  With weights: gate and up."""
    gated = weights_SK is not None
    inputs, outputs = (pool.inputs, pool.hidden) if gated else (pool.hidden, pool.inputs)
    tiles, order = (chosen_SK, chosen_SK) if way.groups is None else (way.groups.tiles, way.groups.order)
    step = inputs // 128 & -(inputs // 128)
    # Programs that go through 64 rows twice start less often; but there must be many of them.
    rows = 32 if gated else 64
    twice = chosen_SK.numel() * (outputs // rows) >= 6000 and outputs % (2 * rows) == 0
    halves = 2 if twice else 1
    count = chosen_SK.numel() if way.groups is None else way.groups.tiles.shape[0]
    moe_few.few[(count * (outputs // (halves * rows)),)](
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
        BURST=min(2 if pool.fp8 else 4, step),
        HALVES=halves,
        GATED=gated,
        ROUNDED=x_scale is not None,
        SORTED=way.groups is not None,
        FP8=pool.fp8,
        num_warps=4,
        maxnreg=168,
        launch_pdl=True,
    )


def _room(groups: Groups, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For activations by place in order, and their scales by tile: e4m3 [P, I] and float32 [T, I/128, N]."""
    data = torch.empty(groups.order.shape[0], inputs, dtype=torch.float8_e4m3fn, device=device)
    places = max(groups.size, moe_many.SCALES.value)
    return data, torch.empty(groups.tiles.shape[0], inputs // 128, places, dtype=torch.float32, device=device)


def gathered(x: Rounded, groups: Groups, topk: int) -> tuple[Tensor, Tensor]:
    """A token's activations for each of its pairs, reordered, as `_room` says."""
    count, tiles = x.scale.shape[1], groups.tiles.shape[0]
    data, scale = _room(groups, x.data.shape[1], x.data.device)
    rows = min(16, groups.size)
    moe_many.gather[(tiles * (groups.size // rows),)](
        reorder(x).data.view(torch.int32),
        x.scale,
        groups.tiles,
        groups.order,
        data.view(torch.int32),
        scale,
        K=topk,
        N=groups.size,
        COUNT=count,
        WIDTH=triton.next_power_of_2(count),
        ROWS=rows,
        num_warps=4,
    )
    return data, scale


def _boxes(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How the copy engine reads ``tensor`` [N, M]: in boxes of rows x columns; single rows as they are."""
    bits = tensor.element_size() * 8
    layout = gl.NVMMASharedLayout(columns * bits // 8 if rows > 1 else 0, bits, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


def _launch_many(
    groups: Groups,
    x: Tensor,
    x_scale: Tensor,
    weights_SK: Tensor | None,
    pool: ExpertPool,
    limit: float,
    out: Tensor,
    out_scale: Tensor,
) -> None:
    """Tiles of up to 256 pairs; programs of four warp groups for small tiles, else two.  With weights: gate and up."""
    gated, size = weights_SK is not None, groups.size
    inputs, outputs = (pool.inputs, pool.hidden) if gated else (pool.hidden, pool.inputs)
    tiles, count, piece = groups.tiles.shape[0], inputs // 128, min(size, 64)
    small = size <= 64 and not pool.fp8 and not inputs % 256 and not outputs % (128 if gated else 256)
    warp_groups = 4 if small else 2
    wide = 1 if count % 2 or pool.fp8 or size >= 64 else 2
    halves = 1 if warp_groups == 4 or (not gated and outputs % 256) else 2
    width = wide * (128 if pool.fp8 else 64)
    stage = wide * (128 * size + 4 * x_scale.shape[2]) + 64 * warp_groups * width
    held = 256 * (size + piece) if gated else 0
    items = triton.cdiv(tiles, SIDE_BY_SIDE) * SIDE_BY_SIDE * (outputs // (128 if gated else 64 * warp_groups * halves))
    moe_many.many[(min(items, processors_of(out.device)),)](
        _boxes(x, piece, 128),
        _boxes(x_scale.flatten(0, 1), 1, x_scale.shape[2]),
        _boxes((pool.w13 if gated else pool.w2).view(torch.uint8).flatten(0, 1), 32 * warp_groups, width),
        weights_SK if gated else x_scale,
        pool.s13 if gated else pool.s2,
        _code_values(out.device),
        pool.slot_of_expert,
        groups.tiles,
        groups.order,
        out,
        out_scale,
        tiles,
        outputs,
        limit,
        PIECES=size // piece,
        COUNT=count,
        WIDE=wide,
        STAGES=min(6, (SHARED_BYTES - held) // stage),
        HALVES=halves,
        WGS=warp_groups,
        SIDE=SIDE_BY_SIDE,
        GATED=gated,
        FP8=pool.fp8,
        num_warps=4,
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
