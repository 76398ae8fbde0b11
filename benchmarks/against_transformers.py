"""Prefill, decode and peak memory against Transformers' deepseek_v4: same checkpoint, same machine, same process.

    python -m benchmarks.against_transformers [--model FOLDER] [--tokens 4096] [--memory-tokens 16384] [--threads 2]

A quantised model is expanded to float32 for both: Transformers does not compute with these formats on a CPU.
Without --model it makes a random checkpoint in V4-Flash's proportions (heads x head_dim = 8 x hidden, q_lora and
o_lora = hidden / 4, six experts of hidden / 2, the three layer kinds); random weights cost what trained ones cost.
Both sides compute in float32 and keep a float32 cache.  Logits are compared first; where they disagree no speed-up is
printed.  Decoding is measured twice: one token of each side in turn, so that each finds the caches full of the other's
data and code, and `RUN` tokens of each in turn, as an answer is decoded.  Peak memory is the growth of the high-water
mark over a prefill in a process of its own for each side, with most of the machine's free memory as its limit; a side
that reaches the limit is shown with it and "or more".
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.timing import timed
from dsv4_engine import Engine
from dsv4_engine.accounting import parameters
from tests.support.expanded_checkpoint import expand_checkpoint
from tests.support.random_checkpoint import make_checkpoint

RUN = 20
TOLERANCE = 2e-4  # of the largest logit, as in tests/engine/test_model.py
FLASH_PROPORTIONS: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "compress_ratios": [0, 0, 4, 128, 4, 128], "num_attention_heads": 16,
    "head_dim": 128, "q_lora_rank": 64, "o_groups": 2, "o_lora_rank": 64, "sliding_window": 128, "index_n_heads": 16,
    "index_head_dim": 128, "index_topk": 512, "moe_intermediate_size": 128, "n_routed_experts": 32,
    "num_experts_per_tok": 6, "num_hash_layers": 3, "swiglu_limit": 10.0,
}  # fmt: skip


def alternately(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int, run: int = 1
) -> tuple[float, float]:
    """Median seconds of both, run in turn, ``run`` times each, so that whatever else the machine does falls on both.

    No warm-up.
    """
    our_times, their_times = [], []
    for _ in range(repeats):
        our_times += [timed(ours) for _ in range(run)]
        their_times += [timed(theirs) for _ in range(run)]
    return statistics.median(our_times), statistics.median(their_times)


def peak_growth(side: str, folder: Path, tokens: int, threads: int, limit: int) -> tuple[int, bool]:
    """Bytes that a prefill adds to resident memory in a fresh process, and whether it fitted into ``limit``."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(side, folder, tokens, threads, limit, sender))
    child.start()
    sender.close()
    try:
        grown: int | None = receiver.recv()
    except EOFError:  # killed
        grown = None
    child.join()
    return (limit, False) if grown is None else (grown, True)


def _measure_peak(side: str, folder: Path, tokens: int, threads: int, limit: int, sender: Connection) -> None:
    torch.set_num_threads(threads)
    ids = torch.randint(0, 2048, (tokens,))
    run: Callable[[], object]
    if side == "dsv4":
        session = Engine.load(folder, kv_dtype="fp32").session()
        session.extend([0])
        run = lambda: session.extend(ids.tolist())  # noqa: E731
    else:
        oracle = Oracle(folder)
        oracle.prefill(ids[:8])
        run = lambda: oracle.prefill(ids)  # noqa: E731
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (before + limit, before + limit))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    try:
        run()
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        sender.send(None)
    else:
        sender.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def ceilings() -> tuple[float, float]:
    """This machine's float32 matrix rate (FLOP/s) and read bandwidth (bytes/s), measured now."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    flops = 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(5))
    x = torch.randn(64 << 20)
    return flops, x.nbytes / min(timed(lambda: x.sum()) for _ in range(5))


class Oracle:
    """Transformers, eager, with its own cache."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.cache: Any = None

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(ids[None], use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[0, -1].float()

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        out = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return out.logits[0, -1].float()


def disagreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: random, V4-Flash's proportions")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--memory-tokens", type=int, default=16384, help="0 leaves the memory part out")
    parser.add_argument("--repeats", type=int, default=3, help="prefills to time, and twenty times as many steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as temporary:
        random = args.model is None
        plain = Path(temporary) / "model"
        folder = (
            make_checkpoint(plain, mtp=False, **FLASH_PROPORTIONS) if random else expand_checkpoint(args.model, plain)
        )
        engine = Engine.load(folder, kv_dtype="fp32")
        oracle = Oracle(folder)
        weights = "random weights" if random else f"{args.model}, expanded to float32"
        ids = torch.randint(0, engine.config.vocab_size, (max(args.tokens, args.memory_tokens),))
        prompt = ids[: args.tokens]

        session = engine.session()
        errors = [disagreement(session.extend(prompt.tolist()), oracle.prefill(prompt))]
        errors += [disagreement(session.extend([token]), oracle.step(token)) for token in (5, 7, 11)]
        agree = max(errors) <= TOLERANCE
        rows: list[dict[str, Any]] = []

        matrix_rate, bandwidth = ceilings()
        active = parameters(engine.config).active
        ours, theirs = alternately(
            lambda: engine.session().extend(prompt.tolist()), lambda: oracle.prefill(prompt), args.repeats
        )
        floor = 2 * active * args.tokens / matrix_rate
        rows.append(_row(f"prefill {args.tokens} tokens", ours, theirs, "s", floor / ours))

        for run, name in ((1, "one token in turn"), (RUN, f"{RUN} tokens in turn")):
            ours, theirs = alternately(
                lambda: session.extend([5]), lambda: oracle.step(5), 20 * args.repeats // run, run
            )
            rows.append(_row(f"decode at {args.tokens}, {name}", ours, theirs, "s", active * 4 / bandwidth / ours))

        if args.memory_tokens:
            del oracle, session
            gc.collect()
            limit = int(psutil.virtual_memory().available * 0.85)
            sizes = (peak_growth(side, folder, args.memory_tokens, args.threads, limit) for side in ("dsv4", "oracle"))
            (ours, _), (theirs, fits) = sizes
            rows.append(_row(f"peak memory, {args.memory_tokens} tokens", ours, theirs, "B", None, at_least=not fits))

    print(f"{weights}; {args.threads} threads; {parameters(engine.config).total / 1e6:.1f} M parameters")
    print(f"ceilings: {matrix_rate / 1e9:.0f} GFLOP/s float32 matrix product, {bandwidth / 1e9:.1f} GB/s read")
    print(f"largest logit difference {max(errors):.1e} (allowed {TOLERANCE})")
    print(f"{'':36}{'dsv4':>12}{'Transformers':>14}{'ratio':>8}  share of the ceiling")
    for row in rows:
        more = "+" if row["at_least"] else ""
        ratio = f"{row['ratio']:.1f}x{more}" if agree else "none: the outputs disagree"
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        mine, other = _show(row["dsv4"], row["unit"]), _show(row["transformers"], row["unit"]) + more
        print(f"{row['name']:36}{mine:>12}{other:>14}{ratio:>9}  {share}")
    print(json.dumps({"weights": weights, "agree": agree, "error": max(errors), "rows": rows}))
    return 0 if agree else 1


def _row(
    name: str, ours: float, theirs: float, unit: str, share: float | None, at_least: bool = False
) -> dict[str, Any]:
    ratio = theirs / ours
    values = {"name": name, "dsv4": ours, "transformers": theirs, "unit": unit, "ratio": ratio, "share": share}
    return values | {"at_least": at_least}


def _show(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
