"""Prefill of a long prompt with one engine: speed along the way, peak memory, the time by part, and decode behind it.

    python -m benchmarks.long_prefill [--device cuda] [--tokens 1048576] [--model tiny] [--operations]

The prompt is real text: the sources of Python's standard library, as many as the tokens need.  Time is what lies
between two marks that the parts of a layer set as they begin and end: events on the GPU's own stream, the clock on a
CPU.  A part's time is its own, without the parts inside it.  --operations adds what torch's profiler says of one chunk.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import timed
from dsv4_engine import Engine
from dsv4_engine.model import Model

KINDS = {0: "window", 4: "csa", 128: "hca"}
DECODED = 64
COLUMNS = 8  # rows of the table of speeds


class Parts:
    """Marks at the beginnings and ends of parts; `seconds` adds up what lies between them by part."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open = ["rest"]
        self._marks: list[tuple[Any, str]] = []
        self.seconds: dict[str, float] = {}

    def watch(self, model: Model) -> None:
        """Wrap the parts of every layer of ``model``."""
        for block in model.blocks:
            attn = block.attn
            kind = KINDS[attn.ratio]
            self._wrap(attn, "forward", f"{kind}: projections, window, entries")
            self._wrap(attn, "_attend", f"{kind}: core attention")
            if attn.compressor is not None:
                self._wrap(attn.compressor, "advance", "compressors")
            if attn.indexer is not None:
                self._wrap(attn.indexer.compressor, "advance", "compressors")
                self._wrap(attn.indexer, "select", "index choice")
            self._wrap(block.ffn, "forward", "experts")
            self._wrap(block.hc_attn, "around", "mHC")
            self._wrap(block.hc_ffn, "around", "mHC")

    def settle(self) -> None:
        """Add up the marks set so far; the device has to be idle."""
        for (a, part), (b, _) in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[part] = self.seconds.get(part, 0.0) + (a.elapsed_time(b) / 1e3 if self._cuda else b - a)
        self._marks.clear()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((event if self._cuda else time.perf_counter(), self._open[-1]))

    def _wrap(self, owner: object, method: str, part: str) -> None:
        run: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any) -> Any:
            self._open.append(part)
            self.mark()
            try:
                return run(*args)
            finally:
                self._open.pop()
                self.mark()

        setattr(owner, method, watched)


def text_ids(engine: Engine, count: int) -> list[int]:
    """The standard library's sources as tokens, in the order of their paths."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        ids += engine.tokenizer.encode(path.read_text("utf-8", "replace"), specials=False)
        if len(ids) >= count:
            return ids[:count]
    raise SystemExit(f"Python's standard library here has only {len(ids):,} tokens of text")


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def operations(run: Callable[[], object]) -> str:
    """The operations that take most of the device's time over one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    found = [event for event in found if event.self_device_time_total and event.device_type.name == "CUDA"]
    total = sum(event.self_device_time_total for event in found)
    lines = [f"{sum(e.count for e in found):,} launches, {total / 1e3:.1f} ms of kernels"]
    lines += [f"{e.self_device_time_total / total:6.1%} {e.count:6} x  {e.key[:90]}" for e in found[:24]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--operations", action="store_true")
    given = parser.parse_args()

    engine = Engine.load(given.model, device=given.device, ctx=given.tokens)
    device = engine.backend.device
    ids = text_ids(engine, given.tokens - 2 * DECODED)
    engine.session().extend(ids[: engine.chunk], logits="none")  # libraries load and choose their kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts, session = Parts(device), engine.session()
    parts.watch(engine.model)

    rows, seconds, step = [], 0.0, -(-len(ids) // COLUMNS // engine.chunk) * engine.chunk
    print(f"{engine.name} on {engine.device}, chunks of {engine.chunk:,}")
    print(f"{'tokens':>12}{'seconds':>10}{'tokens/s':>12}")
    for start in range(0, len(ids), step):
        piece = ids[start : start + step]
        parts.mark()
        took = timed(lambda: session.extend(piece, logits="none"))  # noqa: B023
        parts.mark()
        parts.settle()
        seconds += took
        rows.append({"tokens": session.position, "seconds": took, "tok_s": len(piece) / took})
        print(f"{session.position:12,}{took:10.2f}{len(piece) / took:12,.0f}")
    peak, cache = peak_memory(device), session.kv_bytes
    print(f"{'in all':>12}{seconds:10.2f}{len(ids) / seconds:12,.0f}")
    print(f"peak memory {peak / 2**20:,.0f} MiB, of which weights {engine.plan.weights / 2**20:,.0f}, cache "
          f"{cache / 2**20:,.0f}; planned {engine.plan.needed / 2**20:,.0f}")  # fmt: skip
    by_part = dict(sorted(parts.seconds.items(), key=lambda item: -item[1]))
    for part, spent in by_part.items():
        print(f"{spent:10.2f} s {spent / sum(by_part.values()):6.1%}  {part}")

    steps = [timed(lambda: session.extend([token])) for token in ids[:DECODED]]  # noqa: B023
    short = engine.session()
    short.extend(ids[:4096])
    steps_short = [timed(lambda: short.extend([token])) for token in ids[4096 : 4096 + DECODED]]  # noqa: B023
    decode = {"end_ms": statistics.median(steps) * 1e3, "4096_ms": statistics.median(steps_short) * 1e3}
    print(f"a decoded token: {decode['4096_ms']:.1f} ms at 4,096 tokens, {decode['end_ms']:.1f} ms at the end")
    if given.operations and device.type == "cuda":
        print("\none decode step at the end:\n" + operations(lambda: session.extend(ids[:1])))
        fork = session.fork()
        print("\nthe first 8,192 tokens:\n" + operations(lambda: engine.session().extend(ids[:8192], logits="none")))
        fork.ctx += 8192
        print("\n8,192 tokens at the end:\n" + operations(lambda: fork.extend(ids[:8192], logits="none")))
    print(json.dumps({"model": engine.name, "device": engine.device, "chunk": engine.chunk, "seconds": seconds,
                      "peak_bytes": peak, "cache_bytes": cache, "rows": rows, "parts": by_part, **decode}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
