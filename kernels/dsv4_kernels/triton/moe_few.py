"""The experts' products for few tokens on compute capability 9.0, in Gluon: matrices go from memory straight into the
registers from which the tensor cores take them; and what moe_many.py shares with it.  Knows nothing of routing; reads
the tables that moe_route.py makes.

A thread's share of 128 inputs of a row, as `wgmma` wants it, is 32 inputs: with FP4 16 adjacent bytes that share one
scale.  That needs another order of the inputs within 128 (`reordered`), in which the activations are brought.  Codes
become e4m3 relative to the largest scale of their row.  Per 128 inputs one product starts from zero and is added, times
the token's scale, in order, in float32; tokens are the columns, so a token's bits do not depend on how many there are.
Letters: N pairs of a tile, R matrix rows of a program, D hidden, I expert hidden.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..rounding import FP8_AMAX_FLOOR
from .packing import nibbles_to_e4m3

FEW = gl.constexpr(8)  # pairs of a tile of `few`: the fewest columns of wgmma
FLOOR = gl.constexpr(FP8_AMAX_FLOOR)
E4M3_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8))


@gluon.constexpr_function
def warp_rows(warps, columns):
    """Bases of the warps of a tile whose warp has 16 rows."""
    return [[16 << i] + [0] * columns for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def codes_layout(warps, fp8):
    """128 inputs of 16 x warps rows in words of four bytes: a thread has a quarter of row r and of row r + 8."""
    count = 3 if fp8 else 2
    registers = [[0, 1 << i] for i in range(count)] + [[8, 0]]
    lanes = [[0, 1 << count], [0, 2 << count], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_rows(warps, 1), [], [16 * warps, 4 << count])


@gluon.constexpr_function
def scales_layout(warps, burst):
    """FP4 scales of `burst` blocks, four in a word: every thread has those of its rows."""
    registers = [[0, 1 << i] for i in range(burst.bit_length() - 1)] + [[8, 0]]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_rows(warps, 1), [], [16 * warps, burst])


@gluon.constexpr_function
def rows_layout(count):
    """Words of whole rows, for `all_scales`; four warps."""
    return gl.BlockedLayout([1, min(4, 1 << (count - 1).bit_length())], [4, 8], [4, 1], [1, 0])


@gluon.constexpr_function
def bytes_layout(warps):
    """Half of their inputs as bytes: quarter, group of eight inputs, every other one of them."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [8, 0, 0, 0]]
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_rows(warps, 3), [], [16 * warps, 4, 4, 4])


