"""Products for many tokens on compute capability 9.0, in Gluon: one warp copies tiles, two warp groups multiply.

`linear_many` has the bits of the portable kernel in linear.py, and of linear_few.py: the tensor cores sum 128 inputs
from nothing; the sums, in FP8 times their scales, are added in float32 in the inputs' order.
Knows nothing of the dispatch.
Letters: S tokens, O outputs, K inputs; tiles are 128 bytes wide, which is 128 inputs in FP8 and 64 in bf16.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..rounding import FP8_AMAX_FLOOR
from .gpu import processors_of
from .staging import barriers

BAND = 8  # output tiles that are worked on side by side
SHARED_BYTES = 226 << 10  # of a multiprocessor, less what barriers take

FLOOR = gl.constexpr(FP8_AMAX_FLOOR)


@gluon.jit
def power(exponent):
    """2^(exponent - 127) of an e8m0 byte: float32."""
    return gl.maximum(exponent.to(gl.int32) << 23, 1 << 22).to(gl.float32, bitcast=True)


@gluon.jit
def _place(tile, s_tiles, o_tiles, BAND: gl.constexpr):
    """Tile number to (token tile, output tile): bands of BAND output tiles, so that the tiles at work share inputs."""
    first = tile // (BAND * s_tiles) * BAND
    height = gl.minimum(o_tiles - first, BAND)
    within = tile % (BAND * s_tiles)
    return within // height, first + within % height


@gluon.jit
def _copy_many(
    x_desc,
    w_desc,
    x_s,
    w_s,
    full,
    empty,
    s_tiles,
    o_tiles,
    outputs,
    steps,
    parts,
    group_tiles,
    STAGES: gl.constexpr,
    S_TILE: gl.constexpr,
    O_TILE: gl.constexpr,
    WIDTH: gl.constexpr,
    BAND: gl.constexpr,
):
    count = 0
    for tile in range(gl.program_id(0), s_tiles * o_tiles, gl.num_programs(0)):
        s_tile, o_tile = _place(tile, s_tiles, o_tiles, BAND)
        column = o_tile // group_tiles * (steps * WIDTH)
        for step in range(parts * steps):
            stage = count % STAGES
            k = step % steps * WIDTH
            row = step // steps * outputs + o_tile * O_TILE
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (S_TILE + O_TILE) * 128)
            tma.async_copy_global_to_shared(x_desc, [s_tile * S_TILE, column + k], full.index(stage), x_s.index(stage))
            tma.async_copy_global_to_shared(w_desc, [row, k], full.index(stage), w_s.index(stage))
            count += 1


@gluon.jit
def _add(d, scale, acc):
    """acc + d scale, as machine code that stays in its place: d's registers are then free for the next product."""
    d, scale = gl.broadcast(d, scale[:, None])
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [d, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def round_by(amax):
    """(1 / scale, scale) of blocks with these largest magnitudes, as `rounded.round_block` has them."""
    bits = gl.maximum(amax, FLOOR).to(gl.int32, bitcast=True)
    bits = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    endless = amax == float("inf")
    scale = gl.where(endless, float("inf"), bits.to(gl.float32, bitcast=True))
    return gl.where(endless, 0.0, (0x7F000000 - bits).to(gl.float32, bitcast=True)), scale


@gluon.jit
def to_codes(x, inverse):
    x, inverse = gl.broadcast(x, inverse[:, None])
    return (x * inverse).to(gl.float8e4nv)


@gluon.jit
def _hand_over(out_desc, out_s, result, s, o):
    tma.store_wait(0)
    out_s.store(result)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [s, o], out_s)


