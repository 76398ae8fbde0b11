"""`corpus-agg`: reports scattered over a corpus; how many, how much in all, which most?

What CorpusQA measures (answers that no single passage holds), with answers that are computed instead of judged: the
reports are generated, the text around them is the run's haystack.  Their number does not grow with the length, so
that lengths differ in nothing but the text between them.  The corpus is read once and each question asked behind it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import TaskError
from ..scoring import name_is, number_is
from ..task import Building, Cell, Json, Question, Sample
from .layout import Layout, finish, fits, plant
from .options import Options, grid, shared

_DEPOTS = (
    "Aldermoor", "Brackenhithe", "Coldwater Quay", "Dunvale", "Eastering", "Farrowgate", "Gullhaven", "Hollinshaw",
    "Ironbeck", "Kestrel Point", "Larkholm", "Mossbridge", "Netherby Cross", "Oxenfold", "Pinecastle", "Quarry Hill",
)  # fmt: skip
_GOODS = ("amber", "barley", "copper", "glassware", "linen", "paper", "salt", "timber", "tin", "wool")
_FORMS = (
    "Depot report {number}: the depot at {depot} shipped {crates} crates of {good}.",
    "Depot report {number}: {crates} crates of {good} left the depot at {depot}.",
    "Depot report {number}: from the depot at {depot}, {crates} crates of {good} were sent out.",
)
_INTRODUCTION = (
    "The following texts contain depot reports, scattered among much else. Each report is one sentence that begins "
    'with "Depot report" and its number. I will ask about all of the reports together afterwards.\n\n'
)
_ASKED = {
    "count": "How many depot reports are from the depot at {depot}?",
    "sum": "How many crates did the depot at {depot} ship in total, over all of its reports?",
    "largest": "Which depot shipped the most crates in a single report?",
    "most": "Which depot shipped the most crates in total, over all of its reports?",
}
_CLOSING = {
    int: ' End your reply with "Answer:" and the number.',
    str: ' End your reply with "Answer:" and the name of the place.',
}
_DEPOTS_OF_SAMPLE = 5
_LEAST_TEXT = 64


@dataclass(frozen=True)
class _Report:
    number: int
    depot: str
    good: str
    crates: int
    form: str

    def __str__(self) -> str:
        return self.form.format(number=self.number, depot=self.depot, crates=self.crates, good=self.good)


class CorpusAggregation:
    """Cells are lengths x samples; each asks how many, how much, which most at once, and which most in total."""

    name = "corpus-agg"
    max_tokens = 512

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """Option: reports (how many there are: 24)."""
        with Options(self.name, options) as given:
            params = {"reports": given.integer("reports", 24, 2 * _DEPOTS_OF_SAMPLE, 4096)}
        return grid(self.name, lengths, samples, seed, [params])

    def build(self, cell: Cell, building: Building) -> Sample:
        text, rng = building.text, cell.rng("reports")
        filler = building.filler.take(max(0, building.room(cell)), shared(cell).rng("haystack"))
        plain = text.decode(filler)
        depots = [depot for depot in _DEPOTS if depot not in plain]
        if "Depot report" in plain or len(depots) < _DEPOTS_OF_SAMPLE:
            raise TaskError("the haystack speaks of depots as the reports do", "Use another haystack.")
        reports = _reports(rng, rng.sample(depots, _DEPOTS_OF_SAMPLE), cell.params["reports"])
        answers = _answers(rng, reports)
        questions = {kind: text.encode(answer.asked) for kind, answer in answers.items()}
        pieces = [text.encode(f" {report}") for report in reports]
        layout = Layout(text)
        layout.add(_INTRODUCTION)
        room = building.room(cell) - len(layout.ids) - max(map(len, questions.values())) - self.max_tokens
        filler = filler[: fits(cell, room - sum(map(len, pieces)), "the text", _LEAST_TEXT)]
        depths = sorted(rng.uniform(1, 100) for _ in reports)
        starts = plant(layout, text, filler, list(zip(depths, pieces, strict=True)))

        def facts(kind: str) -> dict[str, Json]:
            used = [i for i, report in enumerate(reports) if report in answers[kind].reports]
            needles = [{"needle": [starts[i], starts[i] + len(pieces[i])], "depth": round(depths[i], 2)} for i in used]
            return {"kind": kind, "needles": needles}

        return finish(
            cell,
            building,
            layout.ids,
            [Question(ids, answers[kind].expected, facts=facts(kind)) for kind, ids in questions.items()],
            self.max_tokens,
        )

    def score(self, question: Question, answer: str) -> float:
        """1 when the answer concludes with the number, or with the name and no other depot's."""
        if isinstance(question.expected, int):
            return number_is(answer, question.expected)
        return name_is(answer, question.expected, _DEPOTS)


@dataclass(frozen=True)
class _Answer:
    """A question, its answer, and the reports on which that rests."""

    asked: str
    expected: int | str
    reports: Sequence[_Report]


def _reports(rng: random.Random, depots: Sequence[str], count: int) -> list[_Report]:
    """Reports in random order, at least two of each depot; one has most crates at once, and one most in total."""
    while True:
        of = [*depots, *depots, *rng.choices(depots, k=count - 2 * len(depots))]
        rng.shuffle(of)
        reports = [
            _Report(number, depot, rng.choice(_GOODS), rng.randrange(11, max(1000, 50 * count)), rng.choice(_FORMS))
            for number, depot in enumerate(of, 1)
        ]
        largest = sorted(report.crates for report in reports)
        totals = sorted(_totals(reports).values())
        if largest[-1] > largest[-2] and totals[-1] > totals[-2]:
            return reports


def _totals(reports: Sequence[_Report]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for report in reports:
        totals[report.depot] += report.crates
    return totals


def _answers(rng: random.Random, reports: Sequence[_Report]) -> dict[str, _Answer]:
    """All questions about ``reports``, each about a depot that is drawn for it where it needs one."""
    depots = sorted({report.depot for report in reports})
    totals = _totals(reports)

    def of(depot: str) -> list[_Report]:
        return [report for report in reports if report.depot == depot]

    counted, summed = rng.sample(depots, 2)
    largest = max(reports, key=lambda report: report.crates)
    expected: dict[str, tuple[str, int | str, Sequence[_Report]]] = {
        "count": (counted, len(of(counted)), of(counted)),
        "sum": (summed, totals[summed], of(summed)),
        "largest": ("", largest.depot, [largest]),
        "most": ("", max(totals, key=totals.__getitem__), reports),
    }
    return {
        kind: _Answer("\n\n" + _ASKED[kind].format(depot=depot) + _CLOSING[type(right)], right, used)
        for kind, (depot, right, used) in expected.items()
    }
