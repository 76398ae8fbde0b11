"""The two kernels of hyper-connections: streams written and projected, then read, normed and rounded.

What they are for, and in which order they add, is said in hyper_connection.py, which launches them.
Letters: T tokens of a program, R channels of a range, N coefficients (padded), D hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .packing import begin, bf16_dot, fetch, pinned, to_bf16
from .rounded import round_block


@triton.jit
def _shares(post_ptr, comb_ptr, token, shown, K: tl.constexpr):
    """What goes into stream K of T tokens: [T, 1] each, of the sub-layer's result and of streams 0..3."""
    comb = comb_ptr + token * 16 + K
    return (
        tl.load(post_ptr + token * 4 + K, mask=shown, other=0.0)[:, None],
        tl.load(comb, mask=shown, other=0.0)[:, None],
        tl.load(comb + 4, mask=shown, other=0.0)[:, None],
        tl.load(comb + 8, mask=shown, other=0.0)[:, None],
        tl.load(comb + 12, mask=shown, other=0.0)[:, None],
    )


@triton.jit
def _mixed(share, f, x0, x1, x2, x3):
    """A stream after the write: bfloat16 [T, R]."""
    y = tl.fma(share[2], x1, share[1] * x0)
    return pinned(to_bf16(tl.fma(share[0], f, tl.fma(share[4], x3, tl.fma(share[3], x2, y)))))


@triton.jit
def _beside(a, b):
    """[T, n] and [T, n] -> [T, 2n]"""
    rows: tl.constexpr = a.shape[0]
    width: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (rows, 2 * width))


