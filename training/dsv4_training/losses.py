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

from .facts import ANSWER, ASKED, MEMBER, NOISE, PART, PROMPT, TEXT, VALUE

PIECE = 16384  # tokens whose logits are kept at a time
NAMED = 12  # tokens of a part's name, its first ones


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
        answer = ((classes_N == ANSWER) | (classes_N == ASKED)).float()
        return cls(*(mean(loss_N, weight, total) for weight in (text, answer, value)))


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


def parts_of(ids_BS: Tensor, classes_BS: Tensor, document_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every position the tokens [B, S, NAMED] of a part's name, which of them there are for a thing (the last name
    before it), and which for an answer that is about to give the name; none elsewhere."""
    length = ids_BS.shape[1]
    place = torch.arange(length, device=ids_BS.device)
    is_part, is_value = classes_BS == PART, classes_BS == VALUE
    opens_part = is_part & ~F.pad(is_part[:, :-1], (1, 0))
    opens_value = is_value & ~F.pad(is_value[:, :-1], (1, 0))
    last = torch.where(opens_part, place, -1).cummax(1).values
    following = torch.where(opens_value, place, length).flip(1).cummin(1).values.flip(1)
    asked = classes_BS == ASKED
    start = torch.where(asked, following, last)
    at = start[..., None] + torch.arange(NAMED, device=ids_BS.device)
    flat = at.clamp(0, length - 1).flatten(1)
    named = torch.where(asked[..., None], is_value.gather(1, flat).view_as(at), is_part.gather(1, flat).view_as(at))
    there = named.long().cumprod(-1).bool() & (at >= 0) & (at < length)
    shown = there & (document_BS.gather(1, flat).view_as(at) == document_BS[..., None])
    member = (classes_BS == MEMBER)[..., None]
    return ids_BS.gather(1, flat).view_as(at), shown & member, shown & asked[..., None]


def binding_losses(hidden_ND: Tensor, head_VD: Tensor, names_NJ: Tensor, shown_NJ: Tensor) -> Tensor:
    """Divergence (float32 [N]) of the tokens expected from a thing's hidden state from those of its part's name,
    each of them alike; zero where no name is."""
    logits = F.linear(hidden_ND, head_VD).float()
    count = shown_NJ.sum(1)
    wanted = (logits.gather(1, names_NJ) * shown_NJ).sum(1) / count.clamp_min(1)
    return torch.where(count > 0, logits.logsumexp(-1) - wanted - count.clamp_min(1).log(), 0.0)
