"""Products for very few tokens on compute capability 9.0, in Gluon: a program has all its weights on their way at once.

A program takes R rows of a matrix.  Their weights are fetched before it waits for the kernel in front (programmatic
dependent launch), activations behind that.  The tensor cores' first operand are 64 / R blocks of the R rows, the second
as many blocks of the tokens; of the products, a row keeps those with its own block.  The sums of blocks are added in
order at the end.  Bits: see linear_many.py.  Knows nothing of the dispatch.
Letters: S tokens, O outputs, K inputs, in blocks of 128; R rows, B blocks of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gpu import processors_of
from .linear_many import power, round_by, to_codes
from .rounded import ROUND_BLOCK
from .staging import barrier

STAGE_BYTES = 32 << 10  # of weights
SHARED_BYTES = 226 << 10  # of a multiprocessor, less what barriers take

LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _widened(w_s, half: gl.constexpr, WEIGHTS: gl.constexpr):
    """Half of e4m3 weights [64, 128] as bf16 [64, 64], by way of float32, which is faster than what 3.6 makes of it."""
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
        cvt.rn.bf16x2.f32 $0, x1, x0;
        }
        """,
        "=r,h",
        [w_s.slice(64 * half, 64, dim=1).load(WEIGHTS)],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _own(d, KB: gl.constexpr, TOKENS: gl.constexpr):
    """Of products [64, KB * TOKENS] of KB blocks of rows with KB blocks of tokens those of the same block."""
    if KB == 1:
        return d
    else:
        block = gl.arange(0, 64, gl.SliceLayout(1, d.type.layout)) // (64 // KB)
        other = gl.arange(0, KB * TOKENS, gl.SliceLayout(0, d.type.layout)) // TOKENS
        d = gl.where(block[:, None] == other[None, :], d, 0.0)
        return gl.sum(gl.reshape(d, [64, KB, TOKENS]), 1)


