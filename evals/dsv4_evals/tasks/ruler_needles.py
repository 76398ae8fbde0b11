"""RULER's eight needle tasks: one or more "special magic" values in a haystack of text, noise, or other needles.

The kinds and their parameters are scripts/synthetic.yaml's, the wording is that of scripts/data/synthetic/niah.py.
Knows nothing of scoring.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Literal

from ..errors import TaskError
from ..model import Ids
from ..task import Building, Cell, Json, Question, Sample, Text
from . import words
from .layout import Layout, Statement, answer_tokens, finish, fits, plant, statement, while_they_fit
from .options import shared

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DRAW = {"words": words.word_pair, "numbers": words.number, "uuids": words.identifier}
# Upstream's places of needles in text: forty, evenly from the beginning to the end, as whole percentages.
_DEPTHS = [round(step * 100 / 39) for step in range(40)]
_LEAST_TEXT = 64


@dataclass(frozen=True)
class Kind:
    """One of upstream's needle tasks.  keys: needles' keys; values: values of each; queries: keys asked for."""

    haystack: Literal["repeat", "essay", "needle"]
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def one(self) -> bool:
        """Whether one value is asked for, which upstream words in the singular."""
        return self.queries * self.values == 1


KINDS = {
    "niah_single_1": Kind("repeat"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", value="uuids"),
    "niah_multikey_1": Kind("essay", keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", key="uuids", value="uuids"),
    "niah_multivalue": Kind("essay", values=4),
    "niah_multiquery": Kind("essay", keys=4, queries=4),
}


@dataclass(frozen=True)
class _Wording:
    """Upstream's template with its plural or singular, in three parts."""

    introduction: str
    question: str
    opening: str

    @classmethod
    def of(cls, kind: Kind, keys: Sequence[str]) -> _Wording:
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        things = kind.value[:-1] if kind.one else kind.value
        some, are, are_all = ("A", "is", "is") if kind.one else ("Some", "are", "are all")
        return cls(
            f"{some} special magic {things} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {things} afterwards.\n",
            f"What {are_all} the special magic {things} for {query} mentioned in the provided text?",
            f"The special magic {things} for {query} mentioned in the provided text {are}",
        )


