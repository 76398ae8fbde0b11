"""The experts' products for many tokens on compute capability 9.0, in Gluon: two warp groups share a tile of pairs, and
each takes 64 matrix rows; codes, scales and activations are on their way to shared memory while others are multiplied.

Same arithmetic and order of sums as moe_few.py, so the same bits.  Knows nothing of routing; reads the tables that
moe_route.py makes.  Letters: N pairs of a tile, R matrix rows of a program, D hidden, I expert hidden.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .moe_few import (
    E4M3_TILE,
    barrier,
    bytes_layout,
    codes_layout,
    largest_scales,
    matrix_row,
    operand,
    reordered,
    rounded,
    swiglu,
    unpack,
)


@gluon.constexpr_function
def turned_layout(columns):
    """[128, columns] for rounding along the first dim: lanes along the second; eight warps."""
    lanes = [[0, 1 << i] for i in range(5)]
    across = [[0, 32 << i] for i in range(3) if 32 << i < columns][:2]
    down = [[64 >> i, 0] for i in range(3 - len(across))]
    registers = [[1 << i, 0] for i in range(7 - len(down))]
    return gl.DistributedLinearLayout(registers, lanes, across + down, [], [128, columns])


@gluon.jit
def _copy(x_s, x_scale_s, x, x_scale, block, COUNT: gl.constexpr, STAGES: gl.constexpr):
    """Block number ``block`` of the activations and their scales, to its place in the ring; read twice over."""
    if block < 2 * COUNT:
        async_copy.async_copy_global_to_shared(x_s.index(block % STAGES), x + block % COUNT * 128)
        async_copy.async_copy_global_to_shared(x_scale_s.index(block % STAGES), x_scale + block % COUNT)


@gluon.jit
def _copy_half(
    w_s, s_s, codes, scales, block, COUNT: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr
):
    """As `_copy_rows`, one block a stage; the second half of the rows comes after all blocks of the first."""
    LENGTH: gl.constexpr = w_s.shape[2]
    if block < 2 * COUNT:
        at = block // COUNT * (HALF * COUNT) + block % COUNT
        async_copy.async_copy_global_to_shared(w_s.index(block % STAGES), codes + at * LENGTH)
        if not FP8:
            async_copy.async_copy_global_to_shared(s_s.index(block % STAGES), scales + at)


@gluon.jit
def many(
    x_ptr,
    x_scale_ptr,
    weights_ptr,
    w_ptr,
    s_ptr,
    table_ptr,
    slots_ptr,
    tiles_ptr,
    order_ptr,
    out_ptr,
    out_scale_ptr,
    tiles,
    outputs,
    limit,
    INPUTS: gl.constexpr,
    K: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    GATED: gl.constexpr,
    FP8: gl.constexpr,
):
    """256 matrix rows, in two halves, for a tile of up to N pairs.  x: e4m3, its inputs reordered (`reorder`).

    GATED: x [S, INPUTS] by token; out e4m3 [P, I], reordered, and out_scale float32 [P, I / 128] by place in order.
    Otherwise: x [P, INPUTS] by place; out bfloat16 [P, outputs] by pair.
    GROUP tiles run side by side, so that those of one expert find its rows in the cache.
    """
    R: gl.constexpr = 128
    HALF: gl.constexpr = R // 2 if GATED else R  # outputs of half a program
    COUNT: gl.constexpr = INPUTS // 128
    # Two, so that what a product reads is not what is unpacked beside it: else the compiler has them wait.
    UNROLL: gl.constexpr = 1 if COUNT % 2 else 2
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, N, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    CODES: gl.constexpr = codes_layout(8, FP8)
    BYTES: gl.constexpr = bytes_layout(8)
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, BYTES)))
    LENGTH: gl.constexpr = 32 if FP8 else 16  # words of a row's 128 inputs
    BROUGHT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // LENGTH, LENGTH // 4], [8, 1], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COPIED: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    parts = outputs // (2 * HALF)
    rest = gl.program_id(0) % (GROUP * parts)
    tile = gl.program_id(0) // (GROUP * parts) * GROUP + rest % GROUP
    part = rest // GROUP
    count = 0
    if tile < tiles:
        count = gl.load(tiles_ptr + tile * 3 + 2)
    if count > 0:
        place = gl.load(tiles_ptr + tile * 3 + 1)
        slot = gl.load(slots_ptr + gl.load(tiles_ptr + tile * 3)).to(gl.int64)
        if GATED:
            first = slot * (2 * outputs) + part * (2 * HALF)
        else:
            first = slot * outputs + part * (2 * HALF)
        row = matrix_row(gl.arange(0, R, gl.SliceLayout(1, BROUGHT)), first, outputs, GATED)
        codes = w_ptr.to(gl.pointer_type(gl.int32)) + row[:, None] * (COUNT * LENGTH)
        codes += gl.arange(0, LENGTH, gl.SliceLayout(0, BROUGHT))[None, :]
        scales = s_ptr.to(gl.pointer_type(gl.int32)) + matrix_row(gl.arange(0, R, LINE), first, outputs, GATED) * COUNT
        w_s = gl.allocate_shared_memory(gl.int32, [STAGES, R, LENGTH], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
        s_s = gl.allocate_shared_memory(gl.int32, [STAGES, R], PLAIN)
        _copy_half(w_s, s_s, codes, scales, 0, COUNT, HALF, STAGES, FP8)
        async_copy.commit_group()

        x_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, N, 128], E4M3_TILE)
        x_scale_s = gl.allocate_shared_memory(gl.float32, [STAGES, N], PLAIN)
        x_row = place + gl.minimum(gl.arange(0, N, gl.SliceLayout(1, COPIED)), count - 1)
        line = place + gl.minimum(gl.arange(0, N, LINE), count - 1)
        if GATED:
            x_row = gl.load(order_ptr + x_row) // K
            line = gl.load(order_ptr + line) // K
        x = x_ptr + (x_row.to(gl.int64) * INPUTS)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, COPIED))[None, :]
        x_scale = x_scale_ptr + line.to(gl.int64) * COUNT
        for stage in gl.static_range(STAGES - 1):
            _copy(x_s, x_scale_s, x, x_scale, stage, COUNT, STAGES)
            _copy_half(w_s, s_s, codes, scales, stage + 1, COUNT, HALF, STAGES, FP8)
            async_copy.commit_group()

        top_a = gl.zeros([R], gl.int32, ROWS)
        top_b = top_a
        if not FP8:
            top_a = largest_scales(s_ptr, first, outputs, INPUTS // 32, GATED, R, ROWS)
            top_b = largest_scales(s_ptr, first + HALF, outputs, INPUTS // 32, GATED, R, ROWS)
        async_copy.wait_group(STAGES - 1)
        barrier()
        words = unpack(w_s.index(0).load(CODES), s_s.index(0).load(ROWS), top_a, table_ptr, BYTES, FP8)
        if GATED:
            held = gl.allocate_shared_memory(gl.float32, [2, HALF, N], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
        nothing = gl.zeros([R, N], gl.float32, SUMS)
        for now in range(2):
            acc = gl.zeros([R, N], gl.float32, SUMS)
            for pair in range(COUNT // UNROLL):
                for u in gl.static_range(UNROLL):
                    block = now * COUNT + pair * UNROLL + u
                    async_copy.wait_group(STAGES - 2)
                    barrier()  # everyone's share has come, and everyone is done with the place that is filled next
                    _copy(x_s, x_scale_s, x, x_scale, block + STAGES - 1, COUNT, STAGES)
                    _copy_half(w_s, s_s, codes, scales, block + STAGES, COUNT, HALF, STAGES, FP8)
                    async_copy.commit_group()
                    columns = x_s.index(block % STAGES).permute((1, 0))
                    w = operand(words, OPERAND, BYTES)
                    product = warpgroup_mma(w, columns, nothing, use_acc=False, is_async=True)
                    # While it runs the next block is unpacked (after the last one, what lies there).
                    code, scale = (
                        w_s.index((block + 1) % STAGES).load(CODES),
                        s_s.index((block + 1) % STAGES).load(ROWS),
                    )
                    top = gl.where(block + 1 < COUNT, top_a, top_b)
                    words = unpack(code, scale, top, table_ptr, BYTES, FP8)
                    x_scale_n = x_scale_s.index(block % STAGES).load(gl.SliceLayout(0, SUMS))
                    product = warpgroup_mma_wait(0, [product])
                    if FP8:
                        s_row = (
                            matrix_row(gl.arange(0, R, gl.SliceLayout(1, SUMS)), first + now * HALF, outputs, GATED)
                            // 128
                        )
                        exponent = gl.load(s_ptr + s_row * COUNT + pair * UNROLL + u).to(gl.int32)
                        product = product * (exponent << 23).to(gl.float32, bitcast=True)[:, None]
                    product, x_scale_n = gl.broadcast(product, x_scale_n[None, :])
                    acc = gl.fma(product, x_scale_n, acc)
            if not FP8:
                unit = gl.maximum(gl.where(now == 0, top_a, top_b) - 6, 0) << 23
                acc = acc * gl.convert_layout(unit, gl.SliceLayout(1, SUMS)).to(gl.float32, bitcast=True)[:, None]
            if GATED:
                held.index(now).store(swiglu(acc, limit))
            else:
                STORED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
                value = gl.convert_layout(gl.permute(acc.to(gl.bfloat16), (1, 0)), STORED)
                number = gl.arange(0, N, gl.SliceLayout(1, STORED))
                real = number < count
                pair = gl.load(order_ptr + place + number, mask=real, other=0).to(gl.int64)
                column = part * (2 * HALF) + now * HALF + gl.arange(0, R, gl.SliceLayout(0, STORED))
                gl.store(out_ptr + (pair * outputs)[:, None] + column[None, :], value, mask=real[:, None])
        if GATED:
            TURNED: gl.constexpr = turned_layout(N)
            barrier()
            both = held._reinterpret(gl.float32, [1, 2 * HALF, N], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])).index(0)
            value = both.load(TURNED)
            number = gl.arange(0, N, gl.SliceLayout(0, TURNED))
            real = number < count
            pair = gl.load(order_ptr + place + number, mask=real, other=0)
            value, weight = gl.broadcast(value, gl.load(weights_ptr + pair, mask=real, other=0.0)[None, :])
            data, scale = rounded(gl.permute(value * weight, (1, 0)))
            data = gl.convert_layout(reordered(data.to(gl.uint8, bitcast=True)), COPIED)
            number = gl.arange(0, N, gl.SliceLayout(1, COPIED))
            to = ((place + number).to(gl.int64) * outputs)[:, None] + part * 128
            to += gl.arange(0, 128, gl.SliceLayout(0, COPIED))[None, :]
            gl.store(out_ptr + to, data.to(gl.float8e4nv, bitcast=True), mask=(number < count)[:, None])
            SCALE: gl.constexpr = scale.type.layout
            number = gl.arange(0, N, SCALE)
            to = (place + number).to(gl.int64) * (outputs // 128) + part
            gl.store(out_scale_ptr + to, scale, mask=number < count)
