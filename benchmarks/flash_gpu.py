"""V4-Flash on GPUs, random weights made in place: decoding, prefill, memory, and where the kernels' time goes.

    python -m benchmarks.flash_gpu --layers 36                      # as many as one H200 holds
    python -m benchmarks.flash_gpu --device cuda:0,cuda:1           # the whole model on two
    python -m benchmarks.flash_gpu --layers 6 --decode 4K --prefill 16K --breakdown

Sessions run as they do for any model: each next token is chosen before the next step, greedily or drawn.  Outputs are
checked first: equal bits for other chunks and for steps, on these weights.  Decoding far into a context goes on from a
state filled with random rows; prefill is real.  Where not all layers are there, the whole model's time is given as
that of what lies outside the layers and 43 times a layer's, and marked so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from dsv4_engine.accounting import readable_bytes
from dsv4_engine.config import ModelConfig
from dsv4_engine.engine import Engine
from dsv4_engine.gpu.breakdown import by_part, profiled
from dsv4_engine.gpu.model import GpuModel
from dsv4_engine.gpu.random_engine import backend_of_published, random_engine
from dsv4_engine.gpu.state import GpuState, ring_rows
from dsv4_engine.sampling import Sampler, Sampling
from dsv4_engine.session import Session

LARGEST, REPORTED = 1 << 20, 131_072
GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=0.6, top_p=0.95)


def size(text: str) -> int:
    return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else int(text)


def last_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with its last layers only, CSA and HCA in turn as in most of it, and no MTP block."""
    return replace(
        config,
        num_hidden_layers=layers,
        compress_ratios=config.compress_ratios[-layers:],
        num_hash_layers=max(0, config.num_hash_layers + layers - config.num_hidden_layers),
        num_nextn_predict_layers=0,
        mtp_compress_ratios=(),
    )


