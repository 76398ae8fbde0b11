"""Products with a matrix that is not held as it multiplies, on a CPU: packed FP4 or FP8, or another float type.

A tile of rows is unpacked and multiplied while it lies in the cache, so that no matrix is ever unpacked whole.  Tiles
depend on the matrix and the number of threads alone: a token's result does not depend on its neighbours.
Knows no `Weight` (linear.py does): it takes data and scales.  Letters: S tokens, O outputs, I inputs, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE_BYTES = 4 << 20  # of float32 and thread; measured best of 1 to 8 MiB (docs/performance.md)
MAX_THREADS = 16
FP8_BLOCK, FP4_BLOCK = 128, 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpacked_bytes(columns: int, threads: int) -> int:
    """Bytes that a product needs for its tile and for the indices that are looked up, at most."""
    rows = _tile_rows(columns) * min(threads, MAX_THREADS)
    return rows * columns * 4 * 2 + rows * columns * 4


def unpacked_linear(x_SI: Tensor, data: Tensor, scale: Tensor | None, fmt: str, rows: range | None = None) -> Tensor:
    """x W^T for x [..., I] in float32 or bfloat16 and the given rows of W (all by default): [..., R] in x's dtype.

    fmt: "fp4": data int8 [O, I/2], scale e8m0 [O, I/32]; "fp8": e4m3 [O, I], e8m0 [ceil(O/128), ceil(I/128)];
    "plain": any float type.
    """
    rows = range(data.shape[0]) if rows is None else rows
    columns, threads = x_SI.shape[-1], min(torch.get_num_threads(), MAX_THREADS)
    step = _tile_rows(columns) * threads
    out = x_SI.new_empty((*x_SI.shape[:-1], len(rows)))
    tile_RI = torch.empty(min(step, len(rows)), columns, device="cpu")
    for start in range(rows.start, rows.stop, step):
        end = min(start + step, rows.stop)
        part = tile_RI[: end - start]
        _unpack(data, scale, fmt, start, end, part, threads)
        out[..., start - rows.start : end - rows.start] = F.linear(x_SI, part.to(x_SI.dtype))
    return out


def _tile_rows(columns: int) -> int:
    """Rows of a tile for one thread: a multiple of an FP8 block."""
    return max(FP8_BLOCK, TILE_BYTES // (4 * columns) // FP8_BLOCK * FP8_BLOCK)


def _unpack(data: Tensor, scale: Tensor | None, fmt: str, start: int, end: int, into_RI: Tensor, threads: int) -> None:
    if fmt == "plain":
        into_RI.copy_(data[start:end])
        return
    assert scale is not None
    codes = data.view(torch.uint8).numpy()[start:end]
    table = _pairs() if fmt == "fp4" else _e4m3()
    _look_up(table, codes, into_RI.numpy().view(table.dtype), threads)
    if fmt == "fp4":
        into_RI.view(end - start, -1, FP4_BLOCK).mul_(_powers(scale[start:end])[..., None])
        return
    first = start // FP8_BLOCK
    of_row = torch.arange(start, end, device="cpu") // FP8_BLOCK - first
    scale_RB = _powers(scale[first : -(-end // FP8_BLOCK)])[of_row]
    columns = into_RI.shape[1]
    if columns % FP8_BLOCK:
        into_RI.mul_(scale_RB.repeat_interleave(FP8_BLOCK, 1)[:, :columns])
    else:
        into_RI.view(end - start, -1, FP8_BLOCK).mul_(scale_RB[..., None])


def _look_up(table: np.ndarray, codes: np.ndarray, into: np.ndarray, threads: int) -> None:
    """into = table[codes], rows shared among threads; NumPy's `take` lets go of the interpreter and beats torch's."""

    def some(start: int, end: int) -> None:
        # With "clip" no copy is made first to keep `into` whole should a code be out of range, which no byte is.
        np.take(table, codes[start:end], out=into[start:end], mode="clip")

    rows = codes.shape[0]
    share = -(-rows // threads)
    if threads == 1 or codes.size < 1 << 16:
        some(0, rows)
        return
    list(_workers(threads).map(some, range(0, rows, share), range(share, rows + share, share)))


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "unpack")


def _powers(scale: Tensor) -> Tensor:
    """e8m0 -> float32 2^(byte - 127); byte 0 is 2^-127, a subnormal."""
    return torch.from_numpy(_e8m0().take(scale.view(torch.uint8).numpy()))


def _cached_table(make: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lru_cache(maxsize=1)(make)


@_cached_table
def _pairs() -> np.ndarray:
    """The two values of each byte of FP4 codes, low nibble first, as one 64-bit number: uint64 [256]."""
    pairs = [(E2M1_VALUES[b & 15], E2M1_VALUES[b >> 4]) for b in range(256)]
    return np.array(pairs, np.float32).view(np.uint64).reshape(256)


@_cached_table
def _e4m3() -> np.ndarray:
    """float32 [256]; the two NaN codes, which no checkpoint holds, come out as +-480."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(mantissa / 1.0, -9))
    return np.where(code & 128, -value, value).astype(np.float32)


@_cached_table
def _e8m0() -> np.ndarray:
    """float32 [256]: the byte is a float32's exponent field, but for 2^-127, which has a mantissa bit instead."""
    bits = np.arange(256, dtype=np.uint32) << 23
    bits[0] = 1 << 22
    return bits.view(np.float32)
