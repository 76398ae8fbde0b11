"""A model of the bundled one's make, small enough to train and run in a test."""

import dataclasses

import torch
from torch import Tensor

from dsv4_engine.config import ModelConfig
from dsv4_training.parameters import initial_parameters
from dsv4_training.recipe import Shape


def small_config(**changes: object) -> ModelConfig:
    """Every kind of layer, hashed and not, with few sizes large."""
    base = dataclasses.replace(
        Shape(vocabulary=512).config(),
        hidden_size=128,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128),
        num_attention_heads=2,
        o_groups=2,
        n_routed_experts=4,
        num_hash_layers=1,
        index_topk=16,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def lively_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters in which every tensor matters: fresh ones start with many zeros and ones."""
    parameters = initial_parameters(config, seed, {20: "1", 21: "23", 22: "456"})
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in parameters.items():
            if name.endswith(("_base", "ape", "attn_sink", "norm.weight", "gate.bias")):
                p += 0.2 * torch.randn(p.shape, generator=g)
            elif name.endswith("_scale"):
                p.fill_(0.3)
            elif name.endswith(("wo_b.weight", "w2.weight", "experts.w2")):
                p *= 5
            elif name == "head.weight":
                p *= 3
    return parameters