def build(kind: Kind, cell: Cell, building: Building) -> Sample:
    """The cell's sample.  Raises TaskError when it does not fit."""
    text, rng = building.text, cell.rng("needles")
    filler: list[int] = []
    if kind.haystack == "essay":
        filler = building.filler.take(max(0, building.room(cell)), shared(cell).rng("haystack"))
    plain = text.decode(filler)
    taken: set[str] = set()
    keys = words.unique(partial(_DRAW[kind.key], rng), kind.keys, taken, plain)
    while any(one in other for one, other in permutations(keys, 2)):  # "old-cat" is found in "cold-cathedral"
        keys = words.unique(partial(_DRAW[kind.key], rng), kind.keys, taken, plain)
    values = [words.unique(partial(_DRAW[kind.value], rng), kind.values, taken, plain) for _ in keys]
    asked = rng.sample(range(len(keys)), kind.queries)
    needles = [(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
    rng.shuffle(needles)

    wording = _Wording.of(kind, [keys[i] for i in asked])
    expected = [value for i in asked for value in values[i]]
    opening, question = text.encode(wording.opening), text.encode(wording.question)
    max_tokens = answer_tokens(text, expected, 128)
    layout = Layout(text)
    layout.add(wording.introduction)
    room = building.room(cell) - len(layout.ids) - len(question) - len(opening) - max_tokens
    if kind.haystack == "essay":
        places = _in_text(kind, cell, text, layout, needles, room, filler)
    elif kind.haystack == "repeat":
        places = _in_noise(kind, cell, text, layout, needles, room)
    else:
        places = _in_needles(kind, cell, text, layout, needles, room, taken)

    told = [{"key": key, "expected": value in expected} | place for (key, value), place in places]
    facts = {"needles": told}
    if kind.one:
        facts |= next(place for (_, value), place in places if value in expected)
    return finish(cell, building, layout.ids, [Question(question, expected, opening, facts)], max_tokens)


Needles = list[tuple[str, str]]
Places = list[tuple[tuple[str, str], dict[str, Json]]]


def _in_text(
    kind: Kind, cell: Cell, text: Text, layout: Layout, needles: Needles, room: int, filler: Sequence[int]
) -> Places:
    """Needles between the sentences of running text, at different ones of the forty depths.

    The tasks with a haystack of text share it at each length and sample.
    """
    depths = sorted(cell.rng("places").sample(_DEPTHS, len(needles)))
    statements = [
        _statement(kind, text, *needle, before="" if depth == 0 else " ", after=".\n" if depth == 0 else ".")
        for needle, depth in zip(needles, depths, strict=True)
    ]
    end = text.encode("\n")
    tokens = fits(cell, room - sum(len(each.ids) for each in statements) - len(end), "the text", _LEAST_TEXT)
    planted = [(depth, each.ids) for each, depth in zip(statements, depths, strict=True)]
    starts = plant(layout, text, filler[:tokens], planted)
    layout.add(end)
    return [
        (needle, {**each.facts(start), "depth": depth})
        for needle, each, start, depth in zip(needles, statements, starts, depths, strict=True)
    ]


def _in_noise(kind: Kind, cell: Cell, text: Text, layout: Layout, needles: Needles, room: int) -> Places:
    """Needles among copies of one line.  The first line is the end of a copy, so that the whole fills the room."""
    lines = [_statement(kind, text, *needle) for needle in needles]
    noise = text.encode(NOISE + "\n")
    tokens = fits(cell, room - sum(len(each.ids) for each in lines), "the noise", len(noise))
    copies: list[Ids] = [noise] * (tokens // len(noise))
    if tokens % len(noise):
        copies.insert(0, noise[-(tokens % len(noise)) :])
    return _among(cell.rng("places"), layout, copies, needles, lines, least=1)


def _in_needles(
    kind: Kind, cell: Cell, text: Text, layout: Layout, needles: Needles, room: int, taken: set[str]
) -> Places:
    """Needles among others of their kind, all keys and values different."""
    lines = [_statement(kind, text, *needle) for needle in needles]
    rng = cell.rng("distractors")

    def distractors() -> Iterator[Ids]:
        while True:
            (key,) = words.unique(partial(_DRAW[kind.key], rng), 1, taken)
            if any(mine in key or key in mine for mine, _ in needles):
                continue
            (value,) = words.unique(partial(_DRAW[kind.value], rng), 1, taken)
            yield text.encode(_said(kind, key) + f"{value}.\n")

    tokens = room - sum(len(each.ids) for each in lines)
    others = while_they_fit(distractors(), tokens)
    if len(others) < 4:
        raise TaskError(f"{cell.id} does not fit: there is no room for other needles", "Give a longer context.")
    return _among(cell.rng("places"), layout, others, needles, lines)


def _among(
    rng: random.Random, layout: Layout, others: list[Ids], needles: Needles, lines: list[Statement], least: int = 0
) -> Places:
    """Adds ``others`` with ``lines`` at random places, of which the first is ``least``, between them."""
    before = dict(zip(sorted(rng.sample(range(least, len(others) + 1), len(lines))), range(len(lines)), strict=True))
    places: Places = []
    for place in range(len(others) + 1):
        if place in before:
            mine = lines[before[place]]
            start = layout.add(mine.ids)
            depth = round(100 * place / len(others), 2)
            places.append((needles[before[place]], {**mine.facts(start), "depth": depth}))
        if place < len(others):
            layout.add(others[place])
    return places


def _said(kind: Kind, key: str) -> str:
    return f"One of the special magic {kind.value} for {key} is: "


def _statement(kind: Kind, text: Text, key: str, value: str, before: str = "", after: str = ".\n") -> Statement:
    return statement(text, before + _said(kind, key), value, after)
