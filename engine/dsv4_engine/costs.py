"""What computing costs, from a configuration alone: FLOPs and bytes of any stretch of tokens, operation by operation.

Owns the list of a model's matrix products, DeepSeek-V3.2's included, and the weighting by precision.  Counts 2 per
multiply-add of products with weights, index scores and core attention; norms, softmax, RoPE and the mixing of residual
streams are left out, as in the report.  Knows no device (roofline.py) and no tensors.
Sources: report, section 2.3 (equations 9-27) and figure 1; DeepSeek-V3.2 for the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from dsv4_engine.accounting import kv_bytes, kv_bytes_per_token, kv_entry_bytes
from dsv4_engine.config import FP4_BLOCK, FP8_BLOCK, BaselineConfig, ModelConfig
from dsv4_engine.errors import InputError

Precision = Literal["fp4", "fp8", "bf16"]
Held = Literal["published", "bfloat16", "float32"]
Config = ModelConfig | BaselineConfig

# FP4 counts half only where both operands are FP4: FP4 weights meet FP8 activations at FP8's rate (report, 2.3.4).
WEIGHTS: dict[Precision, float] = {"fp4": 0.5, "fp8": 1.0, "bf16": 2.0}
WEIGHTING = "equivalent FP8: FP8 1, BF16 2, FP4 x FP4 1/2"
GQA8 = "BF16 cache of 8 key and value heads of 128 channels in every layer"

# Each operation and the part it is shown under; the order is the order of tables.
PART_OF = {
    "projections": "linears",
    "compressors": "linears",
    "index projections": "linears",
    "dense MLP": "linears",
    "router": "experts",
    "routed experts": "experts",
    "shared expert": "experts",
    "index scores": "indexer",
    "window attention": "window",
    "csa attention": "csa",
    "hca attention": "hca",
    "dsa attention": "dsa",
    "mHC": "mHC",
    "head": "head",
}
PARTS = tuple(dict.fromkeys(PART_OF.values()))
KINDS = ("window", "csa", "hca", "dsa", "outside layers")  # dsa: V3.2's layers
GROUPS = ("weights", "indexer", "core attention")
_CORE = ("window", "csa", "hca", "dsa")


@dataclass(frozen=True)
class Cost:
    """One operation in all layers of one kind, at one precision.

    flops: 2 a multiply-add.  weight_bytes, cache_bytes: read in one pass over the tokens.  stream_bytes: residual
    streams read and written once around each sub-layer.
    """

    operation: str
    kind: str
    precision: Precision
    flops: int
    weight_bytes: float = 0.0
    cache_bytes: int = 0
    stream_bytes: int = 0

    @property
    def part(self) -> str:
        return PART_OF[self.operation]

    @property
    def group(self) -> str:
        """Products with weights, index scores, or core attention: the columns of the published comparison."""
        return "indexer" if self.part == "indexer" else "core attention" if self.part in _CORE else "weights"

    @property
    def weighted(self) -> float:
        """FLOPs in equivalent FP8 (WEIGHTING)."""
        return self.flops * WEIGHTS[self.precision]

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes + self.stream_bytes


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a layer, as published: (out, in), how it is stored, in what it multiplies, how many a token uses."""

    operation: str
    rows: int
    columns: int
    stored: Literal["fp4", "fp8", "bf16", "fp32"]
    precision: Precision
    active: int = 1
    there: int = 1


# ---- costs of a stretch of tokens ------------------------------------------------------------------------------------


def costs(
    config: Config, start: int, tokens: int, *, logits: int = 1, kv_dtype: str = "mixed", held: Held = "published"
) -> tuple[Cost, ...]:
    """Costs of taking in ``tokens`` tokens after ``start`` earlier ones, in one pass over the weights.

    logits: tokens that go through the head.  held: weights as in the published files, or expanded to a plain type
    (compressors and the head then in float32).  Token t (from 0) sees t+1 positions, its own included.
    """
    if start < 0 or tokens < 1 or not 0 <= logits <= tokens:
        raise InputError(
            f"{tokens} tokens after {start}, {logits} of them with logits, cannot be counted",
            "Give at least one token, and no negative numbers.",
        )
    found = list(_weight_costs(config, tokens, logits, held))
    found += _v32_attention(config, start, tokens, kv_dtype) if isinstance(config, BaselineConfig) else (
        _v4_attention(config, start, tokens, kv_dtype)
    )  # fmt: skip
    return tuple(merged(found))


