"""`variable-tracking`: chains of assignments in running text; which variables have a value in the end?

Harder than RULER's `vt`: diverse text instead of one line repeated, several chains of the same form of which one is
asked for, and naming a variable of another chain costs.  Own wording.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..scoring import named_f1
from ..task import Building, Cell, Json, Question, Sample
from . import words
from .layout import Layout, answer_tokens, finish, fits, plant
from .options import Options, grid, shared

_INTRODUCTION = (
    'The following text hides chains of variable assignments, like "VAR A = 12345." and "VAR B = VAR A." '
    "Keep track of the value of every variable; I will ask about them afterwards.\n\n"
)
_QUESTION = (
    "\n\nWhich variables have the value {value}, directly or through other variables? "
    'End your reply with "Answer:" and their names, separated by commas.'
)
_LETTERS = 5
_NAME = rf"\b[A-Z]{{{_LETTERS}}}\b"
_LEAST_TEXT = 64


class VariableTracking:
    """Cells are lengths x samples.  Assignments stand in the order of their chain; the chains are interleaved."""

    name = "variable-tracking"
    max_tokens = 256

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """Options: chains (4), hops (assignments of one variable to another in each chain: 4)."""
        with Options(self.name, options) as given:
            params = {"chains": given.integer("chains", 4, 1, 64), "hops": given.integer("hops", 4, 1, 64)}
        return grid(self.name, lengths, samples, seed, [params])

    def build(self, cell: Cell, building: Building) -> Sample:
        text, rng = building.text, cell.rng("chains")
        chains, steps = cell.params["chains"], cell.params["hops"] + 1
        filler = building.filler.take(max(0, building.room(cell)), shared(cell).rng("haystack"))
        plain = text.decode(filler)
        names = words.unique(lambda: words.letters(rng, _LETTERS, string.ascii_uppercase), chains * steps, plain=plain)
        values = words.unique(lambda: words.number(rng, 5), chains, plain=plain)
        said = {}
        for chain, value in enumerate(values):
            mine = names[chain * steps : (chain + 1) * steps]
            said[mine[0]] = f"VAR {mine[0]} = {value}"
            said |= {new: f"VAR {new} = VAR {old}" for old, new in pairwise(mine)}
        pieces = {name: text.encode(f" {sentence}.") for name, sentence in said.items()}
        question = text.encode(_QUESTION.format(value=values[0]))
        expected = names[:steps]
        max_tokens = answer_tokens(text, ["Answer:", ", ".join(expected)], self.max_tokens)
        layout = Layout(text)
        layout.add(_INTRODUCTION)
        room = building.room(cell) - len(layout.ids) - len(question) - max_tokens - sum(map(len, pieces.values()))
        filler = filler[: fits(cell, room, "the text", _LEAST_TEXT)]

        # Each chain draws its own places, so that the chain asked for is spread over all of the text.
        order = []
        for chain in range(chains):
            depths = sorted(rng.uniform(1, 100) for _ in range(steps))
            order += [(depths[step], names[chain * steps + step]) for step in range(steps)]
        order.sort()
        starts = plant(layout, text, filler, [(depth, pieces[name]) for depth, name in order])
        planted = [
            {"variable": name, "needle": [start, start + len(pieces[name])], "depth": round(depth, 2)}
            for (depth, name), start in zip(order, starts, strict=True)
        ]
        facts = {"assigned": values[0], "needles": planted}
        return finish(cell, building, layout.ids, [Question(question, expected, facts=facts)], max_tokens)

    def score(self, question: Question, answer: str) -> float:
        """F1 of the names in the answer (behind its last "Answer:" where it has one) and those of the chain."""
        return named_f1(answer, question.expected, _NAME)
