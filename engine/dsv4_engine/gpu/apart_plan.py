"""The plan of a model whose routed experts do not fit its GPUs: dense parts spread over them, a pool on each.

Owns the order of decisions: everything on the GPUs if it fits, else all routed experts in memory, or on disk behind as
many as memory holds.  Knows sizes only (plan.py has them), and imports nothing that needs triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4_kernels.backend import Backend

from ..accounting import enough_bytes, readable_bytes
from ..config import ModelConfig
from ..device_map import AUTO, BALANCED, DeviceMap, Limits, chosen_map, spread
from ..errors import MemoryPlanError
from ..offload.layout import ExpertLayout
from ..placement import CPU_SHARE, MemoryPlan, Row, program_bytes, room
from ..weights import Form, Spec
from .plan import CHUNK, GpuPlan, gpu_memory_plan, layer_bytes, state_bytes, working_set

_LEAST_CHUNK = 1024


@dataclass(frozen=True)
class Machine:
    """devices: GPUs by name; rooms: bytes that may be used of each; memory: of the host, for experts; program: what the
    process takes there besides.
    """

    devices: tuple[str, ...]
    rooms: tuple[int, ...]
    memory: int
    program: int

    @classmethod
    def here(cls, devices: Sequence[str], limits: Limits) -> Machine:
        """This machine, within limits."""
        program = program_bytes()
        memory = room("cpu", limits, program)
        if limits.cpu is None:
            memory = int(CPU_SHARE * memory)
        rooms = tuple(room(device, limits, program, number) for number, device in enumerate(devices))
        return cls(tuple(devices), rooms, memory, program)


def planned(
    config: ModelConfig,
    specs: Mapping[str, Spec],
    form: Callable[[str], Form],
    backend: Backend,
    ctx: int,
    limits: Limits,
    device_map: str | Path,
) -> GpuPlan:
    """The plan on the backend's GPUs: everything there where that fits and nothing else was asked for."""
    devices = [str(device) for device in backend.devices]
    if limits == Limits() and str(device_map) == AUTO:
        try:
            return gpu_memory_plan(config, specs, form, backend, ctx)
        except MemoryPlanError:
            pass  # then with the experts apart
    machine, wanted = Machine.here(devices, limits), chosen_map(device_map, config, devices)
    plan = apart_plan(config, specs, form, machine, ctx, wanted, balanced=str(device_map) == BALANCED)
    return GpuPlan(tuple(plan.device_map.ranges), plan)


def apart_plan(
    config: ModelConfig,
    specs: Mapping[str, Spec],
    form: Callable[[str], Form],
    machine: Machine,
    ctx: int,
    wanted: DeviceMap | None = None,
    balanced: bool = False,
) -> MemoryPlan:
    """Plan for one sequence of ``ctx`` tokens; ``wanted``: what lies where, else sizes decide.

    balanced: layers are spread evenly, not one GPU after another.  Raises MemoryPlanError with the number that matters:
    what the smallest chunk needs.
    """
    chunk = CHUNK
    while chunk > _LEAST_CHUNK and working_set(config, chunk, ctx) > min(machine.rooms) // 8:
        chunk //= 2
    while True:
        try:
            return _planned(config, specs, form, machine, ctx, wanted, balanced, chunk)
        except MemoryPlanError:
            if chunk <= _LEAST_CHUNK:
                raise
            chunk //= 2


