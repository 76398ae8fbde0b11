"""What `profile` finds out: costs from configurations, rooflines, and what was measured.  Collects; prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4cli.errors import InputProblem
from dsv4cli.options import ANYWHERE, Placed
from dsv4cli.output import progress_bar

if TYPE_CHECKING:
    from dsv4_engine.config import ModelConfig
    from dsv4_engine.costs import Config, Held
    from dsv4_engine.engine import Backend, Engine
    from dsv4_engine.measure import Phase
    from dsv4_engine.roofline import Device

BASELINE = "v3.2"
PRESETS = (BASELINE, "v4-pro", "v4-flash")
MAX_CTX, MEASURED_CTX, SWEEP_FROM = 1 << 20, 4096, 4096


@dataclass(frozen=True)
class Named:
    """A model by the name it was asked for; path: its folder, None where only the published configuration is there."""

    name: str
    config: Config
    path: str | None

    @property
    def max_ctx(self) -> int:
        return getattr(self.config, "max_position_embeddings", MAX_CTX)


@dataclass(frozen=True)
class Wanted:
    """What was asked for; ctx and device None: the defaults."""

    models: tuple[str, ...]
    ctx: int | None
    kv_dtype: str
    device: str | None
    dtype: str
    sweep: bool
    measure: bool
    random_weights: bool
    placed: Placed = ANYWHERE


def check(wanted: Wanted) -> None:
    """Refuse with an InputProblem what does not go together, before anything is computed."""
    from dsv4cli.plots import MAX_SERIES

    if wanted.random_weights and not wanted.measure:
        raise InputProblem("--random-weights is for --measure", "Add --measure.")
    if wanted.measure and (len(wanted.models) != 1 or wanted.models[0] == BASELINE):
        raise InputProblem("--measure times one V4 model", "Name one, such as tiny.")
    if wanted.measure and not _is_here(wanted.device or "cpu"):
        raise InputProblem(
            f"--measure runs on this machine, and --device is {wanted.device}", "Use --device cpu or cuda."
        )
    if wanted.sweep and len({BASELINE, *wanted.models}) > MAX_SERIES:
        raise InputProblem(
            f"{len(wanted.models)} models in one plot cannot be told apart", f"Name at most {MAX_SERIES - 1}."
        )


def _is_here(device: str) -> bool:
    return device.split(":")[0] in ("cpu", "cuda")


def collect(wanted: Wanted) -> dict[str, Any]:
    """The whole document.  Raises InputProblem or an InputError for wrong input."""
    models = find(wanted.models)
    ctx = choose_ctx(models, wanted.ctx, MEASURED_CTX if wanted.measure else MAX_CTX)
    if wanted.measure:
        ctx = _measurable(models[1], wanted, ctx)
    found = analytic(models, ctx, wanted.kv_dtype)
    if wanted.sweep:
        found["sweep"] = sweep(models, ctx, wanted.kv_dtype)
    device = wanted.device or ("cpu" if wanted.measure else None)
    ceilings = devices(device, wanted.dtype)
    # Once models are named the baseline's rooflines would only be in the way.
    shown = models[1:] if wanted.models and BASELINE not in wanted.models else models
    found["roofline"] = [_roofline(shown, each, ctx, wanted, here=device == "cpu") for each in ceilings]
    if wanted.measure:
        found["measured"] = _measured(models[1], wanted, ctx, device or "cpu", ceilings[0])
    return found


def find(names: Sequence[str]) -> list[Named]:
    """The baseline and then the models, each once; without names the published ones.

    Raises an InputError for what is no model.
    """
    found = [_named(name) for name in dict.fromkeys(names or PRESETS) if name != BASELINE]
    return [_named(BASELINE), *found]


def _named(name: str) -> Named:
    from dsv4_engine.config import PRESETS as PUBLISHED
    from dsv4_engine.config import BaselineConfig, ModelConfig
    from dsv4_engine.errors import InputError
    from dsv4_engine.locate import resolve_model

    if name == BASELINE:
        return Named(name, BaselineConfig.preset(), None)
    try:
        folder = resolve_model(name)
    except InputError:
        if name in PUBLISHED:
            return Named(name, ModelConfig.preset(name), None)
        raise
    return Named(name, ModelConfig.from_folder(folder), str(folder))


def choose_ctx(models: Sequence[Named], ctx: int | None, default: int) -> int:
    """The context to count at; raises InputProblem beyond what a model goes up to."""
    smallest = min((*models[1:], models[0]), key=lambda model: model.max_ctx)
    if ctx is not None and ctx > smallest.max_ctx:
        raise InputProblem(
            f"--ctx is {ctx:,}, and {smallest.name} goes up to {smallest.max_ctx:,} tokens", "Give a smaller --ctx."
        )
    return ctx or min(default, smallest.max_ctx)


# ---- from the configurations -----------------------------------------------------------------------------------------


def analytic(models: Sequence[Named], ctx: int, kv_dtype: str) -> dict[str, Any]:
    """The document of costs at ``ctx`` tokens; the first model is the baseline."""
    from dsv4_engine.costs import GQA8, WEIGHTING

    found: dict[str, Any] = {}
    for model in models:
        found[model.name] = _costs_of(model, ctx, kv_dtype)
        _compare(found[model.name], found[BASELINE])
    return {
        "ctx": ctx,
        "baseline": BASELINE,
        "weighting": WEIGHTING,
        "gqa8": GQA8,
        "kv_dtype": kv_dtype,
        "models": found,
    }


def _costs_of(model: Named, ctx: int, kv_dtype: str) -> dict[str, Any]:
    from dsv4_engine import costs
    from dsv4_engine.accounting import kv_bytes_per_token, parameters, sequence_state_bytes
    from dsv4_engine.config import BaselineConfig

    config = model.config
    counted, cache = parameters(config), costs.cache_bytes(config, ctx, kv_dtype)
    decode = costs.decode_costs(config, ctx, kv_dtype=kv_dtype)
    prefill = costs.prefill_costs(config, ctx, kv_dtype=kv_dtype)
    gqa8 = costs.gqa8_bytes(config, ctx)
    weights_read, cache_read = sum(c.weight_bytes for c in decode), sum(c.cache_bytes for c in decode)
    return {
        "path": model.path,
        "total_params": counted.total,
        "active_params": counted.active,
        "weights_bytes": costs.stored_bytes(config),
        "kv_bytes": cache,
        "kv_bytes_per_token": kv_bytes_per_token(config, kv_dtype),
        "kv_state_bytes": 0 if isinstance(config, BaselineConfig) else sequence_state_bytes(config),
        "gqa8_kv_bytes": gqa8,
        "gqa8_ratio": cache / gqa8,
        "flops_raw": sum(c.flops for c in decode),
        "flops_weighted": sum(c.weighted for c in decode),
        "bytes_read": {"weights": weights_read, "cache": cache_read, "total": weights_read + cache_read},
        "by_group": costs.total(decode, lambda c: c.group),
        "by_part": costs.total(decode, lambda c: c.part),
        "by_kind": costs.total(decode, lambda c: c.kind),
        "by_operation": costs.total(decode, lambda c: c.operation),
        "prefill": {
            "flops_raw": sum(c.flops for c in prefill),
            "flops_weighted": sum(c.weighted for c in prefill),
            "by_part": costs.total(prefill, lambda c: c.part),
            "by_kind": costs.total(prefill, lambda c: c.kind),
        },
    }


def _compare(model: dict[str, Any], baseline: dict[str, Any]) -> None:
    model["kv_ratio"] = model["kv_bytes"] / baseline["kv_bytes"]
    for costs, base in ((model, baseline), (model["prefill"], baseline["prefill"])):
        costs["flops_ratio_raw"] = costs["flops_raw"] / base["flops_raw"]
        costs["flops_ratio"] = costs["flops_weighted"] / base["flops_weighted"]


def sweep(models: Sequence[Named], ctx: int, kv_dtype: str) -> dict[str, Any]:
    """Decode FLOPs and cache bytes at 4K, 8K, ... up to ``ctx``, by model."""
    from dsv4_engine.costs import cache_bytes, decode_costs

    lengths = [SWEEP_FROM << step for step in range(32) if SWEEP_FROM << step < ctx] + [ctx]
    if len(lengths) < 2:
        raise InputProblem(
            f"a sweep from {SWEEP_FROM:,} tokens to a --ctx of {ctx:,} has no lengths", "Give a larger --ctx."
        )
    found: dict[str, Any] = {}
    for model in models:
        rows = [decode_costs(model.config, length, kv_dtype=kv_dtype) for length in lengths]
        row: dict[str, list[float]] = {
            "flops_raw": [sum(c.flops for c in costs) for costs in rows],
            "flops_weighted": [sum(c.weighted for c in costs) for costs in rows],
            "kv_bytes": [cache_bytes(model.config, length, kv_dtype) for length in lengths],
        }
        base = found.setdefault(BASELINE, row)
        ratios = {"flops_ratio_raw": "flops_raw", "flops_ratio": "flops_weighted", "kv_ratio": "kv_bytes"}
        found[model.name] = row | {
            ratio: [mine / theirs for mine, theirs in zip(row[key], base[key], strict=True)]
            for ratio, key in ratios.items()
        }
    return {"lengths": lengths, "models": found}


# ---- rooflines -------------------------------------------------------------------------------------------------------


def devices(name: str | None, dtype: str) -> list[Device]:
    """All named devices; one by name; or this machine's "cpu" or "cuda", whose ceilings are measured (seconds)."""
    from dsv4_engine.roofline import DEVICES

    if name is None:
        return list(DEVICES.values())
    if name in DEVICES:
        return [DEVICES[name]]
    if not _is_here(name):
        raise InputProblem(
            f"there is no device {name!r}", f"Name one of {', '.join(DEVICES)}, or cpu or cuda for this machine."
        )
    from dsv4_engine.ceilings import measured_device

    first = "cuda:0" if name == "cuda:all" else name.split(",")[0]  # several GPUs take turns at one sequence
    return [measured_device(first, dtype)]


