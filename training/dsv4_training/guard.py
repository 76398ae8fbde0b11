"""Against spikes of the loss: look back, roll back a short way, and route with older parameters for a while.

Owns when a loss counts as a spike and what is kept to go back to.  A trainer asks it every few steps.  After a rollback
the experts are chosen with the oldest parameters that are kept, until well behind the spike: the choice is some steps
old at first and older by the length of that stretch at its end.
Source: report, section 4.2 (anticipatory routing); the thresholds, and that the older parameters stay the same, are
ours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_engine.errors import InputError

from .recipe import Routing

KEPT = 3  # snapshots, a look apart: a spike goes back to the second newest, and routes with the oldest
SETTLED = 3  # looks at a stage's losses before one of them can be a spike
RETRIES = 3  # rollbacks in a row without getting beyond the spike


class Diverged(InputError):
    """The loss spikes again and again at the same place, or a gradient is no number."""


@dataclass(frozen=True)
class Snapshot:
    step: int
    tensors: dict[str, Tensor]


class Guard:
    """tensors: what a rollback restores, by name, changed in place by the trainer (parameters and optimiser's
    state)."""

    def __init__(self, settings: Routing, tensors: dict[str, Tensor]) -> None:
        self._settings, self._tensors = settings, tensors
        self._snapshots: deque[Snapshot] = deque(maxlen=KEPT)
        self._losses: list[float] = []
        self._stage = ""
        self._rollbacks = 0
        self._spiked_at = -1
        self.until = 0  # routing is anticipated before this step
        self.older: dict[str, Tensor] | None = None  # parameters to route with, until then

    def anticipates(self, step: int) -> bool:
        return step < self.until

    def keep(self, step: int) -> None:
        """A snapshot of the state before ``step``."""
        if self._settings.guard:
            self._snapshots.append(Snapshot(step, {n: t.detach().clone() for n, t in self._tensors.items()}))

    def is_spike(self, stage: str, losses: Sequence[float]) -> bool:
        """Whether the losses since the last look are one; else they are remembered."""
        value = sum(losses) / len(losses)
        if stage != self._stage:
            self._stage, self._losses = stage, []
        if not math.isfinite(value):
            return True
        settled = len(self._losses) >= SETTLED
        if settled and value > min(self._losses[-8:]) + self._settings.spike:
            return True
        self._losses.append(value)
        return False

    def roll_back(self, step: int) -> int:
        """Restores an older state; returns its step.  Raises Diverged when it does not help."""
        if step > self._spiked_at:
            self._rollbacks = 0
        self._spiked_at, self._rollbacks = max(step, self._spiked_at), self._rollbacks + 1
        if not self._snapshots or self._rollbacks > RETRIES:
            raise Diverged(
                f"the loss spikes at step {step} and {self._rollbacks - 1} rollbacks did not help",
                "Lower the learning rates, or start from another seed.",
            )
        # The newest state may have the cause in it already: one further back, where there is one.
        if len(self._snapshots) > 1:
            self._snapshots.pop()
        snapshot = self._snapshots[-1]
        with torch.no_grad():
            for name, value in snapshot.tensors.items():
                self._tensors[name].copy_(value)
        self.until = step + self._settings.anticipate_steps if self._settings.anticipate_steps else 0
        self._route_with(self._snapshots[0].tensors)
        return snapshot.step

    def _route_with(self, older: dict[str, Tensor]) -> None:
        """In place, for a captured step reads it there."""
        if self.older is None:
            self.older = {name: value.clone() for name, value in older.items()}
        for name, value in self.older.items():
            value.copy_(older[name])

    def facts(self) -> dict[str, Any]:
        """What a resumed run needs besides tensors."""
        return {"until": self.until, "stage": self._stage, "losses": self._losses[-8:]}

    def restore(self, facts: dict[str, Any], older: dict[str, Tensor]) -> None:
        self.until, self._stage, self._losses = facts["until"], facts["stage"], list(facts["losses"])
        self.older = older or None
