"""`passkey`: a number in a long text, said twice in one sentence, at each depth (Mohtashami and Jaggi, 2023).

Wording as in the paper and in InfiniteBench (MIT), scored by InfiniteBench's rule; the text around it is the run's
haystack instead of one paragraph repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..scoring import first_number_is
from ..task import Building, Cell, Json, Question, Sample
from . import words
from .layout import Layout, answer_tokens, finish, fits, plant, statement
from .options import Options, grid, shared

_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
_STATED = " Remember it. {key} is the pass key."
_QUESTION = "\n\nWhat is the pass key?"
_OPENING = "The pass key is"
_LEAST_TEXT = 64


class Passkey:
    """Cells are lengths x depths x samples; all depths of a length and sample share their haystack."""

    name = "passkey"
    max_tokens = 16

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """Options: depths (percent of the text before the key), digits (of the key: 5)."""
        with Options(self.name, options) as given:
            depths, digits = given.depths(), given.integer("digits", 5, 3, 20)
        return grid(self.name, lengths, samples, seed, [{"depth": d, "digits": digits} for d in sorted(depths)])

    def build(self, cell: Cell, building: Building) -> Sample:
        text, rng, depth = building.text, cell.rng("key"), cell.params["depth"]
        filler = building.filler.take(max(0, building.room(cell)), shared(cell).rng("haystack"))
        plain = text.decode(filler)
        (key,) = words.unique(lambda: words.number(rng, cell.params["digits"]), 1, plain=plain)
        before, after = ("", "\n") if depth == 0 else (" ", "")
        stated = statement(text, f"{before}The pass key is ", key, "." + _STATED.format(key=key) + after)
        question, opening = text.encode(_QUESTION), text.encode(_OPENING)
        max_tokens = answer_tokens(text, [key], self.max_tokens)
        layout = Layout(text)
        layout.add(_INTRODUCTION)
        room = building.room(cell) - len(layout.ids) - len(stated.ids) - len(question) - len(opening) - max_tokens
        filler = filler[: fits(cell, room, "the text", _LEAST_TEXT)]
        (start,) = plant(layout, text, filler, [(depth, stated.ids)])
        asked = Question(question, key, opening, stated.facts(start))
        return finish(cell, building, layout.ids, [asked], max_tokens)

    def score(self, question: Question, answer: str) -> float:
        """1 when the first number of the answer is the key."""
        return first_number_is(answer, question.expected)