def _roofline(models: Sequence[Named], device: Device, ctx: int, wanted: Wanted, here: bool) -> dict[str, Any]:
    """What to expect of every model on a device; here: it is this machine's CPU."""
    from dsv4_engine.roofline import expected

    def row(config: Config) -> dict[str, Any]:
        held = _held(config, device, wanted.dtype) if here else "published"
        return _expectation(expected(config, device, ctx, kv_dtype=wanted.kv_dtype, held=held))

    return {**_device(device), "models": {model.name: row(model.config) for model in models}}


def _held(config: Config, device: Device, dtype: str) -> Held:
    """How the engine would hold the weights on this CPU (placement.py)."""
    from dsv4_engine.costs import stored_bytes
    from dsv4_engine.placement import EXPAND_SHARE

    plain: Held = "float32" if dtype == "float32" else "bfloat16"
    return plain if stored_bytes(config, plain) <= EXPAND_SHARE * device.memory else "published"


def _device(device: Device) -> dict[str, Any]:
    return {
        "device": device.name,
        "source": device.source,
        "memory_bytes": device.memory,
        "bandwidth_bytes_s": device.bandwidth,
        "flops_s": dict(device.rates),
    }


def _expectation(found: Any) -> dict[str, Any]:
    def phase(bound: Any, rate: float) -> dict[str, Any]:
        return {
            "seconds": bound.seconds,
            "tok_s": rate,
            "bound": bound.limit,
            "slowest_part": bound.slowest,
            "seconds_by_part": dict(bound.by_part),
        }

    return {
        "decode": phase(found.decode, found.decode_tok_s),
        "prefill": phase(found.prefill, found.prefill_tok_s),
        "weights_bytes": found.weights,
        "cache_bytes": found.cache,
        "needed_bytes": found.needed,
        "devices_needed": found.devices,
        "sequences": found.sequences,
        "max_ctx": found.max_ctx,
    }


