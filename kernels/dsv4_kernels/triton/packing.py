"""What the kernels that write cache rows and index queries share: rounding to bf16 and e2m1, RoPE, the Hadamard turn.

Bit for bit the bytes of dsv4_engine.formats; the layout of rows on the GPU is in rows.py.  Knows no model.
Letters: N rows, C channels, B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..rounding import FP4_AMAX_FLOOR
from .rounded import INTERPRETED, round_block

PDL = not triton.knobs.runtime.interpret  # launches overlap (programmatic dependent launch, see `begin`)

_FP4_FLOOR = tl.constexpr(FP4_AMAX_FLOOR)
# Triton's interpreter cuts bf16 off where a GPU rounds, and multiplies its bits as integers.


def check_inputs(*expected: tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]) -> None:
    """Raise ValueError for a tensor, given by name, that has another dtype or shape or is not contiguous."""
    for name, tensor, dtype, shape in expected:
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous()):
            raise ValueError(
                f"on the GPU {name} must be {dtype} {list(shape)} and contiguous, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )


@triton.jit
def begin():
    """Let the next kernel take its place, then wait for the one before: what a kernel launched with PDL does first.

    Every program has to come here, since the kernel after next relies on it.
    """
    if not INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def begin_alone():
    """As `begin`, but the next kernel takes its place only once the one before has ended.

    A large kernel that waits keeps the device from what other streams have ready.
    """
    if not INTERPRETED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(pointer, BYTES: tl.constexpr, LINES: tl.constexpr):
    """Start to bring up to LINES x 128 bytes to the L2 cache: weights, which need not wait for the kernel before."""
    if not INTERPRETED:
        line = tl.arange(0, LINES) * 128
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $2, $3; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [pointer.to(tl.int64) + line, line, tl.full([LINES], BYTES, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def to_bf16(x):
    """float32 to bf16, to nearest, ties to even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, even, 0x7FC00000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    # A plain cast whose result is used again in float32 takes one value at a time, at a quarter of the rate.
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def pinned(x):
    """bf16 ``x`` as it is.  The compiler may not compute it twice, once for each layout that its readers want."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def product(a, b):
    """a b in float32, rounded, wherever it goes: a plain product may or may not become part of a sum behind it."""
    if INTERPRETED:
        return a * b
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def bf16_dot(a, b, acc):
    """acc + a b for bf16 a and b, products exact, sums in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def turn(x, phase_ptr, FIRST: tl.constexpr):
    """x float32 [N, C] with the 64 channels from FIRST on turned by phases, float32 pairs (cos, sin) [32, 2]."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    real, imaginary = tl.split(tl.reshape(x, (rows, width // 2, 2)))
    pair = tl.arange(0, width // 2) - FIRST // 2
    turned = (pair >= 0) & (pair < 32)
    cos = tl.load(phase_ptr + 2 * pair, mask=turned, other=1.0)[None, :]
    sin = tl.load(phase_ptr + 2 * pair + 1, mask=turned, other=0.0)[None, :]
    both = tl.join(tl.fma(real, cos, -(imaginary * sin)), tl.fma(imaginary, cos, real * sin))
    return tl.reshape(both, (rows, width))


@triton.jit
def hadamard(x):
    """Walsh-Hadamard transform of the rows of float32 [N, C], C a power of two from 64 on, scaled by C^-0.5.

    At least 16 rows.  One row, and one row copied to 16, came out wrong inside the compressor's kernel on a GPU with
    Triton 3.6 (alone they come out right), for a reason not yet found; `hadamard_of_one` is for those.
    """
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    tl.static_assert(rows >= 16)
    # Three bits of an index lie in one thread: neighbours are added, and the bit moves from the lowest place of the
    # three to the highest.
    for _ in tl.static_range(3):
        a, b = tl.split(tl.reshape(x, (rows, width // 8, 4, 2)))
        x = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    x = tl.reshape(x, (rows, width // 8, 8))
    # The others lie in other threads of the warp, which exchange values.
    place = tl.arange(0, width // 8)[None, :, None]
    for bit in tl.static_range(12):
        if 8 << bit < width:
            other = tl.gather(x, tl.broadcast_to(place ^ (1 << bit), x.shape), 1)
            x = tl.where((place >> bit) & 1 == 1, other - x, x + other)
    return tl.reshape(x, (rows, width)) * (width**-0.5)


@triton.jit
def _signed(i, j, x):
    """x times the Hadamard matrix' sign at row i and column j: the parity of the bits they share."""
    bits = i & j
    bits ^= bits >> 4
    bits ^= bits >> 2
    return tl.where(((bits ^ (bits >> 1)) & 1) == 1, -x, x)


