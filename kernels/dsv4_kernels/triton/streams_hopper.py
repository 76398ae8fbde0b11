"""The first kernel of hyper-connections for many tokens on compute capability 9.0, in Gluon: written and projected.

A warp brings boxes of 64 tokens x 32 channels and the range's weights by the copy engine; two warp groups, 64 tokens
each, mix their boxes where they lie, multiply them from shared memory and hand them back to the engine.  Bit for bit
streams._write_and_project; hyper_connection.py says in which order sums are taken, and when this kernel is used.
Letters: T tokens of a box, R channels of a range, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

from .gpu import processors_of
from .staging import barrier, barriers

if TYPE_CHECKING:
    from .hyper_connection import Write

TEAMS = 2  # of four warps that multiply, 64 tokens each
COEFFICIENTS = 24
SHARED_BYTES = 224 << 10  # of a multiprocessor, less what barriers and changes of layout take
MOST_STAGES = 4
MOST_ROUTED = 6  # results that leave room for the two stages that it takes

T, R = gl.constexpr(64), gl.constexpr(32)
WIDE = gl.constexpr(72)  # rows of a range's weights: three parts of 24 coefficients
BOX = gl.constexpr(gl.NVMMASharedLayout(64, 16, rank=2))
LINES = gl.constexpr(gl.BlockedLayout([1, 16], [16, 2], [4, 1], [1, 0]))  # half a row a thread
ROW = gl.constexpr(gl.SliceLayout(1, LINES))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LAST = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))


@gluon.jit
def _shares(post_ptr, comb_ptr, row, shown, K: gl.constexpr):
    comb = comb_ptr + row * 16 + K
    return (
        gl.load(post_ptr + row * 4 + K, mask=shown, other=0.0)[:, None],
        gl.load(comb, mask=shown, other=0.0)[:, None],
        gl.load(comb + 4, mask=shown, other=0.0)[:, None],
        gl.load(comb + 8, mask=shown, other=0.0)[:, None],
        gl.load(comb + 12, mask=shown, other=0.0)[:, None],
    )


@gluon.jit
def _fma(a, b, c):
    a, b = gl.broadcast(a, b)
    return gl.fma(a, b, c)


@gluon.jit
def _bf16(x):
    """Two at a time: the plain cast becomes an instruction of a quarter of the rate here."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, True, 2)


@gluon.jit
def _mixed(share, f, x0, x1, x2, x3):
    y = _fma(share[2], x1, share[1] * x0)
    return _bf16(_fma(share[0], f, _fma(share[4], x3, _fma(share[3], x2, y))))


@gluon.jit
def _row_sums(q):
    """[T, R] -> [T]: eight channels one after the other, then quarters 0 + 2, 1 + 3, then these."""
    even, odd = gl.split(gl.reshape(gl.sum(gl.reshape(q, [T, 4, 8]), 2), [T, 2, 2]))
    return gl.convert_layout(gl.sum(even, 1) + gl.sum(odd, 1), ROW, assert_trivial=True)