# ---- measured --------------------------------------------------------------------------------------------------------


def _measurable(model: Named, wanted: Wanted, ctx: int) -> int:
    """The context to measure at: tokens are decoded behind it.  Raises InputProblem before anything is loaded."""
    from dsv4_engine.measure import MIN_CTX, SPARE_TOKENS

    if model.path is None and not wanted.random_weights:
        raise InputProblem(
            f"{model.name} is not downloaded, so its weights cannot be timed",
            "Add --random-weights to time one layer of each kind with random ones.",
        )
    room = (model.max_ctx - SPARE_TOKENS) // 128 * 128
    if room < MIN_CTX or ctx < MIN_CTX:
        raise InputProblem(f"{min(ctx, model.max_ctx):,} tokens are too few to measure", f"It takes {MIN_CTX:,}.")
    if room < ctx < model.max_ctx:
        raise InputProblem(f"--ctx {ctx:,} leaves no room to decode", f"Give at most {room:,}.")
    return min(ctx, room)


@contextmanager
def _loaded(model: Named, wanted: Wanted, ctx: int, device: str) -> Iterator[tuple[Engine, ModelConfig | None]]:
    """The model loaded for ``ctx`` tokens.  With random weights: one layer of each kind, from a folder that is removed
    afterwards, and the configuration that they stand for.
    """
    import tempfile

    from dsv4_engine import Engine
    from dsv4_engine.config import ModelConfig
    from dsv4_engine.device_map import Limits
    from dsv4_engine.random_weights import one_layer_of_each_kind, random_checkpoint

    def load(folder: str) -> Engine:
        with progress_bar("loading", "bytes") as progress:
            return Engine.load(
                folder,
                device=device,
                dtype=wanted.dtype,
                kv_dtype=wanted.kv_dtype,
                ctx=ctx,
                progress=progress,
                limits=Limits(wanted.placed.gpu, wanted.placed.cpu),
                device_map=wanted.placed.device_map,
            )

    if not wanted.random_weights:
        assert model.path is not None
        yield load(model.path), None
        return
    assert isinstance(model.config, ModelConfig)
    if device.startswith("cuda"):
        from dsv4_engine.gpu.random_engine import backend_of_published

        backend = backend_of_published(model.config, device, wanted.dtype, wanted.kv_dtype)
        if backend.name == "triton":
            yield _random_on_gpus(model.config, backend, ctx)
            return
    with tempfile.TemporaryDirectory(prefix="dsv4-random-") as folder:
        with progress_bar("random weights", "bytes") as progress:
            random_checkpoint(Path(folder), one_layer_of_each_kind(model.config), progress=progress)
        yield load(folder), model.config


