"""The memory plan: what a model needs where, what is there, and in which form the weights are held.

Owns the decision to hold packed weights expanded or routed experts apart, and the refusal of what cannot fit, before
anything is allocated.  Knows sizes only; plans for the GPUs' own kernels are made by placement_gpu.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from dsv4_engine.accounting import enough_bytes, kv_bytes, part_of, readable_bytes, sequence_state_bytes
from dsv4_engine.config import ModelConfig
from dsv4_engine.device_map import DeviceMap, Limits, everything_on
from dsv4_engine.errors import DeviceError, MemoryPlanError
from dsv4_engine.free_memory import available_memory
from dsv4_engine.weights import Spec
from dsv4_kernels.tiling import CPU, GPU
from dsv4_kernels.unpacked import unpacked_bytes

EXPAND_SHARE = 0.25  # of the available memory that expanded weights may take
MAX_WORKING_SET = 1 << 30  # of a chunk's activations on a CPU
MAX_LANES = 4  # chunks that a CPU computes side by side (lanes.py): each takes its activations
MIN_GPU_ACTIVATIONS = 512 << 20
CPU_SHARE = 0.9  # of what is free that experts may fill it to, where no limit is given: others live here too
PROGRAM = 96 << 20  # what a tokenizer and the libraries' buffers add to the program once it runs
MIN_SLOTS = 4  # experts that are held at a time at least
_MAPPED_AROUND = 64 << 10  # bytes that the system maps around a row of a file that is read
_VALUE_BYTES = {"float32": 4, "bfloat16": 2}


class Tensors(Protocol):
    """A model's tensors by published name, with sizes on disk: `weights.Weights`, or `weights.Published`."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...
    def nbytes(self, name: str) -> int: ...


@dataclass(frozen=True)
class Row:
    """One line of a plan: ``bytes`` of ``part`` on ``place`` (cpu, cuda:N or disk)."""

    place: str
    part: str
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """All sizes in bytes, on the device that computes (of several: on all together).

    weights: as held.  weights_on_disk: as in the files.  unpacked: what is unpacked at a time.  kv: one sequence's
    state at `ctx` tokens.  working_set: activations of a chunk, and on a GPU under torch's own operations one layer's
    rows in float32 at `ctx` tokens.  chunk: tokens of a prefill chunk.  program: what the process takes besides.
    expand: packed weights are held expanded in the compute dtype, else they are unpacked at each use.
    max_ctx: the longest context, in tokens, whose cache fits beside the rest; 0 when none does.
    slots: experts that memory holds at a time where they stay in the files; 0 where all are held like other weights.
    gpu_slots: the same for each GPU over memory.  experts: how many there are, of expert_bytes each.
    lanes: chunks that are computed side by side.
    device_map: where everything lies.  rows: the plan line by line; rooms: bytes that may be used, by place.
    """

    device: str
    ctx: int
    kv_dtype: str
    weights: int
    weights_on_disk: int
    unpacked: int
    kv: int
    working_set: int
    chunk: int
    available: int
    expand: bool
    max_ctx: int
    program: int
    slots: int
    gpu_slots: tuple[int, ...]
    experts: int
    expert_bytes: int
    device_map: DeviceMap
    rows: tuple[Row, ...]
    rooms: Mapping[str, int]
    lanes: int = 1

    @property
    def needed(self) -> int:
        return self.weights + self.unpacked + self.kv + self.working_set

    def total(self, place: str) -> int:
        """Bytes planned on a place."""
        return sum(row.bytes for row in self.rows if row.place == place)

    @property
    def cached_share(self) -> float:
        """Of all routed experts, how many are held where they are computed."""
        if self.gpu_slots:
            return min(1.0, sum(self.gpu_slots) / max(self.experts, 1))
        return min(1.0, self.slots / self.experts) if self.slots else 1.0


