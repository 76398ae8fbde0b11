"""Random inputs of the kernels on residual streams, projections and the compressor, and what must come out, in float64.

The equations of the report's sections 2.2 and 2.3 written out once more, sharing nothing with the kernels; only the
packing of bytes is dsv4_engine.formats'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsv4_engine.formats import pack_rows, unpack_index_keys, unpack_rows
from dsv4_kernels.rounding import round_fp4
from dsv4_kernels.triton.compress import Compressing
from dsv4_kernels.triton.hyper_connection import Connection, Write
from dsv4_kernels.triton.rows import SEGMENT_ROWS, from_block, index_key_bytes, row_bytes, segment_table

EPS = 1e-6
ITERATIONS = 20
ROPE = 64
SLACK = 4e-6  # of a vector's largest value: what float32 sums and roots are off before they are rounded, on a CPU 3e-8


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN, or -1 where there is none: what is not written shows."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        if out.dtype == torch.float8_e4m3fn:
            out.view(torch.uint8).fill_(0x7F)
        elif out.is_floating_point():
            out.fill_(torch.nan)
        else:
            out.fill_(-1 if out.dtype.is_signed else 0xFF)
        return out

    with mock.patch("torch.empty", filled):
        yield


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS; NaN where ``got`` holds one."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def largest(x: Tensor) -> Tensor:
    """The largest magnitude along the last dimension, kept as one channel."""
    return x.abs().amax(-1, keepdim=True)


def magnitudes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The values of smallest and of largest magnitude in each interval."""
    larger = torch.where(high.abs() > low.abs(), high, low)
    smaller = torch.where(high.abs() > low.abs(), low, high)
    return torch.where((low < 0) & (high > 0), 0.0, smaller), larger


def in_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def between(got: Tensor, low: Tensor, high: Tensor, rounding: Callable[[Tensor], Tensor] = in_bf16) -> bool:
    """Every value is what ``rounding`` may make of a number from low to high, float64 each, which float32 sums blur.

    Where no tie lies in that interval this is equality: a count of differing values would depend on how many of the
    values happen to share a tie.  Rounding in blocks is tried with the smallest and the largest magnitudes as well, as
    a block's scale may fall either way too.
    """
    slack = SLACK * largest(torch.maximum(low.abs(), high.abs()))
    low, high = low - slack, high + slack
    ends = torch.stack([rounding(x.float()).float() for x in (low, high, *magnitudes(low, high))])
    return got.shape == low.shape and bool(((ends.amin(0) <= got.float()) & (got.float() <= ends.amax(0))).all())


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    out = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return out if weight is None else out * weight.double()


