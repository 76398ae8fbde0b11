"""Where the modules take their weights from: checked checkpoint tensors in the form that the memory plan chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv4_kernels.linear import Weight, stack

from .offload.store import ExpertStore
from .ranks import ALONE, Ranks
from .weights import Weights


@dataclass(frozen=True)
class Source:
    """Weights below ``prefix``, on ``device``.

    expand: packed matrices are held expanded in ``dtype``, else they are unpacked at each use.  seen(bytes) is called
    for every tensor taken, with its size on disk.  ranks: who shares the heads and experts.
    store: holds the routed experts apart from the rest; None where they are weights like the others.
    """

    weights: Weights
    dtype: torch.dtype
    expand: bool
    prefix: str = ""
    seen: Callable[[int], object] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = ALONE
    store: ExpertStore | None = None

    def under(self, name: str) -> Source:
        return replace(self, prefix=f"{self.prefix}{name}.")

    def tensor(self, name: str) -> Tensor:
        """A small float tensor (norms, biases, mHC) in float32."""
        return self.raw(name).float()

    def raw(self, name: str) -> Tensor:
        """A tensor in the type that it has on disk."""
        self._saw(name)
        return self.weights.tensor(self.prefix + name).to(self.device)

    def linear(
        self,
        name: str,
        *,
        float32: bool = False,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Weight:
        """A matrix.  float32: it computes in float32 whatever the model's dtype.  rows, columns: only these."""
        self._saw(f"{name}.weight")
        weight = self.weights.weight(self.prefix + name)
        if rows is not None and rows != (0, weight.shape[0]):
            weight = weight.rows(*rows)
        if columns is not None and columns != (0, weight.shape[1]):
            weight = weight.columns(*columns)
        weight = weight.to(self.device)
        return weight.expanded(torch.float32 if float32 else self.dtype) if self.expand else weight

    def linears(self, *names: str, float32: bool = False, rows: tuple[int, int] | None = None) -> tuple[Weight, ...]:
        """Matrices that read the same input (see `linear`); where they are held expanded, joined into one."""
        weights = tuple(self.linear(name, float32=float32, rows=rows) for name in names)
        return stack(weights) if self.expand else weights

    def _saw(self, name: str) -> None:
        if self.seen is not None:
            self.seen(self.weights.nbytes(self.prefix + name))
