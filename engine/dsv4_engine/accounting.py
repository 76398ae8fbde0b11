"""What a model costs, from its configuration alone: parameters by part, and the bytes of its KV cache.

Owns the arithmetic behind `inspect`, the memory plan and comparisons with V3.2.  Closed forms on purpose: the tests
hold them against the table of tensors in weights.py and the published totals (report, section 2.3.4 and figure 1).
Imports no torch until the cache's byte layouts are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4_engine.config import BaselineConfig, ModelConfig
from dsv4_engine.errors import InputError

if TYPE_CHECKING:
    from dsv4_engine.weights import Weights

PARTS = (
    "embedding",
    "head",
    "attention",
    "compressor",
    "indexer",
    "router",
    "experts",
    "shared expert",
    "mHC",
    "norms",
)
_CACHE_VALUE_BYTES = {"bf16": 2, "fp32": 4}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class Count:
    """Parameters of one part.  active: those one token's forward pass multiplies with (the embedding's are not)."""

    total: int
    active: int


@dataclass(frozen=True)
class Parameters:
    """Parameters by part (see PARTS); the MTP block is apart and in neither sum.  Ids and scales are no parameters."""

    by_part: Mapping[str, Count]
    mtp: int

    @property
    def total(self) -> int:
        return sum(count.total for count in self.by_part.values())

    @property
    def active(self) -> int:
        return sum(count.active for count in self.by_part.values())


def parameters(config: ModelConfig | BaselineConfig) -> Parameters:
    """Count the parameters of a model from its configuration."""
    return _v32_parameters(config) if isinstance(config, BaselineConfig) else _v4_parameters(config)


def _v4_parameters(c: ModelConfig) -> Parameters:
    parts = dict.fromkeys(PARTS, 0)
    parts["embedding"] = parts["head"] = c.vocab_size * c.hidden_size
    layers = [_v4_block(c, ratio, i < c.num_hash_layers) for i, ratio in enumerate(c.compress_ratios)]
    for layer in [*layers, _v4_final(c)]:
        for part, size in layer.items():
            parts[part] += size
    mtp = 0
    if c.num_nextn_predict_layers and c.dspark is None:
        block = sum(_v4_block(c, 0, hashed=False).values()) + sum(_v4_final(c).values())
        mtp = block + 2 * c.hidden_size + 2 * c.hidden_size**2  # enorm, hnorm; e_proj, h_proj
    return Parameters(_with_active(parts, c.num_experts_per_tok, c.n_routed_experts), mtp)


def _with_active(parts: Mapping[str, int], picked: int, experts: int) -> dict[str, Count]:
    share = {"embedding": (0, 1), "experts": (picked, max(experts, 1))}
    return {p: Count(n, n * share.get(p, (1, 1))[0] // share.get(p, (1, 1))[1]) for p, n in parts.items()}


def _v4_block(c: ModelConfig, ratio: int, hashed: bool) -> dict[str, int]:
    """One layer's parameters by part, for a layer with this compress ratio."""
    d, heads = c.hidden_size, c.num_attention_heads * c.head_dim
    expert, mixes = 3 * d * c.moe_intermediate_size, c.hc_mult * (c.hc_mult + 2)
    attention = d * (c.q_lora_rank + c.head_dim) + c.q_lora_rank * heads  # wq_a and wkv; wq_b
    attention += c.o_lora_rank * heads + c.o_groups * c.o_lora_rank * d  # wo_a: each head's values meet one group; wo_b
    index = _compressor(c, ratio, c.index_head_dim) + c.q_lora_rank * c.index_n_heads * c.index_head_dim
    index += d * c.index_n_heads
    return {
        "attention": attention + c.num_attention_heads,  # and a sink a head
        "compressor": _compressor(c, ratio, c.head_dim) if ratio else 0,
        "indexer": index if ratio == 4 else 0,
        "router": c.n_routed_experts * (d if hashed else d + 1),
        "experts": c.n_routed_experts * expert,
        "shared expert": c.n_shared_experts * expert,
        "mHC": 2 * (mixes * c.hc_mult * d + mixes + 3),
        "norms": 2 * d + c.q_lora_rank + c.head_dim,
    }


def _v4_final(c: ModelConfig) -> dict[str, int]:
    return {"norms": c.hidden_size, "mHC": c.hc_mult**2 * c.hidden_size + c.hc_mult + 1}


def _compressor(c: ModelConfig, ratio: int, channels: int) -> int:
    width = 2 * channels if ratio == 4 else channels
    return 2 * c.hidden_size * width + ratio * width + channels


def _v32_parameters(c: BaselineConfig) -> Parameters:
    """DeepSeek-V3.2: latent attention and an indexer in every layer; the first layers' MLP is dense."""
    d, heads, sparse = c.hidden_size, c.num_attention_heads, c.num_hidden_layers - c.first_k_dense_replace
    attention = d * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim + heads * c.v_head_dim)
    attention += c.q_lora_rank * heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    attention += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    index = c.q_lora_rank * c.index_n_heads * c.index_head_dim + d * (c.index_head_dim + c.index_n_heads)
    index += 2 * c.index_head_dim  # its key norm has a weight and a bias
    expert = 3 * d * c.moe_intermediate_size
    parts = {
        "embedding": c.vocab_size * d,
        "head": c.vocab_size * d,
        "attention": c.num_hidden_layers * attention,
        "indexer": c.num_hidden_layers * index,
        "dense MLP": c.first_k_dense_replace * 3 * d * c.intermediate_size,
        "router": sparse * c.n_routed_experts * (d + 1),
        "experts": sparse * c.n_routed_experts * expert,
        "shared expert": sparse * c.n_shared_experts * expert,
        "norms": c.num_hidden_layers * (2 * d + c.q_lora_rank + c.kv_lora_rank) + d,
    }
    return Parameters(_with_active(parts, c.num_experts_per_tok, c.n_routed_experts), mtp=0)