@triton.jit
def hadamard_of_one(x):
    """`hadamard` of one row, float32 [C], C up to 4096: two sums, over the high and over the low four index bits."""
    width: tl.constexpr = x.shape[0]
    high = tl.arange(0, width // 16)
    low = tl.arange(0, 16)
    x = tl.reshape(x, (width // 16, 16))
    x = tl.sum(_signed(high[:, None, None], high[None, :, None], x[None, :, :]), 1)
    x = tl.sum(_signed(low[None, :, None], low[None, None, :], x[:, None, :]), 2)
    return tl.reshape(x, (width,)) * (width**-0.5)


@triton.jit
def e2m1_scale(x):
    """float32 [N, 32] -> the power of two [N] that `round_fp4` divides by; infinity where the block is not finite."""
    amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    bits = tl.maximum(amax, _FP4_FLOOR).to(tl.int32, bitcast=True)
    # 2^ceil(log2(amax / 6)), 6 = 1.5 x 2^2: a mantissa above 1.5 carries into the exponent.
    bits = ((bits + 0x3FFFFF) & 0x7F800000) - (2 << 23)
    return tl.where(amax == float("inf"), float("inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def inverse_of(scale):
    """1 / scale for powers of two, exact; 0 for infinity."""
    bits = 0x7F000000 - scale.to(tl.int32, bitcast=True)
    return tl.where(scale == float("inf"), 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def to_e2m1(v):
    """float32 within +-6 to its e2m1 code, to nearest, ties to even: int32."""
    m = tl.abs(v)
    code = (m > 0.25).to(tl.int32) + (m >= 0.75).to(tl.int32) + (m > 1.25).to(tl.int32) + (m >= 1.75).to(tl.int32)
    code += (m > 2.5).to(tl.int32) + (m >= 3.5).to(tl.int32) + (m > 5.0).to(tl.int32)
    return code | ((v.to(tl.int32, bitcast=True) >> 28) & 8)


# A word of eight e2m1 codes ($2) to the words of its low and its high nibbles as e4m3.  $3 and HIGH: the bytes that
# magnitudes 0 to 3 and 4 to 7 become.
_NIBBLES = """
{
.reg .b32 magnitude, high, low, first, second, sign;
and.b32 magnitude, $2, 0x77777777;
shr.u32 high, magnitude, 16;
prmt.b32 first, $3, HIGH, magnitude;
prmt.b32 second, $3, HIGH, high;
prmt.b32 low, first, second, 0x6420;
prmt.b32 high, first, second, 0x7531;
shl.b32 sign, $2, 4;
lop3.b32 $0, sign, 0x80808080, low, 0xea;
lop3.b32 $1, $2, 0x80808080, high, 0xea;
}
"""
_TO_E4M3, _TO_E4M3_BY_FOUR = tl.constexpr(_NIBBLES.replace("HIGH", "$4")), tl.constexpr(_NIBBLES.replace("HIGH", "$7"))


@triton.jit
def from_e2m1(code, values):
    """e2m1 codes, two a byte, as e4m3: those of the low and those of the high nibbles, uint8 each.

    values: int64, the eight magnitudes as e4m3 with which a code's three bits pick their byte; broadcastable to code.
    """
    if INTERPRETED:
        code = code.to(tl.int32)
        even = ((values >> ((code & 7) * 8).to(tl.int64)) & 0xFF).to(tl.int32) | ((code & 8) << 4)
        odd = ((values >> ((code >> 4 & 7) * 8).to(tl.int64)) & 0xFF).to(tl.int32) | (code & 0x80)
        return even.to(tl.uint8), odd.to(tl.uint8)
    else:
        code, values = tl.broadcast(code, values)
        return tl.inline_asm_elementwise(
            _TO_E4M3_BY_FOUR,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [code, values.to(tl.int32), (values >> 32).to(tl.int32)],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )


@gluon.jit
def nibbles_to_e4m3(code, low, high, PURE: gl.constexpr):
    """Words of eight e2m1 codes as e4m3: the low nibbles' word and the high ones'.

    low, high: the bytes that magnitudes 0 to 3 and 4 to 7 become (see `from_e2m1`).  PURE: the compiler may move it.
    """
    return gl.inline_asm_elementwise(
        _TO_E4M3,
        "=r,=r,r,r,r",
        [code, low, high],
        dtype=(gl.int32, gl.int32),
        is_pure=PURE,
        pack=1,
    )


@triton.jit
def store_row(x, values_ptr, scales_ptr, phase_ptr, CHANNELS: tl.constexpr):
    """A normed row, float32 [B, 64], turned, rounded and written: CHANNELS + 64 bytes of values, the scales' bytes.

    Only the last 64 channels are turned and kept in bf16.
    """
    blocks: tl.constexpr = x.shape[0]
    LAST: tl.constexpr = CHANNELS // 64 - 1
    SCALES: tl.constexpr = (LAST + 7) // 8 * 8
    block = tl.arange(0, blocks)
    column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    code, scale = round_block(x)
    tl.store(values_ptr + column, code.to(tl.uint8, bitcast=True), mask=(block < LAST)[:, None])
    rope = turn(tl.sum(tl.where((block == LAST)[:, None], x, 0.0), 0)[None, :], phase_ptr, 0)
    place = (values_ptr + LAST * 64).to(tl.pointer_type(tl.bfloat16)) + tl.arange(0, 64)[None, :]
    tl.store(place, to_bf16(rope))
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    tl.store(scales_ptr + block, exponent.to(tl.uint8), mask=block < LAST)
    padding = tl.arange(0, 8) + LAST
    tl.store(scales_ptr + padding, tl.zeros([8], tl.uint8), mask=padding < SCALES)


@triton.jit
def store_index_key(x, row_ptr, CHANNELS: tl.constexpr):
    """A turned index key, float32 [1, CHANNELS], through the Hadamard turn to e2m1: CHANNELS / 2 bytes, then scales."""
    BLOCKS: tl.constexpr = CHANNELS // 32
    x = tl.reshape(hadamard_of_one(tl.reshape(x, (CHANNELS,))), (BLOCKS, 32))
    scale = e2m1_scale(x)
    low, high = tl.split(tl.reshape(to_e2m1(x * inverse_of(scale)[:, None]), (BLOCKS, 16, 2)))
    block = tl.arange(0, BLOCKS)
    place = row_ptr + block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(place, (low | (high << 4)).to(tl.uint8))
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    tl.store(row_ptr + CHANNELS // 2 + block, exponent.to(tl.uint8))