@gluon.jit
def _product(
    w_all,
    x_all,
    stage: gl.constexpr,
    step: gl.constexpr,
    STEPS: gl.constexpr,
    X_STEPS: gl.constexpr,
    zero,
    KIND: gl.constexpr,
):
    """A step's weights in a stage, [64, 128] as one piece or two halves, times what they meet, summed from nothing."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, zero.type.layout, 2)
    if KIND == "fp8" or KIND == "rounding":
        w, x = w_all.index(stage * STEPS + step % STEPS), x_all.index(step)
        d = warpgroup_mma(
            w.slice(0, 32, dim=1), x.slice(0, 32, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        for quarter in gl.static_range(1, 4):
            part = w.slice(quarter * 32, 32, dim=1)
            d = warpgroup_mma(part, x.slice(quarter * 32, 32, dim=1).permute((1, 0)), d, is_async=True)
    else:
        first, second = x_all.index(step).permute((1, 0)), x_all.index(X_STEPS + step).permute((1, 0))
        if KIND == "bf16":
            w0, w1 = w_all.index(2 * stage * STEPS + step % STEPS), w_all.index((2 * stage + 1) * STEPS + step % STEPS)
        else:
            w = w_all.index(stage * STEPS + step % STEPS)
            w0, w1 = _widened(w, 0, WEIGHTS), _widened(w, 1, WEIGHTS)
        d = warpgroup_mma(w0, first, zero, use_acc=False, is_async=True)
        d = warpgroup_mma(w1, second, d, is_async=True)
    return d


@gluon.jit
def _side_by_side(sums, COUNT: gl.constexpr, LEVELS: gl.constexpr):
    """COUNT = 2^LEVELS tensors [.., ..] as one [.., .., COUNT], in registers."""
    for level in gl.static_range(LEVELS):
        joined = ()
        for i in gl.static_range(COUNT >> (level + 1)):
            joined += (gl.join(sums[i], sums[i + (COUNT >> (level + 1))]),)  # type: ignore[assignment]
        sums = joined
    return gl.reshape(sums[0], [sums[0].shape[0], sums[0].shape[1], COUNT])


@gluon.jit
def _added(x, before, BEFORE: gl.constexpr):
    """x [R, S, B] summed over B in order, after ``before`` if BEFORE; a thread has all B of a row and token."""
    R: gl.constexpr = x.shape[0]
    S: gl.constexpr = x.shape[1]
    B: gl.constexpr = x.shape[2]
    pieces = (x,)
    for level in gl.static_range(B.bit_length() - 1):
        halved = ()
        for i in gl.static_range(1 << level):
            piece = gl.reshape(pieces[i], [R, S, 2, B >> (level + 1)])
            first, second = gl.split(gl.permute(piece, (0, 1, 3, 2)))
            halved += (first, second)  # type: ignore[assignment]
        pieces = halved  # type: ignore[assignment]
    total = gl.reshape(pieces[0], [R, S]) + 0.0
    if BEFORE:
        total = before + gl.reshape(pieces[0], [R, S])
    for i in gl.static_range(1, B):
        total += gl.reshape(pieces[i], [R, S])
    return total


@gluon.jit(do_not_specialize=["tokens", "outputs", "blocks", "group_tiles"])
def linear_one(
    x_desc,
    w_desc,
    out_ptr,
    xs_ptr,
    ws_ptr,
    tokens,
    outputs,
    blocks,
    group_tiles,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    KIND: gl.constexpr,
):
    """out [S, O] = x w^T as `linear_many`.  KIND: "fp8", "bf16", "widened" (FP8 weights, bf16 activations), or
    "rounding", which is "fp8" of activations that are rounded here.

    x [1 piece or, in bf16, 2 halves, blocks, tokens, 128 bytes], w [likewise, blocks, PARTS * rows, 128 bytes], each
    part in STAGES; blocks that do not exist are fetched as zeros.
    """
    gdc_launch_dependents()
    XB: gl.constexpr = x_desc.block_type.shape[1]
    TOKENS: gl.constexpr = x_desc.block_type.shape[2]
    PIECES: gl.constexpr = w_desc.block_type.shape[0]
    B: gl.constexpr = w_desc.block_type.shape[1]
    R: gl.constexpr = w_desc.block_type.shape[2]
    KB: gl.constexpr = 64 // R
    STEPS: gl.constexpr = B // KB
    N: gl.constexpr = KB * TOKENS
    TOTAL: gl.constexpr = PARTS * STAGES
    FP8: gl.constexpr = KIND == "fp8" or KIND == "rounding"
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32 if FP8 else 16])
    X_FLAT: gl.constexpr = gl.NVMMASharedLayout(128, x_desc.dtype.primitive_bitwidth, 2)
    W_FLAT: gl.constexpr = gl.NVMMASharedLayout(128, w_desc.dtype.primitive_bitwidth, 2)
    ORDERED: gl.constexpr = gl.BlockedLayout([1, 1, B], [32 // TOKENS, TOKENS, 1], [4, 1, 1], [2, 1, 0])
    ACROSS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])

    x_s = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    w_s = gl.allocate_shared_memory(w_desc.dtype, [TOTAL, PIECES, B, R, w_desc.block_type.shape[3]], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [TOTAL + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(TOTAL + 1):
        mbarrier.init(full.index(stage), count=1)
    tile = gl.program_id(0)
    for stage in gl.static_range(TOTAL):
        mbarrier.expect(full.index(stage), w_desc.block_type.nbytes)
        place = [0, stage % STAGES * B, stage // STAGES * outputs + tile * R, 0]
        tma.async_copy_global_to_shared(w_desc, place, full.index(stage), w_s.index(stage))

    # Scales are powers of two: whether the weights or the sums are multiplied makes no difference.
    if KIND != "bf16":
        scale_s = gl.allocate_shared_memory(gl.float32, [TOKENS, XB], LINES)
        block = gl.minimum(gl.arange(0, XB, gl.SliceLayout(0, ACROSS)), blocks - 1)
        token = gl.arange(0, TOKENS, gl.SliceLayout(1, ACROSS))
        scale = gl.full([TOKENS, XB], 1.0, gl.float32, ACROSS)
        scale *= power(gl.load(ws_ptr + tile * R // 128 * blocks + block))[None, :]
    gdc_wait()
    mbarrier.expect(full.index(TOTAL), x_desc.block_type.nbytes)
    column = tile // group_tiles * blocks if KIND == "widened" else 0
    tma.async_copy_global_to_shared(x_desc, [0, column, 0, 0], full.index(TOTAL), x_s)
    if KIND == "fp8":
        scale *= gl.load(xs_ptr + gl.minimum(token, tokens - 1)[:, None] * blocks + block[None, :])
    mbarrier.wait(full.index(TOTAL), 0)
    if KIND == "rounding":
        READ: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        codes_s = gl.allocate_shared_memory(gl.float8e4nv, [XB * TOKENS, 128], W_FLAT)
        halves = x_s._reinterpret(gl.bfloat16, [2, XB * TOKENS, 64], X_FLAT)
        x0 = halves.index(0).load(READ).to(gl.float32)
        x1 = halves.index(1).load(READ).to(gl.float32)
        inverse, x_scale = round_by(gl.maximum(gl.max(gl.abs(x0), 1), gl.max(gl.abs(x1), 1)))
        barrier()  # the codes may lie where the values were
        codes_s.slice(0, 64, dim=1).store(to_codes(x0, inverse))
        codes_s.slice(64, 64, dim=1).store(to_codes(x1, inverse))
        fence_async_shared()
        scale *= gl.convert_layout(gl.permute(gl.reshape(x_scale, [XB, TOKENS]), (1, 0)), ACROSS)
        x_all = codes_s._reinterpret(gl.float8e4nv, [XB // KB, N, 128], W_FLAT)
    else:
        x_all = x_s._reinterpret(
            x_desc.dtype, [x_desc.block_type.shape[0] * XB // KB, N, x_desc.block_type.shape[3]], X_FLAT
        )
    if KIND != "bf16":
        scale_s.store(scale)

    w_all = w_s._reinterpret(w_desc.dtype, [TOTAL * PIECES * STEPS, 64, w_desc.block_type.shape[3]], W_FLAT)
    zero = gl.zeros([64, N], gl.float32, SUMS)
    acc = zero
    for stage in gl.static_range(TOTAL):
        mbarrier.wait(full.index(stage), 0)
        sums = ()
        for pair in gl.static_range(STEPS // 2):
            d0 = _product(w_all, x_all, stage, stage % STAGES * STEPS + 2 * pair, STEPS, XB // KB, zero, KIND)
            d1 = _product(w_all, x_all, stage, stage % STAGES * STEPS + 2 * pair + 1, STEPS, XB // KB, zero, KIND)
            d0, d1 = warpgroup_mma_wait(0, [d0, d1])
            sums += (_own(d0, KB, TOKENS), _own(d1, KB, TOKENS))  # type: ignore[assignment]
        apart = gl.reshape(_side_by_side(sums, STEPS, STEPS.bit_length() - 1), [KB, R, TOKENS, STEPS])
        ordered = gl.convert_layout(gl.reshape(gl.permute(apart, (1, 2, 3, 0)), [R, TOKENS, B]), ORDERED)
        if KIND != "bf16":
            scale = scale_s.slice(stage % STAGES * B, B, dim=1).load(gl.SliceLayout(0, ORDERED))
            ordered *= gl.expand_dims(scale, 0)
        acc = _added(ordered, acc, stage > 0)
    o = tile * R + gl.arange(0, R, gl.SliceLayout(1, acc.type.layout))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, acc.type.layout))
    place = out_ptr + token.to(gl.int64)[None, :] * outputs + o[:, None]
    gl.store(place, acc.to(out_ptr.dtype.element_ty), mask=(token < tokens)[None, :] & (o < outputs)[:, None])
    # Until here they are barriers: nothing else is to be put in their place (see moe_many.py).
    for stage in gl.static_range(TOTAL + 1):
        mbarrier.invalidate(full.index(stage))


# ---- launching -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How `linear_one` divides a product: a program's rows and tokens; its weights come in stages of so many blocks."""

    rows: int
    tokens: int
    stages: int
    stage_blocks: int
    x_blocks: int
    shared: int  # bytes

    @classmethod
    def of(cls, tokens: int, blocks: int, wide: bool, x_bytes: int, parts: int, rows: int, most: int) -> Shape:
        """``wide``: weights in bf16; ``x_bytes``: of a block of activations, with their codes if they are rounded."""
        kb, block_bytes = 64 // rows, 256 if wide else 128
        stage_blocks = max(2 * kb, min(triton.next_power_of_2(blocks), most // (rows * block_bytes)))
        stages = triton.cdiv(blocks, stage_blocks)
        x_blocks = triton.next_power_of_2(stages * stage_blocks)
        tile = max(triton.next_power_of_2(tokens), 8 // kb)
        shared = parts * stages * stage_blocks * rows * block_bytes + tile * x_blocks * (x_bytes + 4)
        return cls(rows, tile, stages, stage_blocks, x_blocks, shared + 4096)


@lru_cache(maxsize=256)
def shape_for(
    tokens: int, outputs: int, blocks: int, wide: bool, x_bytes: int, parts: int, processors: int
) -> Shape | None:
    """As measured: 32 KiB of FP8 or 64 of bf16 a program, but two programs a multiprocessor before more than 32 KiB.

    None where shared memory is too small for four rows.
    """
    for rows in (64, 32, 16, 8, 4):
        shape = Shape.of(tokens, blocks, wide, x_bytes, parts, rows, STAGE_BYTES)
        size = parts * blocks * rows * (256 if wide else 128)
        fills = size <= 32 << 10 or (wide and size <= 64 << 10 and outputs >= 2 * processors * rows)
        if shape.shared <= SHARED_BYTES and (fills or rows == 4):
            return shape
    return None


def _pieces(tensor: Tensor, pieces: int, blocks: int, rows: int) -> TensorDescriptor:
    """How the copy engine reads ``tensor`` [N, M]: [pieces of 128 inputs, blocks, N, 128 bytes], so many at a time."""
    width = 128 // tensor.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=1024 // width, rank=4)
    shape = [pieces, tensor.shape[1] // (pieces * width), tensor.shape[0], width]
    strides = [width, pieces * width, tensor.stride(0), 1]
    return TensorDescriptor(tensor, shape, strides, [pieces, blocks, rows, width], layout)


def multiply_one(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    parts: int = 1,
    groups: int = 1,
    rounding: bool = False,
) -> bool:
    """x [S, G * I] times w [P * O, I] into out [S, O], see `linear_one`; False: the rows are too long."""
    tokens, outputs = out.shape
    kind = "fp8" if x_scale is not None else "bf16" if w_scale is None else "rounding" if rounding else "widened"
    blocks, wide, x_bytes = w.shape[1] // ROUND_BLOCK, w_scale is None, 128 * x.element_size() + 128 * rounding
    shape = shape_for(tokens, outputs, blocks, wide, x_bytes, parts, processors_of(x.device))
    if shape is None:
        return False
    tiles = triton.cdiv(outputs, shape.rows)
    none = out.view(torch.uint8)
    linear_one[(tiles,)](
        _pieces(x, x.element_size(), shape.x_blocks, shape.tokens),
        _pieces(w, w.element_size(), shape.stage_blocks, shape.rows),
        out,
        none if x_scale is None else x_scale,
        none if w_scale is None else w_scale,
        tokens,
        outputs,
        blocks,
        max(1, tiles // groups),
        STAGES=shape.stages,
        PARTS=parts,
        KIND=kind,
        num_warps=4,
        launch_pdl=True,
    )
    return True
