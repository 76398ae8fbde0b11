"""`dsv4 inspect --plan`: the memory plan of a model, downloaded or not, as a document and as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsv4cli.errors import InputProblem
from dsv4cli.options import Placed

if TYPE_CHECKING:
    from dsv4_engine.config import ModelConfig
    from dsv4_engine.placement import MemoryPlan
    from dsv4_engine.weights import Weights


def plan_document(
    config: ModelConfig,
    weights: Weights | None,
    *,
    device: str,
    dtype: str,
    kv_dtype: str,
    ctx: int | None,
    placed: Placed,
) -> dict[str, Any]:
    """The plan and what to expect of it.  weights: None for a model that is not downloaded.

    --gpu-mem without a GPU in --device plans for that many GPUs, which need not be in this machine.  Where nothing
    fits, the document holds the message and the next step instead.
    """
    from dsv4_engine.engine import DEFAULT_PLAN_CTX
    from dsv4_engine.errors import MemoryPlanError
    from dsv4_engine.forecast import forecast, rates_for

    ctx = ctx or min(config.max_position_embeddings, DEFAULT_PLAN_CTX)
    imagined = bool(placed.gpu) and device == "cpu"
    if imagined:
        device = ",".join(f"cuda:{number}" for number in range(len(placed.gpu)))
    try:
        if device == "cpu":
            plan = _on_cpu(config, weights, dtype, kv_dtype, ctx, placed)
        else:
            plan = _on_gpus(config, weights, device, ctx, placed, imagined)
    except MemoryPlanError as error:
        return {"fits": False, "ctx": ctx, "device": device, "message": str(error), "hint": error.hint}
    expected = forecast(config, plan, rates_for(plan, weights))
    return {
        "fits": True,
        **{key: value for key, value in asdict(plan).items() if key != "device_map"},
        "needed": plan.needed,
        "cached_share": plan.cached_share,
        "device_map": _named(plan),
        "left": {place: room - plan.total(place) for place, room in plan.rooms.items()},
        "expected": asdict(expected),
        "advice": _advice(plan, weights),
    }


def _on_cpu(
    config: ModelConfig, weights: Weights | None, dtype: str, kv_dtype: str, ctx: int, placed: Placed
) -> MemoryPlan:
    from dsv4_engine.device_map import Limits, chosen_map
    from dsv4_engine.placement import memory_plan
    from dsv4_engine.weights import Published

    wanted = chosen_map(placed.device_map, config, ["cpu"])
    tensors = weights or Published(config)
    return memory_plan(config, tensors, "cpu", dtype, kv_dtype, ctx, Limits(cpu=placed.cpu), wanted)


def _on_gpus(
    config: ModelConfig, weights: Weights | None, device: str, ctx: int, placed: Placed, imagined: bool
) -> MemoryPlan:
    from dsv4_engine.device_map import AUTO, BALANCED, Limits, chosen_map
    from dsv4_engine.gpu.apart_plan import Machine, apart_plan
    from dsv4_engine.gpu.choice import refusal
    from dsv4_engine.placement import program_bytes
    from dsv4_engine.weights import Published

    tensors = weights or Published(config)
    specs, form = tensors.specs, tensors.form
    if why := refusal(config, {name: form(name) for name in specs}, "bfloat16", "mixed"):
        raise InputProblem(f"this plan is for the Triton kernels: {why}", "Leave --gpu-mem out, or plan for the CPU.")
    devices, limits = tuple(device.split(",")), Limits(placed.gpu, placed.cpu)
    if imagined:
        program = program_bytes()
        memory = placed.cpu if placed.cpu is not None else Machine.here([], limits).memory + program
        machine = Machine(devices, placed.gpu, max(0, memory - program), program)
    else:
        from dsv4_engine.engine import choose_backend
        from dsv4_engine.gpu.choice import too_old_for_triton

        try:
            backend = choose_backend(device)
        except ValueError as error:
            raise InputProblem(str(error), "Give --gpu-mem to plan for GPUs that are not here.") from error
        if why := too_old_for_triton(backend):
            raise InputProblem(f"this plan is for the Triton kernels: {why}", "Without --plan sizes are shown.")
        devices = tuple(str(one) for one in backend.devices)
        machine = Machine.here(devices, limits)
    wanted = None
    if placed.device_map not in (AUTO, BALANCED):
        wanted = chosen_map(placed.device_map, config, devices)
    return apart_plan(config, specs, form, machine, ctx, wanted, balanced=placed.device_map == BALANCED)


def _named(plan: MemoryPlan) -> dict[str, str]:
    import json

    from dsv4_engine.device_map import to_json

    found: dict[str, str] = json.loads(to_json(plan.device_map))
    return found


def _advice(plan: MemoryPlan, weights: Weights | None) -> list[str]:
    """What would make it faster or larger."""
    from dsv4cli.output import file_size

    found = []
    if plan.gpu_slots and sum(plan.gpu_slots) < plan.experts:
        missing = (plan.experts - sum(plan.gpu_slots)) * plan.expert_bytes
        found.append(f"With {file_size(missing)} more GPU memory every expert stays on a GPU.")
    if 0 < plan.slots < plan.experts:
        missing = (plan.experts - plan.slots) * plan.expert_bytes
        found.append(f"With {file_size(missing)} more memory (--cpu-mem) no expert is read from disk twice.")
    if plan.slots or plan.gpu_slots:
        found.append("A shorter --ctx leaves more room for experts.")
    return found


# ---- for people ------------------------------------------------------------------------------------------------------


def show_plan(found: dict[str, Any]) -> None:
    from dsv4cli.output import count, file_size, table

    if not found["fits"]:
        title = f"\nPlan for {count(found['ctx'])} tokens on {found['device']}"
        table(title, ["", ""], [["does not fit", found["message"]], ["", found["hint"]]])
        return
    places = dict.fromkeys(row["place"] for row in found["rows"])
    rows = []
    for place in places:
        mine = [row for row in found["rows"] if row["place"] == place]
        rows += [[place if i == 0 else "", row["part"], file_size(row["bytes"])] for i, row in enumerate(mine)]
        if place in found["rooms"]:
            total, room = sum(row["bytes"] for row in mine), found["rooms"][place]
            rows.append(["", "planned", f"{file_size(total)} of {file_size(room)}"])
    table(f"\nPlan for {count(found['ctx'])} tokens on {found['device']}", ["where", "what", "size"], rows)
    expected = found["expected"]
    lines = [
        ["decode", _rate(expected["decode_tok_s"]), f"waits for {expected['decode_bound']}"],
        ["prefill", _rate(expected["prefill_tok_s"]), f"waits for {expected['prefill_bound']}"],
    ]
    if found["slots"] or found["gpu_slots"]:
        held = f"{found['cached_share']:.0%} of {count(found['experts'])}"
        lines.append(["experts held", held, f"{file_size(found['expert_bytes'])} each, where they are computed"])
    if expected["expert_copy_s"]:
        copy, cpu = expected["expert_copy_s"], expected["expert_cpu_s"]
        better = "copied" if copy <= cpu else "copied all the same"
        times = f"{1e3 * copy:,.2f} ms over the link; this CPU takes {1e3 * cpu:,.0f} ms"
        lines.append(["a missed expert", better, times])
    table(f"\nExpected at best, at the end of {count(found['ctx'])} tokens", ["", "", ""], lines)
    for line in [*expected["sources"], *found["advice"]]:
        print(line)


def _rate(tokens_s: float) -> str:
    return f"{tokens_s:,.0f} tokens/s" if tokens_s >= 100 else f"{tokens_s:.2g} tokens/s"
