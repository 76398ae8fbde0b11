"""The trained tensors: their names, initial values and the precision each is stored in.

Parameters are one flat dict by published name; the experts of a layer are stacked ([E, O, I] under
``layers.N.ffn.experts.w1`` and so on) and split on export.  Knows no forward pass.
Letters: E experts, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4_engine.config import ModelConfig

from .layers import bf16_weight_ste, fp4_weight_ste, fp8_weight_ste

FP8_NAMES = (
    "wq_a.weight", "wq_b.weight", "wkv.weight", "wo_a.weight", "wo_b.weight", "e_proj.weight", "h_proj.weight",
    "shared_experts.w1.weight", "shared_experts.w2.weight", "shared_experts.w3.weight",
)  # fmt: skip
FP4_NAMES = ("ffn.experts.w1", "ffn.experts.w2", "ffn.experts.w3")
F32_NAMES = ("_fn", "_base", "_scale", "ape", "attn_sink", "gate.bias")


def stored_format(name: str) -> str:
    """ "fp4", "fp8", "bf16", "f32" or "i64": how the published checkpoints store the tensor of this name."""
    if name.endswith("tid2eid"):
        return "i64"
    if name.endswith(FP4_NAMES):
        return "fp4"
    # The compressors' wkv shares its name with the attention's but is kept in bfloat16.
    if name.endswith(FP8_NAMES) and ".compressor." not in name:
        return "fp8"
    return "f32" if name.endswith(F32_NAMES) else "bf16"


def block_prefixes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """(name prefix, compress ratio) of every transformer block, the MTP block last."""
    for layer, ratio in enumerate(config.compress_ratios):
        yield f"layers.{layer}", ratio
    for depth in range(config.num_nextn_predict_layers):
        yield f"mtp.{depth}", 0


def digit_codes(strings: list[str], width: int, generator: torch.Generator) -> Tensor:
    """Initial embeddings [len(strings), width] of strings of up to 3 digits: the sum of one code a place and digit.

    Tokens that share digits start out near each other, so a number's value can be carried in few channels.
    """
    places = torch.randn(3, 10, width, generator=generator)
    kind = torch.randn(4, width, generator=generator)
    rows = [sum((places[i, int(d)] for i, d in enumerate(s)), kind[len(s)]) / math.sqrt(len(s) + 1) for s in strings]
    return torch.stack(rows)


def initial_parameters(config: ModelConfig, seed: int, number_tokens: dict[int, str]) -> dict[str, Tensor]:
    """Fresh parameters (float32, leaves that require a gradient) and the fixed hash routing tables (int64).

    number_tokens: token id -> its digits, for the tokens that are digit strings.
    """
    g = torch.Generator().manual_seed(seed)
    d, streams = config.hidden_size, config.hc_mult

    def normal(*shape: int, std: float | None = None) -> Tensor:
        return torch.randn(*shape, generator=g) * (std if std is not None else shape[-1] ** -0.5)

    embed, head = normal(config.vocab_size, d, std=0.7), normal(config.vocab_size, d, std=0.02)
    if number_tokens:
        ids, strings = list(number_tokens), list(number_tokens.values())
        embed[ids] = 0.7 * digit_codes(strings, d, g) + normal(len(ids), d, std=0.05)
        head[ids] = 0.02 * digit_codes(strings, d, g) + normal(len(ids), d, std=0.002)
    p: dict[str, Tensor] = {"embed.weight": embed, "head.weight": head}
    for index, (prefix, ratio) in enumerate(block_prefixes(config)):
        hashed = index < config.num_hash_layers
        p |= _block(config, prefix, ratio, index, hashed, g)
        if prefix.startswith("mtp"):
            for name in ("e_proj", "h_proj"):
                p[f"{prefix}.{name}.weight"] = torch.eye(d) * 0.7 + normal(d, d, std=0.01)
            for name in ("enorm", "hnorm"):
                p[f"{prefix}.{name}.weight"] = torch.ones(d)
    for prefix in ["", *(f"mtp.{i}." for i in range(config.num_nextn_predict_layers))]:
        p[f"{prefix}norm.weight"] = torch.ones(d)
        p[f"{prefix}hc_head_fn"] = normal(streams, streams * d)
        p[f"{prefix}hc_head_base"] = torch.full((streams,), -math.log(streams - 1))  # sigmoid: an equal share each
        p[f"{prefix}hc_head_scale"] = torch.full((1,), 0.01)
    return {n: t if t.dtype == torch.int64 else t.requires_grad_() for n, t in p.items()}


def _block(
    config: ModelConfig, prefix: str, ratio: int, index: int, hashed: bool, g: torch.Generator
) -> dict[str, Tensor]:
    d, c, heads, rank = config.hidden_size, config.head_dim, config.num_attention_heads, config.q_lora_rank
    streams, experts, inner = config.hc_mult, config.n_routed_experts, config.moe_intermediate_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * shape[-1] ** -0.5

    p: dict[str, Tensor] = {}
    for site, number in (("attn", 2 * index), ("ffn", 2 * index + 1)):
        p[f"{prefix}.{site}_norm.weight"] = torch.ones(d)
        p[f"{prefix}.hc_{site}_fn"] = normal((2 + streams) * streams, streams * d)
        # Each sub-layer reads mostly one stream, in turn, and writes to all; the streams keep to themselves.
        read = torch.full((streams,), -2.0)
        read[number % streams] = 2.0
        write = 0.5 * torch.randn(streams, generator=g)
        comb = 5.0 * torch.eye(streams).flatten()
        p[f"{prefix}.hc_{site}_base"] = torch.cat([read, write, comb])
        p[f"{prefix}.hc_{site}_scale"] = torch.full((3,), 0.05)
    a = f"{prefix}.attn"
    p[f"{a}.wq_a.weight"] = normal(rank, d)
    p[f"{a}.q_norm.weight"] = torch.ones(rank)
    p[f"{a}.wq_b.weight"] = normal(heads * c, rank)
    p[f"{a}.wkv.weight"] = normal(c, d)
    p[f"{a}.kv_norm.weight"] = torch.ones(c)
    p[f"{a}.wo_a.weight"] = normal(config.o_groups * config.o_lora_rank, heads * c // config.o_groups)
    p[f"{a}.wo_b.weight"] = normal(d, config.o_groups * config.o_lora_rank) * 0.1
    p[f"{a}.attn_sink"] = torch.zeros(heads)
    compressors = {f"{a}.compressor": (ratio, c)} if ratio else {}
    if ratio == 4:
        compressors[f"{a}.indexer.compressor"] = (ratio, config.index_head_dim)
        p[f"{a}.indexer.wq_b.weight"] = normal(config.index_n_heads * config.index_head_dim, rank)
        p[f"{a}.indexer.weights_proj.weight"] = normal(config.index_n_heads, d)
    for name, (block, channels) in compressors.items():
        width = channels * (2 if block == 4 else 1)
        p[f"{name}.wkv.weight"] = normal(width, d)
        p[f"{name}.wgate.weight"] = normal(width, d)
        p[f"{name}.ape"] = torch.zeros(block, width)
        p[f"{name}.norm.weight"] = torch.ones(channels)
    f = f"{prefix}.ffn"
    p[f"{f}.gate.weight"] = normal(experts, d)
    if hashed:
        order = torch.rand(config.vocab_size, experts, generator=g).argsort(1)
        p[f"{f}.gate.tid2eid"] = order[:, : config.num_experts_per_tok].contiguous()
    else:
        p[f"{f}.gate.bias"] = torch.zeros(experts)
    for name, shape in (("w1", (inner, d)), ("w2", (d, inner)), ("w3", (inner, d))):
        gain = 0.1 if name == "w2" else 1.0
        p[f"{f}.experts.{name}"] = normal(experts, *shape) * gain
        shared = (config.n_shared_experts * inner, d) if name != "w2" else (d, config.n_shared_experts * inner)
        p[f"{f}.shared_experts.{name}.weight"] = normal(*shared) * gain
    return p


def working_weights(p: dict[str, Tensor], quantised: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values the forward pass uses: rounded as stored (with straight-through gradients) when ``quantised``.

    Matrices of products come in ``dtype`` (rounded FP8 and FP4 values are exact in bfloat16), the rest in float32.
    """
    rounders = {"fp4": fp4_weight_ste, "fp8": fp8_weight_ste, "bf16": bf16_weight_ste}
    out: dict[str, Tensor] = {}
    for name, value in p.items():
        form = stored_format(name)
        if quantised and form in rounders:
            value = rounders[form](value)
        out[name] = value.to(dtype) if form in ("fp4", "fp8") or name == "head.weight" else value
    return out


def judging_weights(p: dict[str, Tensor], quantised: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """A copy of `working_weights` for a model that does not learn: its passes are judged by, or routed with.

    It asks for gradients that nobody takes.  So its passes go through the code that was compiled for the model that
    learns, and the divergence of a model from itself is nothing.  Without gradients torch 2.11 compiles other code,
    which on an H200 was seen to be 3 to 7 nats a token away from that of the same weights: what is wrong there are the
    reads of the residual streams (layers.read_head is off by 1.4 of its norm, read_residual by 0.5).
    """
    with torch.no_grad():
        weights = working_weights(p, quantised, dtype)
    return {name: w.detach().clone().requires_grad_(w.is_floating_point()) for name, w in weights.items()}
