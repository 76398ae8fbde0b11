"""What a plan is expected to reach: tokens a second, and what they wait for.

Owns how a plan's bytes meet rates: of the device (roofline.py), of the link between memory and GPU, of the disk, and of
this machine's CPU, which are measured in a second.  Estimates at best: nothing here has been run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dsv4_engine.config import ModelConfig
from dsv4_engine.costs import Cost, Held, costs, decode_costs
from dsv4_engine.offload.layout import ExpertLayout
from dsv4_engine.placement import MemoryPlan
from dsv4_engine.roofline import DEVICES, Device, bound
from dsv4_engine.weights import Weights
from dsv4_kernels.linear import Weight, linear

# Bytes/s from page-locked memory, PCIe 5.  Of the cards in roofline.py those that the Triton kernels run on.
LINKS = {"h200": 55e9, "h100": 50e9}
LINK, DISK = 24e9, 2e9  # bytes/s where nothing better is known
_PROBE = 64 << 20  # bytes of a file that are read to measure the disk
_STORED = {"routed experts": "expert", "projections": "fp8", "index projections": "fp8", "shared expert": "fp8"}


@dataclass(frozen=True)
class Rates:
    """gpu: None where the CPU computes.  link, disk: bytes/s.  unpack: seconds a byte of packed matrices for one token,
    on the CPU, by form; product: its FLOP/s on many tokens.  sources: where the numbers are from.
    """

    gpu: Device | None
    link: float
    disk: float
    unpack: Mapping[str, float]
    product: float
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """Tokens a second, and what most of that time goes to; expert_s: seconds to copy a missed expert to the GPU, and to
    compute it on the CPU instead (0 where there is no choice).
    """

    decode_tok_s: float
    decode_bound: str
    prefill_tok_s: float
    prefill_bound: str
    expert_copy_s: float
    expert_cpu_s: float
    sources: tuple[str, ...]


def rates_for(plan: MemoryPlan, weights: Weights | None) -> Rates:
    """The rates that matter to a plan: this machine's where it has the device, else a named card's data sheet."""
    sources = []
    gpu, link = None, LINK
    if plan.device != "cpu":
        name = _card(plan.rooms[plan.device.split(",")[0]])
        gpu, link = DEVICES[name], LINKS[name]
        where = "" if torch.cuda.is_available() else "; the kernels need compute capability 9.0"
        sources.append(f"GPU: rates of {gpu.name} ({gpu.source}); link {link / 1e9:.0f} GB/s{where}")
    disk = DISK
    if plan.slots and any(row.place == "disk" for row in plan.rows):
        measured = _disk_rate(weights) if weights is not None else None
        disk = measured or DISK
        sources.append(f"disk {disk / 1e9:.1f} GB/s, " + ("measured" if measured else "assumed"))
    unpack, product = _cpu_rates()
    if plan.device == "cpu":
        threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
        sources.append(f"CPU: measured on {threads}, {product / 1e9:.0f} GFLOP/s")
    return Rates(gpu, link, disk, unpack, product, tuple(sources))


def forecast(config: ModelConfig, plan: MemoryPlan, rates: Rates) -> Forecast:
    """What to expect at the plan's context, with uniformly random routing, the worst there is for what is held."""
    chunk = min(plan.chunk, plan.ctx)
    held: Held = "float32" if plan.expand else "published"
    last = costs(config, plan.ctx - chunk, chunk, kv_dtype=plan.kv_dtype, held=held)
    step = decode_costs(config, plan.ctx, kv_dtype=plan.kv_dtype, held=held)
    layers = len(plan.device_map.apart())
    moved = layers * config.num_experts_per_tok * plan.expert_bytes
    used = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** chunk
    most = layers * config.n_routed_experts * used * plan.expert_bytes
    missed = 1 - plan.cached_share
    on_disk = 1 - plan.slots / max(plan.experts, 1) if plan.slots else 0.0
    expert_copy = expert_cpu = 0.0
    if rates.gpu is not None:
        times = {"computing": bound(step, rates.gpu).seconds, "the link": missed * moved / rates.link}
        chunks = {"computing": bound(last, rates.gpu).seconds, "the link": missed * most / rates.link}
        if layers:
            expert_copy = plan.expert_bytes / rates.link
            expert_cpu = plan.expert_bytes * rates.unpack["expert"]
    else:
        times = {"computing": _cpu_seconds(step, rates, plan.expand)}
        chunks = {"computing": _cpu_seconds(last, rates, plan.expand)}
    if on_disk:
        times["the disk"] = on_disk * (missed if rates.gpu is not None else 1) * moved / rates.disk
        chunks["the disk"] = on_disk * most / rates.disk
    decode_for, prefill_for = (max(found, key=lambda what: found[what]) for found in (times, chunks))
    # A layer's missing experts are known only behind its router: what computes does not overlap with their way.
    step_s = times["computing"] + times["the link"] if rates.gpu is not None else 0.0
    return Forecast(
        decode_tok_s=1 / max(step_s, times[decode_for]),
        decode_bound=decode_for,
        prefill_tok_s=chunk / chunks[prefill_for],
        prefill_bound=prefill_for,
        expert_copy_s=expert_copy,
        expert_cpu_s=expert_cpu,
        sources=rates.sources,
    )


