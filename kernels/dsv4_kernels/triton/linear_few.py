"""Products for up to 64 tokens on compute capability 9.0, in Gluon: weights are streamed by one warp, four multiply.

`linear_few` is for FP8 and for bf16, `widened_few` for FP8 weights and bf16 activations.  One token or a few go through
linear_one.py instead, unless rows are short.  Bits: see linear_many.py.  Knows nothing of the dispatch.
Kernels may start while the one in front still runs (programmatic dependent launch): they fetch weights until it has
finished, and only then read activations or write.
Letters: S tokens, O outputs, K inputs, in blocks of 128 bytes, which is 128 inputs in FP8 and 64 in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gpu import processors_of
from .linear_many import power
from .rounded import ROUND_BLOCK
from .staging import barriers

SHARED_BYTES = 110 << 10  # of a program, so that two share a multiprocessor


@gluon.jit
def _following(tile, part, k, parts, per_part):
    """The step after step ``k`` of ``part`` of ``tile``.  (Divisions would cost the copying warp more than copying.)"""
    k += 1
    part = gl.where(k == per_part, part + 1, part)
    k = gl.where(k == per_part, 0, k)
    tile = gl.where(part == parts, tile + gl.num_programs(0), tile)
    return tile, gl.where(part == parts, 0, part), k


@gluon.jit
def _copy_few(
    x_desc,
    w_desc,
    x_s,
    w_s,
    full,
    empty,
    o_tiles,
    outputs,
    per_part,
    parts,
    group_tiles,
    STAGES: gl.constexpr,
    X_BLOCKS: gl.constexpr,
    W_BLOCKS: gl.constexpr,
    GROUPED: gl.constexpr,
    O_TILE: gl.constexpr,
    BYTES: gl.constexpr,
):
    """A stage takes W_BLOCKS blocks of 128 bytes of the weights' rows, and what they meet: X_BLOCKS of x's."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    total = (o_tiles - program + programs - 1) // programs * parts * per_part
    ahead = gl.minimum(total, STAGES)
    tile, part, k = program, 0, 0
    for stage in range(ahead):  # weights depend on nothing
        mbarrier.expect(full.index(stage), BYTES)
        place = [k * W_BLOCKS, part * outputs + tile * O_TILE, 0]
        tma.async_copy_global_to_shared(w_desc, place, full.index(stage), w_s.index(stage))
        tile, part, k = _following(tile, part, k, parts, per_part)
    gdc_wait()
    x_tile, x_part, x_k = program, 0, 0
    for stage in range(ahead):
        column = x_tile // group_tiles * per_part + x_k if GROUPED else x_k
        place = [column * X_BLOCKS, 0, 0]
        tma.async_copy_global_to_shared(x_desc, place, full.index(stage), x_s.index(stage))
        x_tile, x_part, x_k = _following(x_tile, x_part, x_k, parts, per_part)
    stage, phase = 0, 0
    for _ in range(ahead, total):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), BYTES)
        place = [k * W_BLOCKS, part * outputs + tile * O_TILE, 0]
        tma.async_copy_global_to_shared(w_desc, place, full.index(stage), w_s.index(stage))
        column = tile // group_tiles * per_part + k if GROUPED else k
        place = [column * X_BLOCKS, 0, 0]
        tma.async_copy_global_to_shared(x_desc, place, full.index(stage), x_s.index(stage))
        tile, part, k = _following(tile, part, k, parts, per_part)
        stage += 1
        phase = gl.where(stage == STAGES, phase ^ 1, phase)
        stage = gl.where(stage == STAGES, 0, stage)


