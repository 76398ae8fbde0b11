"""Scores of one query with many FP4 keys on compute capability 9.0, in Gluon: keys go from memory straight into the
registers from which the tensor cores take them, all of a program's at once.

A thread has the words of four bytes of two keys that `wgmma` wants from it; low nibbles are the even channels, which
come first in the query, high nibbles the odd ones.  Products and sums as index._scores has them, hence the same bits.
Letters: H heads, R keys of a tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .packing import nibbles_to_e4m3
from .rows import SEGMENT_ROWS
from .staging import barrier

R = gl.constexpr(64)
_SEGMENT = gl.constexpr(SEGMENT_ROWS)
_ROW = gl.constexpr(17)  # words of a row: 16 of codes, one of scales
CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 4], [0, 8], [8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 16]
    )
)
BYTES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 4, 0], [0, 8, 0], [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 16, 4],
    )
)
QUERY = gl.constexpr(gl.NVMMASharedLayout(128, 8))
_EXACT = gl.constexpr(11)  # halvings up to which none becomes subnormal


@gluon.jit
def _operand(words, OPERAND: gl.constexpr):
    """Words as the tensor cores' first operand, e4m3 [R, 64]: a word stands for its four bytes."""
    zero = gl.zeros([R, 16, 4], gl.int32, BYTES)
    words = gl.convert_layout(words, gl.SliceLayout(2, BYTES), assert_trivial=True)
    codes = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r,r,r,r",
        [gl.expand_dims(words, 2) + zero],
        dtype=gl.uint8,
        is_pure=True,
        pack=4,
    )
    ready = gl.reshape(codes, [R, 64]).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(ready, OPERAND, assert_trivial=True)


@gluon.jit
def _most(scales):
    """The largest of the four bytes of each."""
    return gl.maximum(
        gl.maximum(scales & 0xFF, (scales >> 8) & 0xFF), gl.maximum((scales >> 16) & 0xFF, (scales >> 24) & 0xFF)
    )