@triton.jit(do_not_specialize=["tokens", "parts"])
def _write_and_project(
    x_ptr,
    x_token,
    x_stream,
    result_ptr,
    routed_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    parts_ptr,
    partial_ptr,
    tokens,
    parts,
    D: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    WRITE: tl.constexpr,
    ROUTED: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """T tokens and the ranges part, part + parts, .. a program.

    COEFFICIENTS 0: write only.  WRITE False: the streams are as they are.
    """
    part = tl.program_id(0)
    if COEFFICIENTS > 0:
        fetch(parts_ptr + part * (3 * COEFFICIENTS * 4 * R), 3 * COEFFICIENTS * 4 * R * 2, 256)
    begin()
    token = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    shown = token < tokens
    inside = shown[:, None]
    n = tl.arange(0, N)
    # Columns of the product: 16 coefficients' first parts, the same ones' second and third parts, nothing, the next 16.
    # So a coefficient's parts come out in one thread, which adds them.
    column = tl.arange(0, 4 * N)
    part_of, coefficient = column // 16 % 4, column // 64 * 16 + column % 16
    w_place = (part_of * COEFFICIENTS + coefficient)[None, :] * (4 * R) + tl.arange(0, 4 * R)[:, None]
    w_real = ((part_of < 3) & (coefficient < COEFFICIENTS))[None, :]
    total = tl.zeros([T, N], tl.float32)
    squares = tl.zeros([T], tl.float32)
    if WRITE:
        share0 = _shares(post_ptr, comb_ptr, token, shown, 0)
        share1 = _shares(post_ptr, comb_ptr, token, shown, 1)
        share2 = _shares(post_ptr, comb_ptr, token, shown, 2)
        share3 = _shares(post_ptr, comb_ptr, token, shown, 3)
    for place in range(part, D // R, parts):
        d = place * R + tl.arange(0, R)
        x = x_ptr + token[:, None] * x_token + d[None, :]
        y0 = tl.load(x, mask=inside, other=0.0)
        y1 = tl.load(x + x_stream, mask=inside, other=0.0)
        y2 = tl.load(x + 2 * x_stream, mask=inside, other=0.0)
        y3 = tl.load(x + 3 * x_stream, mask=inside, other=0.0)
        if WRITE:
            f = tl.zeros([T, R], tl.float32)
            for a in tl.static_range(ROUTED):
                routed = routed_ptr + (token[:, None] * ROUTED + a) * D + d[None, :]
                f += tl.load(routed, mask=inside, other=0.0).to(tl.float32)
            f += tl.load(result_ptr + token[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            f = to_bf16(f).to(tl.float32)
            x0, x1, x2, x3 = y0.to(tl.float32), y1.to(tl.float32), y2.to(tl.float32), y3.to(tl.float32)
            y0 = _mixed(share0, f, x0, x1, x2, x3)
            y1 = _mixed(share1, f, x0, x1, x2, x3)
            y2 = _mixed(share2, f, x0, x1, x2, x3)
            y3 = _mixed(share3, f, x0, x1, x2, x3)
        if COEFFICIENTS > 0:
            z0, z1, z2, z3 = y0.to(tl.float32), y1.to(tl.float32), y2.to(tl.float32), y3.to(tl.float32)
            squares += tl.sum(tl.fma(z3, z3, tl.fma(z2, z2, tl.fma(z1, z1, z0 * z0))), 1)
            y = _beside(_beside(y0, y1), _beside(y2, y3))
            w = tl.load(parts_ptr + place * (3 * COEFFICIENTS * 4 * R) + w_place, mask=w_real, other=0.0)
            sums = tl.reshape(bf16_dot(y, w, tl.zeros([T, 4 * N], tl.float32)), (T, N // 16, 4, 16))
            total += tl.reshape(tl.sum(sums, 2), (T, N))
        if WRITE:  # behind the product, which waits for stores before it
            out = out_ptr + token[:, None] * (4 * D) + d[None, :]
            tl.store(out, y0, mask=inside)
            tl.store(out + D, y1, mask=inside)
            tl.store(out + 2 * D, y2, mask=inside)
            tl.store(out + 3 * D, y3, mask=inside)
    if COEFFICIENTS > 0:
        partial = partial_ptr + (part * tokens + token) * 32
        tl.store(partial[:, None] + n[None, :], total, mask=inside & (n < COEFFICIENTS)[None, :])
        tl.store(partial + 24, squares, mask=shown)


@triton.jit
def _coefficients(
    partial_ptr, base_ptr, scale_ptr, token, shown, tokens, norm_eps, D: tl.constexpr, COEFFICIENTS: tl.constexpr,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The sums of all parts: (fn x) / rms(x) * scale + base, float32 [T, 32]."""
    n = tl.arange(0, 32)
    group = tl.arange(0, SUMS)[None, :, None]
    place = partial_ptr + (group * tokens + token[:, None, None]) * 32 + n[None, None, :]
    sums = tl.zeros([T, SUMS, 32], tl.float32)
    for part in tl.static_range(0, PARTS, GROUPS):  # one turn, or SUBS of them
        inside = shown[:, None, None] & (group < tl.minimum(GROUPS, PARTS - part))
        sums += tl.load(place + part * tokens * 32, mask=inside, other=0.0)
    total = tl.sum(sums, 1)
    squares = tl.sum(tl.where((n == 24)[None, :], total, 0.0), 1)
    inverse = tl.rsqrt(squares / (4 * D) + norm_eps)
    real = n < COEFFICIENTS
    base = tl.load(base_ptr + n, mask=real, other=0.0)[None, :]
    scale = tl.load(scale_ptr + n, mask=real, other=0.0)[None, :]
    return tl.fma(total * inverse[:, None], scale, base)


@triton.jit
def _column(m, n: tl.constexpr):
    """Column n of [T, 32]: [T]."""
    return tl.sum(tl.where((tl.arange(0, 32) == n)[None, :], m, 0.0), 1)


@triton.jit
def _balanced(a, b, c, d, eps):
    """Four numbers divided by their sum + eps."""
    inverse = 1.0 / (a + b + c + d + eps)
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def _softmax(row, eps):
    a, b, c, d = row
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    inverse = 1.0 / (a + b + c + d)
    return tl.fma(a, inverse, eps), tl.fma(b, inverse, eps), tl.fma(c, inverse, eps), tl.fma(d, inverse, eps)


@triton.jit
def _row(place, shown):
    """Four adjacent numbers of each token: [T] each."""
    return (
        tl.load(place, mask=shown, other=0.0),
        tl.load(place + 1, mask=shown, other=0.0),
        tl.load(place + 2, mask=shown, other=0.0),
        tl.load(place + 3, mask=shown, other=0.0),
    )


@triton.jit
def _balance(comb_ptr, token, shown, iterations, eps):
    """The matrices of T tokens, made doubly stochastic where they lie.  Each lies in one thread, so that the 39
    normalisations wait for nothing but arithmetic.
    """
    comb_ptr += token * 16
    a, b, c, d = _softmax(_row(comb_ptr, shown), eps)
    e, f, g, h = _softmax(_row(comb_ptr + 4, shown), eps)
    i, j, k, l = _softmax(_row(comb_ptr + 8, shown), eps)  # noqa: E741
    o, p, q, r = _softmax(_row(comb_ptr + 12, shown), eps)
    for turn in range(iterations):
        if turn > 0:
            a, b, c, d = _balanced(a, b, c, d, eps)
            e, f, g, h = _balanced(e, f, g, h, eps)
            i, j, k, l = _balanced(i, j, k, l, eps)  # noqa: E741
            o, p, q, r = _balanced(o, p, q, r, eps)
        a, e, i, o = _balanced(a, e, i, o, eps)
        b, f, j, p = _balanced(b, f, j, p, eps)
        c, g, k, q = _balanced(c, g, k, q, eps)
        d, h, l, r = _balanced(d, h, l, r, eps)  # noqa: E741
    _store_row(comb_ptr, a, b, c, d, shown)
    _store_row(comb_ptr + 4, e, f, g, h, shown)
    _store_row(comb_ptr + 8, i, j, k, l, shown)
    _store_row(comb_ptr + 12, o, p, q, r, shown)


@triton.jit
def _store_row(out, a, b, c, d, shown):
    tl.store(out, a, mask=shown)
    tl.store(out + 1, b, mask=shown)
    tl.store(out + 2, c, mask=shown)
    tl.store(out + 3, d, mask=shown)


@triton.jit(do_not_specialize=["tokens"])
def _read(
    x_ptr,
    x_token,
    x_stream,
    partial_ptr,
    base_ptr,
    scale_ptr,
    norm_ptr,
    u_ptr,
    data_ptr,
    data_scale_ptr,
    post_ptr,
    comb_ptr,
    tokens,
    iterations,
    hc_eps,
    norm_eps,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SUMS: tl.constexpr,
    T: tl.constexpr,
):
    """The first programs make post and comb of T tokens each, the others read the streams of one token each.

    COEFFICIENTS 4 is the read before the head: no post and comb, u in float32, nothing rounded to e4m3.
    """
    begin()
    HEAD: tl.constexpr = COEFFICIENTS == 4
    mixing = 0 if HEAD else tl.cdiv(tokens, T)
    if tl.program_id(0) < mixing:
        first = tl.program_id(0).to(tl.int64) * T
        n = tl.arange(0, 32)[None, :]
        for start in range(first, tl.minimum(first + T, tokens), 8):
            token = start + tl.arange(0, 8)
            shown = token < tokens
            m = _coefficients(
                partial_ptr, base_ptr, scale_ptr, token, shown, tokens, norm_eps, D, COEFFICIENTS, PARTS, GROUPS, SUMS,
                8,
            )  # fmt: skip
            token, shown = token[:, None], shown[:, None]
            tl.store(post_ptr + token * 4 + n - 4, 2.0 * tl.sigmoid(m), mask=shown & (n >= 4) & (n < 8))
            tl.store(comb_ptr + token * 16 + n - 8, m, mask=shown & (n >= 8) & (n < 24))
        tl.debug_barrier()
        token = first + tl.arange(0, T)
        _balance(comb_ptr, token, token < tokens, iterations, hc_eps)
        return
    t = (tl.program_id(0) - mixing).to(tl.int64)
    one = t + tl.arange(0, 1)
    block = tl.arange(0, BLOCKS)
    inside = (block < D // 128)[:, None]
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = x_ptr + t * x_token + column
    # All loads before the first use: the coefficients are a chain of waits.
    x0 = tl.load(x, mask=inside, other=0.0)
    x1 = tl.load(x + x_stream, mask=inside, other=0.0)
    x2 = tl.load(x + 2 * x_stream, mask=inside, other=0.0)
    x3 = tl.load(x + 3 * x_stream, mask=inside, other=0.0)
    m = _coefficients(
        partial_ptr, base_ptr, scale_ptr, one, one >= 0, tokens, norm_eps, D, COEFFICIENTS, PARTS, GROUPS, SUMS, 1
    )
    pre = tl.sigmoid(m) + hc_eps
    u = tl.sum(_column(pre, 0), 0) * x0.to(tl.float32)
    u = tl.fma(tl.sum(_column(pre, 1), 0), x1.to(tl.float32), u)
    u = tl.fma(tl.sum(_column(pre, 2), 0), x2.to(tl.float32), u)
    u = to_bf16(tl.fma(tl.sum(_column(pre, 3), 0), x3.to(tl.float32), u)).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tl.sum(u * u, 1), 0) / D + norm_eps)
    u = to_bf16(u * inverse * tl.load(norm_ptr + column, mask=inside, other=0.0))
    if HEAD:
        tl.store(u_ptr + t * D + column, u.to(tl.float32), mask=inside)
    else:
        tl.store(u_ptr + t * D + column, u, mask=inside)
        data, scale = round_block(u.to(tl.float32))
        tl.store(data_ptr + t * D + column, data, mask=inside)
        tl.store(data_scale_ptr + t * (D // 128) + block, scale, mask=block < D // 128)
