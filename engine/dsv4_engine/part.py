"""One process' part of a model's weights, for the memory plan: the same names, smaller shapes (ranks.py).

Says again in sizes what attention.py and moe.py take of each matrix; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from .config import ModelConfig
from .ranks import Ranks
from .weights import Spec, Weights


class Part:
    """What ``ranks`` leaves to this process; has `specs` and `nbytes` as Weights has."""

    def __init__(self, weights: Weights, config: ModelConfig, ranks: Ranks) -> None:
        self._weights, self._config, self._ranks = weights, config, ranks
        own = range(*ranks.share(config.n_routed_experts))
        specs = {
            name: replace(spec, shape=self._shape(name, spec))
            for name, spec in weights.specs.items()
            if not name.startswith("mtp.") and _expert(name) in (None, *own)
        }
        self.specs: Mapping[str, Spec] = {name: spec for name, spec in specs.items() if prod(spec.shape)}

    def nbytes(self, name: str) -> int:
        """Bytes on disk of this process' part, its scales included."""
        whole = self._weights.specs[name].shape
        return self._weights.nbytes(name) * prod(self.specs[name].shape) // prod(whole)

    def _shape(self, name: str, spec: Spec) -> tuple[int, ...]:
        divided = (".attn.wq_b.", ".attn.wo_a."), (".attn.wo_b.",)
        config, ranks, shape = self._config, self._ranks, list(spec.shape)
        for axis, names in enumerate(divided):
            if any(part in name for part in names):
                start, end = ranks.share(config.o_groups)
                shape[axis] = shape[axis] * (end - start) // config.o_groups
        if ".shared_experts." in name:
            start, end = ranks.share(config.moe_intermediate_size, ranks.hidden_step(config))
            shape[1 if ".w2." in name else 0] = end - start
        return tuple(shape)


def _expert(name: str) -> int | None:
    return int(name.split(".")[4]) if ".ffn.experts." in name else None
