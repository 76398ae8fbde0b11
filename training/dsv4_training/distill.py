"""Merging: on-policy distillation of several specialists into one student.

The student writes answers to each specialist's questions and learns that specialist's whole distribution on them: the
reverse KL divergence over the full vocabulary.  Of the teachers only the last hidden states are cached; their logits
are made anew from those, piece by piece, so nobody's [tokens x vocabulary] is ever kept.
Letters: N tokens, D hidden, V vocabulary, T tokens of an answer.
Source: report, section 5 (sum over i of w_i KL(student || teacher_i) on the student's own samples).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .learner import Answers, Learner, judged_hidden
from .metrics import Record
from .model import Mode, Network
from .parameters import judging_weights
from .prompts import Question

PIECE = 4096  # tokens whose logits are there at a time


def _piece(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    log_p = F.linear(hidden, head).float().log_softmax(-1)
    log_q = F.linear(teacher_hidden, teacher_head).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(hidden_ND: Tensor, head_VD: Tensor, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor) -> Tensor:
    """KL(student || teacher) of each token over the full vocabulary, float32 [N]; the teacher takes no gradient."""
    teacher_hidden_ND, teacher_head_VD = teacher_hidden_ND.detach(), teacher_head_VD.detach()
    parts = [
        checkpoint(_piece, h, head_VD, t, teacher_head_VD, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden_ND.split(PIECE), teacher_hidden_ND.split(PIECE), strict=True)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Teacher:
    """weights: as stored; weight: of its divergence."""

    name: str
    weights: dict[str, Tensor]
    weight: float

    @classmethod
    def of(cls, name: str, parameters: dict[str, Tensor], weight: float, mode: Mode) -> Teacher:
        return cls(name, judging_weights(parameters, mode.quantised, mode.dtype), weight)

    def hidden(self, network: Network, answers: Answers, mode: Mode) -> Tensor:
        """What is cached of it: the last hidden states at the answers' tokens, [n, D] of those there are."""
        return judged_hidden(network, self.weights, answers, mode)[answers.mask]


def divergence(hidden_BTD: Tensor, head_VD: Tensor, answers: Answers, teacher: Teacher, cached_ND: Tensor) -> Tensor:
    """The mean over the answers' tokens."""
    return reverse_kl(hidden_BTD[answers.mask], head_VD, cached_ND, teacher.weights["head.weight"]).mean()


def mean(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the models' parameters; what is no floating-point number is the first one's.

    Students of one model that have learnt the same from different answers lie in one valley of the loss, and their
    mean errs less than each (Wortsman et al., 2022, "model soups").
    """
    return {
        name: torch.stack([model[name].detach() for model in models]).mean(0) if value.is_floating_point() else value
        for name, value in models[0].items()
    }


def run(
    student: Learner, teachers: Sequence[Teacher], questions: Iterable[list[Question]], note: Callable[[Record], Any]
) -> None:
    """All steps.  questions: of each step, as many for each teacher, in their order."""
    whole = sum(teacher.weight for teacher in teachers)
    shares = [teacher.weight / whole for teacher in teachers]
    passes = student.writing.passes
    assert passes % len(teachers) == 0, "post.check sees to it"
    each = passes // len(teachers)
    for step, asked in enumerate(questions, 1):
        answers = student.write(asked)
        # A pass has one teacher's answers, so that one head at a time is needed.
        cache = [
            teachers[n // each].hidden(student.network, part, student.mode)
            for n, part in enumerate(answers.parts(passes))
        ]

        def loss(
            number: int, part: Answers, weights: dict[str, Tensor], hidden: Tensor, cache: Sequence[Tensor] = cache
        ) -> tuple[Tensor, Tensor]:
            who = number // each
            value = divergence(hidden, weights["head.weight"], part, teachers[who], cache[number])
            noted = torch.zeros(len(teachers), device=value.device)
            noted[who] = value.detach() / each
            return shares[who] * value / each, noted

        noted, norm = student.learn(answers, loss)
        by_teacher = {f"kl_{t.name}": round(v, 5) for t, v in zip(teachers, noted.tolist(), strict=True)}
        lengths = answers.written.lengths.float().mean()
        record: Record = {"step": step, "kl": round(sum(s * v for s, v in zip(shares, noted.tolist(), strict=True)), 5)}
        note(record | by_teacher | {"tokens": round(float(lengths), 2), "grad_norm": round(float(norm), 4)})