def decode_costs(config: Config, ctx: int, *, kv_dtype: str = "mixed", held: Held = "published") -> tuple[Cost, ...]:
    """Costs of the one token that makes the context ``ctx`` tokens long."""
    return costs(config, ctx - 1, 1, kv_dtype=kv_dtype, held=held)


def prefill_costs(
    config: Config, ctx: int, *, chunk: int = 8192, kv_dtype: str = "mixed", held: Held = "published"
) -> tuple[Cost, ...]:
    """Costs of reading ``ctx`` tokens in chunks, with logits of the last one; weights are read once a chunk."""
    parts = (
        costs(config, at, min(chunk, ctx - at), logits=int(at + chunk >= ctx), kv_dtype=kv_dtype, held=held)
        for at in range(0, ctx, chunk)
    )
    return tuple(merged(cost for part in parts for cost in part))


def merged(found: Iterable[Cost]) -> list[Cost]:
    """Costs of the same operation, kind and precision added up, in the order of the tables."""
    sums: dict[tuple[str, str, str], Cost] = {}
    for cost in found:
        key = (cost.operation, cost.kind, cost.precision)
        old = sums.get(key)
        sums[key] = cost if old is None else replace(
            old,
            flops=old.flops + cost.flops,
            weight_bytes=old.weight_bytes + cost.weight_bytes,
            cache_bytes=old.cache_bytes + cost.cache_bytes,
            stream_bytes=old.stream_bytes + cost.stream_bytes,
        )  # fmt: skip
    order = {name: place for place, name in enumerate((*PART_OF, *KINDS))}
    return sorted(sums.values(), key=lambda c: (order[c.operation], order[c.kind], c.precision))


def total(found: Iterable[Cost], by: Callable[[Cost], str]) -> dict[str, dict[str, float]]:
    """Sums of flops, flops_weighted, weight_bytes and cache_bytes by ``by`` (part, kind, group, ...)."""
    sums: dict[str, dict[str, float]] = {}
    for cost in found:
        row = sums.setdefault(by(cost), {"flops": 0, "flops_weighted": 0.0, "weight_bytes": 0.0, "cache_bytes": 0})
        row["flops"] += cost.flops
        row["flops_weighted"] += cost.weighted
        row["weight_bytes"] += cost.weight_bytes
        row["cache_bytes"] += cost.cache_bytes
    return sums


# ---- products with weights -------------------------------------------------------------------------------------------


def _weight_costs(config: Config, tokens: int, logits: int, held: Held) -> Iterator[Cost]:
    for kind, layers, matrices in _layers(config):
        through = logits if kind == "outside layers" else tokens
        for m in matrices:
            # Routed evenly, a token misses a given expert with probability 1 - active/there.
            used = m.there * (1 - (1 - m.active / m.there) ** through)
            yield Cost(
                m.operation,
                kind,
                m.precision,
                flops=2 * m.rows * m.columns * m.active * layers * through,
                weight_bytes=_matrix_bytes(m, config, held) * used * layers,
                stream_bytes=_stream_bytes(config, held) * layers * tokens if m.operation == "mHC" else 0,
            )


