"""The indexer on the GPU at V4-Flash's shapes: scores and the best 512, against DeepGEMM's scores alone if installed.

    python -m benchmarks.kernels_indexer [--full]

Random data.  Choices are compared first, on sampled queries: with float32 scores, no entry chosen may lie below the
last one that had to be, nor one left out above it, by more than FP8 sums allow.  Medians of graph replays; rates count
2 x 64 x 128 operations a query and visible key; share: of 1302 TFLOP/s, or of 4.26 TB/s where keys are read once.
--full: also all of one layer at 1M tokens, in chunks of 8192.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import COPY_CEILING, FP8_CEILING, HEADER, Row, peer, replay_ms, report
from dsv4_engine.formats import pack_index_keys
from dsv4_kernels.index import index_scores
from dsv4_kernels.rounding import round_fp4
from dsv4_kernels.triton.index import choose_entries, fold_queries
from dsv4_kernels.triton.rows import segment_table

HEADS, CHANNELS, TOPK = 64, 128, 512
TOLERANCE = 2e-3  # of the largest score
SAMPLES = 5


class Case:
    """Queries at ``position``, each with its own keys or all with the same."""

    def __init__(self, position: Tensor, own: bool) -> None:
        self.position, queries = position, len(position)
        self.most = int((position.max() + 1) // 4)
        self.keys = [round_fp4(torch.randn(self.most, CHANNELS, device="cuda")) for _ in range(queries if own else 1)]
        self.segments = [list(pack_index_keys(keys).split(2048)) for keys in self.keys]
        self.table = torch.cat([segment_table(segments) for segments in self.segments])
        q = torch.randn(queries, HEADS, CHANNELS, device="cuda", dtype=torch.bfloat16)
        self.q = torch.cat([round_fp4(part) for part in q.split(1024)])
        self.weights = torch.randn(queries, HEADS, device="cuda")
        self.folded = fold_queries(self.q, self.weights)

    def run(self) -> Tensor:
        return choose_entries(*self.folded, self.position, self.table, 4, self.most, TOPK)

    def error(self, got: Tensor) -> float:
        """How far the worst sampled choice is from a right one, relative to the largest score."""
        worst = 0.0
        for t in range(0, len(self.position), max(1, len(self.position) // SAMPLES)):
            keys = self.keys[t if len(self.keys) > 1 else 0][: int(self.position[t] + 1) // 4]
            scores = index_scores(self.q[t : t + 1].float(), self.weights[t : t + 1], keys)[0]
            entries = got[t].long()
            if (entries.diff() <= 0).any() or int(entries[0]) < 0:
                return float("inf")
            last = scores.topk(TOPK).values[-1]
            left_out = scores.index_fill(0, entries, float("-inf")).max()
            wrong = torch.stack([last - scores[entries].min(), left_out - last]).max() / scores.abs().max()
            worst = max(worst, float(wrong))
        return worst


def peer_scores(case: Case) -> Callable[[], Tensor] | None:
    """DeepGEMM's scores of as many queries and keys (e4m3, a scale a key), without a choice."""
    deep_gemm = peer("deep_gemm")
    if deep_gemm is None or len(case.keys) == len(case.position):
        return None
    queries = len(case.position)
    q, k = case.q.to(torch.float8_e4m3fn), case.keys[0].to(torch.float8_e4m3fn)
    scale = torch.ones(case.most, device="cuda")
    first = torch.zeros(queries, dtype=torch.int32, device="cuda")
    end = ((case.position + 1) // 4).to(torch.int32)
    return lambda: deep_gemm.fp8_mqa_logits(q, (k, scale), case.weights, first, end)


def measure(what: str, shape: str, case: Case) -> Row:
    wrong = case.error(case.run())
    if not wrong < TOLERANCE:
        raise SystemExit(f"{what}, {shape}: choices off by {wrong:.1e} of the largest score")
    other = peer_scores(case)
    peer_ms = replay_ms(other) if other is not None else None
    ms = replay_ms(case.run)
    pairs = int(((case.position + 1) // 4).sum())
    if len(case.position) == len(case.keys):
        read = pairs * (CHANNELS // 2 + CHANNELS // 32) / ms * 1e3
        row = Row(what, shape, ms, f"{read / 1e9:.0f} GB/s", read / COPY_CEILING, wrong, peer_ms)
    else:
        rate = 2 * HEADS * CHANNELS * pairs / ms * 1e3
        row = Row(what, shape, ms, f"{rate / 1e12:.0f} TFLOP/s", rate / FP8_CEILING, wrong, peer_ms)
    print(row.line(), flush=True)
    return row


def whole_layer() -> Row:
    """Every query of a 1M-token prompt once, in chunks of 8192 that see only what lies before them."""
    context, chunk = 1_048_576, 8192
    case = Case(torch.arange(context - chunk, context, device="cuda"), own=False)
    wrong = case.error(case.run())
    if not wrong < TOLERANCE:
        raise SystemExit(f"whole layer: choices off by {wrong:.1e}")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for first in (0, chunk, context // 2):  # compiles what is needed
        choose_entries(
            *case.folded, torch.arange(first, first + chunk, device="cuda"), case.table, 4, (first + chunk) // 4, TOPK
        )
    start.record()
    for first in range(0, context, chunk):
        position = torch.arange(first, first + chunk, device="cuda")
        choose_entries(*case.folded, position, case.table, 4, (first + chunk) // 4, TOPK)
    end.record()
    end.synchronize()
    ms = start.elapsed_time(end)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    rate = 2 * HEADS * CHANNELS * sum((p + 1) // 4 for p in range(context)) / ms * 1e3
    shape = f"1M queries, chunks of 8192, peak {peak:.2f} GiB"
    row = Row("indexer, whole layer", shape, ms, f"{rate / 1e12:.0f} TFLOP/s", rate / FP8_CEILING, wrong)
    print(row.line(), flush=True)
    return row


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description="The indexer on the GPU.")
    parser.add_argument("--full", action="store_true", help="also a whole layer at 1M tokens")
    full = parser.parse_args().full
    print(HEADER)
    rows = []
    for keys in (32_768, 262_144):
        case = Case(torch.full((4096,), 4 * keys - 1, device="cuda"), own=False)
        rows.append(measure("indexer, all visible", f"4096 queries x {keys:,}, best {TOPK}", case))
    for batch, keys in ((1, 16_384), (1, 262_144), (32, 65_536)):
        case = Case(torch.full((batch,), 4 * keys - 1, device="cuda"), own=True)
        rows.append(measure("indexer, decoding", f"batch {batch} x {keys:,}, best {TOPK}", case))
    if full:
        rows.append(whole_layer())
    report(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