def memory_plan(
    config: ModelConfig,
    weights: Tensors,
    device: str = "cpu",
    dtype: str = "float32",
    kv_dtype: str = "mixed",
    ctx: int = 131_072,
    limits: Limits = Limits(),  # noqa: B008  # frozen
    device_map: DeviceMap | None = None,
    alone: bool = True,
) -> MemoryPlan:
    """Plan for one sequence of `ctx` tokens under torch's own operations; dtype: "float32" | "bfloat16".

    limits: of what may be used; None in them: what is free.  device_map: where experts stay; None decides by size.
    alone: no other process computes a part of the model.
    Raises MemoryPlanError with the needed and the available size when it cannot fit, DeviceError for no such device.
    """
    if device != "cpu" and device_map is not None and device_map.apart():
        raise DeviceError(
            "experts apart from a GPU are for the Triton kernels, and torch's own operations run here",
            "Use --dtype bfloat16 with --kv-dtype mixed, or leave --device-map out.",
        )
    program = program_bytes()
    available = room(device, limits, program)
    rows = ctx if device == "cpu" else config.vocab_size  # of the embedding: looked up where they lie in the file
    packed = {name: _held(weights, name, dtype, rows, expand=False) for name in weights.specs}
    expanded = {name: _held(weights, name, dtype, rows, expand=True) for name in weights.specs}
    expand = sum(expanded.values()) <= EXPAND_SHARE * available and (device_map is None or not device_map.apart())
    held = expanded if expand else packed  # what needs no unpacking is used where it lies in the file
    state, lanes = sequence_state_bytes(config), 1
    if device == "cpu":
        # Expanded weights are cheap to read again, and 512 tokens keep a small model's activations in the caches;
        # packed ones are unpacked once a chunk, which 2048 tokens share.
        budget = min(MAX_WORKING_SET, max(0, available) // 16)
        per_token = working_bytes_per_token(config)
        chunk = _chunk(per_token, budget, 512 if expand else 2048)
        if expand and alone:
            lanes = max(1, min(MAX_LANES, _threads(), budget // (chunk * per_token)))
        unpacked = 0 if expand else _tile_bytes(weights)
    else:
        chunk = _chunk(gpu_bytes_per_token(config), max(MIN_GPU_ACTIVATIONS, available // 12), 8192)
        unpacked = 0 if expand else max(4 * prod(s.shape) for s in weights.specs.values() if len(s.shape) == 2)

    def besides(tokens: int) -> int:
        """Bytes beside weights at a context of so many tokens."""
        activations = _working_set(config, device, chunk, tokens, lanes)
        return unpacked + activations + kv_bytes(config, kv_dtype, tokens) + state

    if available < besides(ctx) + sum(held.values()):
        lanes = 1  # slower, where more would not fit
    rest = available - besides(ctx) - sum(held.values())
    apart = device_map.apart() if device_map is not None else range(config.num_hidden_layers) if rest < 0 else ()
    number, size = _experts(weights)
    slots = 0
    if apart and device == "cpu" and number:
        moved = {n for n in held if _expert_layer(n) is not None and _expert_layer(n) in (*apart, "mtp")}
        held = {name: size for name, size in held.items() if name not in moved}
        least = max(MIN_SLOTS, config.num_experts_per_tok + 2)
        while chunk > 128 and available - besides(ctx) - sum(held.values()) < least * size:
            chunk = max(128, chunk // 256 * 128)
        free = available - besides(ctx) - sum(held.values())
        if limits.cpu is None:
            free -= int((1 - CPU_SHARE) * available)
        number = len(moved) // 3
        slots = min(number, max(least, free // size))
        held[_POOL] = slots * size
        device_map = device_map or everything_on("cpu", config.num_hidden_layers, "disk")
    left = available - sum(held.values())
    longest = bisect_right(range(config.max_position_embeddings + 1), left, key=besides) - 1
    plan = MemoryPlan(
        device=device,
        ctx=ctx,
        kv_dtype=kv_dtype,
        weights=sum(held.values()),
        weights_on_disk=sum(weights.nbytes(name) for name in weights.specs),
        unpacked=unpacked,
        kv=kv_bytes(config, kv_dtype, ctx) + state,
        working_set=_working_set(config, device, chunk, ctx, lanes),
        chunk=chunk,
        available=available,
        expand=expand,
        max_ctx=max(0, longest if not slots else min(longest, ctx)),  # experts fill what the planned context leaves
        program=program,
        slots=slots,
        gpu_slots=(),
        experts=number,
        expert_bytes=size,
        device_map=device_map or everything_on(device, config.num_hidden_layers),
        rows=(),
        rooms={device: available + (program if device == "cpu" else 0)},
        lanes=lanes,
    )
    object.__setattr__(plan, "rows", tuple(_rows(plan, held, weights)))
    if plan.needed > available:
        raise MemoryPlanError(_shortage(plan, limits), _next_step(plan, limits))
    return plan


_POOL = "pool"


def program_bytes() -> int:
    """Bytes that this process takes now, and what it will take besides the model."""
    import psutil

    return int(psutil.Process().memory_info().rss) + PROGRAM


def room(device: str, limits: Limits, program: int, number: int = 0) -> int:
    """Bytes that a model may take on a device; number: which of the GPUs it is."""
    if device != "cpu":
        free, limit = available_memory(device), limits.of(number)
        return free if limit is None else min(free, limit)
    free = available_memory("cpu") - PROGRAM
    return max(0, free if limits.cpu is None else min(free, limits.cpu - program))


def _experts(weights: Tensors) -> tuple[int, int]:
    """How many routed experts there are, and the bytes of one."""
    sizes = [weights.nbytes(name) for name, spec in weights.specs.items() if spec.role == "expert"]
    return len(sizes) // 3, -(-3 * sum(sizes) // len(sizes)) if sizes else 0


def _expert_layer(name: str) -> int | str | None:
    """The layer of a routed expert's tensor, "mtp" in the MTP block; None for other tensors."""
    if ".ffn.experts." not in name:
        return None
    return "mtp" if name.startswith("mtp.") else int(name.split(".")[1])


def _tile_bytes(weights: Tensors) -> int:
    """What products with packed matrices unpack at a time (dsv4_kernels.unpacked)."""
    widest = max((s.shape[1] for s in weights.specs.values() if len(s.shape) == 2), default=1)
    return unpacked_bytes(widest, _threads())


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _working_set(config: ModelConfig, device: str, chunk: int, ctx: int, lanes: int) -> int:
    """Bytes of the activations of chunks side by side, and of what grows with the context while they are computed."""
    if device != "cpu":
        rows = int(ctx * _unpacked_rows_per_token(config))
        return GPU.working_set + chunk * gpu_bytes_per_token(config) + rows
    size = min(chunk, ctx) * working_bytes_per_token(config)
    return min(lanes, -(-ctx // chunk)) * (size + _score_tile(config, ctx) + _chosen_rows(config, chunk, ctx))


def _score_tile(config: ModelConfig, ctx: int) -> int:
    """Scores of a tile of queries with what they see, at most what tiles are held to."""
    seen = 2 * config.sliding_window + ctx // min((r for r in config.compress_ratios if r), default=ctx)
    return min(CPU.working_set, 3 * 4 * CPU.queries * config.num_attention_heads * seen)


def _chosen_rows(config: ModelConfig, chunk: int, ctx: int) -> int:
    """Rows in float32 that the queries of a chunk chose together, in the layers that choose, at most."""
    if 4 not in config.compress_ratios:
        return 0
    return 4 * config.head_dim * min(ctx // 4, chunk * config.index_topk)


def working_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of float32 activations that a prefilled token needs on a CPU at a block's widest point.

    Attention: the streams before and after it, queries, queries being turned, results.  Experts: the streams, inputs
    and each chosen expert's result, and of small ones that are computed side by side what lies between.
    """
    streams = 2 * config.hc_mult * config.hidden_size
    attention = 3 * config.num_attention_heads * config.head_dim + 4 * config.head_dim
    experts = (config.num_experts_per_tok + 2) * (config.hidden_size + 2 * config.moe_intermediate_size)
    return 4 * (streams + max(attention, experts))


def gpu_bytes_per_token(config: ModelConfig) -> int:
    """The same on a GPU under torch's own operations (an upper estimate)."""
    streams = 4 * config.hc_mult * config.hidden_size
    attention = 4 * config.num_attention_heads * config.head_dim + 4 * 2 * config.head_dim
    index = 3 * config.index_n_heads * config.index_head_dim
    experts = (config.num_experts_per_tok + config.n_shared_experts) * (
        config.hidden_size + 3 * config.moe_intermediate_size
    )
    return 4 * (streams + max(attention + index, experts))


def _chunk(per_token: int, budget: int, most: int) -> int:
    """Tokens whose activations fit ``budget`` bytes: a multiple of 128, 128 at least."""
    return min(most, max(128, budget // per_token // 128 * 128))


def _unpacked_rows_per_token(config: ModelConfig) -> float:
    """Bytes a token of the layer with the most rows, while a GPU reads all of them as float32."""
    return 4 * config.head_dim / min((r for r in config.compress_ratios if r), default=float("inf"))


def _held(weights: Tensors, name: str, dtype: str, rows: int, expand: bool) -> int:
    """Bytes one tensor takes in memory; what is used as it lies on disk is mapped and needs room to stay there.

    rows: how many of the embedding's are used.
    """
    spec, on_disk = weights.specs[name], weights.nbytes(name)
    if name == "embed.weight":
        return min(on_disk, rows * max(_MAPPED_AROUND, on_disk // spec.shape[0]))
    if spec.role == "ids":
        return on_disk
    if spec.role == "float" and not name.endswith(
        (".wkv.weight", ".wgate.weight", ".weights_proj.weight", "head.weight")
    ):
        return 4 * prod(spec.shape)  # norms, biases, mHC, the router: always float32
    if not expand:
        return on_disk
    float32 = spec.role == "float" and not name.endswith(".weights_proj.weight")  # compressors and head compute in it
    return prod(spec.shape) * (4 if float32 else _VALUE_BYTES[dtype])


def _rows(plan: MemoryPlan, held: Mapping[str, int], weights: Tensors) -> Iterator[Row]:
    """The plan by part, the largest idea first: weights, then what a sequence needs, then the program."""
    by_part: dict[str, int] = {}
    for name, size in held.items():
        part = "experts held" if name == _POOL else part_of(name)
        by_part[part] = by_part.get(part, 0) + size
    yield from (Row(plan.device, part, size) for part, size in by_part.items())
    yield Row(plan.device, f"cache of {plan.ctx:,} tokens", plan.kv)
    if plan.unpacked:
        yield Row(plan.device, "tile being unpacked", plan.unpacked)
    beside = f"{plan.lanes} x " if plan.lanes > 1 else ""
    yield Row(plan.device, f"activations of {beside}{plan.chunk:,} tokens", plan.working_set)
    if plan.device == "cpu":
        yield Row("cpu", "program", plan.program)
    if plan.slots:
        yield Row("disk", "experts", plan.experts * plan.expert_bytes)


def _shortage(plan: MemoryPlan, limits: Limits) -> str:
    weights = plan.weights - plan.slots * plan.expert_bytes
    parts = [("weights", weights), ("what is unpacked at a time", plan.unpacked)]
    if plan.slots:
        parts.insert(1, (f"{plan.slots} experts at a time", plan.slots * plan.expert_bytes))
    parts += [(f"cache of {plan.ctx:,} tokens", plan.kv), ("activations", plan.working_set)]
    limited = plan.device == "cpu" and limits.cpu is not None
    if limited:
        parts.append(("the program", plan.program))
    listed = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts if size)
    besides = plan.program if limited else 0
    needed = readable_bytes(plan.needed + besides)
    limit = _limit(plan, limits)
    available = readable_bytes(plan.available + besides if limit is None else limit)
    apart = ", with its routed experts on disk," if plan.slots else ""
    return f"the model{apart} needs {needed} of memory on {plan.device} ({listed}), but {available} are available"


def _limit(plan: MemoryPlan, limits: Limits) -> int | None:
    """The limit on the process, where that and not the machine says how much may be used."""
    binds = plan.device == "cpu" and limits.cpu is not None and limits.cpu - plan.program <= plan.available
    return limits.cpu if binds else None


def _next_step(plan: MemoryPlan, limits: Limits) -> str:
    if plan.max_ctx >= 1024 and plan.max_ctx < plan.ctx:
        advice = f"Use a context of at most {plan.max_ctx // 1024 * 1024:,} tokens (--ctx)"
        return f"{advice}, or the mixed cache format." if plan.kv_dtype != "mixed" else f"{advice}."
    if _limit(plan, limits) is not None:
        return f"Give at least {enough_bytes(plan.needed + plan.program)} (--cpu-mem), or use a smaller model."
    return f"Free memory, use a smaller model, or a machine with {readable_bytes(plan.needed)} of free memory."