def _matrix_bytes(m: _Matrix, config: Config, held: Held) -> float:
    """As in the published files with its scales, or expanded: then what computes in float32 is held in it."""
    if held != "published":
        float32 = held == "float32" or m.stored == "fp32" or m.operation in ("compressors", "head", "router")
        return m.rows * m.columns * (4 if float32 else 2)
    size = m.rows * m.columns
    if m.stored == "fp4":
        return size / 2 + size / FP4_BLOCK
    if m.stored == "fp8":
        scale = 4 if isinstance(config, BaselineConfig) else 1  # V3.2's block scales are float32
        return size + scale * -(-m.rows // FP8_BLOCK) * -(-m.columns // FP8_BLOCK)
    return size * (4 if m.stored == "fp32" else 2)


def _stream_bytes(config: Config, held: Held) -> int:
    """Residual streams of one token in one layer: read and written once for each of its two sub-layers."""
    if isinstance(config, BaselineConfig):
        return 0
    return 2 * 2 * config.hc_mult * config.hidden_size * (4 if held == "float32" else 2)


@lru_cache(maxsize=64)
def _layers(config: Config) -> tuple[tuple[str, int, tuple[_Matrix, ...]], ...]:
    """(kind, number of layers, matrices of one such layer); the head is a layer of the kind "outside layers"."""
    if isinstance(config, BaselineConfig):
        return _v32_layers(config)
    ratios = {kind: ratio for ratio, kind in ((0, "window"), (4, "csa"), (128, "hca"))}
    found = []
    for kind, ratio in ratios.items():
        if number := config.compress_ratios.count(ratio):
            found.append((kind, number, tuple(_v4_matrices(config, ratio))))
    head = (
        _Matrix("head", config.vocab_size, config.hidden_size, "bf16", "bf16"),
        _Matrix("head", config.hc_mult, config.hc_mult * config.hidden_size, "fp32", "bf16"),
    )
    return (*found, ("outside layers", 1, head))


def _v4_matrices(c: ModelConfig, ratio: int) -> Iterator[_Matrix]:
    linear: Precision = "fp8" if c.quantization else "bf16"
    expert: Precision = ("fp4" if c.expert_dtype == "fp4" else "fp8") if c.quantization else "bf16"
    d, heads = c.hidden_size, c.num_attention_heads * c.head_dim
    yield _Matrix("projections", c.q_lora_rank, d, linear, linear)
    yield _Matrix("projections", heads, c.q_lora_rank, linear, linear)
    yield _Matrix("projections", c.head_dim, d, linear, linear)
    # Each head's values meet one group of wo_a, which is stored like the others and multiplies in BF16.
    yield _Matrix("projections", c.o_groups * c.o_lora_rank, heads // c.o_groups, linear, "bf16")
    yield _Matrix("projections", d, c.o_groups * c.o_lora_rank, linear, linear)
    if ratio:
        yield _Matrix("compressors", 2 * c.head_dim * (2 if ratio == 4 else 1), d, "bf16", "bf16")
    if ratio == 4:
        yield _Matrix("compressors", 4 * c.index_head_dim, d, "bf16", "bf16")
        yield _Matrix("index projections", c.index_n_heads * c.index_head_dim, c.q_lora_rank, linear, linear)
        yield _Matrix("index projections", c.index_n_heads, d, "bf16", "bf16")
    yield _Matrix("router", c.n_routed_experts, d, "bf16", "bf16")
    multiplies: Precision = "bf16" if expert == "bf16" else "fp8"
    routed = (c.num_experts_per_tok, c.n_routed_experts)
    for rows, columns in _gate_up_down(c.moe_intermediate_size, d):
        yield _Matrix("routed experts", rows, columns, expert, multiplies, *routed)
        yield _Matrix("shared expert", rows, columns, linear, linear, c.n_shared_experts, c.n_shared_experts)
    mixes = c.hc_mult * (c.hc_mult + 2)
    yield _Matrix("mHC", 2 * mixes, c.hc_mult * d, "fp32", "bf16")  # one projection a sub-layer


def _gate_up_down(inner: int, hidden: int) -> tuple[tuple[int, int], ...]:
    return (inner, hidden), (inner, hidden), (hidden, inner)


def _v32_layers(c: BaselineConfig) -> tuple[tuple[str, int, tuple[_Matrix, ...]], ...]:
    """V3.2: latent attention with the key and value projections absorbed into query and output, in BF16."""
    d, heads = c.hidden_size, c.num_attention_heads
    query = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    attention = (
        _Matrix("projections", c.q_lora_rank, d, "fp8", "fp8"),
        _Matrix("projections", query, c.q_lora_rank, "fp8", "fp8"),
        _Matrix("projections", c.kv_lora_rank + c.qk_rope_head_dim, d, "fp8", "fp8"),
        _Matrix("projections", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, "fp8", "bf16"),
        _Matrix("projections", d, heads * c.v_head_dim, "fp8", "fp8"),
        _Matrix("index projections", c.index_n_heads * c.index_head_dim, c.q_lora_rank, "fp8", "fp8"),
        _Matrix("index projections", c.index_head_dim, d, "fp8", "fp8"),
        _Matrix("index projections", c.index_n_heads, d, "bf16", "bf16"),
    )
    dense = [_Matrix("dense MLP", *shape, "fp8", "fp8") for shape in _gate_up_down(c.intermediate_size, d)]
    sparse = [_Matrix("router", c.n_routed_experts, d, "bf16", "bf16")]
    for rows, columns in _gate_up_down(c.moe_intermediate_size, d):
        sparse.append(_Matrix("routed experts", rows, columns, "fp8", "fp8", c.num_experts_per_tok, c.n_routed_experts))
        sparse.append(_Matrix("shared expert", rows, columns, "fp8", "fp8", c.n_shared_experts, c.n_shared_experts))
    head = _Matrix("head", c.vocab_size, d, "bf16", "bf16")
    first, all_layers = c.first_k_dense_replace, c.num_hidden_layers
    return (
        ("dsa", first, (*attention, *dense)),
        ("dsa", all_layers - first, (*attention, *sparse)),
        ("outside layers", 1, (head,)),
    )


# ---- index scores and core attention ---------------------------------------------------------------------------------


def _blocks_seen(end: int, ratio: int, most: int | None = None) -> int:
    """Sum over n = 1..end of min(n // ratio, most): finished blocks that the tokens of a sequence see."""
    if most is not None and end >= ratio * most:
        return _blocks_seen(ratio * most - 1, ratio) + most * (end - ratio * most + 1)
    full = end // ratio
    return ratio * full * (full - 1) // 2 + full * (end - ratio * full + 1)


def _seen(start: int, tokens: int, ratio: int, most: int | None = None) -> int:
    return _blocks_seen(start + tokens, ratio, most) - _blocks_seen(start, ratio, most)


def _v4_attention(c: ModelConfig, start: int, tokens: int, kv_dtype: str) -> Iterator[Cost]:
    """Queries, keys and values are head_dim wide; a row serves all heads as key and as value."""
    end, (row, key) = start + tokens, kv_entry_bytes(c, kv_dtype)
    a_row = 2 * c.num_attention_heads * 2 * c.head_dim
    near = min(end, tokens + c.sliding_window - 1)
    for kind, ratio in (("window", 0), ("csa", 4), ("hca", 128)):
        layers = c.compress_ratios.count(ratio)
        if not layers:
            continue
        window = a_row * _seen(start, tokens, 1, c.sliding_window)
        yield Cost("window attention", kind, "bf16", window * layers, cache_bytes=near * row * layers)
        if kind == "csa":
            pairs = 2 * c.index_n_heads * c.index_head_dim * _seen(start, tokens, 4)
            both_fp4: Precision = "fp4" if kv_dtype == "mixed" else "bf16"
            yield Cost("index scores", kind, both_fp4, pairs * layers, cache_bytes=end // 4 * key * layers)
            rows, read = _seen(start, tokens, 4, c.index_topk), min(end // 4, tokens * c.index_topk)
            yield Cost("csa attention", kind, "bf16", a_row * rows * layers, cache_bytes=read * row * layers)
        if kind == "hca":
            rows = _seen(start, tokens, 128)
            yield Cost("hca attention", kind, "bf16", a_row * rows * layers, cache_bytes=end // 128 * row * layers)


def _v32_attention(c: BaselineConfig, start: int, tokens: int, kv_dtype: str) -> Iterator[Cost]:
    end, (row, key) = start + tokens, kv_entry_bytes(c, kv_dtype)
    layers = c.num_hidden_layers
    pairs = 2 * c.index_n_heads * c.index_head_dim * _seen(start, tokens, 1)
    precision: Precision = "fp8" if kv_dtype == "mixed" else "bf16"
    yield Cost("index scores", "dsa", precision, pairs * layers, cache_bytes=end * key * layers)
    # Absorbed: queries meet latents with their RoPE channels, weights meet latents alone.
    a_row = 2 * c.num_attention_heads * (c.kv_lora_rank + c.qk_rope_head_dim + c.kv_lora_rank)
    rows, read = _seen(start, tokens, 1, c.index_topk), min(end, tokens * c.index_topk)
    yield Cost("dsa attention", "dsa", "bf16", a_row * rows * layers, cache_bytes=read * row * layers)


# ---- memory ----------------------------------------------------------------------------------------------------------


def cache_bytes(config: Config, tokens: int, kv_dtype: str = "mixed") -> int:
    """Bytes of the cache after ``tokens`` tokens: finished entries, without the constant window and open blocks."""
    if isinstance(config, BaselineConfig):
        return tokens * int(kv_bytes_per_token(config, kv_dtype))
    return kv_bytes(config, kv_dtype, tokens)


def gqa8_bytes(config: Config, tokens: int) -> int:
    """Bytes of a cache of grouped-query attention in as many layers (GQA8)."""
    return config.num_hidden_layers * 2 * 8 * 128 * 2 * tokens


def stored_bytes(config: Config, held: Held = "published") -> int:
    """Bytes of all matrices with their scales and of the embedding; without MTP, norms, biases and expert ids."""
    embedding = config.vocab_size * config.hidden_size * 2
    layers = (
        layers * m.there * _matrix_bytes(m, config, held) for _, layers, matrices in _layers(config) for m in matrices
    )
    return embedding + int(sum(layers))


# ---- a request, beside the same on V3.2 ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestCost:
    """What one request costs, and what it would cost with DeepSeek-V3.2.

    kv_bytes: the cache at its end.  flops: prefill of the uncached prompt and every decoded token; raw, and weighted in
    equivalent FP8 (WEIGHTING).
    """

    kv_bytes: int
    flops_raw: int
    flops_weighted: float
    v32_kv_bytes: int
    v32_flops_raw: int
    v32_flops_weighted: float

    @property
    def kv_ratio(self) -> float:
        return self.kv_bytes / self.v32_kv_bytes

    @property
    def flops_ratio_raw(self) -> float:
        return self.flops_raw / self.v32_flops_raw

    @property
    def flops_ratio(self) -> float:
        """Weighted, of V3.2's weighted."""
        return self.flops_weighted / self.v32_flops_weighted


def request_cost(
    config: ModelConfig, prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0, kv_dtype: str = "mixed"
) -> RequestCost:
    """Cost of reading a prompt, its first ``cached_tokens`` without computing, and writing a completion.

    The last token written is never read again, so it costs nothing.  V3.2 is granted the same cached tokens.
    """
    if prompt_tokens < 1 or completion_tokens < 0 or not 0 <= cached_tokens <= prompt_tokens:
        raise InputError(
            f"a request of {prompt_tokens} prompt tokens ({cached_tokens} cached) and {completion_tokens} completion "
            "tokens cannot be counted",
            "Give at least one prompt token, no negative numbers, and no more cached tokens than the prompt has.",
        )
    baseline = BaselineConfig.preset()
    read, decoded = prompt_tokens - cached_tokens, max(0, completion_tokens - 1)
    sums = []
    for model in (config, baseline):
        found: list[Cost] = []
        if read:
            found += costs(model, cached_tokens, read, kv_dtype=kv_dtype)
        if decoded:
            found += costs(model, prompt_tokens, decoded, logits=decoded, kv_dtype=kv_dtype)
        sums.append((sum(c.flops for c in found), sum(c.weighted for c in found)))
    end = prompt_tokens + decoded
    return RequestCost(cache_bytes(config, end, kv_dtype), *sums[0], cache_bytes(baseline, end, kv_dtype), *sums[1])
