"""The memory plan: what a model needs on a device, what is there, and in which form the weights are held.

Owns the decision to hold packed weights expanded, and the refusal of what cannot fit, before anything is allocated.
Knows sizes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_engine.accounting import kv_bytes, kv_bytes_per_token, readable_bytes, sequence_state_bytes
from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import DeviceError, MemoryPlanError
from dsv4_kernels.tiling import GPU

if TYPE_CHECKING:
    from dsv4_engine.weights import Weights

EXPAND_SHARE = 0.25  # of the available memory that expanded weights may take
MIN_WORKING_SET, MAX_WORKING_SET = 128 << 20, 1 << 30
MIN_GPU_ACTIVATIONS = 512 << 20
GPU_SHARE = 0.95  # of what is free: the rest goes to the libraries' own buffers and the allocator's rounding
_VALUE_BYTES = {"float32": 4, "bfloat16": 2}
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """All sizes in bytes.

    weights: as held.  weights_on_disk: as in the files.  unpacked: the largest matrix while it is unpacked for one use.
    kv: one sequence's state at `ctx` tokens.  working_set: the budget for activations, whatever the context; on a GPU
    also for one layer's rows in float32 at `ctx` tokens.  chunk: tokens of a prefill chunk, so that they fit it.
    expand: packed weights are held expanded in the compute dtype, else they are unpacked at each use.
    max_ctx: the longest context, in tokens, whose cache fits beside the rest; 0 when none does.
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

    @property
    def needed(self) -> int:
        return self.weights + self.unpacked + self.kv + self.working_set


