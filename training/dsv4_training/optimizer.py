"""Muon for matrices and AdamW for everything else, with the report's settings.

Matrices of one shape are stepped together as one batch, so that a step is few launches.
Source: report, section 2.4 (algorithm 1) for Muon; AdamW as usual.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .recipe import Optimiser as Settings

FAST = 8 * ((3.4445, -4.7750, 2.0315),)
STABILISING = 2 * ((2.0, -1.5, 0.5),)


def orthogonalise(g: Tensor) -> Tensor:
    """The hybrid Newton-Schulz iteration on [..., n, m]: divide by the Frobenius norm, then aM + b(MM')M + c(MM')^2 M.

    The fast steps are taken in bfloat16 on a GPU, the stabilising ones in float32, so that the singular values end
    within 0.02 of one; elsewhere all in float32.  Returns g's dtype.
    """
    m = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    tall = m.shape[-2] > m.shape[-1]
    m = (m.mT if tall else m).to(torch.bfloat16 if g.is_cuda else torch.float32)
    m = newton_schulz(m, FAST)
    m = newton_schulz(m.float(), STABILISING)
    return (m.mT if tall else m).to(g.dtype)


def newton_schulz(m: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    for a, b, c in steps:
        square = m @ m.mT
        m = a * m + (b * square + c * (square @ square)) @ m
    return m


def is_matrix(name: str, value: Tensor) -> bool:
    """Whether Muon steps this parameter: matrices but embedding, head, norms and mHC's biases and gates."""
    return value.dim() >= 2 and name not in ("embed.weight", "head.weight") and not name.endswith("ape")


class Optimizer:
    """Steps named parameters in place from their ``grad``.

    Rates and counts are tensors, so that a captured step can be replayed with other values.
    """

    def __init__(self, parameters: Mapping[str, Tensor], groups: int, settings: Settings) -> None:
        """groups: wo_a [g*o, i] is g independent matrices and is orthogonalised as such."""
        self.settings = settings
        device = next(iter(parameters.values())).device
        # Multiplies both learning rates; steps taken so far.
        self.scale = torch.ones((), device=device)
        self.steps = torch.zeros((), device=device)
        self._state: dict[str, Tensor] = {"steps": self.steps}
        self._adam: list[tuple[Tensor, Tensor, Tensor]] = []
        self._muon: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for name, p in parameters.items():
            if not p.requires_grad:
                continue
            first = self._state[f"first.{name}"] = torch.zeros_like(p, requires_grad=False)
            if settings.kind == "muon" and is_matrix(name, p):
                parts = groups if name.endswith("wo_a.weight") else 1
                shape = (p.shape[-2] // parts, p.shape[-1])
                self._muon.setdefault(shape, []).append((p, first))
            else:
                second = self._state[f"second.{name}"] = torch.zeros_like(p, requires_grad=False)
                self._adam.append((p, first, second))

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes but the parameters, by name: the tensors themselves."""
        return self._state

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self._step_muon(self.settings.muon_lr * self.scale)
        self._step_adam(self.settings.adam_lr * self.scale)

    def zero_grad(self) -> None:
        for p in [*(p for p, _, _ in self._adam), *(p for group in self._muon.values() for p, _ in group)]:
            p.grad = None

    def _step_muon(self, lr: Tensor) -> None:
        s = self.settings
        for shape, group in self._muon.items():
            used = [(p, m) for p, m in group if p.grad is not None]
            if not used:
                continue
            values, momenta = [p for p, _ in used], [m for _, m in used]
            grads = [p.grad for p in values if p.grad is not None]
            torch._foreach_mul_(momenta, s.momentum)
            torch._foreach_add_(momenta, grads)
            looked_ahead = torch._foreach_add(grads, momenta, alpha=s.momentum)
            stacked = torch.cat([u.reshape(-1, *shape) for u in looked_ahead])
            update = orthogonalise(stacked) * (-0.18 * max(shape) ** 0.5 * lr)
            sizes = [p.numel() // (shape[0] * shape[1]) for p in values]
            updates = [u.reshape(p.shape) for u, p in zip(update.split(sizes), values, strict=True)]
            torch._foreach_mul_(values, 1 - lr * s.weight_decay)
            torch._foreach_add_(values, updates)

    def _step_adam(self, lr: Tensor) -> None:
        s = self.settings
        used = [(p, m, v) for p, m, v in self._adam if p.grad is not None]
        if not used:
            return
        values, first, second = (list(column) for column in zip(*used, strict=True))
        grads = [p.grad for p in values if p.grad is not None]
        torch._foreach_lerp_(first, grads, 1 - s.betas[0])
        torch._foreach_mul_(second, s.betas[1])
        torch._foreach_addcmul_(second, grads, grads, 1 - s.betas[1])
        roots = torch._foreach_mul(second, 1 / (1 - s.betas[1] ** self.steps))
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, s.eps)
        steps = torch._foreach_div(first, roots)
        torch._foreach_mul_(steps, -lr / (1 - s.betas[0] ** self.steps))
        if decayed := [p for p in values if p.dim() >= 2]:
            torch._foreach_mul_(decayed, 1 - lr * s.weight_decay)
        torch._foreach_add_(values, steps)


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most ``largest``; returns the norm (not synchronised)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factor)
    return norm
