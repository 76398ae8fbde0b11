"""The sparse attention of attention.py for compute capability 9.0, 512 channels, a window of 128; 64 heads a program.

Written in Gluon, because Triton scores every tile twice here (it gives chained products one warp layout) and because
fetching, unpacking and multiplying have to overlap.  Knows nothing of the dispatch.

Eight warps: in Q K^T the two warp groups split a tile's 128 keys, in P V the channels, so that the sums of 64 x 512
take half of the registers.  While they run, the next tile's rows are on their way to registers.  P V runs in two halves
of 64 keys: as soon as the first has been read, the next tile's first half is unpacked in its place.  After a query's
last tile comes the next query's window.  Shared memory, KiB: queries 64, keys 128, weights 16.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .staging import barrier

HEADS = gl.constexpr(64)
CHANNELS = gl.constexpr(512)
ROPE = gl.constexpr(64)
VALUES = gl.constexpr(448)
BYTES = gl.constexpr(576)  # of a row's values
SCALES = gl.constexpr(8)
KEYS = gl.constexpr(128)
HALF = gl.constexpr(64)
SEGMENT = gl.constexpr(2048)
LIFT = gl.constexpr(14.0)
LOG2E = gl.constexpr(1.4426950408889634)

# Codes as words of four: a warp reads 64 consecutive bytes of eight rows at a time, 16 bytes a thread.  So a thread of
# eight warps keeps to one row of 64.
CODES = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
ROW_OF = gl.constexpr(gl.SliceLayout(1, CODES))
WIDE = gl.constexpr(gl.NVMMASharedLayout(128, 16))
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32))  # the same memory as words
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))
ROWS = gl.constexpr(gl.SliceLayout(1, SCORES))
# One value a head and warp group: in memory, and with both in the threads that hold the head.
PAIRS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
BOTH = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 0]], [], [64, 2]
    )
)


@gluon.jit
def _numbers(selected_ptr, entry, end, GATHER: gl.constexpr):
    """Row numbers of entries ``entry`` and on, the last one's from ``end`` on: int32 [HALF]."""
    entry = gl.minimum(gl.maximum(entry + gl.arange(0, HALF, ROW_OF), 0), gl.maximum(end - 1, 0))
    if GATHER:
        return gl.load(selected_ptr + entry)
    else:
        return entry