@gluon.jit
def _rows(x_s, stage, block: gl.constexpr, BLOCKS: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr):
    """From block ``block`` of x in a stage on TILE rows, of which the first ROWS are tokens, the others anything."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, x_s.dtype.primitive_bitwidth, 2)
    WIDTH: gl.constexpr = 1024 // x_s.dtype.primitive_bitwidth
    blocks = x_s.index(stage)._reinterpret(x_s.dtype, [BLOCKS, ROWS, WIDTH], LAYOUT)
    return blocks.index(block)._reinterpret(x_s.dtype, [TILE, WIDTH], LAYOUT)


@gluon.jit
def _weights(w_s, stage, block: gl.constexpr, BLOCKS: gl.constexpr, O_TILE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, w_s.dtype.primitive_bitwidth, 2)
    WIDTH: gl.constexpr = 1024 // w_s.dtype.primitive_bitwidth
    return w_s.index(stage)._reinterpret(w_s.dtype, [BLOCKS, O_TILE, WIDTH], LAYOUT).index(block)


@gluon.jit
def _save_few(out_ptr, acc, tile, tokens, outputs, O_TILE: gl.constexpr):
    SUMS: gl.constexpr = acc.type.layout
    row = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    o = tile * O_TILE + gl.arange(0, O_TILE, gl.SliceLayout(0, SUMS))
    place = out_ptr + row.to(gl.int64)[:, None] * outputs + o[None, :]
    gl.store(place, acc.to(out_ptr.dtype.element_ty), mask=(row < tokens)[:, None] & (o < outputs)[None, :])


@gluon.jit
def _scales(xs, ws, block, last):
    """Scales of four blocks from ``block`` on, the last one's beyond it, where tiles are zero."""
    b0, b1 = gl.minimum(block, last), gl.minimum(block + 1, last)
    b2, b3 = gl.minimum(block + 2, last), gl.minimum(block + 3, last)
    x0, x1, x2, x3 = gl.load(xs + b0), gl.load(xs + b1), gl.load(xs + b2), gl.load(xs + b3)
    w0, w1, w2, w3 = gl.load(ws + b0), gl.load(ws + b1), gl.load(ws + b2), gl.load(ws + b3)
    return x0, x1, x2, x3, w0, w1, w2, w3


@gluon.jit
def _plus(acc, d, scale):
    d, scale = gl.broadcast(d, scale[:, None])
    return gl.fma(d, scale, acc)


@gluon.jit
def _part(x, w, d, part: gl.constexpr, FIRST: gl.constexpr = True):
    """A quarter of a block's inputs: the first quarter of a FIRST block replaces d, the others are added."""
    QUARTER: gl.constexpr = x.shape[1] // 4
    w_part = w.slice(QUARTER * part, QUARTER, dim=1).permute((1, 0))
    return warpgroup_mma(
        x.slice(QUARTER * part, QUARTER, dim=1), w_part, d, use_acc=part > 0 or not FIRST, is_async=True
    )


