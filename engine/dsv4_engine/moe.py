"""One layer's mixture of experts with its shared expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from dsv4_kernels.moe import Expert, expert_forward, mixture, route, streamed_mixture
from dsv4_kernels.moe_stacked import StackedExperts, stacked_mixture
from dsv4_kernels.tiling import tiling

from .config import ModelConfig
from .source import Source

GUESSED = 64  # chosen experts up to which the next layer's are guessed; a prompt's chunk needs most of them anyway


def _expert(source: Source, part: tuple[int, int] | None = None) -> Expert:
    """part: of the hidden channels, only these."""
    return Expert(w13=source.linears("w1", "w3", rows=part), w2=source.linear("w2", columns=part))


class MixtureOfExperts:
    """Routed experts, chosen by score or (hash layers) by token id, plus the shared expert."""

    def __init__(self, source: Source, config: ModelConfig, hashed: bool) -> None:
        self.config = config
        self.gate = source.tensor("gate.weight")
        self.bias = None if hashed else source.tensor("gate.bias")
        self.tid2eid = source.raw("gate.tid2eid") if hashed else None
        self.apart = None if source.store is None else source.store.layer(source.prefix)
        self.following: MixtureOfExperts | None = None  # the next layer's, whose experts may be on disk
        self.ranks = ranks = source.ranks
        self.own = range(*ranks.share(config.n_routed_experts))  # of the experts, this process' own
        self.experts = [_expert(source.under(f"experts.{e}")) for e in (() if self.apart else self.own)]
        whole = source.device.type != "cpu" and ranks.count == 1
        self.stacked = StackedExperts.of(self.experts) if whole else None
        if self.stacked is not None:
            self.experts = self.stacked.views()
        part = ranks.share(config.moe_intermediate_size, ranks.hidden_step(config))
        shared = config.n_shared_experts and part[0] < part[1]
        self.shared = _expert(source.under("shared_experts"), part) if shared else None

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
        if self.following is not None and chosen_SK.numel() <= GUESSED:
            self.following.guess(u_SD)
        out = self._mixture(u_SD, chosen_SK, weights_SK)
        if self.shared is not None:
            out = out + expert_forward(u_SD, self.shared, config.swiglu_limit)
        return self.ranks.sum(out).to(u_SD.dtype)

    def expect(self, token_ids_S: Tensor) -> None:
        """These tokens will come: experts that are held apart are fetched where the ids already say which."""
        if self.apart is not None and self.tid2eid is not None:
            self.apart.expect(self.tid2eid[token_ids_S])

    def guess(self, u_SD: Tensor) -> None:
        """Fetch what this layer would choose for the input of the layer before, while that one computes.

        Streams change little from layer to layer: of the bundled model's experts 54 to 69% are guessed (17% by chance).
        """
        if self.apart is not None and self.tid2eid is None:
            topk = self.config.num_experts_per_tok
            chosen_SK, _ = route(u_SD, self.gate, topk=topk, scaling=1.0, normalise=False, bias_E=self.bias)
            self.apart.expect(chosen_SK)

    def _mixture(self, u_SD: Tensor, chosen_SK: Tensor, weights_SK: Tensor) -> Tensor:
        limit, stacked = self.config.swiglu_limit, self.stacked
        if self.apart is not None:
            return self.apart.mixture(u_SD, chosen_SK, weights_SK, limit)
        if self.ranks.count > 1:
            return streamed_mixture(u_SD, self._own_of, chosen_SK, weights_SK, limit)
        # Large experts are better taken one by one: laid side by side they would fill memory.
        if stacked is not None and stacked.bytes_read(*chosen_SK.shape) <= tiling(u_SD.device).working_set // 2:
            return stacked_mixture(u_SD, stacked, chosen_SK, weights_SK, limit)
        return mixture(u_SD, self.experts, chosen_SK, weights_SK, limit)

    def _own_of(self, experts: Iterable[int]) -> Iterator[tuple[int, Expert]]:
        return ((e, self.experts[e - self.own.start]) for e in experts if e in self.own)