@gluon.jit
def _bring(
    x_desc, result_desc, routed_desc, wide_desc, last_desc, x_s, f_s, wide_s, last_s, full, empty, tiles,
    STREAM: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr, WRITE: gl.constexpr, ROUTED: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = 5 + ROUTED if WRITE else 4
    step = 0
    for item in range(gl.program_id(0), tiles * PARTS, gl.num_programs(0)):
        first = item // PARTS * (T * TEAMS)
        for place in range(item % PARTS, D // R, PARTS):
            stage = step % STAGES
            at = full.index(stage)
            d = place * R
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(at, TEAMS * BOXES * T * R * 2 + WIDE * 4 * R * 2)
            for w in gl.static_range(TEAMS):
                here = stage * TEAMS + w
                for j in gl.static_range(4):
                    tma.async_copy_global_to_shared(x_desc, [first + w * T, j * STREAM + d], at, x_s[j].index(here))
                if WRITE:
                    to = here * (1 + ROUTED)
                    for a in gl.static_range(ROUTED):
                        column = a * D + d
                        tma.async_copy_global_to_shared(routed_desc, [first + w * T, column], at, f_s.index(to + a))
                    tma.async_copy_global_to_shared(result_desc, [first + w * T, d], at, f_s.index(to + ROUTED))
            for j in gl.static_range(4):
                row = place * WIDE
                tma.async_copy_global_to_shared(wide_desc, [row, j * R], at, wide_s.index(stage * 4 + j))
                tma.async_copy_global_to_shared(last_desc, [row + 64, j * R], at, last_s.index(stage * 4 + j))
            step += 1


@gluon.jit
def _multiply(
    WHICH: gl.constexpr, out_desc, post_ptr, comb_ptr, partial_ptr, x_s, f_s, wide_s, last_s, full, empty,
    tokens, tiles, D: gl.constexpr, PARTS: gl.constexpr, WRITE: gl.constexpr, ROUTED: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 tokens of each item: a tile of tokens and the ranges part, part + PARTS, .."""
    nothing = gl.zeros([T, 64], gl.float32, SUMS)
    little = gl.zeros([T, 8], gl.float32, LAST)
    step = 0
    for item in range(gl.program_id(0), tiles * PARTS, gl.num_programs(0)):
        part = item % PARTS
        first = item // PARTS * (T * TEAMS) + WHICH * T
        row = first.to(gl.int64) + gl.arange(0, T, ROW)
        shown = row < tokens
        if WRITE:
            s0 = _shares(post_ptr, comb_ptr, row, shown, 0)
            s1 = _shares(post_ptr, comb_ptr, row, shown, 1)
            s2 = _shares(post_ptr, comb_ptr, row, shown, 2)
            s3 = _shares(post_ptr, comb_ptr, row, shown, 3)
        v0 = gl.zeros([T, 8], gl.float32, LAST)
        v1 = gl.zeros([T, 8], gl.float32, LAST)
        v2 = gl.zeros([T, 8], gl.float32, LAST)
        squares = gl.zeros([T], gl.float32, ROW)
        for place in range(part, D // R, PARTS):
            stage = step % STAGES
            here = stage * TEAMS + WHICH
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            y0 = x_s[0].index(here).load(LINES)
            y1 = x_s[1].index(here).load(LINES)
            y2 = x_s[2].index(here).load(LINES)
            y3 = x_s[3].index(here).load(LINES)
            if WRITE:
                f = gl.zeros([T, R], gl.float32, LINES)
                for a in gl.static_range(ROUTED + 1):
                    f += f_s.index(here * (1 + ROUTED) + a).load(LINES).to(gl.float32)
                f = _bf16(f).to(gl.float32)
                x0, x1, x2, x3 = y0.to(gl.float32), y1.to(gl.float32), y2.to(gl.float32), y3.to(gl.float32)
                y0 = _mixed(s0, f, x0, x1, x2, x3)
                y1 = _mixed(s1, f, x0, x1, x2, x3)
                y2 = _mixed(s2, f, x0, x1, x2, x3)
                y3 = _mixed(s3, f, x0, x1, x2, x3)
                x_s[0].index(here).store(y0)
                x_s[1].index(here).store(y1)
                x_s[2].index(here).store(y2)
                x_s[3].index(here).store(y3)
                fence_async_shared()
            barrier()  # all of the box is there; and all warps are through with the stage before
            wide = nothing
            last = little
            for j in gl.static_range(4):
                w = wide_s.index(stage * 4 + j).permute((1, 0))
                wide = warpgroup_mma(x_s[j].index(here), w, wide, use_acc=j > 0, is_async=True)
            for j in gl.static_range(4):
                w = last_s.index(stage * 4 + j).permute((1, 0))
                last = warpgroup_mma(x_s[j].index(here), w, last, use_acc=j > 0, is_async=True)
            if WRITE:
                for j in gl.static_range(4):
                    tma.async_copy_shared_to_global(out_desc, [first, j * D + place * R], x_s[j].index(here))
                if STAGES > 2:
                    tma.store_wait(4)
            if STAGES > 2:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            z0, z1, z2, z3 = y0.to(gl.float32), y1.to(gl.float32), y2.to(gl.float32), y3.to(gl.float32)
            squares += _row_sums(gl.fma(z3, z3, gl.fma(z2, z2, gl.fma(z1, z1, z0 * z0))))
            wide, last = warpgroup_mma_wait(0, [wide, last])
            if STAGES == 2:  # too few to be freed as late as in the next step, at the price of another barrier
                if WRITE:
                    tma.store_wait(0)
                barrier()
                mbarrier.arrive(empty.index(stage), count=1)
            # Columns 8 (3 part + third) .. + 7 of the product belong to coefficients 8 third .. + 7.
            even, odd = gl.split(gl.permute(gl.reshape(wide, [T, 2, 2, 2, 8]), (0, 4, 1, 2, 3)))
            c04, c26 = gl.split(even)
            c15, c37 = gl.split(odd)
            c0, c4 = gl.split(c04)
            c2, c6 = gl.split(c26)
            c1, c5 = gl.split(c15)
            c3, c7 = gl.split(c37)
            v0 += gl.convert_layout((c0 + c3) + c6, LAST, assert_trivial=True)
            v1 += gl.convert_layout((c1 + c4) + c7, LAST, assert_trivial=True)
            v2 += gl.convert_layout(c2 + c5, LAST, assert_trivial=True) + last
            step += 1
        line = first.to(gl.int64) + gl.arange(0, T, gl.SliceLayout(1, LAST))[:, None]
        to = partial_ptr + (part.to(gl.int64) * tokens + line) * 32 + gl.arange(0, 8, gl.SliceLayout(0, LAST))[None, :]
        gl.store(to, v0, mask=line < tokens)
        gl.store(to + 8, v1, mask=line < tokens)
        gl.store(to + 16, v2, mask=line < tokens)
        gl.store(partial_ptr + (part.to(gl.int64) * tokens + row) * 32 + 24, squares, mask=shown)
    if WRITE:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "tiles"])
def _write_and_project(
    x_desc, out_desc, result_desc, routed_desc, wide_desc, last_desc, post_ptr, comb_ptr, partial_ptr, tokens, tiles,
    STREAM: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr, WRITE: gl.constexpr, ROUTED: gl.constexpr,
    TEAMS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Programs take tiles of TEAMS x 64 tokens and PARTS parts of their ranges in turn."""
    # Buffers of their own, so that the compiler sees that a store to one leaves the others alone.
    x0_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TEAMS, T, R], BOX)
    x1_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TEAMS, T, R], BOX)
    x2_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TEAMS, T, R], BOX)
    x3_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TEAMS, T, R], BOX)
    x_s = (x0_s, x1_s, x2_s, x3_s)
    f_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * TEAMS * (1 + ROUTED) if WRITE else 1, T, R], BOX)
    wide_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, 64, R], BOX)
    last_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, 8, R], BOX)
    full, empty = barriers(STAGES, TEAMS)
    # fmt: off
    gl.warp_specialize([
        (_multiply, (gl.constexpr(0), out_desc, post_ptr, comb_ptr, partial_ptr, x_s, f_s, wide_s, last_s, full, empty,
                     tokens, tiles, D, PARTS, WRITE, ROUTED, TEAMS, STAGES)),
        (_multiply, (gl.constexpr(1), out_desc, post_ptr, comb_ptr, partial_ptr, x_s, f_s, wide_s, last_s, full, empty,
                     tokens, tiles, D, PARTS, WRITE, ROUTED, TEAMS, STAGES)),
        (_bring, (x_desc, result_desc, routed_desc, wide_desc, last_desc, x_s, f_s, wide_s, last_s, full, empty, tiles,
                  STREAM, D, PARTS, WRITE, ROUTED, TEAMS, STAGES)),
    ], [4, 1], [232, 24])
    # fmt: on