# ---- the cache -------------------------------------------------------------------------------------------------------


def kv_entry_bytes(config: ModelConfig | BaselineConfig, kv_dtype: str) -> tuple[int, int]:
    """Bytes of one attention entry and of one indexer key.

    mixed, V4: e4m3 + bf16 + scales rows and FP4 keys; V3.2: an FP8 latent of 4 fp32 scales with bf16 RoPE channels, and
    FP8 keys with an fp32 scale.
    """
    if isinstance(config, BaselineConfig):
        latent, rope, key = config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
        if kv_dtype == "mixed":
            return latent + 4 * -(-latent // 128) + 2 * rope, key + 4 * -(-key // 128)
        size = _value_bytes(kv_dtype)
        return size * (latent + rope), size * key
    if kv_dtype == "mixed":
        from dsv4_engine.formats import index_key_bytes, row_bytes

        return row_bytes(config.head_dim, config.qk_rope_head_dim), index_key_bytes(config.index_head_dim)
    return _value_bytes(kv_dtype) * config.head_dim, _value_bytes(kv_dtype) * config.index_head_dim


def _value_bytes(kv_dtype: str) -> int:
    if kv_dtype not in _CACHE_VALUE_BYTES:
        raise InputError(f"kv_dtype {kv_dtype!r} is unknown", f"Use mixed, {' or '.join(_CACHE_VALUE_BYTES)}.")
    return _CACHE_VALUE_BYTES[kv_dtype]


def kv_bytes_per_token(config: ModelConfig | BaselineConfig, kv_dtype: str = "mixed") -> float:
    """Bytes that one more token adds to the cache, over all layers, on average over a long text."""
    entry, key = kv_entry_bytes(config, kv_dtype)
    if isinstance(config, BaselineConfig):
        return float(config.num_hidden_layers * (entry + key))
    return sum((entry + (key if r == 4 else 0)) / r for r in config.compress_ratios if r)


def kv_bytes(config: ModelConfig, kv_dtype: str, tokens: int) -> int:
    """Bytes of a sequence's compressed entries after this many tokens; unfinished blocks have none yet."""
    entry, key = kv_entry_bytes(config, kv_dtype)
    return sum(tokens // r * (entry + (key if r == 4 else 0)) for r in config.compress_ratios if r)


def sequence_state_bytes(config: ModelConfig) -> int:
    """Bytes at most of what a sequence of any length carries besides its entries: window, open blocks; in float32."""
    window = (config.num_hidden_layers + config.num_nextn_predict_layers) * config.sliding_window * config.head_dim
    # kv and gate of the open block; with an overlap both are twice as wide and the last block's halves are kept too.
    blocks = sum(2 * r * config.head_dim * (3 if r == 4 else 1) for r in config.compress_ratios)
    index = sum(2 * r * config.index_head_dim * 3 for r in config.compress_ratios if r == 4)
    return 4 * (window + blocks + index)


# ---- a checkpoint's files --------------------------------------------------------------------------------------------

_PART_OF = (  # the first that matches a published name
    (r"^mtp\.", "mtp"),
    (r"^embed\.", "embedding"),
    (r"^head\.", "head"),
    (r"\.indexer\.", "indexer"),
    (r"\.compressor\.", "compressor"),
    (r"\.shared_experts\.", "shared expert"),
    (r"\.experts\.", "experts"),
    (r"\.gate\.", "router"),
    (r"hc_(attn|ffn|head)_", "mHC"),
    (r"norm\.weight$", "norms"),
    (r"\.attn\.", "attention"),
)


def part_of(name: str) -> str:
    """The part (PARTS, or "mtp") that a tensor belongs to, by its published name."""
    return next(part for pattern, part in _PART_OF if re.search(pattern, name))


def bytes_on_disk(weights: Weights) -> dict[str, int]:
    """Bytes of a checkpoint's used tensors by part, scales included; "unused" where a drafter lies beside them."""
    sizes: dict[str, int] = {}
    for name in weights.specs:
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + weights.nbytes(name)
    unused = weights.checkpoint.total_bytes - sum(sizes.values())
    return sizes | ({"unused": unused} if unused else {})


def enough_bytes(size: int) -> str:
    """A size as --cpu-mem takes it, rounded up so that it suffices: "13.2GiB", below that "460MiB"."""
    if size >= 1 << 30:
        return f"{math.ceil(10 * size / (1 << 30)) / 10:.1f}GiB"
    return f"{10 * math.ceil(size / (10 << 20))}MiB"


def readable_bytes(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    unit = 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:,.1f} {_UNITS[unit]}"