@gluon.jit
def _save(out_desc, out_s, scale_ptr, acc, s, o, tokens, outputs, ROUND: gl.constexpr):
    """A tile of sums [64, HALF] to memory; ROUND: as e4m3 (`rounded.round_block` of its bf16 values) with scales."""
    if ROUND:
        y = acc.to(gl.bfloat16).to(gl.float32)
        inverse, scale = round_by(gl.max(gl.abs(y), 1))
        result = to_codes(y, inverse)
        row = s + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
        gl.store(scale_ptr + row.to(gl.int64) * (outputs // 128) + o // 128, scale, mask=(row < tokens) & (o < outputs))
    else:
        result = acc.to(out_desc.dtype)
    if acc.shape[1] > out_desc.block_type.shape[1]:  # float32, in two halves: room for another stage
        halves = gl.permute(gl.reshape(result, [64, 2, acc.shape[1] // 2]), (0, 2, 1))
        first, second = gl.split(halves)
        _hand_over(out_desc, out_s, first, s, o)
        _hand_over(out_desc, out_s, second, s, o + acc.shape[1] // 2)
    else:
        _hand_over(out_desc, out_s, result, s, o)


@gluon.jit
def _multiply_many(
    WHICH: gl.constexpr,
    out_desc,
    scale_ptr,
    xs_ptr,
    ws_ptr,
    x_s,
    w_s,
    out_s,
    full,
    empty,
    tokens,
    s_tiles,
    o_tiles,
    outputs,
    steps,
    parts,
    STAGES: gl.constexpr,
    S_TILE: gl.constexpr,
    O_TILE: gl.constexpr,
    FP8: gl.constexpr,
    ROUND: gl.constexpr,
    BAND: gl.constexpr,
):
    """A warp group takes 64 of the tile's tokens, and the outputs in two halves, to have registers for FP8's sums.

    While one group scales and adds, the other keeps the tensor cores busy.
    """
    HALF: gl.constexpr = O_TILE // 2
    WIDE: gl.constexpr = 1 if FP8 else 2  # stages that hold 128 inputs
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32 if FP8 else 16])
    d = gl.zeros([64, HALF], gl.float32, SUMS)
    out_s = out_s.index(WHICH)
    count = 0
    for tile in range(gl.program_id(0), s_tiles * o_tiles, gl.num_programs(0)):
        s_tile, o_tile = _place(tile, s_tiles, o_tiles, BAND)
        a = gl.zeros([64, HALF], gl.float32, SUMS)
        b = gl.zeros([64, HALF], gl.float32, SUMS)
        s = s_tile * S_TILE + WHICH * 64
        xs = xs_ptr + gl.minimum(s + gl.arange(0, 64, gl.SliceLayout(1, SUMS)), tokens - 1).to(gl.int64) * steps
        last = (outputs - 1) // 128
        a_scale = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, SUMS))
        b_scale = a_scale + 0.0
        a_ws = ws_ptr + gl.minimum(o_tile * O_TILE // 128, last) * steps
        b_ws = ws_ptr + gl.minimum((o_tile * O_TILE + HALF) // 128, last) * steps
        for step in range(parts * steps // WIDE):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            x = x_s.index(stage).slice(WHICH * 64, 64, dim=0)
            w_a = w_s.index(stage).slice(0, HALF, dim=0).permute((1, 0))
            w_b = w_s.index(stage).slice(HALF, HALF, dim=0).permute((1, 0))
            d = warpgroup_mma(x, w_a, d, use_acc=False, is_async=True)
            if FP8:
                token = gl.load(xs + step)
                a_scale = token * power(gl.load(a_ws + step))
                b_scale = token * power(gl.load(b_ws + step))
            else:
                second = (count + 1) % STAGES
                mbarrier.wait(full.index(second), (count + 1) // STAGES & 1)
                x_second = x_s.index(second).slice(WHICH * 64, 64, dim=0)
                d = warpgroup_mma(x_second, w_s.index(second).slice(0, HALF, dim=0).permute((1, 0)), d, is_async=True)
            d = warpgroup_mma_wait(0, [d])
            a = _add(d, a_scale, a)
            d = warpgroup_mma(x, w_b, d, use_acc=False, is_async=True)
            if not FP8:
                w_b = w_s.index(second).slice(HALF, HALF, dim=0).permute((1, 0))
                d = warpgroup_mma(x_second, w_b, d, is_async=True)
            d = warpgroup_mma_wait(0, [d])
            mbarrier.arrive(empty.index(stage), count=1)
            if not FP8:
                mbarrier.arrive(empty.index(second), count=1)
            b = _add(d, b_scale, b)
            count += WIDE
        _save(out_desc, out_s, scale_ptr, a, s, o_tile * O_TILE, tokens, outputs, ROUND)
        _save(out_desc, out_s, scale_ptr, b, s, o_tile * O_TILE + HALF, tokens, outputs, ROUND)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "s_tiles", "o_tiles", "outputs", "steps", "parts", "group_tiles"])
def linear_many(
    x_desc,
    w_desc,
    out_desc,
    scale_ptr,
    xs_ptr,
    ws_ptr,
    tokens,
    s_tiles,
    o_tiles,
    outputs,
    steps,
    parts,
    group_tiles,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
    ROUND: gl.constexpr,
    BAND: gl.constexpr,
):
    """out [S, O] = x w^T in tiles of 128 tokens; programs take tiles in turn.  Shared memory, KiB: a stage 48, out 32.

    x [S, G * K], w [parts * O, K]: ``group_tiles`` output tiles read the same K columns of x, the sums of the parts are
    added.  FP8: x and w with scales xs [S, K/128] and ws [O/128, K/128].  ROUND: out is e4m3 with scale [S, O/128].
    """
    S_TILE: gl.constexpr = x_desc.block_type.shape[0]
    WIDTH: gl.constexpr = x_desc.block_type.shape[1]
    O_TILE: gl.constexpr = w_desc.block_type.shape[0]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES, S_TILE, WIDTH], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, O_TILE, WIDTH], w_desc.layout)
    out_s = gl.allocate_shared_memory(out_desc.dtype, [2, 64, out_desc.block_type.shape[1]], out_desc.layout)
    full, empty = barriers(STAGES, 2)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply_many, (gl.constexpr(0), out_desc, scale_ptr, xs_ptr, ws_ptr, x_s, w_s, out_s, full, empty,
                              tokens, s_tiles, o_tiles, outputs, steps, parts, STAGES, S_TILE, O_TILE, FP8, ROUND,
                              BAND)),
            (_multiply_many, (gl.constexpr(1), out_desc, scale_ptr, xs_ptr, ws_ptr, x_s, w_s, out_s, full, empty,
                              tokens, s_tiles, o_tiles, outputs, steps, parts, STAGES, S_TILE, O_TILE, FP8, ROUND,
                              BAND)),
            (_copy_many, (x_desc, w_desc, x_s, w_s, full, empty, s_tiles, o_tiles, outputs, steps, parts, group_tiles,
                          STAGES, S_TILE, O_TILE, WIDTH, BAND)),
        ],
        [4, 1],
        [232, 24],
    )
    # fmt: on