# ---- launching -------------------------------------------------------------------------------------------------------


def _boxes(tensor: Tensor, rows: int = 64) -> TensorDescriptor:
    """How the copy engine reads or writes ``tensor`` [N, M]: in boxes of rows x 32."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, 32], layout)


def takes(x_SJD: Tensor, before: Write | None, coefficients: int) -> bool:
    """Whether `write_and_project_many` does, given what hyper_connection._streams has checked."""
    expanded = before is None and x_SJD.stride(1) == 0 and x_SJD.stride(0) == x_SJD.shape[2]
    few = before is None or before.routed is None or before.routed.shape[1] <= MOST_ROUTED
    return coefficients == COEFFICIENTS and few and (expanded or x_SJD.is_contiguous())


def write_and_project_many(
    x_SJD: Tensor, before: Write | None, out: Tensor, parts_of_fn: Tensor, partial: Tensor
) -> None:
    """Streams after ``before`` to ``out``, sums of their products with fn to ``partial``: float32 [PARTS, S, 32].

    parts_of_fn: `hyper_connection.Connection.parts`; for what `takes` allows.
    """
    tokens, _, hidden = x_SJD.shape
    expanded = x_SJD.stride(1) == 0
    routed = None if before is None else before.routed
    count = 0 if routed is None else routed.shape[1]
    tiles = triton.cdiv(tokens, 64 * TEAMS)
    x = _boxes(x_SJD[:, 0] if expanded else x_SJD.flatten(1))
    w = parts_of_fn.view(-1, 128)
    stage = 64 * 32 * 2 * TEAMS * (5 + count if before is not None else 4) + 72 * 128 * 2
    _write_and_project[(min(processors_of(x_SJD.device), tiles * partial.shape[0]),)](
        x,
        x if before is None else _boxes(out.flatten(1)),
        x if before is None else _boxes(before.result),
        x if routed is None else _boxes(routed.flatten(1)),
        _boxes(w),
        _boxes(w, 8),
        partial if before is None else before.post,
        partial if before is None else before.comb,
        partial,
        tokens,
        tiles,
        STREAM=0 if expanded else hidden,
        D=hidden,
        PARTS=partial.shape[0],
        WRITE=before is not None,
        ROUTED=count,
        TEAMS=TEAMS,
        STAGES=min(MOST_STAGES, SHARED_BYTES // stage),
        num_warps=4,
    )
