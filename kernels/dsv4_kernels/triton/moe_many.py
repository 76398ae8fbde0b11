"""The experts' products for many tokens on compute capability 9.0, in Gluon: one warp brings tiles by the copy engine,
two warp groups unpack and multiply; while one unpacks or adds, the other keeps the tensor cores busy.

A tile is up to PIECES x PN pairs of an expert, so that codes are unpacked once for all of them; pieces that no pair is
in cost nothing.  Same arithmetic and order of sums as moe_few.py, so the same bits.  Knows nothing of routing; reads
the tables that moe_route.py makes.  Letters: PN pairs of a piece, R matrix rows of a warp group, D hidden, I expert
hidden, P pairs, T tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .moe_few import bytes_layout, operand, reordered, rounded, swiglu, unpack
from .staging import barrier, barriers

R = gl.constexpr(64)
SCALES = tl.constexpr(32)  # a tile's scales of 128 inputs take as many places at least: the copy engine's alignment


@triton.jit
def gather(
    x_ptr, scale_ptr, tiles_ptr, order_ptr, out_ptr, out_scale_ptr, K: tl.constexpr, N: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Activations by place in order, int32 words [P, 32 COUNT], and their scales by tile: float32 [T, COUNT, N]."""
    WORDS: tl.constexpr = 256
    tile = tl.program_id(0) // (N // ROWS)
    first = tl.program_id(0) % (N // ROWS) * ROWS
    count = tl.load(tiles_ptr + tile * 3 + 2)
    if first < count:
        number = first + tl.arange(0, ROWS)
        real = number < count
        place = tl.load(tiles_ptr + tile * 3 + 1) + number
        token = (tl.load(order_ptr + place, mask=real, other=0) // K).to(tl.int64)
        for start in range(0, COUNT * 32, WORDS):
            word = start + tl.arange(0, WORDS)
            mask = real[:, None] & (word < COUNT * 32)[None, :]
            value = tl.load(x_ptr + token[:, None] * (COUNT * 32) + word[None, :], mask=mask)
            tl.store(out_ptr + place.to(tl.int64)[:, None] * (COUNT * 32) + word[None, :], value, mask=mask)
        block = tl.arange(0, WIDTH)
        mask = real[:, None] & (block < COUNT)[None, :]
        scale = tl.load(scale_ptr + token[:, None] * COUNT + block[None, :], mask=mask)
        tl.store(out_scale_ptr + (tile * COUNT + block)[None, :] * max(N, SCALES) + number[:, None], scale, mask=mask)


@gluon.constexpr_function
def words_layout(blocks, fp8):
    """A warp group's half of a box, words of `blocks` x 128 inputs: a thread has a quarter of a row's words."""
    count = 3 if fp8 else 2
    registers = [[0, 1 << i] for i in range(count)] + [[0, 4 << count]] * (blocks - 1)
    lanes = [[0, 1 << count], [0, 2 << count], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, blocks * (4 << count)])


@gluon.constexpr_function
def turned_layout(rows, columns):
    """[rows, columns] for rounding along the first dim: lanes along the second; four warps."""
    along = [[0, 1 << i] for i in range(columns.bit_length() - 1)]
    threads = along + [[rows >> (1 + i), 0] for i in range(7 - len(along))]
    registers = [[1 << i, 0] for i in range((rows >> (7 - len(along))).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, threads[:5], threads[5:], [], [rows, columns])


@gluon.jit
def _item(item, tiles_ptr, slots_ptr, tiles, parts, SIDE: gl.constexpr):
    """Item number to tile, its first place, pairs, slot, and which part of the rows; SIDE tiles stand side by side."""
    rest = item % (SIDE * parts)
    tile = item // (SIDE * parts) * SIDE + rest % SIDE
    entry = tiles_ptr + gl.minimum(tile, tiles - 1) * 3
    count = gl.where(tile < tiles, gl.load(entry + 2), 0)
    slot = gl.load(slots_ptr + gl.where(count > 0, gl.load(entry), 0))
    return tile, gl.load(entry + 1), count, slot, rest // SIDE


@gluon.jit
def _bring(
    x_desc, scale_desc, w_desc, slots_ptr, tiles_ptr, x_s, scale_s, w_s, full, empty, tiles, outputs,
    PIECES: gl.constexpr, COUNT: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    SIDE: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    PN: gl.constexpr = x_desc.block_type.shape[0]
    NS: gl.constexpr = scale_desc.block_type.shape[1]
    BOX: gl.constexpr = w_desc.block_type.shape[0]
    WIDTH: gl.constexpr = w_desc.block_type.shape[1]
    ROWS: gl.constexpr = HALVES * BOX if GATED else HALVES * 2 * BOX
    EACH: gl.constexpr = WIDE * NS * 4 + 2 * BOX * WIDTH  # bytes of a stage that all pieces share
    parts = outputs // ROWS
    step = 0
    for item in range(gl.program_id(0), (tiles + SIDE - 1) // SIDE * SIDE * parts, gl.num_programs(0)):
        tile, place, count, slot, part = _item(item, tiles_ptr, slots_ptr, tiles, parts, SIDE)
        if count > 0:
            pieces = (count + PN - 1) // PN
            for half in range(HALVES):
                if GATED:
                    row = slot * (2 * outputs) + part * ROWS + half * BOX
                    other = row + outputs
                else:
                    row = slot * outputs + part * ROWS + half * (2 * BOX)
                    other = row + BOX
                for k in range(COUNT // WIDE):
                    stage = step % STAGES
                    at = full.index(stage)
                    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                    for p in gl.static_range(PIECES):
                        mbarrier.expect(at, EACH + WIDE * (p + 1) * PN * 128, pred=pieces == p + 1)
                    tma.async_copy_global_to_shared(w_desc, [row, k * WIDTH], at, w_s.index(stage * 2))
                    tma.async_copy_global_to_shared(w_desc, [other, k * WIDTH], at, w_s.index(stage * 2 + 1))
                    for b in gl.static_range(WIDE):
                        block = k * WIDE + b
                        scale_to = scale_s.index(stage * WIDE + b)
                        tma.async_copy_global_to_shared(scale_desc, [tile * COUNT + block, 0], at, scale_to)
                        for p in gl.static_range(PIECES):
                            to = x_s.index((stage * WIDE + b) * PIECES + p)
                            here = p < pieces
                            tma.async_copy_global_to_shared(x_desc, [place + p * PN, block * 128], at, to, pred=here)
                    step += 1


@gluon.jit
def _add(product, scale, acc):
    """acc + product scale, as machine code that stays in its place."""
    product, scale = gl.broadcast(product, scale)
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _rows(row, first, apart):
    """Matrix row (int64) of a warp group's row: of every 16 eight are of the first box and eight of the other."""
    return first + row // 16 * 8 + row % 8 + row // 8 % 2 * apart


@gluon.jit
def _codes(w_s, stage, WHICH: gl.constexpr, WIDE: gl.constexpr, FP8: gl.constexpr):
    """A stage's words of a warp group's rows: int32 [R, words of 128 inputs] for each of its WIDE blocks."""
    WORDS: gl.constexpr = words_layout(WIDE, FP8)
    LENGTH: gl.constexpr = 32 if FP8 else 16
    code = w_s.index(stage * 2).slice(WHICH * 32, 32, dim=0).load(WORDS)
    other = w_s.index(stage * 2 + 1).slice(WHICH * 32, 32, dim=0).load(WORDS)
    code = gl.permute(gl.reshape(gl.join(code, other), [4, 8, WIDE, LENGTH, 2]), (0, 4, 1, 3, 2))
    if WIDE == 2:
        return gl.split(gl.reshape(code, [R, LENGTH, 2]))
    else:
        return (gl.reshape(code, [R, LENGTH]),)


@gluon.jit
def _piece(
    p: gl.constexpr, acc, w, nothing, x_s, scale_s, at, s_ptr, first, apart, block, PIECES: gl.constexpr,
    COUNT: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """acc + w times piece p of the tile's pairs, block number ``block`` of the inputs, which is in place ``at``."""
    SUMS: gl.constexpr = acc.type.layout
    PN: gl.constexpr = acc.shape[1]
    columns = x_s.index(at * PIECES + p).permute((1, 0))
    product = warpgroup_mma(w, columns, nothing, use_acc=False, is_async=True)
    scale = scale_s.index(at).slice(p * PN, PN, dim=1).load(SUMS)
    product = warpgroup_mma_wait(0, [product])
    if FP8:
        s_row = _rows(gl.arange(0, R, gl.SliceLayout(1, SUMS)), first, apart) // 128
        exponent = gl.load(s_ptr + s_row * COUNT + block).to(gl.int32)
        product = product * (exponent << 23).to(gl.float32, bitcast=True)[:, None]
    return _add(product, scale, acc)


@gluon.jit
def _sums(
    pieces, top, s_ptr, table_ptr, x_s, scale_s, w_s, full, empty, step, first, apart, WHICH: gl.constexpr,
    PN: gl.constexpr, PIECES: gl.constexpr, COUNT: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr,
    FP8: gl.constexpr,
):  # fmt: skip
    """A warp group's 64 rows times the tile's pairs, a piece each: float32 [R, PN].  top: the rows' largest scales."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PN, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    BYTES: gl.constexpr = bytes_layout(4)
    nothing = gl.zeros([R, PN], gl.float32, SUMS)
    a0 = gl.zeros([R, PN], gl.float32, SUMS)
    a1 = gl.zeros([R, PN], gl.float32, SUMS)
    a2 = gl.zeros([R, PN], gl.float32, SUMS)
    a3 = gl.zeros([R, PN], gl.float32, SUMS)
    words = s_ptr.to(gl.pointer_type(gl.int32)) + _rows(gl.arange(0, R, top.type.layout), first, apart) * COUNT
    even = top
    odd = top + 0
    if not FP8:
        even = gl.load(words)
        odd = gl.load(words + (WIDE - 1))
    for k in range(COUNT // WIDE):
        stage = (step + k) % STAGES
        even_next = even + 0
        odd_next = odd + 0
        if not FP8:
            ahead = gl.minimum(k + 1, COUNT // WIDE - 1) * WIDE
            even_next = gl.load(words + ahead)
            odd_next = gl.load(words + (ahead + WIDE - 1))
        mbarrier.wait(full.index(stage), (step + k) // STAGES & 1)
        blocks = _codes(w_s, stage, WHICH, WIDE, FP8)
        for b in gl.static_range(WIDE):
            four = even if b == 0 else odd
            at = stage * WIDE + b
            block = k * WIDE + b
            w = operand(unpack(blocks[b], four, top, table_ptr, BYTES, FP8), OPERAND, BYTES)
            a0 = _piece(0, a0, w, nothing, x_s, scale_s, at, s_ptr, first, apart, block, PIECES, COUNT, FP8)
            if PIECES > 1:
                if pieces > 1:
                    a1 = _piece(1, a1, w, nothing, x_s, scale_s, at, s_ptr, first, apart, block, PIECES, COUNT, FP8)
            if PIECES > 2:
                if pieces > 2:
                    a2 = _piece(2, a2, w, nothing, x_s, scale_s, at, s_ptr, first, apart, block, PIECES, COUNT, FP8)
                if pieces > 3:
                    a3 = _piece(3, a3, w, nothing, x_s, scale_s, at, s_ptr, first, apart, block, PIECES, COUNT, FP8)
        # One thread says that the stage is free: every warp must have read its scales.  The branches hide those reads
        # from the compiler, which puts a barrier here by itself where there is one piece only.
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        even = even_next
        odd = odd_next
    if not FP8:
        unit = gl.convert_layout(gl.maximum(top - 6, 0) << 23, gl.SliceLayout(1, SUMS))
        unit = unit.to(gl.float32, bitcast=True)[:, None]
        a0 = a0 * unit
        a1 = a1 * unit
        a2 = a2 * unit
        a3 = a3 * unit
    return a0, a1, a2, a3


@gluon.jit
def _round(
    p: gl.constexpr, early, late, weights_ptr, order_ptr, out_ptr, out_scale_ptr, tile, place, count, part, outputs,
    FROM: gl.constexpr, PN: gl.constexpr, NS: gl.constexpr,
):  # fmt: skip
    """128 values of pairs FROM and on of piece p, 64 of them early [64, pairs]: times weight, rounded, stored."""
    SHARE: gl.constexpr = early.shape[1]
    LINES: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    value = gl.reshape(gl.permute(gl.join(early, late), (1, 2, 0)), [SHARE, 128])
    number = p * PN + FROM + gl.arange(0, SHARE, gl.SliceLayout(1, value.type.layout))
    real = number < count
    pair = gl.load(order_ptr + place + number, mask=real, other=0)
    weight = gl.load(weights_ptr + pair, mask=real, other=0.0)
    value, weight = gl.broadcast(value, weight[:, None])
    data, scale = rounded(value * weight)
    data = gl.convert_layout(reordered(data.to(gl.uint8, bitcast=True)), LINES)
    number = p * PN + FROM + gl.arange(0, SHARE, gl.SliceLayout(1, LINES))
    to = ((place + number).to(gl.int64) * outputs)[:, None] + part * 128
    to += gl.arange(0, 128, gl.SliceLayout(0, LINES))[None, :]
    gl.store(out_ptr + to, data.to(gl.float8e4nv, bitcast=True), mask=(number < count)[:, None])
    number = p * PN + FROM + gl.arange(0, SHARE, scale.type.layout)
    gl.store(out_scale_ptr + (tile * (outputs // 128) + part) * NS + number, scale, mask=number < count)


@gluon.jit
def _store(p: gl.constexpr, acc, order_ptr, out_ptr, place, count, column, outputs, BOX: gl.constexpr):
    """A warp group's rows of piece p to its pairs' results: 32 columns from ``column`` on, and 32 of the next box."""
    PN: gl.constexpr = acc.shape[1]
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    one, two = gl.split(gl.permute(gl.reshape(acc.to(gl.bfloat16), [4, 2, 8, PN]), (0, 2, 3, 1)))
    one = gl.convert_layout(gl.permute(gl.reshape(one, [32, PN]), (1, 0)), STORED)
    two = gl.convert_layout(gl.permute(gl.reshape(two, [32, PN]), (1, 0)), STORED)
    number = p * PN + gl.arange(0, PN, gl.SliceLayout(1, STORED))
    real = number < count
    pair = gl.load(order_ptr + place + number, mask=real, other=0).to(gl.int64)
    out = out_ptr + (pair * outputs)[:, None] + column + gl.arange(0, 32, gl.SliceLayout(0, STORED))[None, :]
    gl.store(out, one, mask=real[:, None])
    gl.store(out + BOX, two, mask=real[:, None])


@gluon.jit
def _multiply(
    WHICH: gl.constexpr, weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr, out_scale_ptr,
    x_s, scale_s, w_s, early_s, late_s, full, empty, done, tiles, outputs, limit, PN: gl.constexpr,
    PIECES: gl.constexpr, COUNT: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    WGS: gl.constexpr, SIDE: gl.constexpr, GATED: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """One warp group: rows 32 WHICH and on of both boxes."""
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, bytes_layout(4))))
    GROUPS: gl.constexpr = COUNT * 4
    WIDTH: gl.constexpr = 1 << (GROUPS - 1).bit_length()
    WHOLE: gl.constexpr = gl.BlockedLayout([1, min(16, WIDTH)], [4, 8], [4, 1], [1, 0])
    BOX: gl.constexpr = 32 * WGS
    ROWS: gl.constexpr = HALVES * BOX if GATED else HALVES * 2 * BOX
    SHARE: gl.constexpr = PN // WGS  # pairs of a piece that a warp group rounds
    FROM: gl.constexpr = WHICH * SHARE
    TURNED: gl.constexpr = turned_layout(64, SHARE)
    parts = outputs // ROWS
    step = 0
    turn = 0
    for item in range(gl.program_id(0), (tiles + SIDE - 1) // SIDE * SIDE * parts, gl.num_programs(0)):
        tile, place, count, slot, part = _item(item, tiles_ptr, slots_ptr, tiles, parts, SIDE)
        if count > 0:
            pieces = (count + PN - 1) // PN
            for half in range(HALVES):
                if GATED:
                    first = slot.to(gl.int64) * (2 * outputs) + part * ROWS + half * BOX + WHICH * 32
                    apart = outputs
                else:
                    first = slot.to(gl.int64) * outputs + part * ROWS + half * (2 * BOX) + WHICH * 32
                    apart = BOX
                top = gl.zeros([R], gl.int32, ROW)
                if not FP8:
                    s_row = _rows(gl.arange(0, R, gl.SliceLayout(1, WHOLE)), first, apart)
                    group = gl.arange(0, WIDTH, gl.SliceLayout(0, WHOLE))[None, :]
                    exponent = gl.load(s_ptr + s_row[:, None] * GROUPS + group, mask=group < GROUPS, other=0)
                    top = gl.convert_layout(gl.max(exponent.to(gl.int32), 1), ROW)
                # fmt: off
                sums = _sums(pieces, top, s_ptr, table_ptr, x_s, scale_s, w_s, full, empty, step, first, apart,
                             WHICH, PN, PIECES, COUNT, WIDE, STAGES, FP8)
                # fmt: on
                step += COUNT // WIDE
                for p in gl.static_range(PIECES):
                    if p < pieces:
                        if GATED:
                            value = swiglu(sums[p], limit)
                            # The other warp group may still be reading what stood there before.
                            mbarrier.wait(done.index(1), (turn & 1) ^ 1)
                            if half < HALVES - 1:
                                early_s.index(p).slice(WHICH * 32, 32, dim=0).store(value)
                            else:
                                if HALVES == 1 and WHICH < 2:
                                    early_s.index(p).slice(WHICH * 32, 32, dim=0).store(value)
                                else:
                                    late_s.index(0).slice(WHICH % 2 * 32, 32, dim=0).store(value)
                                mbarrier.arrive(done.index(0), count=1)
                                mbarrier.wait(done.index(0), turn & 1)
                                early = early_s.index(p).slice(FROM, SHARE, dim=1).load(TURNED)
                                late = late_s.index(0).slice(FROM, SHARE, dim=1).load(TURNED)
                                mbarrier.arrive(done.index(1), count=1)
                                turn += 1
                                # fmt: off
                                _round(p, early, late, weights_ptr, order_ptr, out_ptr, out_scale_ptr, tile, place,
                                       count, part, outputs, FROM, PN, scale_s.shape[2])
                                # fmt: on
                        else:
                            column = part * ROWS + half * (2 * BOX) + WHICH * 32
                            _store(p, sums[p], order_ptr, out_ptr, place, count, column, outputs, BOX)


@gluon.jit
def many(
    x_desc, scale_desc, w_desc, weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr,
    out_scale_ptr, tiles, outputs, limit, PIECES: gl.constexpr, COUNT: gl.constexpr, WIDE: gl.constexpr,
    STAGES: gl.constexpr, HALVES: gl.constexpr, WGS: gl.constexpr, SIDE: gl.constexpr, GATED: gl.constexpr,
    FP8: gl.constexpr,
):  # fmt: skip
    """Programs take items in turn: a tile of up to PIECES x PN pairs, and HALVES x 128 matrix rows (GATED: two halves).

    x: e4m3 [P, 128 COUNT] by place in order, inputs reordered; scales float32 [T, COUNT, N], see `gather`.
    GATED: out e4m3 [P, outputs] and out_scale [T, outputs / 128, N] the same way.  Otherwise: out bfloat16
    [P, outputs] by pair.  A stage brings WIDE x 128 inputs; SIDE tiles run side by side, so that those of one expert
    find its rows in the cache.
    """
    PN: gl.constexpr = x_desc.block_type.shape[0]
    NS: gl.constexpr = scale_desc.block_type.shape[1]
    BOX: gl.constexpr = w_desc.block_type.shape[0]
    WIDTH: gl.constexpr = w_desc.block_type.shape[1]
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES * WIDE * PIECES, PN, 128], x_desc.layout)
    scale_s = gl.allocate_shared_memory(gl.float32, [STAGES * WIDE, 1, NS], scale_desc.layout)
    bytes_s = gl.allocate_shared_memory(gl.uint8, [STAGES * 2, BOX, WIDTH], w_desc.layout)
    words_s = bytes_s._reinterpret(gl.int32, [STAGES * 2, BOX, WIDTH // 4], gl.NVMMASharedLayout(WIDTH, 32))
    HELD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    early_s = gl.allocate_shared_memory(gl.float32, [PIECES if GATED else 1, 64, PN if GATED else 4], HELD)
    late_s = gl.allocate_shared_memory(gl.float32, [1, 64, PN if GATED else 4], HELD)
    full, empty = barriers(STAGES, WGS)
    # A barrier that nobody waits for would be dead from here on, and its place be given to what changes layouts.  But
    # memory that was made a barrier is not for data: it changed under them when the GPU went to another process.
    done = full
    if GATED:
        done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        mbarrier.init(done.index(0), count=WGS)
        mbarrier.init(done.index(1), count=WGS)
    # fmt: off
    if WGS == 4:
        gl.warp_specialize([
            (_multiply, (gl.constexpr(0), weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr,
                         out_scale_ptr, x_s, scale_s, words_s, early_s, late_s, full, empty, done, tiles, outputs,
                         limit, PN, PIECES, COUNT, WIDE, STAGES, HALVES, WGS, SIDE, GATED, FP8)),
            (_multiply, (gl.constexpr(1), weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr,
                         out_scale_ptr, x_s, scale_s, words_s, early_s, late_s, full, empty, done, tiles, outputs,
                         limit, PN, PIECES, COUNT, WIDE, STAGES, HALVES, WGS, SIDE, GATED, FP8)),
            (_multiply, (gl.constexpr(2), weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr,
                         out_scale_ptr, x_s, scale_s, words_s, early_s, late_s, full, empty, done, tiles, outputs,
                         limit, PN, PIECES, COUNT, WIDE, STAGES, HALVES, WGS, SIDE, GATED, FP8)),
            (_multiply, (gl.constexpr(3), weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr,
                         out_scale_ptr, x_s, scale_s, words_s, early_s, late_s, full, empty, done, tiles, outputs,
                         limit, PN, PIECES, COUNT, WIDE, STAGES, HALVES, WGS, SIDE, GATED, FP8)),
            (_bring, (x_desc, scale_desc, w_desc, slots_ptr, tiles_ptr, x_s, scale_s, bytes_s, full, empty, tiles,
                      outputs, PIECES, COUNT, WIDE, STAGES, HALVES, SIDE, GATED)),
        ], [4, 4, 4, 1], [112, 112, 112, 24])
    else:
        gl.warp_specialize([
            (_multiply, (gl.constexpr(0), weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr,
                         out_scale_ptr, x_s, scale_s, words_s, early_s, late_s, full, empty, done, tiles, outputs,
                         limit, PN, PIECES, COUNT, WIDE, STAGES, HALVES, WGS, SIDE, GATED, FP8)),
            (_multiply, (gl.constexpr(1), weights_ptr, s_ptr, table_ptr, slots_ptr, tiles_ptr, order_ptr, out_ptr,
                         out_scale_ptr, x_s, scale_s, words_s, early_s, late_s, full, empty, done, tiles, outputs,
                         limit, PN, PIECES, COUNT, WIDE, STAGES, HALVES, WGS, SIDE, GATED, FP8)),
            (_bring, (x_desc, scale_desc, w_desc, slots_ptr, tiles_ptr, x_s, scale_s, bytes_s, full, empty, tiles,
                      outputs, PIECES, COUNT, WIDE, STAGES, HALVES, SIDE, GATED)),
        ], [4, 1], [240, 24])
    # fmt: on