def _random_on_gpus(config: ModelConfig, backend: Backend, ctx: int) -> tuple[Engine, ModelConfig | None]:
    """The whole model where it fits these GPUs, else one layer of each kind and the configuration they stand for."""
    from dsv4_engine.errors import MemoryPlanError
    from dsv4_engine.gpu.random_engine import random_engine
    from dsv4_engine.random_weights import one_layer_of_each_kind

    try:
        return random_engine(config, backend, ctx), None
    except MemoryPlanError:
        return random_engine(one_layer_of_each_kind(config), backend, ctx), config


def _measured(model: Named, wanted: Wanted, ctx: int, device: str, ceilings: Device) -> dict[str, Any]:
    """Timed prefill, timed decode, and the cache's line, as a document."""
    import torch

    from dsv4_engine.measure import SPARE_TOKENS, measure

    with _loaded(model, wanted, ctx + SPARE_TOKENS, device) as (engine, whole):
        with progress_bar("reading", "tokens") as progress:
            found = measure(engine, ctx, ceilings, whole, progress)
        timed = engine.config.num_hidden_layers
        return {
            "model": model.name,
            "weights": "random" if wanted.random_weights else "loaded",
            "layers_timed": timed,
            "layers": timed if whole is None else whole.num_hidden_layers,
            "scaled": found.scaled,
            "weights_held": engine.dtype if engine.plan.expand else "packed",
            "device": engine.device,
            "dtype": engine.dtype,
            "kv_dtype": engine.kv_dtype,
            "threads": torch.get_num_threads(),
            "ceilings": _device(ceilings),
            "prefill": _phase(found.prefill),
            "decode": _phase(found.decode),
            "cache": {**asdict(found.cache), "difference": found.cache.difference},
        }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "tokens": phase.tokens,
        "ctx": phase.ctx,
        "seconds": phase.seconds,
        "tok_s": phase.tokens / phase.seconds,
        "roofline_s": phase.least_s,
        "share_of_roofline": phase.least_s / phase.seconds,
        "parts": [
            {
                **asdict(part),
                "share_of_time": part.seconds / max(sum(p.seconds for p in phase.parts), 1e-12),
                "share_of_roofline": part.least_s / part.seconds if part.seconds else None,
            }
            for part in phase.parts
        ],
    }


def sums_by(rows: Sequence[Mapping[str, Any]], key: str, *values: str) -> dict[str, dict[str, float]]:
    """Sums of ``values`` over rows with the same ``key``, in the order they come."""
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        into = sums.setdefault(row[key], dict.fromkeys(values, 0.0))
        for value in values:
            into[value] += row[value]
    return sums
