"""Where a model's time and cache bytes go on this machine, measured beside what its configuration says.

Owns the stopwatch that is put around the layers' methods from outside while something is timed (the model knows
nothing of it), the timed prefill and decode, and the line through measured cache sizes.  Synchronises with a GPU at
every part, so parts are timed in a run of their own there and whole steps without them; the GPU's own kernels are timed
by torch's profiler instead (gpu/breakdown.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from threading import Lock, local
from typing import Any, Protocol

import numpy as np
import torch

from dsv4_engine import token_step
from dsv4_engine.accounting import kv_bytes, kv_bytes_per_token, sequence_state_bytes
from dsv4_engine.attention import Attention
from dsv4_engine.ceilings import now
from dsv4_engine.compressor import Compressor
from dsv4_engine.config import ModelConfig
from dsv4_engine.costs import KINDS, Cost, Held, decode_costs, prefill_costs
from dsv4_engine.engine import Engine
from dsv4_engine.errors import InputError
from dsv4_engine.hyper_connection import HyperConnection
from dsv4_engine.indexer import Indexer
from dsv4_engine.model import Block, Model
from dsv4_engine.moe import MixtureOfExperts
from dsv4_engine.roofline import Device, bound
from dsv4_engine.session import Progress, Session

MIN_CTX = 1024
STEPS, MIN_STEPS, STEPS_BUDGET_S = 16, 4, 20.0
SPARE_TOKENS = 2 * STEPS + 1  # decoded after the prefill: one to warm up, whole steps, steps by part
OUTSIDE = "outside layers"

# What the stopwatch can tell apart, and the operations of costs.py that are done meanwhile.
OPERATIONS_OF = {
    "projections": ("projections",),
    "compressors": ("compressors",),
    "indexer": ("index projections", "index scores"),
    "core attention": ("window attention", "csa attention", "hca attention"),
    "experts": ("router", "routed experts", "shared expert"),
    "mHC": ("mHC",),
    "head": ("head",),
    "other": (),  # embedding, positions, copies of the state
}
_PART_OF = {operation: part for part, operations in OPERATIONS_OF.items() for operation in operations}


@dataclass(frozen=True)
class PartTime:
    """One part in all layers of one kind, for all tokens of the phase.

    seconds: measured.  least_s: the roofline for flops and bytes, 0 where nothing is counted.
    """

    part: str
    kind: str
    seconds: float
    least_s: float
    flops: int
    bytes: float


@dataclass(frozen=True)
class Phase:
    """A prefill, or one decoded token.

    seconds: of the whole; a decoded token's without the stopwatch.  Where one layer of each kind was timed, as many
    times longer as the parts are together.  least_s: its roofline.
    """

    tokens: int
    ctx: int
    seconds: float
    least_s: float
    parts: tuple[PartTime, ...]


@dataclass(frozen=True)
class CacheFit:
    """Measured cache sizes at several lengths and the least-squares line through them, beside the analytic one.

    held: bytes of the state's rows, windows and open blocks.  allocated: bytes of the memory behind them, reserve
    included.  slope: bytes a token; intercept: bytes.  analytic_state: what an intercept can be at most.
    """

    lengths: tuple[int, ...]
    held: tuple[int, ...]
    allocated: tuple[int, ...]
    slope: float
    intercept: float
    analytic_slope: float
    analytic_entries: tuple[int, ...]
    analytic_state: int

    @property
    def difference(self) -> float:
        """Of the measured slope from the analytic one, as a share of the latter."""
        return self.slope / self.analytic_slope - 1 if self.analytic_slope else 0.0


@dataclass(frozen=True)
class Measurement:
    """prefill, decode: see Phase.  scaled: one layer of each kind was timed, and times are multiplied by their number;
    the cache is that of the layers that ran.
    """

    prefill: Phase
    decode: Phase
    cache: CacheFit
    scaled: bool


def measure(
    engine: Engine, ctx: int, device: Device, whole: ModelConfig | None = None, progress: Progress | None = None
) -> Measurement:
    """Read ``ctx`` random tokens and decode some more, timed; ``device``: ceilings to compare with.

    whole: the configuration that the engine's one layer of each kind stands for.  Needs SPARE_TOKENS of context beyond
    ctx.  progress(done, total) counts prefilled tokens.  Raises InputError for a context too short to draw a line.
    """
    if ctx < MIN_CTX:
        raise InputError(f"{ctx} tokens are too few to measure", f"Use a context of at least {MIN_CTX:,} tokens.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(engine.config.vocab_size, (ctx + SPARE_TOKENS,), generator=generator).tolist()
    session, clock = engine.session(), _clock(engine)
    lengths = [ctx * quarter // 4 // 128 * 128 for quarter in (1, 2, 3, 4)]
    whole_chunks = lengths[0] % engine.chunk == 0  # else it would cost time to cut them for the cache's sake
    ends = [*lengths, ctx] if whole_chunks else [ctx]
    sizes: list[tuple[int, int]] = []

    warm = engine.session()
    # On a GPU as many at once as will be: their kernels are compiled then, which takes seconds.
    warm.extend(ids[: min(ends[0], engine.chunk) if engine.backend.name == "triton" else min(256, ctx)])
    warm.extend(ids[:1])
    with clock.watching():
        before = now(engine.device)  # inside: a profiler takes seconds to begin and to end
        for start, end in pairwise([0, *ends]):
            if end > start:
                session.extend(ids[start:end], "last" if end == ctx else "none", _shifted(progress, start, ctx))
            if whole_chunks and len(sizes) < len(lengths):
                sizes.append((session.kv_bytes, allocated_bytes(session)))
        took = now(engine.device) - before
    config = whole or engine.config
    forms: Held = engine.dtype if engine.plan.expand else "published"  # type: ignore[assignment]
    found = prefill_costs(config, ctx, chunk=engine.chunk, kv_dtype=engine.kv_dtype, held=forms)
    prefill = _phase(ctx, ctx, took, clock.seconds, found, device, engine.config, whole)

    rest = iter(ids[ctx:])
    session.extend([next(rest)])
    plain = _steps(session, rest, engine.device)
    clock = _clock(engine)
    with clock.watching():
        watched = _steps(session, rest, engine.device)
    found = decode_costs(config, session.position, kv_dtype=engine.kv_dtype, held=forms)
    seconds = {key: value / len(watched) for key, value in clock.seconds.items()}
    decode = _phase(1, session.position, median(plain), seconds, found, device, engine.config, whole)
    if not whole_chunks:
        session = engine.session()  # in the other's place: memory is planned for one
        for start, end in pairwise([0, *lengths]):
            session.extend(ids[start:end], "none")
            sizes.append((session.kv_bytes, allocated_bytes(session)))
    fit = fit_cache(engine.config, engine.kv_dtype, lengths, *map(list, zip(*sizes, strict=True)))
    return Measurement(prefill, decode, fit, scaled=whole is not None)


def _clock(engine: Engine) -> Clock:
    if engine.backend.name != "triton":
        return Stopwatch(engine.device, engine.plan.lanes)
    from dsv4_engine.gpu.breakdown import KernelClock  # needs triton

    return KernelClock(engine.model)


class Clock(Protocol):
    """seconds: by (part, kind of layer), of all that ran while `watching` lasted."""

    seconds: dict[tuple[str, str], float]

    def watching(self) -> AbstractContextManager[None]: ...


def _steps(session: Session, ids: Iterator[int], device: str) -> list[float]:
    """Seconds of each decode step."""
    times: list[float] = []
    while len(times) < MIN_STEPS or (len(times) < STEPS and sum(times) < STEPS_BUDGET_S):
        before = now(device)
        session.extend([next(ids)])
        times.append(now(device) - before)
    return times


def _shifted(progress: Progress | None, start: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(start + done, total)


def _phase(
    tokens: int,
    ctx: int,
    whole_s: float,
    seconds: dict[tuple[str, str], float],
    found: Sequence[Cost],
    device: Device,
    timed: ModelConfig,
    whole: ModelConfig | None,
) -> Phase:
    times = {key: value * _number_of(key[1], timed, whole) for key, value in seconds.items()}
    parts = []
    for part in OPERATIONS_OF:
        for kind in KINDS:
            counted = [c for c in found if _PART_OF[c.operation] == part and c.kind == kind]
            if (part, kind) in times or counted:
                least = bound(counted, device).seconds
                flops, size = sum(c.flops for c in counted), sum(c.bytes for c in counted)
                parts.append(PartTime(part, kind, times.get((part, kind), 0.0), least, flops, size))
    if whole is not None:
        whole_s *= sum(times.values()) / sum(seconds.values())
    return Phase(tokens, ctx, whole_s, bound(found, device).seconds, tuple(parts))


def _number_of(kind: str, timed: ModelConfig, whole: ModelConfig | None) -> float:
    """How many layers each timed layer of this kind stands for."""
    if whole is None or kind == OUTSIDE:
        return 1.0
    ratio = {"window": 0, "csa": 4, "hca": 128}[kind]
    return whole.compress_ratios.count(ratio) / timed.compress_ratios.count(ratio)


# ---- the stopwatch ---------------------------------------------------------------------------------------------------


class _Calls(local):
    """A thread's open calls.  inside: seconds of finished calls, one entry for each open call."""

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.kind, self.watching = OUTSIDE, False