@gluon.jit
def fetch(window_ptr, window_scales, segments_ptr, base, position, ring, entry, number):
    """Packed rows in registers: seven blocks of 64 codes, the rotated channels, the scales.

    From ``entry`` on: entries, with these row numbers, or, where negative, as many keys of the window, the last of
    which is -1.
    """
    CODE: gl.constexpr = number.type.layout.parent
    HALVES: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0])  # words of two 16-bit floats
    if entry < 0:
        seen = gl.maximum(position + 1 + entry + gl.arange(0, number.shape[0], number.type.layout), 0)
        row = (base + gl.where(ring > 0, seen % gl.maximum(ring, 1), seen)).to(gl.int64)
        value, scale = row * BYTES, window_scales + row * SCALES
    else:
        block = gl.load(segments_ptr + (number // SEGMENT)) - window_ptr.to(gl.int64)
        row = (number % SEGMENT).to(gl.int64)
        value, scale = block + row * BYTES, block + (SEGMENT * BYTES + row * SCALES)
    values = (window_ptr + (value >> 4) * 16).to(gl.pointer_type(gl.int32))  # so that the compiler sees the alignment
    codes = values[:, None] + gl.arange(0, 16, gl.SliceLayout(0, CODE))[None, :]
    rope = gl.convert_layout(values, gl.SliceLayout(1, HALVES))[:, None] + VALUES // 4
    return (
        gl.load(codes),
        gl.load(codes + 16),
        gl.load(codes + 32),
        gl.load(codes + 48),
        gl.load(codes + 64),
        gl.load(codes + 80),
        gl.load(codes + 96),
        gl.load(rope + gl.arange(0, 32, gl.SliceLayout(0, HALVES))[None, :]),
        gl.load((window_ptr + (scale >> 3) * 8).to(gl.pointer_type(gl.int64))),
    )


@gluon.jit
def widen(codes, exponent):
    """e4m3 codes, four in a word, [N, 16], times 2^(exponent - 127), [N]: fp16, two in a word, [N, 32]."""
    twice = gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $1;",
        "=r,r",
        [(exponent << 23).to(gl.float32, bitcast=True)],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    codes, scale = gl.broadcast(codes, gl.expand_dims(twice, 1))
    first, second = gl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        .reg .b32 a, b;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 a, low;
        cvt.rn.f16x2.e4m3x2 b, high;
        mul.rn.f16x2 $0, a, $3;
        mul.rn.f16x2 $1, b, $3;
        }
        """,
        "=r,=r,r,r",
        [codes, scale],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    words = gl.reshape(gl.join(first, second), [codes.shape[0], 32])
    return gl.convert_layout(words, gl.BlockedLayout([1, 8], [8, 4], [gl.num_warps(), 1], [1, 0]))


@gluon.jit
def narrow(words):
    """bf16 to fp16, two in a word."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high;
        shl.b32 low, $1, 16;
        and.b32 high, $1, 0xffff0000;
        cvt.rn.f16x2.f32 $0, high, low;
        }
        """,
        "=r,r",
        [words],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _block(rows, b: gl.constexpr):
    return widen(rows[b], (rows[8] >> (8 * b)).to(gl.int32) & 0xFF)


@gluon.jit
def _beside(a, b):
    """[N, n] and [N, n] -> [N, 2n]; moves nothing between threads."""
    return gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@gluon.jit
def unpack(keys, rows):
    """Fetched rows to shared memory, words [N, CHANNELS / 2].  One store, since each is followed by a barrier."""
    a = _beside(_beside(_block(rows, 0), _block(rows, 1)), _beside(_block(rows, 2), _block(rows, 3)))
    b = _beside(_beside(_block(rows, 4), _block(rows, 5)), _beside(_block(rows, 6), narrow(rows[7])))
    keys.store(_beside(a, b))


@gluon.jit
def _pointers(base, stride, columns: gl.constexpr, LAYOUT: gl.constexpr):
    row = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, columns, gl.SliceLayout(0, LAYOUT))
    return base + row[:, None] * stride + column[None, :]


@gluon.jit
def _save(partial_ptr, stats_ptr, top, weight, acc):
    """The program's sum of chains so far: acc to partial [programs, HEADS, CHANNELS], top and weight to stats
    [programs, 2, HEADS].
    """
    SUMS: gl.constexpr = acc.type.layout
    program = gl.program_id(0).to(gl.int64)
    stats = stats_ptr + program * (2 * HEADS) + gl.arange(0, HEADS, ROWS)
    gl.store(stats, top)
    gl.store(stats + HEADS, weight)
    gl.store(_pointers(partial_ptr + program * (HEADS * CHANNELS), CHANNELS, acc.shape[1], SUMS), acc)


@gluon.jit
def _merge(partial_ptr, stats_ptr, top, weight, acc):
    """What was saved, and one more chain."""
    SUMS: gl.constexpr = acc.type.layout
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    program = gl.program_id(0).to(gl.int64)
    stats = stats_ptr + program * (2 * HEADS) + gl.arange(0, HEADS, ROWS)
    all_top, all_weight = gl.load(stats), gl.load(stats + HEADS)
    total = gl.load(_pointers(partial_ptr + program * (HEADS * CHANNELS), CHANNELS, acc.shape[1], SUMS))
    new = gl.maximum(all_top, top)
    a, b = gl.exp2(all_top - new), gl.exp2(top - new)
    a_row = gl.convert_layout(a, SUM_ROWS)[:, None]
    b_row = gl.convert_layout(b, SUM_ROWS)[:, None]
    acc, b_row = gl.broadcast(acc, b_row)
    return new, gl.fma(weight, b, all_weight * a), gl.fma(acc, b_row, total * a_row)


@gluon.jit
def _over_groups(pair_s, x, MAXIMUM: gl.constexpr):
    """Sum or maximum over the warp groups of x [HEADS, 2], each of which has its own: [HEADS] for both."""
    pair_s.store(x)
    pairs = pair_s.load(BOTH)
    if MAXIMUM:
        return gl.convert_layout(gl.max(pairs, 1), ROWS)
    else:
        return gl.convert_layout(gl.sum(pairs, 1), ROWS)


@gluon.jit
def _what(item, heads, chains, PARTS: gl.constexpr):
    """Part of the channels, chain, query, first of its 64 rows in q and out."""
    chain = item // PARTS % chains  # 0 of 1 if not SPLIT; as a constant it makes Triton 3.6 fail in its analysis
    rest = item // PARTS // chains
    t = rest // (heads // HEADS)
    return item % PARTS, chain, t, t * heads + rest % (heads // HEADS) * HEADS


@gluon.jit(do_not_specialize=["chains"])
def attention_hopper(
    q_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    window_ptr,
    window_scales,
    base_ptr,
    segments_ptr,
    segments_stride,
    selected_ptr,
    sink_ptr,
    phase_ptr,
    position_ptr,
    scale,
    ratio,
    ring,
    chosen,
    heads,
    items,
    chains,
    GATHER: gl.constexpr,
    SPLIT: gl.constexpr,
    PARTS: gl.constexpr,
    CHAIN: gl.constexpr,
):
    """Queries x blocks of 64 heads (x chains if SPLIT) x PARTS of the channels are items; programs take them in turn.

    SPLIT: every chain is an item of its own and leaves its sums, fp32, in partial [S, heads, chains, CHANNELS] and
    stats [S, heads, chains, 2].  Otherwise an item runs through all chains, and they are as `_save` says.
    """
    PART: gl.constexpr = CHANNELS // PARTS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, PART // 2, 16])
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    SPAN: gl.constexpr = PART // 8 if PART < 256 else 32
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [32 // SPAN, SPAN], [8, 1], [1, 0])
    q_s = gl.allocate_shared_memory(gl.float16, [HEADS, CHANNELS], WIDE)
    both = gl.allocate_shared_memory(gl.float16, [1, KEYS, CHANNELS], WIDE)
    p_s = gl.allocate_shared_memory(gl.float16, [HEADS, KEYS], WIDE)
    pair_s = gl.allocate_shared_memory(gl.float32, [HEADS, 2], PAIRS)
    keys = both.index(0)
    words = both._reinterpret(gl.int32, [1, KEYS, CHANNELS // 2], WORDS).index(0)
    words_a, words_b = words.slice(0, HALF, dim=0), words.slice(HALF, HALF, dim=0)
    key = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([HEADS, KEYS], gl.float32, SCORES)

    part, chain, t, row0 = _what(gl.program_id(0), heads, chains, PARTS)
    position = gl.load(position_ptr + t).to(gl.int32)
    base = gl.load(base_ptr + t).to(gl.int32)
    if not SPLIT:  # later items find their queries and windows in place
        number = gl.zeros([HALF], gl.int32, ROW_OF)
        rows_a = fetch(window_ptr, window_scales, segments_ptr, base, position, ring, -KEYS, number)
        rows_b = fetch(window_ptr, window_scales, segments_ptr, base, position, ring, -HALF, number)
        q_s.store(gl.load(_pointers(q_ptr + row0.to(gl.int64) * CHANNELS, CHANNELS, CHANNELS, PLAIN)).to(gl.float16))
        unpack(words_a, rows_a)
        unpack(words_b, rows_b)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        part, chain, t, row0 = _what(item, heads, chains, PARTS)
        _, _, next_t, next_row0 = _what(gl.minimum(item + gl.num_programs(0), items - 1), heads, chains, PARTS)
        next_position = gl.load(position_ptr + next_t).to(gl.int32)
        next_base = gl.load(base_ptr + next_t).to(gl.int32)
        end = gl.where(ratio > 0, (position + 1) // gl.maximum(ratio, 1), 0)
        if GATHER:
            end = gl.minimum(end, chosen)
        start = chain * CHAIN  # of the entries after the tile in shared memory
        if SPLIT:
            end = gl.minimum(end, start + CHAIN)
        if (chain == 0) | (start < end):
            segments = segments_ptr + t.to(gl.int64) * segments_stride
            selected = selected_ptr + t.to(gl.int64) * chosen
            values = both._reinterpret(gl.float16, [PARTS, KEYS, PART], WIDE).index(part)
            # Of the tile in shared memory the keys low .. high - 1 are seen.
            low = gl.maximum(KEYS - 1 - position, 0)
            high = KEYS
            if SPLIT:
                entry = start
                if chain == 0:
                    entry = -KEYS
                else:
                    low = 0
                    high = end - start
                    start += KEYS
                number_a = _numbers(selected, entry, end, GATHER)
                number_b = _numbers(selected, entry + HALF, end, GATHER)
                rows_a = fetch(window_ptr, window_scales, segments, base, position, ring, entry, number_a)
                rows_b = fetch(window_ptr, window_scales, segments, base, position, ring, entry + HALF, number_b)
                q_s.store(
                    gl.load(_pointers(q_ptr + row0.to(gl.int64) * CHANNELS, CHANNELS, CHANNELS, PLAIN)).to(gl.float16)
                )
                unpack(words_a, rows_a)
                unpack(words_b, rows_b)
            number_a = _numbers(selected, start, end, GATHER)
            number_b = _numbers(selected, start + HALF, end, GATHER)
            top = gl.full([HEADS], float("-inf"), gl.float32, ROWS)
            weight = gl.sum(gl.reshape(nothing, [HEADS, 2, HALF]), 2)
            acc = gl.zeros([HEADS, PART], gl.float32, SUMS)
            while start < end + KEYS:
                fence_async_shared()
                barrier()
                s = warpgroup_mma(q_s, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
                # After the last tile comes the next item's window.
                entry = gl.where(start < end, start, -KEYS)
                if SPLIT:
                    more = start < end
                else:
                    more = (start < end) | (item + gl.num_programs(0) < items)
                rows_a = fetch(window_ptr, window_scales, segments, next_base, next_position, ring, entry, number_a)
                s = warpgroup_mma_wait(0, [s])
                if (low > 0) | (high < KEYS):
                    bias = gl.where((key >= low) & (key < high), 0.0, float("-inf"))
                    s, bias = gl.broadcast(s, gl.expand_dims(bias, 0))
                    s += bias
                new = _over_groups(pair_s, gl.max(gl.reshape(s, [HEADS, 2, HALF]), 2), True)
                new = gl.maximum(top, gl.fma(new, gl.full_like(new, scale), gl.full_like(new, -LIFT)))
                old = gl.exp2(top - new)
                s, shift = gl.broadcast(s, (-new)[:, None])
                p = gl.exp2(gl.fma(s, gl.full_like(s, scale), shift))
                p_s.store(p.to(gl.float16))
                acc = acc * gl.convert_layout(old, SUM_ROWS)[:, None]
                top = new
                fence_async_shared()
                barrier()
                acc = warpgroup_mma(p_s.slice(0, HALF, dim=1), values.slice(0, HALF, dim=0), acc, is_async=True)
                acc = warpgroup_mma(p_s.slice(HALF, HALF, dim=1), values.slice(HALF, HALF, dim=0), acc, is_async=True)
                rows_b = fetch(
                    window_ptr, window_scales, segments, next_base, next_position, ring, entry + HALF, number_b
                )
                number_a = _numbers(selected, start + KEYS, end, GATHER)
                number_b = _numbers(selected, start + KEYS + HALF, end, GATHER)
                weight, old = gl.broadcast(
                    weight, gl.convert_layout(old, gl.SliceLayout(1, weight.type.layout))[:, None]
                )
                weight = gl.fma(weight, old, gl.sum(gl.reshape(p, [HEADS, 2, HALF]), 2))
                low = 0
                high = end - start
                acc = warpgroup_mma_wait(1, [acc])
                barrier()
                if more:
                    unpack(words_a, rows_a)
                acc = warpgroup_mma_wait(0, [acc])
                barrier()
                if more:
                    unpack(words_b, rows_b)
                if not SPLIT:
                    if (start % CHAIN == 0) & (start > 0) & (start < end):  # a chain ends and another one follows
                        total_weight = _over_groups(pair_s, weight, False)
                        if start > CHAIN:
                            top, total_weight, acc = _merge(partial_ptr, stats_ptr, top, total_weight, acc)
                            barrier()  # several threads hold a head
                        _save(partial_ptr, stats_ptr, top, total_weight, acc)
                        top = gl.full([HEADS], float("-inf"), gl.float32, ROWS)
                        weight = gl.sum(gl.reshape(nothing, [HEADS, 2, HALF]), 2)
                        acc = gl.zeros([HEADS, PART], gl.float32, SUMS)
                start += KEYS

            total_weight = _over_groups(pair_s, weight, False)
            if SPLIT:
                place = (row0.to(gl.int64) * chains + chain) * CHANNELS + part * PART
                gl.store(_pointers(partial_ptr + place, chains * CHANNELS, PART, SUMS), acc)
                stats = stats_ptr + ((row0 + gl.arange(0, HEADS, ROWS)).to(gl.int64) * chains + chain) * 2
                gl.store(stats, top)
                gl.store(stats + 1, total_weight)
            else:
                if end > CHAIN:
                    top, total_weight, acc = _merge(partial_ptr, stats_ptr, top, total_weight, acc)
                sink = gl.load(sink_ptr + row0 % heads + gl.arange(0, HEADS, ROWS))
                share = 1.0 / (total_weight + gl.exp2(sink * LOG2E - top))
                acc = acc * gl.convert_layout(share, SUM_ROWS)[:, None]
                real, imaginary = gl.split(gl.reshape(acc, [HEADS, PART // 2, 2]))
                TURNED: gl.constexpr = gl.SliceLayout(0, real.type.layout)
                pair = part * (PART // 2) + gl.arange(0, PART // 2, TURNED) - VALUES // 2
                angle = phase_ptr + t * ROPE + 2 * pair
                real, cos = gl.broadcast(real, gl.load(angle, mask=pair >= 0, other=1.0)[None, :])
                real, sin = gl.broadcast(real, gl.load(angle + 1, mask=pair >= 0, other=0.0)[None, :])
                back = gl.join(gl.fma(real, cos, imaginary * sin), gl.fma(imaginary, cos, -(real * sin)))
                o = gl.convert_layout(gl.reshape(back, [HEADS, PART]), SUMS)
                o_s = q_s.slice(0, PART, dim=1)  # of fp16, which takes bf16's bits as well
                o_s.store(o.to(gl.bfloat16).to(gl.float16, bitcast=True))
                q = gl.load(_pointers(q_ptr + next_row0.to(gl.int64) * CHANNELS, CHANNELS, CHANNELS, PLAIN))
                out = _pointers(out_ptr + row0.to(gl.int64) * CHANNELS + part * PART, CHANNELS, PART, STORED)
                gl.store(out, o_s.load(STORED).to(gl.bfloat16, bitcast=True))
                q_s.store(q.to(gl.float16))
        position, base = next_position, next_base
