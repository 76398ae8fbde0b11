"""`needle`: one fact in a long text, asked for; and beside it a question about a fact that is not there.

Prompt, statement and question are RULER's (Apache-2.0, github.com/NVIDIA/RULER), without its prefix of the answer, so
that the model is free to say that a key is not mentioned.  All depths of one length and sample share their haystack.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from ..task import Building, Cell, Json, Question, Sample, Text
from . import words
from .layout import Layout, Statement, finish, fits, plant, statement
from .options import Options, grid, shared

INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
STATED = "One of the special magic numbers for {key} is: "
QUESTION = "What is the special magic number for {key} mentioned in the provided text?"
ANSWER_PREFIX = "The special magic number for {key} mentioned in the provided text is"
LEAST_TEXT = 64

_DENIAL = re.compile(
    r"\b(?:not|no|never|none|nothing|nowhere|neither|without|cannot|unable|unknown|unanswerable|absent|missing|lacks?)\b"
    r"|n['’]t\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d[\d,. ]{3,}\d")


class Needle:
    """One needle at each depth; each sample asks for its number, and for the number of a key that is not there."""

    name = "needle"
    max_tokens = 128  # RULER's for these questions

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """options: depths, percent of the text that comes before the needle."""
        with Options(self.name, options) as given:
            depths = given.depths()
        return grid(self.name, lengths, samples, seed, [{"depth": depth} for depth in sorted(depths)])

    def build(self, cell: Cell, building: Building) -> Sample:
        text, depth = building.text, cell.params["depth"]
        haystack = haystack_of(cell, building)
        plain, rng = text.decode(haystack), cell.rng("needle")
        key, other = new_to(plain, 2, lambda: words.word_pair(rng))
        value = new_number(plain, rng)
        stated = needle(text, key, value, first=depth == 0)
        asked, absent = (text.encode(QUESTION.format(key=k)) for k in (key, other))
        behind = max(len(asked), len(absent)) + self.max_tokens
        ids, (start,) = laid_out(cell, building, haystack, [(depth, stated)], behind)
        questions = (
            Question(asked, value, facts={"key": key, **stated.facts(start)}),
            Question(absent, {"absent": other, "present": key}, facts={"key": other, "negative": True}),
        )
        return finish(cell, building, ids, questions, self.max_tokens)

    def score(self, question: Question, answer: str) -> float:
        """1 when the answer holds the number; of an absent key, when it denies and gives no number for it."""
        if question.facts.get("negative"):
            return float(says_absent(answer, question.expected["present"]))
        return float(question.expected in answer)


def haystack_of(cell: Cell, building: Building) -> list[int]:
    """The haystack of a cell, as long as it could be; the same for all cells of this length and sample."""
    return building.filler.take(max(0, building.room(cell)), shared(cell).rng("haystack"))


def needle(text: Text, key: str, value: str, first: bool = False) -> Statement:
    """RULER's statement.  first: the text begins with it, else it follows a sentence."""
    before = STATED.format(key=key)
    return statement(text, before, value, ".\n") if first else statement(text, " " + before, value, ".")


def laid_out(
    cell: Cell, building: Building, haystack: Sequence[int], stated: Sequence[tuple[float, Statement]], behind: int
) -> tuple[list[int], list[int]]:
    """The prompt with statements hidden at their depths in as much haystack as fits, and where each begins.

    ``behind``: tokens to leave for a question and its answer.  Raises TaskError when too little text would be left.
    """
    text = building.text
    layout = Layout(text)
    layout.add(INTRODUCTION)
    closing = text.encode("\n")
    taken = len(layout.ids) + len(closing) + sum(len(one.ids) for _, one in stated) + behind
    room = fits(cell, building.room(cell) - taken, "the text around what is hidden", LEAST_TEXT)
    starts = plant(layout, text, haystack[:room], [(depth, one.ids) for depth, one in stated])
    layout.add(closing)
    return layout.ids, starts


def new_to(plain: str, count: int, draw: Callable[[], str]) -> list[str]:
    """``count`` different strings that do not occur in the text: what is asked for has one answer."""

    def new() -> str:
        while (found := draw()) in plain:
            pass
        return found

    return words.unique(new, count)


def new_number(plain: str, rng: random.Random) -> str:
    """A number of seven digits that does not occur in the text."""
    return new_to(plain, 1, lambda: words.number(rng))[0]


def says_absent(answer: str, present: str) -> bool:
    """Whether an answer says that something is not there.

    Some sentence has to deny.  A number counts as an answer, and so as wrong, unless its sentence names the key
    ``present`` that it belongs to.
    """
    sentences = re.split(r"(?<=[.!?])\s+|\n+", answer)
    denies = any(_DENIAL.search(sentence) for sentence in sentences)
    return denies and all(present in sentence or not _NUMBER.search(sentence) for sentence in sentences)