def memory_plan(
    config: ModelConfig,
    weights: Weights,
    device: str = "cpu",
    dtype: str = "float32",
    kv_dtype: str = "mixed",
    ctx: int = 131_072,
) -> MemoryPlan:
    """Plan for one sequence of `ctx` tokens; dtype: "float32" | "bfloat16".

    Raises MemoryPlanError with the needed and the available size when it cannot fit, DeviceError for no such device.
    """
    available = available_memory(device)
    packed = sum(_held(weights, name, dtype, expand=False) for name in weights.specs)
    expanded = sum(_held(weights, name, dtype, expand=True) for name in weights.specs)
    expand = expanded <= EXPAND_SHARE * available  # otherwise what needs no unpacking is used where it lies in the file
    largest = max(4 * prod(spec.shape) for spec in weights.specs.values() if len(spec.shape) == 2)
    held = expanded if expand else packed
    unpacked = 0 if expand else largest
    if device == "cpu":
        working_set = min(MAX_WORKING_SET, max(MIN_WORKING_SET, available // 16))
        # Expanded weights are cheap to read again, and 512 tokens keep a small model's activations in the caches;
        # packed ones are unpacked once a chunk, which 2048 tokens share.
        chunk, per_token = _chunk(config, working_set, 512 if expand else 2048), 0.0
    else:
        chunk = _chunk(config, max(MIN_GPU_ACTIVATIONS, available // 12), 8192)  # fewer leave it idle between launches
        working_set = GPU.working_set + chunk * working_bytes_per_token(config)
        per_token = _unpacked_rows_per_token(config)
    state = sequence_state_bytes(config)
    left = max(0, available - held - unpacked - working_set - state)
    working_set += int(ctx * per_token)
    # Without compressed layers any length fits.
    fitting = left / max(kv_bytes_per_token(config, kv_dtype) + per_token, 1e-9)
    plan = MemoryPlan(
        device=device,
        ctx=ctx,
        kv_dtype=kv_dtype,
        weights=held,
        weights_on_disk=sum(weights.nbytes(name) for name in weights.specs),
        unpacked=unpacked,
        kv=kv_bytes(config, kv_dtype, ctx) + state,
        working_set=working_set,
        chunk=chunk,
        available=available,
        expand=expand,
        max_ctx=int(min(config.max_position_embeddings, fitting)),
    )
    if plan.needed > available:
        raise MemoryPlanError(_shortage(plan), _next_step(plan))
    return plan


def working_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of activations one prefilled token needs at a block's widest point, float32 (an upper estimate)."""
    streams = 4 * config.hc_mult * config.hidden_size
    attention = 4 * config.num_attention_heads * config.head_dim + 4 * 2 * config.head_dim
    index = 3 * config.index_n_heads * config.index_head_dim
    experts = (config.num_experts_per_tok + config.n_shared_experts) * (
        config.hidden_size + 3 * config.moe_intermediate_size
    )
    return 4 * (streams + max(attention + index, experts))


def _chunk(config: ModelConfig, budget: int, most: int) -> int:
    """Tokens whose activations fit ``budget`` bytes: a multiple of 128, 128 at least."""
    return min(most, max(128, budget // working_bytes_per_token(config) // 128 * 128))


def _unpacked_rows_per_token(config: ModelConfig) -> float:
    """Bytes a token of the layer with the most rows, while a GPU reads all of them as float32."""
    return 4 * config.head_dim / min((r for r in config.compress_ratios if r), default=float("inf"))


def _held(weights: Weights, name: str, dtype: str, expand: bool) -> int:
    """Bytes one tensor takes in memory; what is used as it lies on disk is mapped and needs room to stay there."""
    spec, on_disk = weights.specs[name], weights.nbytes(name)
    if spec.role == "ids" or name == "embed.weight":
        return on_disk
    if spec.role == "float" and not name.endswith(
        (".wkv.weight", ".wgate.weight", ".weights_proj.weight", "head.weight")
    ):
        return 4 * prod(spec.shape)  # norms, biases, mHC, the router: always float32
    if not expand:
        return on_disk
    float32 = spec.role == "float" and not name.endswith(".weights_proj.weight")  # compressors and head compute in it
    return prod(spec.shape) * (4 if float32 else _VALUE_BYTES[dtype])


def _shortage(plan: MemoryPlan) -> str:
    parts = [("weights", plan.weights), ("a matrix being unpacked", plan.unpacked)]
    parts += [(f"cache of {plan.ctx:,} tokens", plan.kv), ("working set", plan.working_set)]
    listed = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts if size)
    needed, available = readable_bytes(plan.needed), readable_bytes(plan.available)
    return f"the model needs {needed} of memory on {plan.device} ({listed}), but {available} are available"


def _next_step(plan: MemoryPlan) -> str:
    if plan.max_ctx >= 1024:
        advice = f"Use a context of at most {plan.max_ctx // 1024 * 1024:,} tokens (--ctx)"
        return f"{advice}, or the mixed cache format." if plan.kv_dtype != "mixed" else f"{advice}."
    return f"Free memory, use a smaller model, or a machine with {readable_bytes(plan.needed)} of free memory."


# ---- what is there ---------------------------------------------------------------------------------------------------


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be used on a device now.  Raises DeviceError for an unknown or absent device.

    For "cpu" what the system, the control group and the process' own limit leave, pages of files that can be dropped
    counted as free.  For a GPU what no process has taken, and what this one's allocator keeps and does not use.
    """
    if device == "cpu":
        import psutil

        return max(0, min([int(psutil.virtual_memory().available), *_cgroup_free(), *_address_space_free()]))
    if device.split(":")[0] != "cuda":
        raise DeviceError(f"there is no device {device!r}", "Use cpu or cuda.")
    import torch

    index = device.partition(":")[2] or "0"
    if not index.isdecimal() or not torch.cuda.is_available() or int(index) >= torch.cuda.device_count():
        raise DeviceError(f"there is no device {device!r} on this machine", "Use --device cpu, or see `dsv4 doctor`.")
    kept = torch.cuda.memory_reserved(int(index)) - torch.cuda.memory_allocated(int(index))
    return int(GPU_SHARE * (torch.cuda.mem_get_info(int(index))[0] + kept))


def _cgroup_free(root: Path = _CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each limit on this process' control group and its parents leaves, for versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return  # no control groups on this system
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers not in ("", "memory"):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit_name, usage_name, file_name = names if controllers else ("memory.max", "memory.current", "inactive_file")
        group = base / path.lstrip("/")
        # Inside a container the path may lie outside the mount: then only the root is there to ask.
        for folder in (group, *group.parents):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None:
                yield max(0, limit - max(0, usage - _statistic(folder / "memory.stat", file_name)))
            if folder == base:
                break


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _statistic(path: Path, key: str) -> int:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == key), 0)
    except (OSError, ValueError):
        return 0


def _address_space_free() -> Iterator[int]:
    """What `ulimit -v` leaves; files mapped already count against it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        import psutil

        yield limit - int(psutil.Process().memory_info().vms)