def _planned(
    config: ModelConfig,
    specs: Mapping[str, Spec],
    form: Callable[[str], Form],
    machine: Machine,
    ctx: int,
    wanted: DeviceMap | None,
    balanced: bool,
    chunk: int,
) -> MemoryPlan:
    layers, ratios = config.num_hidden_layers, config.compress_ratios
    whole, before, after = layer_bytes(specs, form, layers)
    layout = ExpertLayout.published(config)
    size, each = layout.nbytes, config.n_routed_experts * layout.nbytes
    activations = working_set(config, chunk, ctx)
    free = {d: r - activations for d, r in zip(machine.devices, machine.rooms, strict=True)}
    states = [state_bytes(config, [ratio], ctx) for ratio in ratios]
    placed = wanted
    if placed is None:
        found = spread([a + b for a, b in zip(whole, states, strict=True)], before, after, free, balanced=balanced)
        if found is not None:
            placed = DeviceMap(found[0], found, found, found[-1])
    dense = [a - each for a in whole]
    if placed is None:
        some = [a + b for a, b in zip(dense, states, strict=True)]
        # Evenly, so that every GPU has room for experts.
        found = spread(some, before, after, free, balanced=len(machine.devices) > 1)
        if found is None:
            raise _too_small(config, machine, sum(some) + before + after + activations, each)
        home = "cpu" if machine.memory >= each * layers else "disk"
        placed = DeviceMap(found[0], found, (home,) * layers, found[-1])
    apart = placed.apart()
    experts = config.n_routed_experts * len(apart)
    slots: list[int] = []
    rows: list[Row] = []
    for device in placed.devices:
        limit = machine.rooms[machine.devices.index(device)]
        mine = [i for i in range(layers) if placed.layers[i] == device]
        held = sum(dense[i] + (0 if i in apart else each) for i in mine)
        held += (before if placed.embed == device else 0) + (after if placed.head == device else 0)
        state = sum(states[i] for i in mine)
        left = limit - held - state - activations
        here = sum(i in apart for i in mine)
        if left < (each if here else 0):
            raise _too_small(config, machine, held + state + activations, each if here else 0, device)
        slots.append(min(left // size, config.n_routed_experts * here))
        rows += [
            Row(device, f"layers {mine[0]} to {mine[-1]}", held),
            Row(device, f"cache of {ctx:,} tokens", state),
            Row(device, f"activations of {chunk:,} tokens", activations),
        ]
        if here:
            rows.append(Row(device, "experts held", slots[-1] * size))
    in_memory = min(experts, max(0, machine.memory) // size)
    if apart and in_memory < min(experts, config.n_routed_experts):
        raise MemoryPlanError(
            f"one layer's {config.n_routed_experts} experts need {readable_bytes(each)} of memory on cpu, and "
            f"{readable_bytes(max(0, machine.memory))} are available",
            f"Give at least {enough_bytes(each + machine.program)} (--cpu-mem).",
        )
    if apart:
        rows.append(Row("cpu", "experts held", in_memory * size))
        if in_memory < experts:
            rows.append(Row("disk", "experts", experts * size))
    rows.append(Row("cpu", "program", machine.program))
    on_gpus = [row for row in rows if row.place in machine.devices]

    def total(start: str) -> int:
        return sum(row.bytes for row in on_gpus if row.part.startswith(start))

    return MemoryPlan(
        device=",".join(placed.devices),
        ctx=ctx,
        kv_dtype="mixed",
        weights=total("layers") + total("experts"),
        weights_on_disk=sum(whole) + before + after,
        unpacked=0,
        kv=total("cache"),
        working_set=total("activations"),
        chunk=chunk,
        available=sum(machine.rooms[machine.devices.index(device)] for device in placed.devices),
        expand=False,
        max_ctx=ctx if apart else _longest(config, machine, rows, ctx),
        program=machine.program,
        slots=in_memory if apart else 0,
        gpu_slots=tuple(slots) if apart else (),
        experts=experts,
        expert_bytes=size,
        device_map=placed,
        rows=tuple(rows),
        rooms={**dict(zip(machine.devices, machine.rooms, strict=True)), "cpu": machine.memory + machine.program},
    )


def _longest(config: ModelConfig, machine: Machine, rows: Sequence[Row], ctx: int) -> int:
    """The longest context, in tokens, that still fits where everything is held: a bound from the fullest GPU."""
    from ..accounting import kv_bytes_per_token

    left = min(
        r - sum(row.bytes for row in rows if row.place == d)
        for d, r in zip(machine.devices, machine.rooms, strict=True)
    )
    per_token = kv_bytes_per_token(config, "mixed") + (config.index_head_dim + 4) / 4
    return int(min(config.max_position_embeddings, ctx + left / per_token))


def _too_small(config: ModelConfig, machine: Machine, besides: int, each: int, device: str = "") -> MemoryPlanError:
    place, number = device or ", ".join(machine.devices), config.n_routed_experts
    there = machine.rooms[machine.devices.index(device)] if device else sum(machine.rooms)
    experts = f" and one layer's {number} experts {readable_bytes(each)}" if each else ""
    one = f" to {enough_bytes(besides + each)}" if device or len(machine.devices) == 1 else ""
    return MemoryPlanError(
        f"the model needs {readable_bytes(besides + each)} on {place} (everything but routed experts "
        f"{readable_bytes(besides)}{experts}), and {readable_bytes(there)} may be used",
        f"Raise --gpu-mem{one}, use a shorter context (--ctx), or more GPUs (--device cuda:0,cuda:1).",
    )
