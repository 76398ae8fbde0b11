"""What the tests build samples with: two tokenizers without vocabulary files, endless text, a pretended template."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from dsv4_evals.task import Building, Question, Sample, Task

TEMPLATE, TURN = 9, 3  # tokens around a prompt, and around each earlier turn
_PIECE = re.compile(r" ?[A-Za-z]{1,4}|[0-9]{1,3}| ?[^\sA-Za-z0-9]{1,2}|\n+|\s")
_NOUNS = ["river", "stone", "cloud", "market", "window", "garden", "letter", "engine", "harbour", "winter", "mirror"]
_VERBS = ["crosses", "warms", "follows", "hides", "carries", "answers", "measures", "forgets", "paints", "opens"]


class Words:
    """Up to four letters, three digits or two marks a token: lengths of lines vary as they do in a real vocabulary."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in _PIECE.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[token] for token in ids)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]


class Bytes:
    """A token a byte: all identifiers take equally many."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class Sentences:
    """A filler of sentences that never run out."""

    def __init__(self, text: Any) -> None:
        self._text = text

    def take(self, tokens: int, rng: random.Random) -> list[int]:
        ids: list[int] = []
        while len(ids) < tokens:
            said = (
                f"The {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {rng.choice(_NOUNS)}"
                + rng.choice([".", " at night.", " and waits.", " without a word.\n"])
                for _ in range(200)
            )
            ids += self._text.encode(" ".join(said) + " ")
        return ids[:tokens]


def building(text: Any | None = None) -> Building:
    """A fresh Building over a tokenizer (Words by default)."""
    text = Words() if text is None else text
    return Building(
        text, Sentences(text), lambda cell: cell.ctx - TEMPLATE, lambda prompt: TEMPLATE + TURN * len(prompt.turns)
    )


def tokens(sample: Sample) -> int:
    """Tokens of a sample's longest question with everything before it, and of the room for its answer."""
    prompt = TEMPLATE + sum(TURN + len(turn.ids) for turn in sample.prompt.turns) + len(sample.prompt.ids)
    return prompt + max(len(q.ids) + len(q.opening) for q in sample.questions) + sample.max_tokens


def built(task: Task, ctx: int, with_: Building, sample: int = 0, seed: int = 0, **options: Any) -> list[Sample]:
    """The samples of all cells of one length, of the given number among those of a run."""
    cells = task.cells([ctx], sample + 1, seed, options)
    return [task.build(cell, with_) for cell in cells if cell.params["sample"] == sample]


def spelt(with_: Building, sample: Sample) -> str:
    """The context of a sample as text: earlier turns, then the beginning of the message."""
    turns = [f"[{turn.role}] {with_.text.decode(turn.ids)}\n" for turn in sample.prompt.turns]
    return "".join(turns) + with_.text.decode(sample.prompt.ids)


def asked(with_: Building, question: Question) -> str:
    return with_.text.decode(question.ids)


def span(with_: Building, sample: Sample, where: Sequence[int]) -> str:
    """The text of [start, end) of the prompt's ids."""
    return with_.text.decode(sample.prompt.ids[where[0] : where[1]])