@dataclass
class Stopwatch:
    """Seconds by (part, kind of layer), each without what watched calls inside it took.

    Of calls in other threads than the watching one, which are chunks side by side, `lanes` at a time, the share.
    """

    device: str
    lanes: int = 1
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    _calls: _Calls = field(default_factory=_Calls)
    _adding: Lock = field(default_factory=Lock)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, every model's layers are timed; one thread watches at a time."""
        self._calls.watching = True
        kept = [(owner, name, owner.__dict__[name]) for owner, name, _ in _watched()]
        try:
            for owner, name, part in _watched():
                setattr(owner, name, self._timed(owner.__dict__[name], part, owner in (Block, token_step._Layer)))
            yield
        finally:
            for owner, name, method in kept:
                setattr(owner, name, method)

    def _timed(self, method: Callable[..., Any], part: str, opens: bool) -> Callable[..., Any]:
        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            calls = self._calls
            kind = calls.kind
            if opens:
                calls.kind = {0: "window", 4: "csa", 128: "hca"}[layer.attn.ratio]
            calls.inside.append(0.0)
            before = now(self.device)
            try:
                return method(layer, *args, **kwargs)
            finally:
                took = now(self.device) - before
                key = (part, calls.kind)
                own = (took - calls.inside.pop()) * (1.0 if calls.watching else 1 / self.lanes)
                with self._adding:
                    self.seconds[key] = self.seconds.get(key, 0.0) + own
                if calls.inside:
                    calls.inside[-1] += took
                calls.kind = kind

        return call


