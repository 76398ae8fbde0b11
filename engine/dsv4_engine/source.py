"""Where the modules take their weights from: checked checkpoint tensors in the form that the memory plan chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv4_kernels.linear import Weight, stack

from .weights import Weights


@dataclass(frozen=True)
class Source:
    """Weights below ``prefix``, on ``device``.

    expand: packed matrices are held expanded in ``dtype``, else they are unpacked at each use.  seen(bytes) is called
    for every tensor taken, with its size on disk.
    """

    weights: Weights
    dtype: torch.dtype
    expand: bool
    prefix: str = ""
    seen: Callable[[int], object] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def under(self, name: str) -> Source:
        return replace(self, prefix=f"{self.prefix}{name}.")

    def tensor(self, name: str) -> Tensor:
        """A small float tensor (norms, biases, mHC) in float32."""
        return self.raw(name).float()

    def raw(self, name: str) -> Tensor:
        """A tensor in the type that it has on disk."""
        self._saw(name)
        return self.weights.tensor(self.prefix + name).to(self.device)

    def linear(self, name: str, *, float32: bool = False) -> Weight:
        """A matrix.  float32: it computes in float32 whatever the model's dtype."""
        self._saw(f"{name}.weight")
        weight = self.weights.weight(self.prefix + name).to(self.device)
        return weight.expanded(torch.float32 if float32 else self.dtype) if self.expand else weight

    def linears(self, *names: str, float32: bool = False) -> tuple[Weight, ...]:
        """Matrices that read the same input; where they are held expanded, joined into one."""
        weights = tuple(self.linear(name, float32=float32) for name in names)
        return stack(weights) if self.expand else weights

    def _saw(self, name: str) -> None:
        if self.seen is not None:
            self.seen(self.weights.nbytes(self.prefix + name))
