"""What `inspect` finds out about a model: layers, parameters, bytes.  Collects one document; prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsv4cli.options import ANYWHERE, Placed
from dsv4cli.plan import plan_document

if TYPE_CHECKING:
    from dsv4_engine.config import ModelConfig
    from dsv4_engine.weights import Weights

_KINDS = {
    "window": "the last tokens only",
    "csa": "compressed by 4, picked by an indexer",
    "hca": "compressed by 128, all read",
}


def describe(
    model: str,
    *,
    ctx: int | None,
    device: str,
    dtype: str,
    kv_dtype: str,
    plan: bool = False,
    placed: Placed = ANYWHERE,
) -> dict[str, Any]:
    """Everything about ``model`` that its files say.

    The aliases v4-flash and v4-pro that are not downloaded are described from the published configuration; what only
    files can tell is None then.  plan: with the whole memory plan (plan.py), which needs no files.
    Raises an InputError for any other model that is not there or is damaged.
    """
    from dsv4_engine.accounting import bytes_on_disk, kv_bytes_per_token, parameters
    from dsv4_engine.errors import InputError

    config, weights, folder = _open(model)
    most = config.max_position_embeddings
    if ctx is not None and ctx > most:
        raise InputError(f"--ctx is {ctx:,}, and the model goes up to {most:,} tokens", "Give a smaller --ctx.")
    counted = parameters(config)
    disk = bytes_on_disk(weights) if weights else None
    planned = None
    if plan:
        planned = plan_document(config, weights, device=device, dtype=dtype, kv_dtype=kv_dtype, ctx=ctx, placed=placed)
    return {
        "model": model,
        "path": folder,
        "max_ctx": most,
        "layers": _layers(config, kv_dtype),
        "hash_layers": config.num_hash_layers,
        "parameters": {
            "total": counted.total,
            "active": counted.active,
            "mtp": counted.mtp,
            "by_part": {part: asdict(number) for part, number in counted.by_part.items() if number.total},
        },
        "disk": {"total": sum(disk.values()), "by_part": disk} if disk else None,
        "kv": {"dtype": kv_dtype, "bytes_per_token": kv_bytes_per_token(config, kv_dtype)},
        "memory": None if plan or weights is None else _memory(config, weights, device, dtype, kv_dtype, ctx, placed),
        "plan": planned,
    }


def _open(model: str) -> tuple[ModelConfig, Weights | None, str | None]:
    from dsv4_engine.checkpoint import Checkpoint
    from dsv4_engine.config import PRESETS, ModelConfig
    from dsv4_engine.errors import InputError
    from dsv4_engine.locate import resolve_model
    from dsv4_engine.weights import Weights

    try:
        folder = resolve_model(model)
    except InputError:
        if model in PRESETS:
            return ModelConfig.preset(model), None, None
        raise
    config = ModelConfig.from_folder(folder)
    return config, Weights.open(Checkpoint.open(folder), config, values=False), str(folder)


def _layers(config: ModelConfig, kv_dtype: str) -> list[dict[str, Any]]:
    """Layers by kind, in the order of _KINDS, without kinds that the model does not have."""
    from dsv4_engine.accounting import kv_entry_bytes

    entry, key = kv_entry_bytes(config, kv_dtype)
    found = []
    for kind, meaning in _KINDS.items():
        indices = [i for i in range(config.num_hidden_layers) if config.layer_kind(i) == kind]
        if indices:
            ratio = config.compress_ratios[indices[0]]
            per_token = (entry + (key if kind == "csa" else 0)) / ratio if ratio else 0.0
            found.append(
                {"kind": kind, "meaning": meaning, "count": len(indices), "indices": indices,
                 "kv_bytes_per_token": len(indices) * per_token}
            )  # fmt: skip
    return found


def _memory(
    config: ModelConfig, weights: Weights, device: str, dtype: str, kv_dtype: str, ctx: int | None, placed: Placed
) -> dict[str, Any]:
    """The plan for one sequence; where it does not fit, what is said about that."""
    from dsv4_engine.device_map import Limits, chosen_map
    from dsv4_engine.engine import DEFAULT_PLAN_CTX
    from dsv4_engine.errors import MemoryPlanError
    from dsv4_engine.placement import memory_plan

    planned = ctx or min(config.max_position_embeddings, DEFAULT_PLAN_CTX)
    try:
        where = chosen_map(placed.device_map, config, [device])
        plan = memory_plan(config, weights, device, dtype, kv_dtype, planned, Limits(placed.gpu, placed.cpu), where)
    except MemoryPlanError as error:
        return {"fits": False, "ctx": planned, "device": device, "message": str(error), "hint": error.hint}
    return {"fits": True, "needed": plan.needed, **asdict(plan)}


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-2, 4, 6 or, where every other one is there, 3-41 every 2."""
    parts: list[tuple[int, int, int]] = []  # first, last, step
    for number in numbers:
        first, last, step = parts[-1] if parts else (number, -9, 0)
        if parts and (first == last or number - last == step) and number - last <= 2:
            parts[-1] = (first, number, number - last)
        else:
            parts.append((number, number, 0))
    texts = {0: "{0}", 1: "{0}-{1}", 2: "{0}-{1} every 2"}
    return ", ".join(texts[step].format(first, last) for first, last, step in parts)