def _watched() -> Iterable[tuple[type, str, str]]:
    """(class, method, part): the model's layers, and those of a small model's single tokens."""
    return (
        (Model, "forward", "other"),
        (Model, "logits", "head"),
        (Block, "forward", "mHC"),
        (HyperConnection, "around", "mHC"),
        (Attention, "forward", "projections"),
        (Attention, "_attend", "core attention"),
        (Compressor, "advance", "compressors"),
        (Indexer, "advance", "indexer"),
        (Indexer, "select", "indexer"),
        (MixtureOfExperts, "forward", "experts"),
        (token_step.TokenStep, "forward", "other"),
        (token_step.TokenStep, "logits", "head"),
        (token_step._Layer, "forward", "mHC"),  # writes the streams itself
        (token_step._Streams, "read", "mHC"),
        (token_step._Attention, "forward", "projections"),
        (token_step._Attention, "_attend", "core attention"),
        (token_step._Attention, "_rows", "core attention"),
        (token_step._Compressor, "advance", "compressors"),
        (token_step._Indexer, "select", "indexer"),
        (token_step._Experts, "forward", "experts"),
    )


# ---- the cache -------------------------------------------------------------------------------------------------------


def fit_cache(
    config: ModelConfig, kv_dtype: str, lengths: Sequence[int], held: Sequence[int], allocated: Sequence[int]
) -> CacheFit:
    """The least-squares line through ``held`` bytes at ``lengths`` tokens (multiples of 128, past the window)."""
    mean_x, mean_y = sum(lengths) / len(lengths), sum(held) / len(held)
    spread = sum((x - mean_x) ** 2 for x in lengths)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(lengths, held, strict=True)) / spread
    return CacheFit(
        lengths=tuple(lengths),
        held=tuple(held),
        allocated=tuple(allocated),
        slope=slope,
        intercept=mean_y - slope * mean_x,
        analytic_slope=kv_bytes_per_token(config, kv_dtype),
        analytic_entries=tuple(kv_bytes(config, kv_dtype, length) for length in lengths),
        analytic_state=sequence_state_bytes(config),
    )


def allocated_bytes(session: Session) -> int:
    """Bytes of the memory behind every tensor and array that a session's state reaches, each piece of memory once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = [session.state]
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            memory = thing.untyped_storage()
            sizes[memory.data_ptr()] = memory.nbytes()
        elif isinstance(thing, np.ndarray):
            if thing.base is None:
                sizes[thing.ctypes.data] = thing.nbytes
            else:
                left.append(thing.base)
        elif isinstance(thing, (list, tuple)):
            left.extend(thing)
        elif isinstance(thing, dict):
            left.extend(thing.values())
        elif type(thing).__module__.startswith("dsv4_engine."):
            left.extend(vars(thing).values())
    return sum(sizes.values())
