"""What the Triton path needs on each of its devices: weights as packed, a sequence's state, a chunk's activations.

Owns the sizes that stage.py and layer.py take at their widest point, and the split of layers by bytes.  Knows sizes
only, and imports nothing that needs triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from dsv4_kernels.backend import Backend

from ..accounting import readable_bytes
from ..config import FP4_BLOCK, FP8_BLOCK, ModelConfig
from ..device_map import DeviceMap
from ..errors import MemoryPlanError
from ..formats import index_key_bytes, row_bytes
from ..free_memory import available_memory
from ..placement import MemoryPlan, Row
from ..weights import Form, Spec

CHUNK = 8192  # tokens of a prefill chunk: fewer read the experts more often than their products take
INDEX_SCRATCH = 576 << 20  # scores of a slab of queries, with what they are selected from
SPARE = 256 << 20  # recorded steps, tables of constants, the allocator's rounding
SEGMENT_ROWS = 2048


def published_form(spec: Spec, config: ModelConfig) -> Form:
    """The form that a published checkpoint has a tensor in."""
    if spec.role not in ("expert", "linear"):
        return "plain"
    return "fp4" if spec.role == "expert" and config.expert_dtype == "fp4" else "fp8"


def held_bytes(spec: Spec, form: Form) -> int:
    """Bytes of a tensor on a GPU, its scale included."""
    size = prod(spec.shape)
    if form == "fp4":
        return size // 2 + size // FP4_BLOCK
    if form == "fp8":
        return size + size // FP8_BLOCK**2
    # Small tensors are held in float32, mHC's as three bf16 parts; matrices as on disk.
    return size * (4 if spec.role == "ids" else 6 if len(spec.shape) == 1 or spec.shape[0] <= 24 else 2)


def layer_bytes(specs: Mapping[str, Spec], forms: Callable[[str], Form], layers: int) -> tuple[list[int], int, int]:
    """Bytes of each layer, of what lies before the first, and of what lies behind the last."""
    sizes, before, after = [0] * layers, 0, 0
    for name, spec in specs.items():
        size = held_bytes(spec, forms(name))
        if name.startswith("layers."):
            sizes[int(name.split(".")[1])] += size
        elif name.startswith("embed."):
            before += size
        elif not name.startswith("mtp."):
            after += size
    return sizes, before, after


def chunk_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of activations for each token of a prefilled chunk, where a layer needs most."""
    c = config
    streams = 2 * c.hc_mult * c.hidden_size + 2 * c.hidden_size  # and the embedding
    read = 3 * c.hidden_size + c.hidden_size // 32 + 4 * (c.hc_mult + c.hc_mult**2)
    heads, index = c.num_attention_heads * c.head_dim, c.index_n_heads * c.index_head_dim
    plain = 4 * (4 * c.head_dim + 4 * c.index_head_dim + c.index_n_heads)
    low = 2 * (c.q_lora_rank + c.head_dim) + 2 * c.q_lora_rank + row_bytes(c.head_dim, c.qk_rope_head_dim)
    projecting = 2 * (heads + index) + 2 * heads + index
    attending = 4 * heads + index + 4 * c.index_topk + 2 * c.o_groups * c.o_lora_rank
    pairs = c.num_experts_per_tok
    experts = 2 * (pairs + 2) * c.hidden_size + (pairs + 1) * (5 * c.moe_intermediate_size) + 8 * c.n_routed_experts
    mixing = 4 * 32 * (c.hidden_size // 512)
    return streams + read + mixing + max(low + plain + max(projecting, attending), experts)


def working_set(config: ModelConfig, chunk: int, ctx: int) -> int:
    """Bytes beside weights and state on each device."""
    keys = (config.index_head_dim + 4) * ctx // 4 if 4 in config.compress_ratios else 0
    return chunk * chunk_bytes_per_token(config) + INDEX_SCRATCH + keys + SPARE


def state_bytes(config: ModelConfig, ratios: Sequence[int], ctx: int) -> int:
    """Bytes of one sequence's state at ``ctx`` tokens for layers of these compress ratios: slabs in whole segments, and
    three copies of what is small (its own, the last whole chunk's, and an interrupted chunk's).
    """
    rows, total = row_bytes(config.head_dim, config.qk_rope_head_dim), 0
    for ratio in ratios:
        small = 256 * rows
        if ratio:
            small += 8 * (8 if ratio == 4 else ratio) * config.head_dim * (2 if ratio == 4 else 1)
            segments = -(-(ctx // ratio) // SEGMENT_ROWS)
            keys = index_key_bytes(config.index_head_dim) if ratio == 4 else 0
            small += 8 * 8 * 2 * config.index_head_dim if ratio == 4 else 0
            total += segments * SEGMENT_ROWS * (rows + keys)
        total += 3 * small
    return total


@dataclass(frozen=True)
class GpuPlan:
    """ranges: layers of each device; plan: the same for people and for Engine, added up over the devices."""

    ranges: tuple[tuple[int, int], ...]
    plan: MemoryPlan


def gpu_memory_plan(
    config: ModelConfig, specs: Mapping[str, Spec], form: Callable[[str], Form], backend: Backend, ctx: int
) -> GpuPlan:
    """Plan for one sequence of ``ctx`` tokens on the backend's devices.

    Raises MemoryPlanError with the needed and the available size of the device where it does not fit.
    """
    sizes, before, after = layer_bytes(specs, form, config.num_hidden_layers)
    if len(backend.devices) > config.num_hidden_layers:
        problem = f"{config.num_hidden_layers} layers cannot be spread over {len(backend.devices)} GPUs"
        raise MemoryPlanError(problem, "Name fewer GPUs.")
    ranges = split_layers(sizes, before, after, len(backend.devices))
    free = [available_memory(str(device)) for device in backend.devices]
    chunk = CHUNK
    while chunk > 1024 and working_set(config, chunk, ctx) > min(free) // 8:
        chunk //= 2
    needs, longest = [], float(config.max_position_embeddings)
    per_token = (config.index_head_dim + 4) / 4 if 4 in config.compress_ratios else 0.0
    for (first, last), room, device in zip(ranges, free, backend.devices, strict=True):
        held = sum(sizes[first:last]) + (before if first == 0 else 0)
        held += after if last == config.num_hidden_layers else 0
        ratios = config.compress_ratios[first:last]
        fixed = held + working_set(config, chunk, 0) + state_bytes(config, ratios, 0)
        rows = row_bytes(config.head_dim, config.qk_rope_head_dim)
        keys = index_key_bytes(config.index_head_dim)
        mine = sum((rows + (keys if ratio == 4 else 0)) / ratio for ratio in ratios if ratio)
        longest = min(longest, max(0.0, room - fixed) / max(mine + per_token, 1e-9))
        needs.append((held + working_set(config, chunk, ctx) + state_bytes(config, ratios, ctx), room, device, held))
    names = [str(device) for device in backend.devices]
    lines = [
        Row(name, part, size)
        for name, (first, last), (needed, _, _, held) in zip(names, ranges, needs, strict=True)
        for part, size in (
            (f"weights of layers {first} to {last - 1}", held),
            (f"cache of {ctx:,} tokens", state_bytes(config, config.compress_ratios[first:last], ctx)),
            (f"activations of {chunk:,} tokens", working_set(config, chunk, ctx)),
        )
    ]
    placed = tuple(name for name, (first, last) in zip(names, ranges, strict=True) for _ in range(first, last))
    weights = sum(held for *_, held in needs)
    plan = MemoryPlan(
        device=str(backend),
        ctx=ctx,
        kv_dtype="mixed",
        weights=weights,
        weights_on_disk=weights,
        unpacked=0,
        kv=state_bytes(config, config.compress_ratios, ctx),
        working_set=working_set(config, chunk, ctx) * len(ranges),
        chunk=chunk,
        available=sum(free),
        expand=False,
        max_ctx=int(longest),
        program=0,
        slots=0,
        gpu_slots=(),
        experts=0,
        expert_bytes=0,
        device_map=DeviceMap(names[0], placed, placed, names[-1]),
        rows=tuple(lines),
        rooms=dict(zip(names, free, strict=True)),
    )
    for needed, room, device, held in needs:
        if needed > room:
            rest = readable_bytes(needed - held)
            listed = f"weights {readable_bytes(held)}, {ctx:,} tokens and a chunk of {chunk:,} {rest}"
            advice = "Name more GPUs (--device cuda:0,cuda:1)"
            if longest >= 1024:
                advice += f", or use a context of at most {int(longest) // 1024 * 1024:,} tokens (--ctx)"
            raise MemoryPlanError(
                f"the model needs {readable_bytes(needed)} on {device} ({listed}), but {readable_bytes(room)} are free",
                f"{advice}.",
            )
    return GpuPlan(tuple(ranges), plan)


def split_layers(sizes: Sequence[int], before: int, after: int, devices: int) -> list[tuple[int, int]]:
    """Ranges of layers, one a device, that leave the fullest device least; each has one layer at least.

    sizes: bytes of each layer; before, after: what lies on the first and on the last device besides.
    """
    assert devices <= len(sizes)

    def ranges(limit: int) -> list[tuple[int, int]] | None:
        found, start = [], 0
        for device in range(devices):
            total = (before if device == 0 else 0) + (after if device == devices - 1 else 0)
            end, must_leave = start, devices - 1 - device
            while end < len(sizes) - must_leave and (total + sizes[end] <= limit or end == start):
                total += sizes[end]
                end += 1
            if total > limit:
                return None
            found.append((start, end))
            start = end
        return found if start == len(sizes) else None

    low, high = 0, before + after + sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ranges(middle) else (middle + 1, high)
    fitting = ranges(low)
    assert fitting is not None
    return fitting
