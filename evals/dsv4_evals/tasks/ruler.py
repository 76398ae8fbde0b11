"""`ruler`: the eleven tasks of RULER that need no download (NVIDIA, Apache-2.0, github.com/NVIDIA/RULER).

Prompts, sizes of answers and scoring are upstream's (scripts/synthetic.yaml, scripts/data/synthetic/constants.py,
scripts/eval/synthetic/constants.py); the generators are written anew: sized by token ids, seeded per cell, each key
and value of a sample different.  Instead of Paul Graham's essays the haystack is whatever the run's filler is.  The
two question-answering tasks need SQuAD and HotpotQA, and are lm-eval's (`ruler_qa_*`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..scoring import match_all
from ..task import Building, Cell, Json, Question, Sample
from . import ruler_lists, ruler_needles
from .options import Options, grid

_BUILDERS: dict[str, Callable[[Cell, Building], Sample]] = {
    **{name: partial(ruler_needles.build, kind) for name, kind in ruler_needles.KINDS.items()},
    "vt": ruler_lists.variable_tracking,
    "cwe": ruler_lists.common_words,
    "fwe": ruler_lists.frequent_words,
}


class Ruler:
    """Cells are lengths x tasks x samples; the parameter "task" has upstream's name."""

    name = "ruler"
    max_tokens = 128

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """Option: tasks (upstream's names, or all: the default)."""
        with Options(self.name, options) as given:
            tasks = given.names("tasks", ["all", *_BUILDERS], ["all"])
        if "all" in tasks:
            tasks = list(_BUILDERS)
        return grid(self.name, lengths, samples, seed, [{"task": task} for task in tasks])

    def build(self, cell: Cell, building: Building) -> Sample:
        return _BUILDERS[cell.params["task"]](cell, building)

    def score(self, question: Question, answer: str) -> float:
        """The share of the expected strings in the answer."""
        return match_all(answer, question.expected)
