"""The experts' products in plain Triton: for every GPU but those of compute capability 9.0 (moe_few.py, moe_many.py),
and for Triton's interpreter.  Knows nothing of routing; reads the tables that moe_route.py makes.

FP4 codes become e4m3 relative to the largest scale of their matrix row, which moe.check_pool knows to be exact.  Per
128 inputs one FP8 product starts from zero and is added, times the token's scale, in order, in float32.
Letters: N pairs of a tile, R matrix rows of a program, E experts, D hidden, I expert hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounded import round_block

BLOCK = 128  # inputs whose products the tensor cores add up; as many share an activation's scale


@triton.jit
def code_table(shift):
    """The eight e2m1 magnitudes times 2^(6 - shift) as e4m3, one a byte, rounded to even below 2^-9: two int32."""
    low = tl.zeros_like(shift)
    high = tl.zeros_like(shift)
    for m in tl.static_range(1, 8):
        # Twice the magnitude is 1, 2, 3, 4, 6, 8, 12; its value below is exact in float32.
        twice: tl.constexpr = m if m < 4 else (4 if m == 4 else (6 if m == 5 else (8 if m == 6 else 12)))
        bits = ((127 + 5 - shift) << 23).to(tl.float32, bitcast=True) * twice
        # e4m3's normals keep float32's top three mantissa bits; below 2^-6 adding 2^14 rounds to multiples of 2^-9.
        normal = ((bits.to(tl.int32, bitcast=True) >> 20) & 0x7FF) - (120 << 3)
        small = (bits + 16384.0).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(bits < 0.015625, small, normal)
        if m < 4:
            low |= code << (8 * m)
        else:
            high |= code << (8 * (m - 4))
    return low, high


@triton.jit
def _weights(w_ptr, s_ptr, row, column, width, largest, FP8: tl.constexpr):
    """Matrix rows ``row`` [R], inputs ``column`` .. + BLOCK, as e4m3 [R, BLOCK]."""
    R: tl.constexpr = row.shape[0]
    if FP8:
        return tl.load(w_ptr + row[:, None] * width + column + tl.arange(0, 128)[None, :])
    else:
        code = tl.load(w_ptr + row[:, None] * (width // 2) + column // 2 + tl.arange(0, 64)[None, :]).to(tl.int32)
        exponent = tl.load(s_ptr + row[:, None] * (width // 32) + column // 32 + tl.arange(0, 4)[None, :])
        low, high = code_table(tl.minimum(largest[:, None] - exponent.to(tl.int32), 31))
        low = tl.reshape(tl.broadcast_to(low[:, :, None], [R, 4, 16]), [R, 64])
        high = tl.reshape(tl.broadcast_to(high[:, :, None], [R, 4, 16]), [R, 64])
        even = (tl.where((code & 4) != 0, high, low) >> ((code & 3) * 8)) & 0x7F | ((code & 8) << 4)
        odd = (tl.where((code & 64) != 0, high, low) >> (((code >> 4) & 3) * 8)) & 0x7F | (code & 128)
        both = tl.reshape(tl.join(even, odd), [R, 128]).to(tl.uint8)
        return both.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _products(x_ptr, x_scale_ptr, x_row, real, w_ptr, s_ptr, row, width, COLUMNS: tl.constexpr, FP8: tl.constexpr):
    """Matrix rows ``row`` (int64 [R]) times rows ``x_row`` (int64 [N]) of the activations: float32 [R, N]."""
    acc = tl.zeros([row.shape[0], x_row.shape[0]], tl.float32)
    largest = tl.zeros([row.shape[0]], tl.int32)
    if not FP8:
        group = tl.arange(0, COLUMNS // 32)[None, :]
        exponent = tl.load(s_ptr + row[:, None] * (width // 32) + group, mask=group < width // 32, other=0)
        largest = tl.max(exponent.to(tl.int32), 1)
    for column in range(0, width, 128):
        x = tl.load(x_ptr + x_row[None, :] * width + column + tl.arange(0, 128)[:, None], mask=real[None, :], other=0.0)
        scale = tl.load(x_scale_ptr + x_row * (width // 128) + column // 128, mask=real, other=0.0)[None, :]
        w = _weights(w_ptr, s_ptr, row, column, width, largest, FP8)
        if FP8:
            exponent = tl.load(s_ptr + row // 128 * (width // 128) + column // 128).to(tl.int32)
            scale = scale * (exponent << 23).to(tl.float32, bitcast=True)[:, None]
        acc += tl.dot(w, x) * scale
    if not FP8:
        acc = acc * (tl.maximum(largest - 6, 0) << 23).to(tl.float32, bitcast=True)[:, None]
    return acc


@triton.jit
def _tile(tiles_ptr, slots_ptr, order_ptr, tile, N: tl.constexpr):
    """A tile's slot, first place, pairs (int32 [N]) and which of them are real."""
    count = tl.load(tiles_ptr + tile * 3 + 2)
    place = tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, N)
    slot = tl.load(slots_ptr + tl.load(tiles_ptr + tile * 3)).to(tl.int64)
    real = tl.arange(0, N) < count
    return slot, place, tl.load(order_ptr + place, mask=real, other=0), real


