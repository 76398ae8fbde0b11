"""Questions whose answers can be checked: prompts cut out of the training episodes before an answer, and their reward.

Drawn from the training side of every split (corpus.py), by the same functions as training text.  Knows no model.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import tokenizers

from dsv4_engine.protocol import END_THINK, EOS

from . import packing
from .episodes import Part, Seam, Special
from .facts import SAID, VALUE
from .packing import Source
from .recipe import Data, RecipeError, Stage

Array = np.ndarray[Any, Any]
END = 1  # the token that ends an answer
SHORTEST = 256
SPARE = 4  # tokens by which an answer may be longer than the one it is held against
ATTEMPTS = 100


@dataclass(frozen=True)
class Question:
    """ids: everything up to the answer; wanted: what the answer must hold; allowed: its tokens, the end included."""

    ids: Array
    wanted: tuple[str, ...]
    allowed: int


def reward(question: Question, text: str, tokens: int) -> float:
    """The share of what is wanted in the text behind any thinking, and less for more tokens than are allowed.

    So it does not pay to name everything in sight, nor never to end.
    """
    answer = text.rsplit(END_THINK, 1)[-1]
    found = sum(wanted in answer for wanted in question.wanted) / len(question.wanted)
    return found * min(1.0, question.allowed / tokens)


def draw_question(
    rng: Random, source: Source, tokenizer: tokenizers.Tokenizer, data: Data, stage: Stage, length: int
) -> Question:
    """A prompt of at most ``length`` tokens.  Raises RecipeError when the data hold no such questions."""
    for _ in range(ATTEMPTS):
        tokens = round(math.exp(rng.uniform(math.log(min(SHORTEST, length)), math.log(length))))
        episode = packing.draw_episode(rng, source, data, stage, tokens)
        ids, classes, seams = packing.classified(tokenizer, episode)
        if len(ids) < tokens and seams:
            ids, classes = packing.lengthened(rng, source.pools, ids, classes, seams, tokens)
        both = list(zip(answers(ids, classes), values(episode.parts), strict=True))
        fitting = [(span, wanted) for span, wanted in both if 0 < span.start <= length]
        if fitting:
            span, wanted = rng.choice(fitting)
            return Question(ids[: span.start], wanted, span.stop - span.start + SPARE)
    raise RecipeError(
        f"in {ATTEMPTS} episodes there was no question of at most {length} tokens with an answer to check",
        "Give the specialist's data a share of needles, many_keys, tracking, code_lookup or grouped, or more length.",
    )


def answers(ids: Array, classes: Array) -> list[slice]:
    """Where answers stand that hold a value and end with the end token."""
    said = np.concatenate([[False], np.isin(classes, SAID), [False]])
    edges = np.flatnonzero(said[1:] != said[:-1])
    spans = [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [s for s in spans if ids[s.stop - 1] == END and (classes[s] == VALUE).any()]


def values(parts: Iterable[Part]) -> list[tuple[str, ...]]:
    """What each of these answers holds: its values, each once."""
    out, said = [], list[str]()
    for part in parts:
        if isinstance(part, Special):
            if part.trained and part.token == EOS and said:
                out.append(tuple(dict.fromkeys(said)))
            said = said if part.trained and part.token != EOS else []
        elif not isinstance(part, Seam) and part[0]:
            said = [*said, part[0]] if part[1] == VALUE else said if part[1] in SAID else []
    return out


@dataclass(frozen=True)
class Plan:
    """The questions of steps 0, 1, ...: each step's by its number alone, dealt out to ``data`` in turn."""

    seed: str
    source: Source
    data: tuple[Data, ...]
    stage: Stage
    prompts: int
    length: int

    def questions(self, step: int) -> list[Question]:
        """``prompts`` of them, those of the first data first."""
        rng = Random(f"questions/{self.seed}/{step}")
        tokenizer = tokenizers.Tokenizer.from_str(self.source.definition)
        each = self.prompts // len(self.data)
        return [
            draw_question(rng, self.source, tokenizer, data, self.stage, self.length)
            for data in self.data
            for _ in range(each)
        ]

    def drawn(self, steps: int, workers: int) -> Iterator[list[Question]]:
        """Those of all steps, drawn ahead by ``workers`` processes; 0 draws them here."""
        if not workers:
            yield from map(self.questions, range(steps))
            return
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            yield from pool.imap(self.questions, range(steps))