def turned(x: Tensor, phases: Tensor) -> Tensor:
    """x float64 [N, ..., C], its last 64 channels turned by phases [N, 32, 2]."""
    head, tail = x[..., :-ROPE], x[..., -ROPE:].unflatten(-1, (ROPE // 2, 2))
    p = phases.double().view(phases.shape[0], *[1] * (x.dim() - 2), ROPE // 2, 2)
    real = tail[..., 0] * p[..., 0] - tail[..., 1] * p[..., 1]
    imaginary = tail[..., 1] * p[..., 0] + tail[..., 0] * p[..., 1]
    return torch.cat([head, torch.stack([real, imaginary], -1).flatten(-2)], -1)


def hadamard(x: Tensor) -> Tensor:
    size = x.shape[-1]
    h = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    while h.shape[0] < size:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=x.device), h)
    return x @ h * size**-0.5


def random_phases(tokens: int, device: str) -> Tensor:
    angle = torch.rand(tokens, ROPE // 2, device=device) * 6.3
    return torch.stack([angle.cos(), angle.sin()], -1)


# ---- hyper-connections -----------------------------------------------------------------------------------------------


@dataclass
class StreamsCase:
    x: Tensor  # bfloat16 [S, 4, D]
    before: Write | None
    fn: Tensor
    base: Tensor
    scale: Tensor
    weights: Connection

    def part(self, tokens: slice) -> StreamsCase:
        before = self.before
        if before is not None:
            routed = None if before.routed is None else before.routed[tokens]
            before = Write(before.result[tokens], before.post[tokens], before.comb[tokens], routed)
        return StreamsCase(self.x[tokens], before, self.fn, self.base, self.scale, self.weights)

    def streams(self) -> Tensor:
        """float64 [S, 4, D]"""
        x = self.x.double()
        if self.before is None:
            return x
        f = self.before.result.double()
        if self.before.routed is not None:
            f = f + self.before.routed.double().sum(1)
        f = f.to(torch.bfloat16).double()
        kept = torch.einsum("sjk,sjd->skd", self.before.comb.double(), x)
        return kept + self.before.post.double()[:, :, None] * f[:, None]

    def coefficients(self, streams: Tensor) -> Tensor:
        """float64 [S, M] from what the kernel made of the streams."""
        x = streams.double().flatten(1)
        m = x @ self.fn.double().T / (x.pow(2).mean(1, keepdim=True) + EPS).sqrt()
        spread = [4, 4, 16] if self.fn.shape[0] == 24 else [4]
        return m * self.scale.double().repeat_interleave(torch.tensor(spread, device=m.device)) + self.base.double()

    def read(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """float64 [S, D] each: between these it lies before its last rounding.

        The mix of the streams is rounded too, which may fall either way, and with it the norm of all channels.
        """
        pre = torch.sigmoid(self.coefficients(streams)[:, :4]) + EPS
        u = torch.einsum("sj,sjd->sd", pre, streams.double())
        slack = SLACK * largest(u)
        low, high = in_bf16(u - slack).double(), in_bf16(u + slack).double()
        norms = [(x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() for x in magnitudes(low, high)]
        ends = torch.stack([x / norm * self.weights.norm.double() for x in (low, high) for norm in norms])
        return ends.amin(0), ends.amax(0)

    def post_and_comb(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        m = self.coefficients(streams)
        a = m[:, 8:].unflatten(1, (4, 4)).softmax(2) + EPS
        a = a / (a.sum(1, keepdim=True) + EPS)
        for _ in range(ITERATIONS - 1):
            a = a / (a.sum(2, keepdim=True) + EPS)
            a = a / (a.sum(1, keepdim=True) + EPS)
        return 2 * torch.sigmoid(m[:, 4:8]), a


def streams_case(tokens: int, hidden: int, routed: int | None, device: str, head: bool = False) -> StreamsCase:
    """routed: how many results are added besides one; None: nothing is written before."""
    count = 4 if head else 24
    fn = torch.randn(count, 4 * hidden, device=device) * hidden**-0.5
    base, scale = torch.randn(count, device=device), torch.rand(1 if head else 3, device=device) + 0.5
    weights = Connection.of(fn, base, scale, torch.rand(hidden, device=device) + 0.5)
    before = None
    if routed is not None:
        before = Write(
            torch.randn(tokens, hidden, device=device).to(torch.bfloat16),
            torch.rand(tokens, 4, device=device) * 2,
            torch.rand(tokens, 4, 4, device=device) / 2,
            torch.randn(tokens, routed, hidden, device=device).to(torch.bfloat16) if routed else None,
        )
    x = torch.randn(tokens, 4, hidden, device=device).to(torch.bfloat16)
    return StreamsCase(x, before, fn, base, scale, weights)


# ---- queries and rows ------------------------------------------------------------------------------------------------


def window_rows(y: Tensor, norm: Tensor, phases: Tensor) -> Tensor:
    """float64 [S, C] of kv projections [S, C], before they are packed."""
    return turned(normed(y.double(), norm), phases)


def rows_hold(rows: Tensor, want: Tensor) -> bool:
    """Whether packed rows, uint8 [S, row bytes], are what float64 [S, C] rounds to, with nothing in their padding."""
    channels = want.shape[1]
    blocks = -((ROPE - channels) // 64)
    padding = rows[:, channels + ROPE + blocks :]
    rounded = between(
        unpack_rows(rows, channels, ROPE), want, want, lambda x: unpack_rows(pack_rows(x, ROPE), channels, ROPE)
    )
    return rounded and not padding.any()


def keys_hold(keys: Tensor, want: Tensor) -> bool:
    """The same of packed index keys, uint8 [S, C/2 + C/32]."""
    return between(unpack_index_keys(keys), want, want, round_fp4)


def queries(y: Tensor, phases: Tensor) -> Tensor:
    """float64 [S, H, C] of projections [S, H, C]."""
    return turned(normed(y.double(), None), phases)


def index_queries(y: Tensor, phases: Tensor) -> Tensor:
    """float64 [S, I, E] of projections [S, I, E], before they are rounded to FP4."""
    return hadamard(turned(y.double(), phases))


def index_queries_hold(codes: Tensor, folded_SI: Tensor, weights_SI: Tensor, want: Tensor) -> bool:
    """Whether e4m3 codes and the weights with what was divided out of them are what float64 [S, I, E] rounds to.

    A power of two of each head may lie in the query or in its weight; bf16 takes back what the quotient rounded.
    """
    scale = folded_SI / (weights_SI * (codes.shape[1] * codes.shape[2]) ** -0.5)
    even, odd = (codes.float() * scale[..., None]).to(torch.bfloat16).chunk(2, -1)
    return between(torch.stack([even, odd], -1).flatten(-2), want, want, round_fp4)


# ---- compressor ------------------------------------------------------------------------------------------------------


@dataclass
class CompressorCase:
    """One sequence of N tokens, to be handed over in any chunks."""

    ratio: int
    channels: int
    index_channels: int
    projected: Tensor  # float32 [N, X]
    phases: Tensor  # of every block's start, float32 [blocks + 1, 32, 2]
    entries: Compressing
    index_keys: Compressing | None
    stored: list[Tensor]
    stored_keys: list[Tensor]

    def fresh(self) -> CompressorCase:
        """The same weights and tokens before the first call, everything poisoned."""
        stored, keys, entries, index_keys = _state(self.projected, self.ratio, self.entries, self.index_keys)
        tokens, phases = self.projected, self.phases
        return CompressorCase(
            self.ratio, self.channels, self.index_channels, tokens, phases, entries, index_keys, stored, keys
        )

    def rows(self, blocks: int) -> tuple[Tensor, Tensor | None]:
        """What was written: the first rows, packed."""
        rows = torch.cat([from_block(segment, self.channels) for segment in self.stored])[:blocks]
        return rows, torch.cat(self.stored_keys)[:blocks] if self.stored_keys else None

    def pooled(self, compressing: Compressing, first: int, blocks: slice) -> Tensor:
        """Entries ``blocks`` before rounding, float64 [n, C]; first: the compressor's first column."""
        ratio, channels = self.ratio, compressing.norm.shape[0]
        out = [self.projected.new_empty(0, channels).double()]
        for block in range(blocks.start, blocks.stop):
            width = compressing.ape.shape[1]
            tokens = self.projected[max(block - 1, 0) * ratio : (block + 1) * ratio].double()
            kv, gate = tokens[:, first : first + width], tokens[:, first + width : first + 2 * width]
            gate = gate + compressing.ape.double().repeat(2, 1)[-kv.shape[0] :]
            if width > channels:
                own = slice(kv.shape[0] - ratio, None)
                kv = torch.cat([kv[: kv.shape[0] - ratio, :channels], kv[own, channels:]])
                gate = torch.cat([gate[: gate.shape[0] - ratio, :channels], gate[own, channels:]])
            else:
                kv, gate = kv[-ratio:], gate[-ratio:]
            out.append((gate.softmax(0) * kv).sum(0, keepdim=True))
        return turned(normed(torch.cat(out), compressing.norm), self.phases[blocks])

    def wanted(self, blocks: slice) -> tuple[Tensor, Tensor | None]:
        """Entries before they are packed, float64 [n, C], and index keys if there are any."""
        rows = self.pooled(self.entries, 0, blocks)
        if self.index_keys is None:
            return rows, None
        return rows, hadamard(self.pooled(self.index_keys, 2 * self.entries.ape.shape[1], blocks))


def _state(
    like: Tensor, ratio: int, entries: Compressing, index_keys: Compressing | None
) -> tuple[list[Tensor], list[Tensor], Compressing, Compressing | None]:
    slots = 8 if ratio == 4 else ratio
    segments = like.shape[0] // ratio // SEGMENT_ROWS + 1

    def place(c: Compressing, shape: tuple[int, ...]) -> tuple[list[Tensor], Compressing]:
        stored = [torch.full(shape, 0xFF, dtype=torch.uint8, device=like.device) for _ in range(segments)]
        ring = torch.full((slots, 2 * c.ape.shape[1]), torch.nan, device=like.device)
        return stored, Compressing(c.ape, c.norm, ring, segment_table(stored))

    stored, entries = place(entries, (SEGMENT_ROWS * row_bytes(entries.norm.shape[0]),))
    if index_keys is None:
        return stored, [], entries, None
    keys, index_keys = place(index_keys, (SEGMENT_ROWS, index_key_bytes(index_keys.norm.shape[0])))
    return stored, keys, entries, index_keys


def compressor_case(tokens: int, ratio: int, channels: int, index_channels: int, device: str) -> CompressorCase:
    """index_channels 0: no index compressor."""
    factor = 2 if ratio == 4 else 1
    nothing = torch.empty(0)

    def weights(size: int) -> Compressing:
        ape = torch.randn(ratio, factor * size, device=device)
        return Compressing(ape, torch.rand(size, device=device) + 0.5, nothing, nothing)

    entries, index_keys = weights(channels), weights(index_channels) if index_channels else None
    spare = 5 if index_channels else 0  # the weights of the index heads lie there
    projected = torch.randn(tokens, 2 * factor * (channels + index_channels) + spare, device=device)
    phases = random_phases(tokens // ratio + 1, device)
    return CompressorCase(ratio, channels, index_channels, projected, phases, entries, index_keys, [], []).fresh()
