"""What a device could do at best: the time that each operation's bytes and FLOPs need on it, and what fits.

Owns the table of named devices and the bound: an operation takes at least as long as its bytes at the device's
bandwidth and as its FLOPs at the device's rate, whichever is longer, and operations follow one another.  Knows what
operations cost from costs.py only; measures nothing (ceilings.py does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dsv4_engine.accounting import kv_bytes_per_token, sequence_state_bytes
from dsv4_engine.config import BaselineConfig
from dsv4_engine.costs import Config, Cost, Held, cache_bytes, decode_costs, prefill_costs, stored_bytes
from dsv4_engine.placement import MAX_WORKING_SET

COMPARED_CTX = 1 << 20  # how far V3.2 is followed, beyond its published limit
PREFILL_CHUNK = 8192  # weights are read once a chunk; shorter ones leave a GPU waiting for experts
_WIDER = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp32"}
_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """memory: bytes that can be used; bandwidth: bytes/s; rates: dense FLOP/s by precision; source: of the numbers."""

    name: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    source: str

    def rate(self, precision: str) -> float:
        """FLOP/s at a precision, or in the next wider type that the device computes in."""
        while precision not in self.rates:
            precision = _WIDER[precision]
        return self.rates[precision]


# Dense rates with float32 accumulation, one card.  Memory is what torch reports as usable, below what is printed on it.
DEVICES = {
    "h200": Device("H200", int(139.8 * _GIB), 4.8e12, {"fp8": 1979e12, "bf16": 989e12}, "NVIDIA H200 data sheet, SXM"),
    "h100": Device("H100", int(79.1 * _GIB), 3.35e12, {"fp8": 1979e12, "bf16": 989e12}, "NVIDIA H100 data sheet, SXM"),
    "a100": Device("A100", int(79.2 * _GIB), 2.039e12, {"bf16": 312e12}, "NVIDIA A100 data sheet, SXM, 80 GB"),
    "rtx4090": Device(
        "RTX 4090", int(23.6 * _GIB), 1.008e12, {"fp8": 330.3e12, "bf16": 165.2e12}, "NVIDIA Ada architecture paper"
    ),
}


@dataclass(frozen=True)
class Bound:
    """The least time that operations need on a device, in seconds.

    memory_s: of it, spent in operations that wait for bytes rather than for arithmetic.  by_part: seconds by part.
    """

    seconds: float
    memory_s: float
    by_part: Mapping[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> str:
        """What most of the time waits for: "memory" or "compute"."""
        return "memory" if 2 * self.memory_s >= self.seconds else "compute"

    @property
    def slowest(self) -> str:
        return max(self.by_part, key=lambda part: self.by_part[part])


def bound(found: Iterable[Cost], device: Device) -> Bound:
    """The roofline of these costs on a device; different precisions of one operation share its pass over memory."""
    bytes_of: dict[tuple[str, str], float] = {}
    compute_of: dict[tuple[str, str], float] = {}
    part_of: dict[tuple[str, str], str] = {}
    for cost in found:
        key = (cost.operation, cost.kind)
        part_of[key] = cost.part
        bytes_of[key] = bytes_of.get(key, 0.0) + cost.bytes
        compute_of[key] = compute_of.get(key, 0.0) + cost.flops / device.rate(cost.precision)
    seconds = memory_s = 0.0
    by_part: dict[str, float] = {}
    for key, compute in compute_of.items():
        memory = bytes_of[key] / device.bandwidth
        seconds += max(memory, compute)
        memory_s += memory if memory >= compute else 0.0
        by_part[part_of[key]] = by_part.get(part_of[key], 0.0) + max(memory, compute)
    return Bound(seconds, memory_s, by_part)


@dataclass(frozen=True)
class Expectation:
    """What to expect of one sequence of ``ctx`` tokens on a device, at best.

    decode: of the last token; prefill: of all tokens, read in chunks.  weights, cache, needed: bytes; needed has a
    working set on each device.  devices: how many hold it; the layers are spread over them, and one works at a time, so
    that the times are those of one device.  sequences: how many of this length fit beside the weights.  max_ctx: the
    longest context that fits, at most the model's own limit.
    """

    device: Device
    ctx: int
    decode: Bound
    prefill: Bound
    weights: int
    cache: int
    needed: int
    devices: int
    sequences: int
    max_ctx: int

    @property
    def decode_tok_s(self) -> float:
        return 1 / self.decode.seconds

    @property
    def prefill_tok_s(self) -> float:
        return self.ctx / self.prefill.seconds


def expected(
    config: Config, device: Device, ctx: int, *, kv_dtype: str = "mixed", held: Held = "published"
) -> Expectation:
    """Rates at ``ctx`` tokens, what bounds them, and what fits; held: how the weights are kept (costs.costs)."""
    weights, cache = stored_bytes(config, held), cache_bytes(config, ctx, kv_dtype)
    state = sequence_state_bytes(config) if not isinstance(config, BaselineConfig) else 0
    room = device.memory - MAX_WORKING_SET
    devices = max(1, -(-(weights + cache + state) // room)) if room > 0 else 0
    left = devices * room - weights
    per_token = kv_bytes_per_token(config, kv_dtype)
    longest = int((left - state) / per_token) if per_token else math.inf  # a model of windows alone fits any length
    most = COMPARED_CTX if isinstance(config, BaselineConfig) else config.max_position_embeddings
    return Expectation(
        device=device,
        ctx=ctx,
        decode=bound(decode_costs(config, ctx, kv_dtype=kv_dtype, held=held), device),
        prefill=bound(prefill_costs(config, ctx, chunk=PREFILL_CHUNK, kv_dtype=kv_dtype, held=held), device),
        weights=weights,
        cache=cache + state,
        needed=weights + cache + state + devices * MAX_WORKING_SET,
        devices=devices,
        sequences=left // (cache + state),
        max_ctx=int(min(longest, most)),
    )