def _cpu_seconds(found: tuple[Cost, ...], rates: Rates, expand: bool) -> float:
    """Unpacking, or reading what is held expanded, and multiplying, one after the other."""
    seconds = 0.0
    for cost in found:
        form = "held" if expand else _STORED.get(cost.operation, "plain")
        seconds += cost.weight_bytes * rates.unpack[form]
        seconds += cost.flops / rates.product
    return seconds


def _card(room: int) -> str:
    """The card that is here, else the one whose memory is nearest."""
    if torch.cuda.is_available():
        present = torch.cuda.get_device_name(0).lower().replace(" ", "")
        for name in LINKS:
            if name in present:
                return name
    return min(LINKS, key=lambda name: abs(DEVICES[name].memory - room))


def _disk_rate(weights: Weights) -> float | None:
    """Bytes a second of a file's middle, what the system keeps of it dropped first; None where it has no such call."""
    files = {info.file for info in weights.checkpoint.names.values()}
    largest = max(files, key=lambda file: file.stat().st_size)
    size = min(_PROBE, largest.stat().st_size)
    if not hasattr(os, "posix_fadvise"):
        return None
    start = (largest.stat().st_size - size) // 2 // 4096 * 4096
    handle = os.open(largest, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, start, size, os.POSIX_FADV_DONTNEED)
        buffer, done, before = bytearray(4 << 20), 0, time.perf_counter()
        while done < size and (count := os.preadv(handle, [buffer], start + done)):
            done += count
        return done / max(time.perf_counter() - before, 1e-9)
    finally:
        os.close(handle)


def _cpu_rates() -> tuple[Mapping[str, float], float]:
    """Seconds a byte of one-token products with packed matrices, and FLOP/s of float32 products of 512 tokens."""
    rows, columns = 512, 4096
    layout = ExpertLayout("fp4", torch.int8, columns, rows)
    expert = layout.pool(1).expert(0).w13[0]
    scale = torch.zeros(rows // 128, columns // 128, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    eight = Weight(torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), scale, "fp8")
    plain = Weight(torch.zeros(rows, columns, dtype=torch.bfloat16))
    held = Weight(torch.zeros(8 * rows, columns))  # larger than a cache
    one, many = torch.zeros(1, columns), torch.zeros(512, columns)
    found = {}
    with torch.inference_mode():
        for form, weight in (("expert", expert), ("fp8", eight), ("plain", plain), ("held", held)):
            found[form] = _best(lambda weight=weight: linear(one, weight)) / weight.nbytes  # type: ignore[misc]
        product = 2 * 512 * rows * columns / _best(lambda: linear(many, held.rows(0, rows)))
    return found, product


def _best(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best
