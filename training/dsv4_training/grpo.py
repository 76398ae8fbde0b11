"""Rewards: group relative policy optimisation (GRPO) on questions whose answers can be checked.

Owns the advantage of an answer among those to the same question, the loss, and the loop.  Answers are written by the
model in training in the published precision, so what is rewarded is what is shipped.
Letters: P questions, G answers to each, B = P*G, T tokens of an answer, V vocabulary.
Source: DeepSeekMath, arXiv 2402.03300, section 4.1; the divergence weighed by the ratio as in DeepSeek-V3.2's report,
arXiv 2512.02556, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from .learner import Answers, Learner, judged_hidden
from .metrics import Record
from .parameters import judging_weights
from .post import Rewards
from .prompts import END, Question, reward


def advantages(rewards_PG: Tensor) -> Tensor:
    """By how many standard deviations a reward is above the mean of its group; zero where all are the same."""
    spread = rewards_PG.std(1, correction=0, keepdim=True)
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (spread + 1e-4)


def token_logprobs(hidden_BTD: Tensor, head_VD: Tensor, ids_BT: Tensor, temperature: float) -> Tensor:
    """Of the written tokens, as they were drawn: float32 [B, T]."""
    logits = F.linear(hidden_BTD, head_VD).float() / temperature
    return logits.gather(2, ids_BT[..., None]).squeeze(2) - logits.logsumexp(2)


def policy_loss(
    new_BT: Tensor,
    drawn_BT: Tensor,
    reference_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    clip: float,
    kl: float,
) -> Tensor:
    """The mean over answers of the mean over their tokens of -min(r A, clip(r, 1 - clip, 1 + clip) A) + kl r D.

    r = exp(new - drawn) is how much more likely a token is now than when it was drawn, D = q - log q - 1 with
    q = exp(reference - new) estimates the divergence from the reference.
    """
    # Behind an answer's end nothing is known of the differences, and their exponentials may be infinite.
    ratio = torch.where(mask_BT, new_BT - drawn_BT, 0.0).exp()
    advantage = advantage_B[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    back = torch.where(mask_BT, reference_BT - new_BT, 0.0)
    loss = -gain + kl * ratio * (back.exp() - back - 1)
    mask = mask_BT.float()
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def rewards_of(
    questions: Sequence[Question], answers: Answers, tokenizer: tokenizers.Tokenizer, each: int
) -> list[float]:
    """Of every answer; ``each`` of them belong to a question."""
    ids, lengths = answers.written.ids.cpu(), answers.written.lengths.tolist()
    texts = tokenizer.decode_batch(
        [[t for t in row[:n].tolist() if t != END] for row, n in zip(ids, lengths, strict=True)],
        skip_special_tokens=False,
    )
    return [reward(questions[i // each], text, n) for i, (text, n) in enumerate(zip(texts, lengths, strict=True))]


def run(
    learner: Learner,
    settings: Rewards,
    questions: Iterable[list[Question]],
    tokenizer: tokenizers.Tokenizer,
    note: Callable[[Record], Any],
) -> None:
    """All steps; the reference is the model as it is now.  note: takes a record of each step."""
    reference = judging_weights(learner.parameters, True, learner.mode.dtype)
    writing = settings.writing
    for step, asked in enumerate(questions, 1):
        answers = learner.write(asked)
        rewards = torch.tensor(rewards_of(asked, answers, tokenizer, writing.answers), device=learner.device)
        advantage = advantages(rewards.view(-1, writing.answers)).flatten().split(len(rewards) // writing.passes)
        parts = answers.parts(writing.passes)
        states = [judged_hidden(learner.network, reference, part, learner.mode) for part in parts]
        with torch.no_grad():
            before = [_logprobs(h, reference, part, writing) for h, part in zip(states, parts, strict=True)]

        def loss(
            number: int,
            part: Answers,
            weights: dict[str, Tensor],
            hidden: Tensor,
            advantage: Sequence[Tensor] = advantage,
            before: Sequence[Tensor] = before,
        ) -> tuple[Tensor, Tensor]:
            new = _logprobs(hidden, weights, part, writing)
            drawn = part.written.logprobs
            value = policy_loss(new, drawn, before[number], advantage[number], part.mask, settings.clip, settings.kl)
            # How far the forward pass is from the one that drew the tokens, and from the reference.
            apart = ((new - drawn).abs() * part.mask).sum() / part.mask.sum()
            far = ((drawn - before[number]) * part.mask).sum() / part.mask.sum()
            return value / writing.passes, torch.stack([apart.detach(), far]) / writing.passes

        for _ in range(settings.updates):
            noted, norm = learner.learn(answers, loss)
        apart, far = noted.tolist()
        measures = {
            "reward": rewards.mean(),
            "right": (rewards > 0.99).float().mean(),
            "tokens": answers.written.lengths.float().mean(),
            "apart": apart,
            "divergence": far,
            "grad_norm": norm,
        }
        note({"step": step} | {name: round(float(value), 5) for name, value in measures.items()})


def _logprobs(hidden: Tensor, weights: dict[str, Tensor], part: Answers, writing: Any) -> Tensor:
    return token_logprobs(hidden, weights["head.weight"], part.written.ids, writing.temperature)