@gluon.jit
def _score_tiles(
    codes,
    scales,
    q_s,
    weight,
    values_ptr,
    score_ptr,
    largest_ptr,
    visible,
    HEADS: gl.constexpr,
    TILES: gl.constexpr,
    UNIT: gl.constexpr,
    APART: gl.constexpr,
):
    """What is left once the keys are there; everything counts from the program's first key."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    KEYS_OF: gl.constexpr = gl.SliceLayout(1, SUMS)
    word = gl.arange(0, 16, gl.SliceLayout(0, CODES))
    nothing = gl.zeros([R, HEADS], gl.float32, SUMS)
    best = gl.full([R], float("-inf"), gl.float32, KEYS_OF)
    for tile in gl.static_range(TILES):
        most = _most(scales[tile])
        halvings = ((most * 0x01010101 - scales[tile])[:, None] >> (word // 4 * 8)[None, :]) & 0xFF
        low = 0x6C686000 - halvings * 0x08080800
        high = 0x7C787470 - halvings * 0x08080808
        if APART:
            rare = halvings > _EXACT
            values = gl.load(values_ptr + gl.minimum(halvings, 31), mask=rare, other=0)
            low = gl.where(rare, values.to(gl.int32), low)
            high = gl.where(rare, (values >> 32).to(gl.int32), high)
        even, odd = nibbles_to_e4m3(codes[tile], low, high, True)
        first_half, second_half = q_s.slice(0, 64, dim=1), q_s.slice(64, 64, dim=1)
        d = warpgroup_mma(_operand(even, OPERAND), first_half.permute((1, 0)), nothing, use_acc=False, is_async=True)
        d = warpgroup_mma(_operand(odd, OPERAND), second_half.permute((1, 0)), d, is_async=True)
        d = warpgroup_mma_wait(0, [d])
        d, each = gl.broadcast(gl.maximum(d, 0.0), weight[None, :])
        total = gl.reshape(gl.sum(gl.reshape(d * each, [R, 1, HEADS]), 2), [R])
        most = gl.convert_layout(most, KEYS_OF)
        total = gl.convert_layout(total, KEYS_OF)
        total = total * gl.exp2((most - 133).to(gl.float32)) + 0.0  # no -0.0: it ties with 0
        key = tile * R + gl.arange(0, R, KEYS_OF)
        total = gl.where(key < visible, total, float("-inf"))
        gl.store(score_ptr + key, total, mask=key < visible)
        start = tile * R
        if UNIT < R:
            largest = gl.max(gl.reshape(total, [R // UNIT, UNIT]), 1)
            unit = start // UNIT + gl.arange(0, R // UNIT, largest.type.layout)
            gl.store(largest_ptr + unit, largest, mask=unit * UNIT < visible)
        else:
            best = gl.maximum(best, total)
            if (start + R) % UNIT == 0:
                gl.store(largest_ptr + start // UNIT, gl.max(best, 0), mask=start // UNIT * UNIT < visible)
                best = gl.full([R], float("-inf"), gl.float32, KEYS_OF)


@gluon.jit(do_not_specialize=["heads", "ratio"])
def score_far_hopper(
    q_ptr,
    weight_ptr,
    segments_ptr,
    values_ptr,
    position_ptr,
    score_ptr,
    largest_ptr,
    heads,
    ratio,
    HEADS: gl.constexpr,
    TILES: gl.constexpr,
    UNIT: gl.constexpr,
):
    """Scores of one query with TILES x 64 keys of one segment, and the largest of every UNIT (of 128 at most).

    Keys are fetched while the kernels in front run, but for those of the program whose last key may be this token's.
    """
    gdc_launch_dependents()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, CODES)
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    visible = ((gl.load(position_ptr) + 1) // ratio).to(gl.int32)
    first = gl.program_id(0) * (R * TILES)
    if first + R * TILES >= visible:
        gdc_wait()
    if first < visible:
        segment = gl.load(segments_ptr + first // _SEGMENT)
        anchor = segments_ptr.to(gl.pointer_type(gl.int32))
        anchor += (segment - segments_ptr.to(gl.int64)) // 4 + (first % _SEGMENT) * _ROW
        row = gl.arange(0, R, ROWS)
        word = gl.arange(0, 16, gl.SliceLayout(0, CODES))
        codes, scales = (), ()
        for tile in gl.static_range(TILES):
            at = anchor + (tile * R + row) * _ROW
            shown = first + tile * R + row < visible
            scales += (gl.load(at + 16, mask=shown, other=0),)  # type: ignore[assignment]
            codes += (gl.load(at[:, None] + word[None, :], mask=shown[:, None], other=0),)  # type: ignore[assignment]
        gdc_wait()
        q_s = gl.allocate_shared_memory(gl.float8e4nv, [HEADS, 128], QUERY)
        head = gl.arange(0, HEADS, gl.SliceLayout(1, PLAIN))
        channel = gl.arange(0, 128, gl.SliceLayout(0, PLAIN))
        q = gl.load(q_ptr + head[:, None] * 128 + channel[None, :], mask=(head < heads)[:, None], other=0.0)
        q_s.store(q)
        column = gl.arange(0, HEADS, gl.SliceLayout(0, SUMS))
        weight = gl.load(weight_ptr + column, mask=column < heads, other=0.0)
        fence_async_shared()
        barrier()
        # Are a key's scales so far apart anywhere that codes become subnormal?
        apart = gl.zeros([R], gl.int32, ROWS)
        for tile in gl.static_range(TILES):
            halvings = _most(scales[tile]) * 0x01010101 - scales[tile]
            apart |= (halvings | (halvings + 0x74747474)) & -0x7F7F7F80  # the highest bit of each byte above 11
        apart = gl.max((apart != 0).to(gl.int32), 0)
        place = score_ptr + first, largest_ptr + first // UNIT
        if apart > 0:
            _score_tiles(
                codes, scales, q_s, weight, values_ptr, place[0], place[1], visible - first, HEADS, TILES, UNIT, True
            )
        else:
            _score_tiles(
                codes, scales, q_s, weight, values_ptr, place[0], place[1], visible - first, HEADS, TILES, UNIT, False
            )
