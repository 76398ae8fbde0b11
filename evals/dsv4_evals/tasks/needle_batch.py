"""`needle-batch`: many facts in one long text, read once; each is asked for on a fork of its own.

RULER's wording as in needle.py, with its prefix of the answer.  One prefill gives a whole line of depths, which makes
lengths affordable at which reading takes minutes or hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..task import Building, Cell, Json, Question, Sample
from . import words
from .layout import finish
from .needle import ANSWER_PREFIX, QUESTION, haystack_of, laid_out, needle, new_to
from .options import Options, grid

NEEDLES, MOST_NEEDLES = 50, 10_000


class NeedleBatch:
    """Needles spread evenly over one haystack."""

    name = "needle-batch"
    max_tokens = 64

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """options: needles, how many are hidden and asked for."""
        with Options(self.name, options) as given:
            count = given.integer("needles", NEEDLES, 1, MOST_NEEDLES)
        return grid(self.name, lengths, samples, seed, [{"needles": count}])

    def build(self, cell: Cell, building: Building) -> Sample:
        text, count = building.text, cell.params["needles"]
        haystack = haystack_of(cell, building)
        plain, rng = text.decode(haystack), cell.rng("needles")
        keys = new_to(plain, count, lambda: words.word_pair(rng))
        values = new_to(plain, count, lambda: words.number(rng))
        stated = [needle(text, key, value) for key, value in zip(keys, values, strict=True)]
        depths = [100 * (place + 0.5) / count for place in range(count)]
        asked = [text.encode(QUESTION.format(key=key)) for key in keys]
        openings = [text.encode(ANSWER_PREFIX.format(key=key)) for key in keys]
        behind = max(len(a) + len(b) for a, b in zip(asked, openings, strict=True)) + self.max_tokens
        ids, starts = laid_out(cell, building, haystack, list(zip(depths, stated, strict=True)), behind)
        questions = [
            Question(
                asked[i],
                values[i],
                openings[i],
                {"key": keys[i], "depth": round(depths[i], 2), **stated[i].facts(starts[i])},
            )
            for i in range(count)
        ]
        return finish(cell, building, ids, questions, self.max_tokens)

    def score(self, question: Question, answer: str) -> float:
        """1 when the answer holds the number."""
        return float(question.expected in answer)
