"""One layer's mixture of experts with its shared expert."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.moe import Expert, expert_forward, mixture, route
from dsv4_kernels.moe_stacked import StackedExperts, stacked_mixture
from dsv4_kernels.tiling import tiling

from .config import ModelConfig
from .source import Source


def _expert(source: Source) -> Expert:
    return Expert(w13=source.linears("w1", "w3"), w2=source.linear("w2"))


class MixtureOfExperts:
    """Routed experts, chosen by score or (hash layers) by token id, plus the shared expert."""

    def __init__(self, source: Source, config: ModelConfig, hashed: bool) -> None:
        self.config = config
        self.gate = source.tensor("gate.weight")
        self.bias = None if hashed else source.tensor("gate.bias")
        self.tid2eid = source.raw("gate.tid2eid") if hashed else None
        self.experts = [_expert(source.under(f"experts.{e}")) for e in range(config.n_routed_experts)]
        self.stacked = None if source.device.type == "cpu" else StackedExperts.of(self.experts)
        if self.stacked is not None:
            self.experts = self.stacked.views()
        self.shared = _expert(source.under("shared_experts")) if config.n_shared_experts else None

    def forward(self, u_SD: Tensor, token_ids_S: Tensor) -> Tensor:
        """[S, D] in the model's dtype -> the same; token ids int64 [S] matter to hash layers only."""
        config = self.config
        chosen_SK, weights_SK = route(
            u_SD,
            self.gate,
            topk=config.num_experts_per_tok,
            scaling=config.routed_scaling_factor,
            normalise=config.norm_topk_prob,
            bias_E=self.bias,
            chosen_SK=None if self.tid2eid is None else self.tid2eid[token_ids_S],
        )
        out = self._mixture(u_SD, chosen_SK, weights_SK)
        if self.shared is not None:
            out = out + expert_forward(u_SD, self.shared, config.swiglu_limit)
        return out.to(u_SD.dtype)

    def _mixture(self, u_SD: Tensor, chosen_SK: Tensor, weights_SK: Tensor) -> Tensor:
        limit, stacked = self.config.swiglu_limit, self.stacked
        # Large experts are better taken one by one: laid side by side they would fill memory.
        if stacked is not None and stacked.bytes_read(*chosen_SK.shape) <= tiling(u_SD.device).working_set // 2:
            return stacked_mixture(u_SD, stacked, chosen_SK, weights_SK, limit)
        return mixture(u_SD, self.experts, chosen_SK, weights_SK, limit)
