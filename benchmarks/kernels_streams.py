"""The bandwidth-bound kernels at V4-Flash's shapes: hyper-connections, norm + RoPE + packing, compressor.

    python -m benchmarks.kernels_streams

Random data, 8,192 tokens and one.  Outputs are compared with float64 first, on sampled tokens.  Medians of graph
replays; weights of a single token are rotated over many copies, so that they come from memory.  Rates count every
input read once and every output written once, whatever a kernel does; share: of a copy, 4.26 TB/s read and written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.gpu import COPY_CEILING, HEADER, Row, replay_ms, report
from dsv4_kernels.rounding import round_fp8
from dsv4_kernels.triton.compress import compress
from dsv4_kernels.triton.hyper_connection import Connection, connect, head_read
from dsv4_kernels.triton.project import finish_queries, split_low_rank
from dsv4_kernels.triton.rows import WindowRows, from_block, row_bytes
from tests.support.streams_case import (
    EPS,
    ITERATIONS,
    StreamsCase,
    between,
    compressor_case,
    error,
    in_bf16,
    index_queries,
    index_queries_hold,
    keys_hold,
    normed,
    queries,
    random_phases,
    rows_hold,
    streams_case,
    window_rows,
)

HIDDEN, HEADS, CHANNELS, LOW, INDEX_HEADS, INDEX_CHANNELS = 4096, 64, 512, 1024, 64, 128
TOKENS = 8192
SAMPLES = 64
COPIES = 48  # of a hyper-connection's weights: 113 MB, twice the cache
TOLERANCE = 2e-3  # relative RMS; rounding the outputs to bf16 alone gives 1.7e-3


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def row(what: str, shape: str, run: Callable[[], object], moved: int, off: float) -> Row:
    if not off < TOLERANCE:
        raise SystemExit(f"{what}, {shape}: off by {off:.1e}")
    ms = replay_ms(run)
    rate = moved / ms * 1e3
    made = Row(what, shape, ms, f"{rate / 1e9:.0f} GB/s", rate / COPY_CEILING, off)
    print(made.line(), flush=True)
    return made


def demand(true: bool, what: str) -> None:
    if not true:
        raise SystemExit(f"{what} differs from its reference")


def sampled(tokens: int) -> slice:
    return slice(0, tokens, max(1, tokens // SAMPLES))


def copies(case: StreamsCase) -> list[Connection]:
    tokens = case.x.shape[0]
    return [replace(case.weights, parts=case.weights.parts.clone()) for _ in range(COPIES if tokens == 1 else 1)]


def streams(tokens: int, routed: int | None, what: str) -> Row:
    case = streams_case(tokens, HIDDEN, routed, "cuda")
    read = partial(connect, case.x, case.before, iterations=ITERATIONS, hc_eps=EPS, norm_eps=EPS)
    got = read(case.weights)
    few = case.part(sampled(tokens))
    some = got.streams[sampled(tokens)]
    demand(between(got.u[sampled(tokens)], *few.read(some)), "the input")
    demand(torch.equal(got.rounded.values().to(torch.bfloat16), round_fp8(got.u, 128)), "the rounded input")
    for mine, want in zip((got.post, got.comb), few.post_and_comb(some), strict=True):
        demand(bool((mine[sampled(tokens)] - want).abs().max() < 2e-6), "post or comb")
    out = torch.empty_like(case.x)
    weights = cycle(copies(case))
    before = case.before
    moved = size(got.u, got.rounded.data, got.rounded.scale, got.post, got.comb, case.x, case.weights.parts)
    if before is not None:
        moved += size(before.result, before.routed, before.post, before.comb, out)
    return row(
        "hyper-connection",
        f"{tokens} tokens, {what}",
        lambda: read(next(weights), out=out),
        moved,
        error(some, few.streams()),
    )


def head() -> Row:
    case = streams_case(1, HIDDEN, 6, "cuda", head=True)
    made, h = head_read(case.x, case.before, case.weights, hc_eps=EPS, norm_eps=EPS)
    demand(between(h, *case.read(made)), "the input of the head")
    weights = cycle(copies(case))
    assert case.before is not None
    moved = size(case.x, made, h, case.before.result, case.before.routed, case.weights.parts)
    return row(
        "read before the head",
        "1 token",
        lambda: head_read(case.x, case.before, next(weights), hc_eps=EPS, norm_eps=EPS, out=made),
        moved,
        error(made, case.streams()),
    )


def low_rank(tokens: int) -> Row:
    y = torch.randn(tokens, LOW + CHANNELS, device="cuda").to(torch.bfloat16)
    q_norm, kv_norm = torch.rand(LOW, device="cuda") + 0.5, torch.rand(CHANNELS, device="cuda") + 0.5
    phases, position = random_phases(tokens, "cuda"), torch.arange(tokens, device="cuda")
    block = torch.zeros(max(tokens, 256) * row_bytes(CHANNELS), dtype=torch.uint8, device="cuda")
    rows = WindowRows(block, torch.zeros_like(position))
    got = split_low_rank(y, q_norm, kv_norm, phases, position, rows, EPS)
    want = normed(y[:, :LOW].double(), q_norm)
    demand(between(got.values(), want, want, lambda x: round_fp8(in_bf16(x), 128)), "qr")
    packed = from_block(block, CHANNELS)[:tokens]
    demand(rows_hold(packed, window_rows(y[:, LOW:], kv_norm, phases)), "window rows")
    return row(
        "qr and window rows",
        f"{tokens} tokens, {LOW} + {CHANNELS}",
        lambda: split_low_rank(y, q_norm, kv_norm, phases, position, rows, EPS),
        size(y, phases, got.data, got.scale, packed),
        0.0,
    )


def finish(tokens: int, index_heads: int) -> Row:
    wide = HEADS * CHANNELS
    y = torch.randn(tokens, wide + index_heads * INDEX_CHANNELS, device="cuda").to(torch.bfloat16)
    phases = random_phases(tokens, "cuda")
    weights = torch.randn(tokens, index_heads, device="cuda") if index_heads else None
    got = finish_queries(y, HEADS, CHANNELS, phases, EPS, weights, INDEX_CHANNELS)
    some = sampled(tokens)
    off = error(got[0][some], queries(y[some, :wide].unflatten(1, (HEADS, CHANNELS)), phases[some]))
    if weights is not None and got[1] is not None and got[2] is not None:
        want = index_queries(y[some, wide:].unflatten(1, (index_heads, INDEX_CHANNELS)), phases[some])
        demand(index_queries_hold(got[1][some], got[2][some], weights[some], want), "index queries")
    return row(
        "queries",
        f"{tokens} tokens, {HEADS} x {CHANNELS}" + (f", index {index_heads} x {INDEX_CHANNELS}" if index_heads else ""),
        lambda: finish_queries(y, HEADS, CHANNELS, phases, EPS, weights, INDEX_CHANNELS),
        size(y, phases, weights, *got),
        off,
    )


def compressor(tokens: int, ratio: int, position: int, what: str) -> Row:
    index = INDEX_CHANNELS if ratio == 4 else 0
    case = compressor_case(position + tokens, ratio, CHANNELS, index, "cuda")
    spare = case.projected.new_zeros(position + tokens, INDEX_HEADS if index else 0)
    case.projected = torch.cat([case.projected[:, : case.projected.shape[1] - 5 * bool(index)], spare], 1)

    def run(first: int, count: int) -> None:
        part, block = case.projected[first : first + count], first // ratio
        compress(part, ratio, place[first], case.phases[block:], EPS, case.entries, case.index_keys)

    place = {first: torch.tensor([first], device="cuda") for first in (0, position)}
    if position:
        run(0, position)
    run(position, tokens)
    finished = (position + tokens) // ratio
    blocks = slice(max(0, finished - 40), finished)
    (rows, keys), (want, want_keys) = case.rows(finished), case.wanted(blocks)
    demand(rows_hold(rows[blocks], want), "rows")
    demand(keys is None or want_keys is None or keys_hold(keys[blocks], want_keys), "index keys")
    read = case.projected[position:, : 2 * case.entries.ape.shape[1]]
    made = (position + tokens) // ratio - position // ratio
    moved = size(read, case.entries.ape, case.entries.norm) + made * (row_bytes(CHANNELS) + 256)
    if case.index_keys is not None:
        moved += size(read) * INDEX_CHANNELS // CHANNELS + made * 68
    if tokens == 1:
        moved += size(read) * (ratio * 2 if made and ratio == 4 else ratio if made else 1)
    return row("compressor", f"{tokens} tokens, ratio {ratio}{what}", lambda: run(position, tokens), moved, 0.0)


@torch.inference_mode()
def main() -> int:
    print(HEADER)
    rows = [
        streams(TOKENS, 0, "after attention"),
        streams(TOKENS, 6, "after 6 experts and the shared one"),
        streams(TOKENS, None, "first layer, read only"),
        low_rank(TOKENS),
        finish(TOKENS, INDEX_HEADS),
        finish(TOKENS, 0),
        compressor(TOKENS, 4, 0, " with index keys"),
        compressor(TOKENS, 128, 0, ""),
        streams(1, 0, "after attention"),
        streams(1, 6, "after 6 experts and the shared one"),
        head(),
        low_rank(1),
        finish(1, INDEX_HEADS),
        finish(1, 0),
        compressor(1, 4, 9, " with index keys"),
        compressor(1, 4, 11, " with index keys, closing a block"),
        compressor(1, 128, 130, ""),
        compressor(1, 128, 255, ", closing a block"),
    ]
    report(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