@triton.jit
def gate_up(
    x_ptr,
    x_scale_ptr,
    weights_ptr,
    w_ptr,
    s_ptr,
    slots_ptr,
    tiles_ptr,
    order_ptr,
    hidden_ptr,
    hidden_scale_ptr,
    inputs,
    hidden,
    limit,
    K: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
):
    """128 values of silu(min(gate, limit)) clamp(up) weight, rounded, for a tile of pairs; rows by place in order."""
    tile = tl.program_id(0) // (hidden // 128)
    block = tl.program_id(0) % (hidden // 128)
    if tl.load(tiles_ptr + tile * 3 + 2) > 0:
        slot, place, pair, real = _tile(tiles_ptr, slots_ptr, order_ptr, tile, N)
        row = slot * 2 * hidden + block * 128 + tl.arange(0, 128)
        x_row = (pair // K).to(tl.int64)
        gate = _products(x_ptr, x_scale_ptr, x_row, real, w_ptr, s_ptr, row, inputs, COLUMNS, FP8)
        up = _products(x_ptr, x_scale_ptr, x_row, real, w_ptr, s_ptr, row + hidden, inputs, COLUMNS, FP8)
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.load(weights_ptr + pair, mask=real, other=0.0)
        value = gate / (1.0 + tl.exp(-gate)) * up * weight[None, :]
        data, scale = round_block(value, 0)
        to = place.to(tl.int64)
        out = hidden_ptr + to[None, :] * hidden + block * 128 + tl.arange(0, 128)[:, None]
        tl.store(out, data, mask=real[None, :])
        tl.store(hidden_scale_ptr + to * (hidden // 128) + block, scale, mask=real)


@triton.jit
def down(
    hidden_ptr,
    hidden_scale_ptr,
    w_ptr,
    s_ptr,
    slots_ptr,
    tiles_ptr,
    order_ptr,
    out_ptr,
    outputs,
    hidden,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
):
    """128 outputs for a tile of pairs; rows of ``out`` by pair."""
    tile = tl.program_id(0) // (outputs // 128)
    block = tl.program_id(0) % (outputs // 128)
    if tl.load(tiles_ptr + tile * 3 + 2) > 0:
        slot, place, pair, real = _tile(tiles_ptr, slots_ptr, order_ptr, tile, N)
        row = slot * outputs + block * 128 + tl.arange(0, 128)
        acc = _products(hidden_ptr, hidden_scale_ptr, place.to(tl.int64), real, w_ptr, s_ptr, row, hidden, COLUMNS, FP8)
        out = out_ptr + pair.to(tl.int64)[None, :] * outputs + block * 128 + tl.arange(0, 128)[:, None]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=real[None, :])
