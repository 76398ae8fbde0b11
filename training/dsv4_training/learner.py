"""A model that learns from answers it has written itself: what rewards and merging have in common.

Owns the writing of a step's answers, the forward pass over them in the published precision, and the optimiser's step.
The indexer goes on learning what attention looks at, on the answers' positions.
Letters: B answers, S positions, T tokens of an answer, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_engine.config import ModelConfig

from .generation import Writer, Written
from .guard import Diverged
from .model import Mode, Network
from .optimizer import Optimizer, clip_gradients
from .parameters import working_weights
from .post import Writing
from .prompts import END, Question
from .recipe import Optimiser


@dataclass(frozen=True)
class Answers:
    """ids [B, S]: prompts with their answers, END behind them; at [B, T]: positions whose hidden states are followed by
    the answers' tokens; mask [B, T]: which of those there are; written: the tokens and how likely they were."""

    ids: Tensor
    at: Tensor
    mask: Tensor
    written: Written

    def part(self, s: slice) -> Answers:
        w = self.written
        return Answers(self.ids[s], self.at[s], self.mask[s], Written(w.ids[s], w.lengths[s], w.logprobs[s]))

    def parts(self, count: int) -> list[Answers]:
        size = len(self.ids) // count
        return [self.part(slice(i * size, (i + 1) * size)) for i in range(count)]


def mode_on(device: torch.device) -> Mode:
    """The published precision with selected entries."""
    return Mode(True, True, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def last_hidden(
    network: Network, weights: dict[str, Tensor], answers: Answers, mode: Mode, teach: bool
) -> tuple[Tensor, Tensor]:
    """The hidden states before each answer token [B, T, D], and the indexers' loss there (zero without ``teach``)."""
    output = network.forward(weights, answers.ids, mode, answers.at if teach else None)
    hidden = output.hidden.unflatten(0, answers.ids.shape)
    return hidden.gather(1, answers.at[..., None].expand(-1, -1, hidden.shape[-1])), output.index_loss


def judged_hidden(network: Network, weights: dict[str, Tensor], answers: Answers, mode: Mode) -> Tensor:
    """Those of a model that does not learn, [B, T, D] without a way back; weights: from judging_weights."""
    with torch.enable_grad():
        return last_hidden(network, weights, answers, mode, False)[0].detach()


def padded(questions: Sequence[Question], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids [P, length] and their lengths [P]."""
    ids = torch.full((len(questions), length), END)
    for row, question in enumerate(questions):
        ids[row, : len(question.ids)] = torch.from_numpy(question.ids.astype("int64"))
    return ids.to(device), torch.tensor([len(q.ids) for q in questions], device=device)


def joined(prompts_PS: Tensor, lengths_P: Tensor, written: Written, answers: int, room: int) -> Answers:
    """The prompts with their answers behind them."""
    ids = F.pad(prompts_PS, (0, room - prompts_PS.shape[1]), value=END).repeat_interleave(answers, 0)
    step = torch.arange(written.ids.shape[1], device=ids.device)
    at = lengths_P.repeat_interleave(answers)[:, None] - 1 + step
    return Answers(ids.scatter(1, at + 1, written.ids), at, step < written.lengths[:, None], written)


class Learner:
    """parameters: changed in place; steps: of the optimiser, in all."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, Tensor],
        writing: Writing,
        optimiser: Optimiser,
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.parameters, self.writing, self.device = parameters, writing, device
        self.network, self.mode = Network(config, compiled=device.type == "cuda"), mode_on(device)
        self._settings, self._steps, self._taken = optimiser, steps, 0
        self._optimizer = Optimizer(parameters, config.o_groups, optimiser)
        self._writer = Writer(config, writing.prompts, writing.answers, writing.room, self.mode, device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def weights(self) -> dict[str, Tensor]:
        """As stored, with gradients to the parameters."""
        return working_weights(self.parameters, True, self.mode.dtype)

    def write(self, questions: Sequence[Question]) -> Answers:
        """The model's answers to a step's questions, those to one behind each other."""
        ids, lengths = padded(questions, self.writing.length, self.device)
        with torch.no_grad():
            self._writer.read(self.weights(), ids, lengths)
        written = self._writer.write(self.writing.answer, END, self.writing.temperature, self._generator)
        return joined(ids, lengths, written, self.writing.answers, self.writing.room)

    def learn(
        self, answers: Answers, loss: Callable[[int, Answers, dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """One step of the optimiser on all answers, in passes.

        loss(number of the pass, its answers, weights, hidden [B, T, D]) gives the pass' part of the loss and what else
        is to be summed over the passes (no gradient).  Returns the sum of the latter and the gradient's norm.  Raises
        Diverged, before parameters change, when the norm is no number.
        """
        total = torch.zeros((), device=self.device)
        parts = answers.parts(self.writing.passes)
        for number, part in enumerate(parts):
            weights = self.weights()
            hidden, index_loss = last_hidden(self.network, weights, part, self.mode, True)
            value, noted = loss(number, part, weights, hidden)
            (value + index_loss / len(parts)).backward()
            total = total + noted
        self._optimizer.scale.fill_(self.rate_scale(self._taken))
        norm = clip_gradients(self.parameters.values(), self._settings.clip)
        if not math.isfinite(norm):
            raise Diverged(
                f"step {self._taken + 1} has a gradient that is no number", "Lower the rates, or set another seed."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._taken += 1
        return total, norm

    def rate_scale(self, step: int) -> float:
        """Warm-up, a plateau, and a straight line down to ``last_scale``."""
        o = self._settings
        fall = max(0.0, min(1.0, step / self._steps) - o.decay_from) / (1 - o.decay_from)
        return min(1.0, (step + 1) / o.warmup_steps) * (1 - fall * (1 - o.last_scale))