def filled(engine: Engine, tokens: int) -> Session:
    """A session that looks as if it held ``tokens`` (a multiple of the chunk): rows are random, each another one."""
    model, state = _gpu(engine), engine.model.new_state()
    held = cast(GpuState, state)
    held.reserve(tokens)
    for part, stage in zip(held.parts, model.stages, strict=True):
        generator = torch.Generator(stage.device).manual_seed(0)
        for number, buffers in enumerate(part.buffers):
            blocks = [(buffers.window, False)]
            for slab in part.slabs.get(buffers.ratio, []):
                blocks.append((part.layout.segment(slab, number), False))
                if buffers.ratio == 4:
                    blocks.append((part.layout.segment(slab, number, keys=True), True))
            for block, keys in blocks:
                block.random_(0, 256, generator=generator)
                if keys:
                    block[:, model.config.index_head_dim // 2 :] = 125
                    continue
                values, scales = ring_rows(block, model.config.head_dim)
                values.bitwise_and_(0xBF)  # below 2 in e4m3 and in bf16, never NaN
                scales.fill_(127)
    held.position = tokens
    # Session asks only how many tokens there are.
    return engine.session().holding([0] * tokens, state)


def _gpu(engine: Engine) -> GpuModel:
    assert isinstance(engine.model, GpuModel)
    return engine.model


def check(engine: Engine) -> None:
    """Equal bits for one chunk, for others, and for steps."""
    ids = torch.randint(engine.config.vocab_size, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = engine.session().extend(ids, logits="all")
    if not whole.isfinite().all():
        raise SystemExit("logits are not finite")
    session = engine.session()
    parts = [session.extend(ids[a:b], logits="all") for a, b in ((0, 129), (129, 130), (130, 511))]
    parts += [session.extend([token])[None] for token in ids[511:540]]
    parts.append(session.extend(ids[540:], logits="all"))
    same = torch.cat(parts)
    if not torch.equal(same, whole):
        wrong = (same != whole).any(1).nonzero().flatten()
        worst = (same - whole).abs().max() / whole.abs().max()
        print(
            f"NOT EQUAL: {len(wrong)} of {len(ids)} positions, first {wrong[:8].tolist()}, by {worst:.1e}", flush=True
        )
        return
    print("equal bits: one chunk, three chunks, 30 steps and another chunk", flush=True)


def steps(session: Session, sampling: Sampling = GREEDY, count: int = 40) -> float:
    """Median seconds from one token drawn to the next, as `generate` does it."""
    token, times, sampler = 1, [], Sampler(replace(sampling, seed=0))
    for _ in range(count + 8):
        start = time.perf_counter()
        logits = session.extend([token], logits="device")
        begun = sampler.begin(logits)
        assert begun is not None
        session.ahead(begun)
        token = sampler.end(logits, begun)
        times.append(time.perf_counter() - start)
    return statistics.median(times[8:])


def layers_alone(session: Session, count: int = 20) -> float:
    """Median seconds of a step without the head, the logits and a token chosen from them."""
    times = []
    with torch.inference_mode():
        for _ in range(count):
            _wait()
            start = time.perf_counter()
            session._advance(torch.tensor([1]))
            _wait()
            times.append(time.perf_counter() - start)
            session.tokens.append(1)
    return statistics.median(times)


def _wait() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def whole_model(seconds: float, outside: float, layers: int, all_layers: int) -> float:
    return outside + (seconds - outside) * all_layers / layers


def breakdown(engine: Engine, what: str, session: Session, ids: Sequence[int]) -> list[dict[str, Any]]:
    """A table of the kernels' time of one pass."""
    model = _gpu(engine)
    if len(ids) == 1:
        session.extend(ids)
    session.fork().extend(ids)
    fork = session.fork()
    if len(ids) == 1:
        fork.extend(ids)
    with profiled() as kernels:
        fork.extend(ids)
    found = by_part(kernels, model)
    total = sum(seconds for seconds, _ in found.values())
    kinds = ("window", "csa", "hca", "outside layers")
    print(f"\n{what}: {1e3 * total:.3f} ms in {len(kernels)} launches and copies")
    counts = {"window": 0, "csa": 4, "hca": 128}
    number = {kind: engine.config.compress_ratios.count(ratio) for kind, ratio in counts.items()}
    print(f"{'us a layer':18}" + "".join(f"{kind:>16}" for kind in kinds) + f"{'share':>8}")
    rows = []
    for part in dict.fromkeys(part for part, _ in found):
        line, mine = f"{part:18}", 0.0
        for kind in kinds:
            seconds, launches = found.get((part, kind), (0.0, 0))
            each = max(1, number.get(kind, 1))
            mine += seconds
            line += f"{1e6 * seconds / each:11.1f} /{launches / each:3.0f}" if launches else f"{'':>16}"
            if launches:
                rows.append(
                    {"pass": what, "part": part, "kind": kind, "us": 1e6 * seconds / each, "n": launches / each}
                )
        print(f"{line}{mine / total:8.1%}")
    by_name: dict[str, float] = {}
    for kernel in kernels:
        by_name[kernel.name] = by_name.get(kernel.name, 0.0) + kernel.microseconds
    most = sorted(by_name.items(), key=lambda item: -item[1])[:16]
    print("  " + ", ".join(f"{name[:40]} {us / 1e3:.3f} ms" for name, us in most), flush=True)
    return rows


def partly(start: float) -> Callable[[int, int], None]:
    """Prints how far a long prefill is, every 131,072 tokens."""

    def told(done: int, total: int) -> None:
        if total > 4 * REPORTED and done % REPORTED == 0:
            print(f"  {done:>9,} tokens after {time.perf_counter() - start:8.3f} s", flush=True)

    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--model", default="v4-flash", help="v4-flash or v4-pro")
    parser.add_argument("--layers", type=int, help="the last so many only")
    parser.add_argument("--ctx", type=size, default=LARGEST, help="to plan memory for")
    parser.add_argument("--decode", type=size, nargs="*", default=[4096, LARGEST - 8192])
    parser.add_argument("--prefill", type=size, nargs="*", default=[131_072])
    parser.add_argument("--breakdown", action="store_true")
    given = parser.parse_args()
    published = ModelConfig.preset(given.model)
    layers, every = given.layers or published.num_hidden_layers, published.num_hidden_layers
    config = last_layers(published, layers)
    start = time.perf_counter()
    backend = backend_of_published(config, given.device)
    if backend.name != "triton":
        raise SystemExit(f"this measures the Triton kernels: {backend.why}")
    engine = random_engine(config, backend, given.ctx)
    _wait()
    plan, devices = engine.plan, torch.cuda.device_count()
    held = [torch.cuda.memory_allocated(i) for i in range(devices)]
    print(f"{given.model}, random weights, {layers} of {every} layers on {engine.device}, made in "
          f"{time.perf_counter() - start:.1f} s; held {', '.join(map(readable_bytes, held))} (planned "
          f"{readable_bytes(plan.weights)}); chunk {engine.chunk:,}", flush=True)  # fmt: skip
    document: dict[str, Any] = {
        "model": given.model, "weights": "random", "layers": layers, "of": every, "device": engine.device,
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": [], "breakdown": [],
    }  # fmt: skip
    check(engine)
    for ctx in given.decode:
        session = (
            filled(engine, max(engine.chunk, ctx // engine.chunk * engine.chunk - engine.chunk))
            if ctx > 8192
            else engine.session()
        )
        if ctx <= 8192:
            session.extend(torch.randint(config.vocab_size, (ctx,)).tolist(), logits="none")
        greedy, alone = steps(session), layers_alone(session)
        drawn = steps(session, DRAWN)
        row = {"what": "decode", "ctx": session.position, "ms": 1e3 * greedy, "layers_ms": 1e3 * alone}
        row["drawn_ms"] = 1e3 * drawn
        line = f"decode at {session.position:>9,}: {1e3 * greedy:7.3f} ms a token, {1 / greedy:6.1f} tok/s; drawn with "
        line += f"{DRAWN.temperature}, top-p {DRAWN.top_p}: {1e3 * drawn:7.3f} ms; layers alone {1e3 * alone:7.3f} ms"
        if layers < every:
            all_of = whole_model(greedy, greedy - alone, layers, every)
            row["whole_ms"] = 1e3 * all_of
            line += f"; {every} layers would take {1e3 * all_of:7.3f} ms, {1 / all_of:6.1f} tok/s"
        print(line, flush=True)
        document["rows"].append(row)
        if given.breakdown:
            document["breakdown"] += breakdown(engine, f"decode at {session.position:,}", session, [1])
        del session
    for tokens in given.prefill:
        ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(2)).tolist()
        warm = engine.session()
        warm.extend(ids[: min(tokens, engine.chunk)])
        del warm
        for i in range(devices):
            torch.cuda.reset_peak_memory_stats(i)
        before = [torch.cuda.memory_allocated(i) for i in range(devices)]
        session = engine.session()
        start = time.perf_counter()
        session.extend(ids, progress=partly(start))
        took = time.perf_counter() - start
        beyond = max(torch.cuda.max_memory_allocated(i) - b for i, b in enumerate(before))
        line = (
            f"prefill {tokens:>9,}: {took:8.3f} s, {tokens / took:9,.0f} tok/s, {readable_bytes(beyond)} beyond weights"
        )
        planned = plan.working_set // len(_gpu(engine).stages) + plan.kv
        line += f" on the fullest GPU (planned at most {readable_bytes(planned)})"
        row = {"what": "prefill", "tokens": tokens, "s": took, "beyond_weights": beyond}
        if layers < every:
            row["whole_s"] = all_of = took * every / layers
            line += f"; {every} layers would take {all_of:.3f} s, {tokens / all_of:,.0f} tok/s"
        print(line, flush=True)
        document["rows"].append(row)
        if given.breakdown and session.position + engine.chunk <= engine.ctx:
            some = torch.randint(config.vocab_size, (engine.chunk,)).tolist()
            document["breakdown"] += breakdown(engine, f"a chunk of {engine.chunk:,} behind {tokens:,}", session, some)
        del session
    print(json.dumps(document))


if __name__ == "__main__":
    main()
