"""Putting samples together from token ids: pieces with known places, statements between sentences, exact sizes.

Knows no task.  Texts are encoded piece by piece and joined as ids, so that the place of every piece is known to the
token and a million tokens take seconds.  "Place" is an index into ids, "span" a half-open pair [start, end) of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import TaskError
from ..model import Ids, Prompt, Turn
from ..task import Building, Cell, Json, Question, Sample, Text

_SENTENCE_ENDS = (".", "!", "?", '."', ".)", "\n")


@dataclass(frozen=True)
class Statement:
    """Something planted: its ids, and the span in them of what is asked for (empty where nothing is)."""

    ids: Ids
    value: tuple[int, int] = (0, 0)

    def facts(self, start: int) -> dict[str, Json]:
        """The reserved facts of a question about it, when it begins at ``start``."""
        return {
            "needle": [start, start + len(self.ids)],
            "value": [start + self.value[0], start + self.value[1]],
        }


def statement(text: Text, before: str, value: str, after: str) -> Statement:
    """``before + value + after`` (ASCII), asked for ``value``: the span is that of the tokens with any of it."""
    ids = text.encode(before + value + after)
    reach, within = 0, []
    for place, token in enumerate(ids):
        begin, reach = reach, reach + len(text.decode([token]))
        if begin < len(before) + len(value) and reach > len(before):
            within.append(place)
    return Statement(ids, (within[0], within[-1] + 1))


class Layout:
    """Ids that grow piece by piece."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self.ids: list[int] = []

    def add(self, piece: str | Ids) -> int:
        """Appends a piece; returns the place at which it begins."""
        start = len(self.ids)
        self.ids.extend(self._text.encode(piece) if isinstance(piece, str) else piece)
        return start


def plant(layout: Layout, text: Text, filler: Sequence[int], planted: Sequence[tuple[float, Ids]]) -> list[int]:
    """Adds ``filler`` with pieces in it, each at its depth (percent of the filler); returns where they begin.

    A piece goes between two sentences if there are any near (see `seam`).  Pieces at the same place keep the order in
    which they are given; the returned places are in that order too.
    """
    places = [seam(text, filler, round(len(filler) * depth / 100)) for depth, _ in planted]
    starts = [0] * len(planted)
    done = 0
    for index in sorted(range(len(planted)), key=places.__getitem__):
        layout.add(filler[done : places[index]])
        starts[index] = layout.add(planted[index][1])
        done = places[index]
    layout.add(filler[done:])
    return starts


def seam(text: Text, filler: Sequence[int], at: int, reach: int = 48) -> int:
    """The place in ``filler`` nearest to ``at`` at which a sentence ends and another follows.

    Where none is within ``reach`` tokens, a place between two words, else ``at``.
    """
    if at <= 0 or at >= len(filler):
        return min(max(at, 0), len(filler))
    low, high = max(1, at - reach), min(len(filler) - 1, at + reach)
    pieces = {place: text.decode(filler[place : place + 1]) for place in range(low - 1, high + 1)}
    words = [place for place in range(low, high + 1) if pieces[place][:1].isspace()]
    ends = [place for place in words if pieces[place - 1].endswith(_SENTENCE_ENDS)]
    return min(ends or words or [at], key=lambda place: abs(place - at))


def while_they_fit(pieces: Iterable[Ids], room: int) -> list[Ids]:
    """Pieces from the front, as long as they fit ``room`` tokens together; the first that does not ends it."""
    taken = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        taken.append(piece)
    return taken


def fits(cell: Cell, left: int, what: str, least: int) -> int:
    """``left``.  Raises TaskError when the ``left`` tokens for ``what`` are fewer than ``least``."""
    if left < least:
        raise TaskError(
            f"{cell.id} does not fit: {what} would have {left:,} tokens, and needs {least:,}",
            f"Give at least {cell.ctx + least - left:,} tokens of context, or hide less.",
        )
    return left


def finish(
    cell: Cell,
    building: Building,
    ids: Ids,
    questions: Sequence[Question],
    max_tokens: int,
    turns: Sequence[Turn] = (),
) -> Sample:
    """The sample, whose longest question and its answer fill the room to the token.

    ``max_tokens`` is the least room for an answer.  What a haystack of whole lines leaves over goes to the answer as
    well (less than a line).  Raises TaskError when the sample does not fit.
    """
    prompt = Prompt(ids, tuple(turns))
    before = sum(len(turn.ids) for turn in turns)
    if turns:
        before += building.overhead(prompt) - building.overhead(Prompt(()))
    left = building.room(cell) - before - len(ids) - asking(questions)
    return Sample(cell, prompt, tuple(questions), fits(cell, left, "the answer", max_tokens))


def asking(questions: Iterable[Question]) -> int:
    """Tokens of the longest question, its opening of the answer included."""
    return max(len(question.ids) + len(question.opening) for question in questions)


def answer_tokens(text: Text, answers: Sequence[str], official: int) -> int:
    """Room for an answer: the benchmark's, or more where this tokenizer spells the right answer at greater length."""
    return max(official, len(text.encode(" ".join(answers))) + 8)
