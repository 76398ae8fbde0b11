"""Two models on one text: what the change of weights did to the loss and to the distribution of the next token.

Owns the comparison.  The models are loaded one after the other, and the first one's logits wait in a temporary file,
so that memory is that of one model and a chunk of logits.
Letters: S positions, V vocabulary.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_engine.accounting import readable_bytes
from dsv4_engine.config import ModelConfig
from dsv4_engine.engine import Engine
from dsv4_engine.errors import InputError, PromptError
from dsv4_engine.locate import resolve_model
from dsv4_engine.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
_ROWS = 512  # of logits held at a time, at most
_COMPARED = 32  # of them compared at a time, in float64


@dataclass(frozen=True)
class Comparison:
    """Over the tokens that have one before them.  Losses and divergences in nats a token.

    kl_*: of the second model's distribution from the first one's, KL(first || second), over the positions.
    same_top: share of the positions where both like the same token best.
    """

    tokens: int
    loss_before: float
    loss_after: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top: float

    @property
    def loss_change(self) -> float:
        return self.loss_after - self.loss_before


def compare(
    first: str | Path, second: str | Path, text: str, device: str = "cpu", progress: Progress | None = None
) -> Comparison:
    """Run both models over ``text``, read with the first one's tokenizer after the token that begins every sequence.

    device: see Engine.load.  progress(done, total) counts tokens, of both models.  Raises PromptError for an empty
    text, and InputError when the model's context or the temporary folder is too small for it.
    """
    ids = token_ids(first, text)
    told = 0

    def tell(count: int) -> None:
        nonlocal told
        told += count
        if progress is not None:
            progress(told, 2 * len(ids))

    sums = _Sums()
    with tempfile.TemporaryFile(prefix="dsv4-logits-") as file:
        for logits_SV in _logits(first, ids, device, spooled=True):
            file.write(logits_SV.numpy().data)
            tell(len(logits_SV))
        file.seek(0)
        at = 0
        for logits_SV in _logits(second, ids, device):
            old_SV = torch.frombuffer(bytearray(file.read(logits_SV.nbytes)), dtype=torch.float32).view_as(logits_SV)
            wanted = torch.tensor(ids[at + 1 : at + 1 + len(logits_SV)])  # the last position's is not in the text
            for rows in range(0, len(wanted), _COMPARED):
                some = slice(rows, min(rows + _COMPARED, len(wanted)))
                sums.add(old_SV[some], logits_SV[some], wanted[some])
            at += len(logits_SV)
            tell(len(logits_SV))
    return sums.comparison()


class _Sums:
    """What is kept of every position."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._same = 0

    def add(self, old_SV: Tensor, new_SV: Tensor, wanted_S: Tensor) -> None:
        p, q = (F.log_softmax(x.double(), -1) for x in (old_SV, new_SV))
        self._losses.append(-torch.cat([x.gather(1, wanted_S[:, None]) for x in (p, q)], 1))
        self._divergences.append((p.exp() * (p - q)).sum(-1))
        self._same += int((p.argmax(-1) == q.argmax(-1)).sum())

    def comparison(self) -> Comparison:
        losses = torch.cat(self._losses)
        before, after = losses.mean(0).tolist()
        kl = torch.cat(self._divergences).clamp_min(0).sort().values  # rounding may leave -1e-17
        return Comparison(
            tokens=len(kl),
            loss_before=before,
            loss_after=after,
            kl_mean=float(kl.mean()),
            kl_median=float(kl[(len(kl) - 1) // 2]),
            kl_p99=float(kl[round(0.99 * (len(kl) - 1))]),
            kl_max=float(kl[-1]),
            same_top=self._same / len(kl),
        )


def token_ids(model: str | Path, text: str) -> list[int]:
    """What `compare` reads: the token that begins every sequence, then the text's.  Raises PromptError for no text."""
    folder = resolve_model(model)
    tokenizer = Tokenizer.from_folder(folder, ModelConfig.from_folder(folder).vocab_size)
    ids = tokenizer.encode(text, specials=False)
    if not ids:
        raise PromptError("the text to compare on is empty", "Give a text of some pages.")
    return [tokenizer.bos_id, *ids]


def _logits(model: str | Path, ids: list[int], device: str, spooled: bool = False) -> Iterator[Tensor]:
    """float32 logits [S, V] after each of ``ids``, some positions at a time.  spooled: they go to a temporary file."""
    engine = Engine.load(model, device=device, ctx=len(ids))
    size, there = 4 * len(ids) * engine.config.vocab_size, tempfile.gettempdir()
    free = shutil.disk_usage(there).free
    if spooled and size > free:
        problem = (
            f"the logits of {len(ids):,} tokens take {readable_bytes(size)}, and {there} has {readable_bytes(free)}"
        )
        raise InputError(problem, "Compare on a shorter text, or set TMPDIR to a folder on a larger disk.")
    session = engine.session()
    rows = min(engine.chunk, _ROWS)
    for start in range(0, len(ids), rows):
        yield session.extend(ids[start : start + rows], logits="all")