@gluon.jit
def _multiply_few(
    out_ptr,
    xs_ptr,
    ws_ptr,
    x_s,
    w_s,
    full,
    empty,
    tokens,
    outputs,
    o_tiles,
    steps,
    blocks,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    O_TILE: gl.constexpr,
    FP8: gl.constexpr,
):
    """Four blocks of 128 bytes a step, their products by turns, because each waits for the one before in its sum.

    Scales are loaded a step ahead.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, O_TILE, 32 if FP8 else 16])
    gdc_wait()
    xs = xs_ptr + gl.minimum(gl.arange(0, 64, gl.SliceLayout(1, SUMS)), tokens - 1) * blocks
    d0 = gl.zeros([64, O_TILE], gl.float32, SUMS)
    d1 = gl.zeros([64, O_TILE], gl.float32, SUMS)
    d2 = gl.zeros([64, O_TILE], gl.float32, SUMS)
    d3 = gl.zeros([64, O_TILE], gl.float32, SUMS)
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), o_tiles, gl.num_programs(0)):
        ws = ws_ptr + tile * O_TILE // 128 * blocks
        acc = gl.zeros([64, O_TILE], gl.float32, SUMS)
        if FP8:
            x0, x1, x2, x3, w0, w1, w2, w3 = _scales(xs, ws, 0, blocks - 1)
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            t0, t1 = _rows(x_s, stage, 0, 4, ROWS, 64), _rows(x_s, stage, 1, 4, ROWS, 64)
            t2, t3 = _rows(x_s, stage, 2, 4, ROWS, 64), _rows(x_s, stage, 3, 4, ROWS, 64)
            v0, v1 = _weights(w_s, stage, 0, 4, O_TILE), _weights(w_s, stage, 1, 4, O_TILE)
            v2, v3 = _weights(w_s, stage, 2, 4, O_TILE), _weights(w_s, stage, 3, 4, O_TILE)
            if FP8:
                for part in gl.static_range(4):
                    d0 = _part(t0, v0, d0, part)
                    d1 = _part(t1, v1, d1, part)
                    d2 = _part(t2, v2, d2, part)
                    d3 = _part(t3, v3, d3, part)
                s0, s1, s2, s3 = x0 * power(w0), x1 * power(w1), x2 * power(w2), x3 * power(w3)
                x0, x1, x2, x3, w0, w1, w2, w3 = _scales(xs, ws, step * 4 + 4, blocks - 1)
                d0, d1, d2, d3 = warpgroup_mma_wait(0, [d0, d1, d2, d3])
                mbarrier.arrive(empty.index(stage), count=1)
                acc = _plus(_plus(_plus(_plus(acc, d0, s0), d1, s1), d2, s2), d3, s3)
            else:
                for part in gl.static_range(4):
                    d0 = _part(t0, v0, d0, part)
                    d1 = _part(t2, v2, d1, part)
                for part in gl.static_range(4):
                    d0 = _part(t1, v1, d0, part, False)
                    d1 = _part(t3, v3, d1, part, False)
                d0, d1 = warpgroup_mma_wait(0, [d0, d1])
                mbarrier.arrive(empty.index(stage), count=1)
                acc = acc + d0 + d1
            stage += 1
            phase = gl.where(stage == STAGES, phase ^ 1, phase)
            stage = gl.where(stage == STAGES, 0, stage)
        _save_few(out_ptr, acc, tile, tokens, outputs, O_TILE)


@gluon.jit(do_not_specialize=["tokens", "outputs", "o_tiles", "per_part", "parts", "blocks"])
def linear_few(
    x_desc,
    w_desc,
    out_ptr,
    xs_ptr,
    ws_ptr,
    tokens,
    outputs,
    o_tiles,
    per_part,
    parts,
    blocks,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    """As `linear_many`, for up to 64 tokens.  x and w as blocks of 128 bytes of their rows, [blocks, rows, 128 bytes].

    A stage has four blocks, ``per_part`` = ceil(blocks of x / 4); those that do not exist are copied as zeros.
    """
    gdc_launch_dependents()
    ROWS: gl.constexpr = x_desc.block_type.shape[1]
    WIDTH: gl.constexpr = x_desc.block_type.shape[2]
    O_TILE: gl.constexpr = w_desc.block_type.shape[1]
    BYTES: gl.constexpr = (x_desc.block_type.shape[1] + w_desc.block_type.shape[1]) * 512
    BEYOND: gl.constexpr = (64 + 3 * x_desc.block_type.shape[1] - 1) // (4 * x_desc.block_type.shape[1])
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES + BEYOND, 4, ROWS, WIDTH], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 4, O_TILE, WIDTH], w_desc.layout)
    full, empty = barriers(STAGES, 1)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply_few, (out_ptr, xs_ptr, ws_ptr, x_s, w_s, full, empty, tokens, outputs, o_tiles,
                             parts * per_part, blocks, STAGES, ROWS, O_TILE, FP8)),
            (_copy_few, (x_desc, w_desc, x_s, w_s, full, empty, o_tiles, outputs, per_part, parts, o_tiles, STAGES,
                         4, 4, False, O_TILE, BYTES)),
        ],
        [1],
        [32],
    )
    # fmt: on


# ---- FP8 weights, bf16 activations -----------------------------------------------------------------------


@gluon.jit
def _widen(w_s, stage, block: gl.constexpr, exponent, WEIGHTS: gl.constexpr):
    """A block of e4m3 weights times 2^(exponent - 127) as bf16, exact."""
    codes = _weights(w_s, stage, block, 2, 64).load(WEIGHTS)
    power = gl.maximum(exponent.to(gl.int32) << 7, 1 << 6)
    codes, powers = gl.broadcast(codes, gl.full(codes.shape, power | (power << 16), gl.int32, WEIGHTS))
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 h0, h1;
        .reg .b32 pair;
        .reg .f32 x0, x1;
        cvt.rn.f16x2.e4m3x2 pair, $1;
        mov.b32 {h0, h1}, pair;
        cvt.f32.f16 x0, h0;
        cvt.f32.f16 x1, h1;
        cvt.rn.bf16x2.f32 pair, x1, x0;
        mul.rn.bf16x2 $0, pair, $2;
        }
        """,
        "=r,h,r,r",
        [codes, powers],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _wide_rows(x_s, stage, block: gl.constexpr, ROWS: gl.constexpr):
    """What block ``block`` of a stage's weights meets: two blocks of x, transposed."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    return x_s.index(stage)._reinterpret(gl.bfloat16, [2, ROWS, 128], LAYOUT).index(block).permute((1, 0))


@gluon.jit
def _multiply_widened(
    out_ptr,
    ws_ptr,
    x_s,
    w_s,
    full,
    empty,
    tokens,
    outputs,
    o_tiles,
    steps,
    blocks,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Weights are the first operand, from registers: the next block is widened while a product runs."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    gdc_wait()
    d = gl.zeros([64, ROWS], gl.float32, SUMS)
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), o_tiles, gl.num_programs(0)):
        acc = gl.zeros([64, ROWS], gl.float32, SUMS)
        ws = ws_ptr + tile // 2 * blocks
        exponent0, exponent1 = gl.load(ws), gl.load(ws + gl.minimum(1, blocks - 1))
        mbarrier.wait(full.index(stage), phase)
        w0 = _widen(w_s, stage, 0, exponent0, WEIGHTS)
        for step in range(steps):
            d = warpgroup_mma(w0, _wide_rows(x_s, stage, 0, ROWS), d, use_acc=False, is_async=True)
            exponent0 = gl.load(ws + gl.minimum(2 * step + 2, blocks - 1))
            w1 = _widen(w_s, stage, 1, exponent1, WEIGHTS)
            exponent1 = gl.load(ws + gl.minimum(2 * step + 3, blocks - 1))
            d, w0 = warpgroup_mma_wait(0, [d, w0])
            acc += d
            d = warpgroup_mma(w1, _wide_rows(x_s, stage, 1, ROWS), d, use_acc=False, is_async=True)
            before = stage
            stage += 1
            phase = gl.where(stage == STAGES, phase ^ 1, phase)
            stage = gl.where(stage == STAGES, 0, stage)
            mbarrier.wait(full.index(stage), phase, pred=step + 1 < steps)
            w0 = _widen(w_s, stage, 0, exponent0, WEIGHTS)
            d, w1 = warpgroup_mma_wait(0, [d, w1])
            acc += d
            mbarrier.arrive(empty.index(before), count=1)
        o = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        token = gl.arange(0, ROWS, gl.SliceLayout(0, SUMS))
        place = out_ptr + token.to(gl.int64)[None, :] * outputs + o[:, None]
        gl.store(place, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[None, :] & (o < outputs)[:, None])


@gluon.jit(do_not_specialize=["tokens", "outputs", "o_tiles", "steps", "blocks", "group_tiles"])
def widened_few(
    x_desc,
    w_desc,
    out_ptr,
    ws_ptr,
    tokens,
    outputs,
    o_tiles,
    steps,
    blocks,
    group_tiles,
    STAGES: gl.constexpr,
):
    """out [S, O] = x w^T, x bf16 [S, G * K], w e4m3 [O, K] with scales ws [O/128, K/128]: see `linear_few`.

    ``blocks`` of the weights, an even number if there are several groups; a stage has two, and four of x.
    """
    gdc_launch_dependents()
    ROWS: gl.constexpr = x_desc.block_type.shape[1]
    BYTES: gl.constexpr = x_desc.block_type.shape[1] * 512 + 16384
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 4, ROWS, 64], x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 2, 64, 128], w_desc.layout)
    full, empty = barriers(STAGES, 1)
    # fmt: off
    gl.warp_specialize(
        [
            (_multiply_widened, (out_ptr, ws_ptr, x_s, w_s, full, empty, tokens, outputs, o_tiles, steps, blocks,
                                 STAGES, ROWS)),
            (_copy_few, (x_desc, w_desc, x_s, w_s, full, empty, o_tiles, outputs, steps, 1, group_tiles, STAGES,
                         4, 2, True, 64, BYTES)),
        ],
        [1],
        [32],
    )
    # fmt: on


# ---- launching -------------------------------------------------------------------------------------------------------


def _blocks(tensor: Tensor, blocks: int, rows: int) -> TensorDescriptor:
    """How the copy engine reads ``tensor`` [N, M]: as [128-byte blocks of a row, N, 128 bytes], so many at a time."""
    width = 128 // tensor.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=1024 // width, rank=3)
    shape = [tensor.shape[1] // width, tensor.shape[0], width]
    return TensorDescriptor(tensor, shape, [width, tensor.stride(0), 1], [blocks, rows, width], layout)


def few_tile(outputs: int, processors: int, fp8: bool) -> int:
    """Rows of a weight that a program for few tokens takes at a time, as measured."""
    if outputs >= 256 * processors:
        return 64
    return 32 if fp8 or outputs >= 24 * processors else 16


def multiply_few(
    x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, parts: int, groups: int
) -> Tensor:
    """Two programs a multiprocessor, which start before the kernel in front has finished."""
    tokens, outputs = out.shape
    processors = processors_of(x.device)
    options: dict[str, Any] = {"num_warps": 4, "maxnreg": 128, "launch_pdl": True}
    rows = max(8, triton.next_power_of_2(tokens))
    blocks = w.shape[1] // ROUND_BLOCK
    none = out.view(torch.uint8)
    if w_scale is not None and x_scale is None:
        rows = max(16, rows)
        o_tiles = triton.cdiv(outputs, 64)
        widened_few[(min(o_tiles, 2 * processors),)](
            _blocks(x, 4, rows),
            _blocks(w, 2, 64),
            out,
            w_scale,
            tokens,
            outputs,
            o_tiles,
            triton.cdiv(blocks, 2),
            blocks,
            max(1, o_tiles // groups),
            STAGES=(SHARED_BYTES - 1024) // (rows * 512 + 16384),
            **options,
        )
        return out
    o_tile = few_tile(outputs, processors, x_scale is not None)
    o_tiles = triton.cdiv(outputs, o_tile)
    linear_few[(min(o_tiles, 2 * processors),)](
        _blocks(x, 4, rows),
        _blocks(w, 4, o_tile),
        out,
        none if x_scale is None else x_scale,
        none if w_scale is None else w_scale,
        tokens,
        outputs,
        o_tiles,
        triton.cdiv(x.shape[1] * x.element_size(), 512),
        parts,
        blocks,
        STAGES=(SHARED_BYTES - (64 - rows) * 128) // ((rows + o_tile) * 512),
        FP8=x_scale is not None,
        **options,
    )
    return out
