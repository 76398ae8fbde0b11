"""`kv`: the value of a key in a JSON object of random identifiers, which is the whole context.

Wording of "Lost in the Middle" (Liu et al., 2023; MIT), scored by InfiniteBench's rule for the same task.  The object
is read once; keys at several depths are asked for behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..model import Ids
from ..scoring import has_word
from ..task import Building, Cell, Json, Question, Sample
from . import words
from .layout import Layout, finish, fits, statement, while_they_fit
from .options import Options, grid

_INTRODUCTION = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
_QUESTION = '\n\nKey: "{key}"'
_OPENING = "Corresponding value:"
# An identifier has 36 characters, so it never takes more tokens.
_IDENTIFIER_TOKENS = 36
_LEAST_ENTRIES = 4


class KeyValue:
    """Cells are lengths x samples; each has a question for every depth (option), the same object behind all."""

    name = "kv"
    max_tokens = 8 + _IDENTIFIER_TOKENS

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """Option: depths (percent of the entries before the one that is asked for)."""
        with Options(self.name, options) as given:
            depths = given.depths()
        return grid(self.name, lengths, samples, seed, [{"depths": sorted(depths)}])

    def build(self, cell: Cell, building: Building) -> Sample:
        text, rng, taken = building.text, cell.rng("entries"), set[str]()
        opening = text.encode(_OPENING)
        asking = len(text.encode(_QUESTION.format(key=""))) + _IDENTIFIER_TOKENS + len(opening)
        layout = Layout(text)
        layout.add(_INTRODUCTION)
        room = building.room(cell) - len(layout.ids) - asking - self.max_tokens - len(text.encode('"}'))
        entries: list[tuple[str, str]] = []

        def written() -> Iterator[Ids]:
            while True:
                key, value = words.unique(lambda: words.identifier(rng), 2, taken)
                entries.append((key, value))
                yield text.encode(f'{" " if len(entries) > 1 else "{"}"{key}": "{value}",\n')

        lines = while_they_fit(written(), room)
        last = fits(cell, len(lines), "the object (counted in entries)", _LEAST_ENTRIES) - 1
        places = [round(depth / 100 * last) for depth in cell.params["depths"]]
        questions = []
        for i, (key, value) in enumerate(entries[: last + 1]):
            if i not in places and i < last:
                layout.add(lines[i])
                continue
            entry = statement(text, f'{" " if i else "{"}"{key}": "', value, '",\n' if i < last else '"}')
            facts = entry.facts(layout.add(entry.ids))
            questions += [
                Question(text.encode(_QUESTION.format(key=key)), value, opening, {"key": key, "depth": depth, **facts})
                for place, depth in zip(places, cell.params["depths"], strict=True)
                if place == i
            ]
        return finish(cell, building, layout.ids, questions, self.max_tokens)

    def score(self, question: Question, answer: str) -> float:
        """1 when the value is a word of the answer."""
        return has_word(answer, question.expected)