# ---- launching -------------------------------------------------------------------------------------------------------


def _tiles(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How the copy engine reads or writes ``tensor`` [N, M]: in tiles of rows x columns."""
    bits = tensor.element_size() * 8
    layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, columns * bits // 8), element_bitwidth=bits, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


def multiply_many(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    parts: int = 1,
    groups: int = 1,
    rounded: Tensor | None = None,
) -> Tensor:
    """x [S, G * I] times w [P * O, I], see `linear_many`: out [S, O], or codes whose scales ``rounded`` takes."""
    tokens, outputs = out.shape
    width = 128 // x.element_size()
    processors = processors_of(x.device)
    s_tiles = triton.cdiv(tokens, 128)
    o_tile = 256
    while (
        rounded is None
        and o_tile > 64
        and (s_tiles * triton.cdiv(outputs, o_tile) < processors or (groups > 1 and outputs // groups % o_tile))
    ):
        o_tile //= 2
    o_tiles = triton.cdiv(outputs, o_tile)
    columns = min(o_tile // 2, 128 if out.element_size() < 4 else 64)  # of a result that go out at a time
    result = 2 * 64 * columns * out.element_size()
    none = w.view(torch.uint8)
    linear_many[(min(s_tiles * o_tiles, processors),)](
        _tiles(x, 128, width),
        _tiles(w, o_tile, width),
        _tiles(out, 64, columns),
        none if rounded is None else rounded,
        none if x_scale is None else x_scale,
        none if w_scale is None else w_scale,
        tokens,
        s_tiles,
        o_tiles,
        outputs,
        w.shape[1] // width,
        parts,
        max(1, o_tiles // groups),
        STAGES=min(6, (SHARED_BYTES - result) // ((128 + o_tile) * 128)),
        FP8=x_scale is not None,
        ROUND=rounded is not None,
        BAND=BAND,
        num_warps=4,
    )
    return out
