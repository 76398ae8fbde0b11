"""What training minimises: cross entropy by class of text, in pieces that keep few logits at a time.

Letters: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .facts import ANSWER, NOISE, PROMPT, TEXT, VALUE

PIECE = 16384  # tokens whose logits are kept at a time


def piece_losses(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each token (float32 [N]) and the most likely token (int64 [N])."""
    logits = F.linear(hidden_ND, head_VD).float()
    loss = logits.logsumexp(-1) - logits.gather(1, targets_N[:, None]).squeeze(1)
    return loss, logits.detach().argmax(-1)


def token_losses(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, piece: Callable[..., Any] = piece_losses
) -> tuple[Tensor, Tensor]:
    """`piece_losses` of any number of tokens; from PIECE on the logits are computed again in the backward pass."""
    if hidden_ND.shape[0] <= PIECE:
        loss, best = piece(hidden_ND, head_VD, targets_N)
        return loss, best
    parts = [
        checkpoint(piece, h, head_VD, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden_ND.split(PIECE), targets_N.split(PIECE), strict=True)
    ]
    losses, best = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(best)


@dataclass(frozen=True)
class ByClass:
    """Mean losses of running text (with what users write at a weight of its own), of answers and of asked-for values.

    The classes count apart: their weight does not fall with their share.
    """

    text: Tensor
    answer: Tensor
    value: Tensor

    @classmethod
    def of(cls, loss_N: Tensor, classes_N: Tensor, prompt_weight: float, total: Callable[[Tensor], Tensor]) -> ByClass:
        """classes: of the tokens that the losses are about; total: as in `mean`."""
        value = (classes_N == VALUE).float()
        text = (classes_N == TEXT).float() + prompt_weight * (classes_N == PROMPT).float()
        return cls(*(mean(loss_N, weight, total) for weight in (text, (classes_N == ANSWER).float(), value)))


def unchanged(x: Tensor) -> Tensor:
    return x


def mean(x: Tensor, weight: Tensor, total: Callable[[Tensor], Tensor] = unchanged) -> Tensor:
    """Zero where no weight is.  total: sums over the processes of a run, each of which then gets its part of the
    mean."""
    return (x * weight).sum() / total(weight.sum()).clamp_min(1)


def ahead(x_BS: Tensor, by: int, fill: int) -> Tensor:
    """What stands ``by`` places later in the sequence, ``fill`` behind its end."""
    out = torch.full_like(x_BS, fill)
    out[:, :-by] = x_BS[:, by:]
    return out


def following(classes_BS: Tensor, document_BS: Tensor, by: int) -> Tensor:
    """Classes of the tokens ``by`` later, flat; NOISE where another document stands there, or nothing."""
    same = ahead(document_BS, by, -1) == document_BS
    return torch.where(same, ahead(classes_BS, by, NOISE), NOISE).flatten()