@gluon.constexpr_function
def staged_layout(blocks, warps):
    """128 inputs of `blocks` x 8 rows: a thread has 8 inputs of 8 rows; four warps have 8 blocks at most."""
    registers = [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    threads = [[0, 8], [0, 16], [0, 32], [0, 64]] + [[8 << i, 0] if 1 << i < blocks else [0, 0] for i in range(3)]
    return gl.DistributedLinearLayout(registers, threads[:5], threads[5:], [], [8 * blocks, 128])


@gluon.jit
def reordered(x):
    """Inputs 32q + 8c + 2j + h of [rows, 128] at 32c + 16h + 4q + j."""
    rows: gl.constexpr = x.shape[0]
    x = gl.permute(gl.reshape(x, [rows, 4, 4, 4, 2]), (0, 2, 4, 1, 3))
    return gl.reshape(x, [rows, 128])


@gluon.jit
def rounded(x):
    """As rounded.round_block: float32 [rows, 128] to e4m3 and scale [rows]."""
    amax = gl.max(gl.abs(x), 1)
    bits = gl.maximum(amax, FLOOR).to(gl.int32, bitcast=True)
    bits = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    endless = amax == float("inf")
    inverse = gl.where(endless, 0.0, (0x7F000000 - bits).to(gl.float32, bitcast=True))
    scale = gl.where(endless, float("inf"), bits.to(gl.float32, bitcast=True))
    x, inverse = gl.broadcast(x, gl.expand_dims(inverse, 1))
    return (x * inverse).to(gl.float8e4nv), scale


@gluon.jit
def matrix_row(row, first, hidden, GATED: gl.constexpr):
    """Matrix row of a tile's row: GATED, of every 16 eight are gate rows and eight the up rows beside them."""
    if GATED:
        return first + row // 16 * 8 + row % 8 + row // 8 % 2 * hidden
    else:
        return first + row


@gluon.jit
def unpack(code, scales, largest, table_ptr, BYTES: gl.constexpr, FP8: gl.constexpr):
    """Words of codes of 128 inputs of R rows as e4m3, four in a word: even and odd inputs, int32 [R, 4, 4] each.

    scales: for FP4 int32 [R], the four of a row; a thread needs that of its quarter.
    """
    R: gl.constexpr = code.shape[0]
    WORDS: gl.constexpr = gl.SliceLayout(3, BYTES)
    # Not pure: what is pure is moved behind the products beside which it should run.
    if FP8:
        first, second = gl.split(gl.reshape(code, [R, 4, 4, 2]))
        return gl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;",
            "=r,=r,r,r",
            [
                gl.convert_layout(first, WORDS, assert_trivial=True),
                gl.convert_layout(second, WORDS, assert_trivial=True),
            ],
            dtype=(gl.int32, gl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        QUARTERS: gl.constexpr = gl.SliceLayout(2, WORDS)
        quarter = gl.arange(0, 4, gl.SliceLayout(0, QUARTERS))
        scales = gl.convert_layout(scales, gl.SliceLayout(1, QUARTERS), assert_trivial=True)
        exponent = (scales[:, None] >> (quarter * 8)[None, :]) & 0xFF
        # Unsigned, so that scales left over from other rows (`many`, after its last block) stay within the table.
        shift = gl.minimum((largest[:, None] - exponent).to(gl.uint32, bitcast=True), 31)
        values = gl.load(table_ptr + shift)
        code = gl.convert_layout(gl.reshape(code, [R, 4, 4]), WORDS, assert_trivial=True)
        code, low = gl.broadcast(code, gl.expand_dims(values.to(gl.int32), 2))
        code, high = gl.broadcast(code, gl.expand_dims((values >> 32).to(gl.int32), 2))
        return nibbles_to_e4m3(code, low, high, False)


@gluon.jit
def operand(words, OPERAND: gl.constexpr, BYTES: gl.constexpr):
    """What `unpack` gave as the tensor cores' first operand: e4m3 [R, 128], inputs reordered."""
    R: gl.constexpr = words[0].shape[0]
    zero = gl.zeros([R, 4, 4, 4], gl.int32, BYTES)  # a word stands for its four bytes
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, $6;",
        "=r,=r,r,r,r,r,r,r,r,r",
        [gl.expand_dims(words[0], 3) + zero, gl.expand_dims(words[1], 3) + zero],
        dtype=(gl.uint8, gl.uint8),
        is_pure=True,
        pack=4,
    )
    ready = gl.reshape(gl.permute(gl.join(even, odd), (0, 2, 4, 1, 3)), [R, 128])
    return gl.convert_layout(ready.to(gl.float8e4nv, bitcast=True), OPERAND, assert_trivial=True)


@gluon.jit
def _fetch(
    codes, scales, block, BURST: gl.constexpr, COUNT: gl.constexpr, HALVES: gl.constexpr, APART: gl.constexpr,
    FP8: gl.constexpr
):  # fmt: skip
    """BURST blocks of 128 inputs from ``block`` on in registers: their words of codes, and FP4's scales, int32 [R].

    After the COUNT blocks of some rows come those of the rows APART further on.
    """
    LENGTH: gl.constexpr = 32 if FP8 else 16
    at = block // COUNT * (APART * COUNT) + block % COUNT
    more = block < HALVES * COUNT
    fetched = ()
    for b in gl.static_range(BURST):
        fetched = fetched + (gl.load(codes + (at + b) * LENGTH, mask=more, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    if FP8:
        return fetched, fetched
    else:
        scale = gl.load(scales + at, mask=more, other=0)
        if BURST == 4:
            even, odd = gl.split(gl.reshape(scale, [scale.shape[0], 2, 2]))
            first, third = gl.split(even)
            second, fourth = gl.split(odd)
            return fetched, (first, second, third, fourth)
        elif BURST == 2:
            return fetched, gl.split(scale)
        else:
            return fetched, (gl.reshape(scale, [scale.shape[0]]),)


@gluon.jit
def all_scales(s_ptr, row, more, COUNT: gl.constexpr):
    """The scales of whole rows, four in a word: int32 [R, COUNT, rounded up to a power of two].  For `largest_of`."""
    WIDTH: gl.constexpr = 1 << (COUNT - 1).bit_length()
    word = gl.arange(0, WIDTH, gl.SliceLayout(0, row.type.layout.parent))[None, :]
    pointer = s_ptr.to(gl.pointer_type(gl.int32)) + row[:, None] * COUNT + word
    return gl.load(pointer, mask=(word < COUNT) & more, other=0)


@gluon.jit
def largest_of(words, LAYOUT: gl.constexpr):
    """The largest scale of every row: int32 [R]."""
    low = gl.maximum(words & 0xFF, (words >> 8) & 0xFF)
    high = gl.maximum((words >> 16) & 0xFF, (words >> 24) & 0xFF)
    return gl.convert_layout(gl.max(gl.maximum(low, high), 1), LAYOUT)


@gluon.jit
def swiglu(acc, limit):
    """[R, N] of a GATED tile to [R / 2, N]: silu(min(gate, limit)) clamp(up); NaN stays."""
    R: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    gate, up = gl.split(gl.permute(gl.reshape(acc, [R // 16, 2, 8, N]), (0, 2, 3, 1)))
    gate = gl.reshape(gl.where(gate > limit, limit, gate), [R // 2, N])
    up = gl.where(up > limit, limit, up)
    up = gl.reshape(gl.where(up < -limit, -limit, up), [R // 2, N])
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def few(
    x_ptr,
    x_scale_ptr,
    weights_ptr,
    w_ptr,
    s_ptr,
    table_ptr,
    slots_ptr,
    chosen_ptr,
    tiles_ptr,
    order_ptr,
    out_ptr,
    outputs,
    limit,
    INPUTS: gl.constexpr,
    K: gl.constexpr,
    BLOCKS: gl.constexpr,
    BURST: gl.constexpr,
    HALVES: gl.constexpr,
    GATED: gl.constexpr,
    ROUNDED: gl.constexpr,
    SORTED: gl.constexpr,
    FP8: gl.constexpr,
):
    """HALVES x 64 matrix rows for a tile of up to 8 pairs; BLOCKS of 128 inputs a step, fetched BURST at a time.

    GATED: x e4m3 [S, INPUTS] with x_scale by token; out float32 [P, I] by place in order, times the routing weight.
    Otherwise: x [P, INPUTS] by place, e4m3 with x_scale (ROUNDED) or float32 and rounded here; out bfloat16
    [P, outputs] by pair.
    SORTED: tiles and order as in moe_route.Groups; otherwise each pair is a tile, its expert in ``chosen``.
    """
    R: gl.constexpr = 64
    HALF: gl.constexpr = R // 2 if GATED else R
    COUNT: gl.constexpr = INPUTS // 128
    STEPS: gl.constexpr = COUNT // BLOCKS
    LENGTH: gl.constexpr = 32 if FP8 else 16  # words of a row's 128 inputs
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    CODES: gl.constexpr = codes_layout(4, FP8)
    BYTES: gl.constexpr = bytes_layout(4)
    ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, BYTES)))
    SCALES: gl.constexpr = scales_layout(4, BURST)
    WHOLE: gl.constexpr = gl.SliceLayout(1, rows_layout(COUNT))
    STAGED: gl.constexpr = staged_layout(BLOCKS, 4)
    # The next kernel may start when all programs have waited here, so the second product finds the tables and fetches
    # its matrices while the first one ends.
    if GATED:
        gdc_wait()
    gdc_launch_dependents()
    programs_a_tile = outputs // (HALVES * HALF)
    tile = gl.program_id(0) // programs_a_tile
    part = gl.program_id(0) % programs_a_tile
    if SORTED:
        expert = gl.load(tiles_ptr + tile * 3)
        place = gl.load(tiles_ptr + tile * 3 + 1)
        count = gl.load(tiles_ptr + tile * 3 + 2)
    else:
        expert = gl.load(chosen_ptr + tile)
        place = tile
        count = 1
    if count > 0:
        slot = gl.load(slots_ptr + expert).to(gl.int64)
        if GATED:
            first = slot * (2 * outputs) + part * (HALVES * HALF)
        else:
            first = slot * outputs + part * (HALVES * HALF)
        row = matrix_row(gl.arange(0, R, gl.SliceLayout(1, CODES)), first, outputs, GATED)
        codes = w_ptr.to(gl.pointer_type(gl.int32)) + row[:, None] * (COUNT * LENGTH)
        codes += gl.arange(0, LENGTH, gl.SliceLayout(0, CODES))[None, :]
        row = matrix_row(gl.arange(0, R, gl.SliceLayout(1, SCALES)), first, outputs, GATED)
        scales = s_ptr.to(gl.pointer_type(gl.int32)) + row[:, None] * COUNT
        scales += gl.arange(0, BURST, gl.SliceLayout(0, SCALES))[None, :]
        ring = (
            _fetch(codes, scales, 0, BURST, COUNT, HALVES, HALF, FP8),
            _fetch(codes, scales, BURST, BURST, COUNT, HALVES, HALF, FP8),
        )
        row = matrix_row(gl.arange(0, R, WHOLE), first, outputs, GATED)
        whole = gl.zeros([R, 1 << (COUNT - 1).bit_length()], gl.int32, rows_layout(COUNT))
        if not FP8:
            whole = all_scales(s_ptr, row, True, COUNT)

        # The tile's activations: to shared memory, inputs reordered.
        if not GATED:
            gdc_wait()
        x_s = gl.allocate_shared_memory(gl.float8e4nv, [STEPS, BLOCKS * FEW, 128], E4M3_TILE)
        scale_s = gl.allocate_shared_memory(gl.float32, [STEPS, BLOCKS * FEW], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        staged = gl.arange(0, BLOCKS * FEW, gl.SliceLayout(1, STAGED))
        column = staged % FEW
        real = column < count
        x_row = place + column
        if GATED:
            if SORTED:
                x_row = gl.load(order_ptr + x_row, mask=real, other=0)
            x_row = x_row // K
        x_row = x_row.to(gl.int64)
        x = (
            x_ptr
            + (x_row * INPUTS + staged // FEW * 128)[:, None]
            + gl.arange(0, 128, gl.SliceLayout(0, STAGED))[None, :]
        )
        for i in gl.static_range(STEPS):
            if ROUNDED:
                data = gl.load(x + i * (BLOCKS * 128), mask=real[:, None], other=0.0)
                x_block = x_row * (INPUTS // 128) + staged // FEW + i * BLOCKS
                scale = gl.load(x_scale_ptr + x_block, mask=real, other=0.0)
            else:
                data, scale = rounded(gl.load(x + i * (BLOCKS * 128), mask=real[:, None], other=0.0))
            data = reordered(data.to(gl.uint8, bitcast=True)).to(gl.float8e4nv, bitcast=True)
            x_s.index(i).store(data)
            scale_s.index(i).store(scale)
        fence_async_shared()

        nothing = gl.zeros([R, FEW], gl.float32, SUMS)
        for half in range(HALVES):
            largest = gl.zeros([R], gl.int32, ROWS)
            if not FP8:
                largest = largest_of(whole, ROWS)
                whole = all_scales(s_ptr, row + (half + 1) * HALF, half + 1 < HALVES, COUNT)
            acc = gl.zeros([R, FEW], gl.float32, SUMS)
            for step in range(STEPS):
                x_step = x_s.index(step)
                scale_step = scale_s.index(step)
                for b in gl.static_range(BLOCKS):
                    words = unpack(ring[0][0][b % BURST], ring[0][1][b % BURST], largest, table_ptr, BYTES, FP8)
                    w = operand(words, OPERAND, BYTES)
                    columns = x_step.slice(b * FEW, FEW, dim=0).permute((1, 0))
                    product = warpgroup_mma(w, columns, nothing, use_acc=False, is_async=True)
                    x_scale = scale_step.slice(b * FEW, FEW, dim=0).load(gl.SliceLayout(0, SUMS))
                    product = warpgroup_mma_wait(0, [product])
                    if FP8:
                        s_row = (
                            matrix_row(gl.arange(0, R, gl.SliceLayout(1, SUMS)), first + half * HALF, outputs, GATED)
                            // 128
                        )
                        exponent = gl.load(s_ptr + s_row * COUNT + step * BLOCKS + b).to(gl.int32)
                        product = product * (exponent << 23).to(gl.float32, bitcast=True)[:, None]
                    product, x_scale = gl.broadcast(product, x_scale[None, :])
                    acc = gl.fma(product, x_scale, acc)
                    if b % BURST == BURST - 1:
                        block = half * COUNT + step * BLOCKS + b + 1 + BURST
                        ring = (ring[1], _fetch(codes, scales, block, BURST, COUNT, HALVES, HALF, FP8))
            if not FP8:
                top = gl.convert_layout(gl.maximum(largest - 6, 0) << 23, gl.SliceLayout(1, SUMS))
                acc = acc * top.to(gl.float32, bitcast=True)[:, None]
            STORED: gl.constexpr = gl.BlockedLayout([HALF // 32, 64 // HALF], [32, 1], [1, 4], [0, 1])
            if GATED:
                value = gl.convert_layout(swiglu(acc, limit), STORED)
            else:
                value = gl.convert_layout(acc.to(gl.bfloat16), STORED)
            pair = gl.arange(0, FEW, gl.SliceLayout(0, STORED))
            number = place + pair
            if SORTED:
                number = gl.load(order_ptr + number, mask=pair < count, other=0)
            if GATED:
                value = value * gl.load(weights_ptr + number, mask=pair < count, other=0.0)[None, :]
                number = place + pair
            to = (number.to(gl.int64) * outputs)[None, :] + (part * HALVES + half) * HALF
            to += gl.arange(0, HALF, gl.SliceLayout(1, STORED))[:, None]
            gl.store(out_ptr + to, value, mask=(pair < count)[None, :])
