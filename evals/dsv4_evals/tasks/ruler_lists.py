"""RULER's other tasks without a download: variable tracking, common words, frequent words.

Wording and parameters are upstream's (scripts/data/synthetic/{variable_tracking,common_words_extraction,
freq_words_extraction}.py and constants.py there), misspellings included.  Knows nothing of scoring.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from itertools import count, pairwise

from ..errors import TaskError
from ..model import Ids
from ..task import Building, Cell, Question, Sample, Text
from . import words
from .layout import Layout, answer_tokens, finish, fits
from .ruler_needles import NOISE

_HOPS = 4
_VT_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_VT_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
_VT_OPENING = (
    "Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assgined "
    "the value {value}, they are:"
)
# The tokens that upstream's example of variable tracking may have with its answer, and the steps in which it grows.
_EXAMPLE_TOKENS, _EXAMPLE_ANSWER, _EXAMPLE_STEP = 500, 30, 5

_CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_CWE_OPENING = "Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10

_FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_OPENING = "Answer: According to the coded text above, the three most frequently appeared words are:"
_CODED_LETTERS, _DOTS = 6, "..."


def variable_tracking(cell: Cell, building: Building) -> Sample:
    """vt: one chain of five variables in noise, behind a short example.  Raises TaskError when it does not fit."""
    text, rng = building.text, cell.rng("chain")
    names, value = _chain(rng, 5)
    question = text.encode(_VT_QUESTION.format(value=value))
    opening = text.encode(_VT_OPENING.format(number=len(names), value=value))
    max_tokens = answer_tokens(text, names, 30)
    layout = Layout(text)
    layout.add(_vt_example(cell, text, value))
    layout.add(_VT_HEAD)
    assignments = [text.encode(each) for each in _assignments(names, value)]
    noise = text.encode(f" {NOISE}\n")
    room = building.room(cell) - len(layout.ids) - len(question) - len(opening) - max_tokens
    room = fits(cell, room - sum(map(len, assignments)), "the noise", len(noise) * (len(assignments) + 1))
    copies: list[Ids] = [noise] * (room // len(noise))
    if room % len(noise):
        copies.insert(0, noise[-(room % len(noise)) :])
    # Upstream draws places between the lines of noise, in the order of the chain.
    places = sorted(rng.sample(range(1, len(copies) + 1), len(assignments)))
    starts = []
    for index in range(len(copies) + 1):
        if index in places:
            starts.append(layout.add(assignments[places.index(index)]))
        if index < len(copies):
            layout.add(copies[index])
    planted = [
        {"variable": name, "needle": [start, start + len(ids)], "depth": round(100 * place / len(copies), 2)}
        for name, start, ids, place in zip(names, starts, assignments, places, strict=True)
    ]
    facts = {"value_assigned": value, "needles": planted}
    return finish(cell, building, layout.ids, [Question(question, names, opening, facts)], max_tokens)


def _chain(rng: random.Random, letters: int, other: str = "") -> tuple[list[str], str]:
    """Variables of a chain, all different, and the number that the first one gets, which is not ``other``."""
    names = words.unique(lambda: words.letters(rng, letters, string.ascii_uppercase), _HOPS + 1)
    return names, words.unique(lambda: str(rng.randrange(10_000, 99_999)), 1, {other})[0]


def _assignments(names: Sequence[str], value: str) -> list[str]:
    """The sentences of a chain, each with the space in front that joins it to the noise."""
    return [f" VAR {names[0]} = {value}", *(f" VAR {new} = VAR {old} " for old, new in pairwise(names))]


def _vt_example(cell: Cell, text: Text, other: str) -> str:
    """The example that upstream puts first: a chain with names of three letters, with its answer."""
    names, value = _chain(cell.rng("example"), 3, other)

    def example(lines: int) -> str:
        # Drawn anew for every size, so that a size does not depend on those tried before.
        places = cell.rng(f"example of {lines} lines")
        sentences = [f" {NOISE}\n"] * lines
        for offset, (place, sentence) in enumerate(
            zip(sorted(places.sample(range(lines), len(names))), _assignments(names, value), strict=True)
        ):
            sentences.insert(place + offset, sentence)
        asked = _VT_QUESTION.format(value=value) + " " + _VT_OPENING.format(number=len(names), value=value)
        return _VT_HEAD + "".join(sentences)[1:] + asked

    fitting = len(names)
    for lines in count(_EXAMPLE_STEP, _EXAMPLE_STEP):
        if len(text.encode(example(lines))) + _EXAMPLE_ANSWER > _EXAMPLE_TOKENS:
            break
        fitting = lines
    return f"{example(fitting)}  {' '.join(names)}\n\n\n\n"


def common_words(cell: Cell, building: Building) -> Sample:
    """cwe: a numbered list of words, ten of them thirty times, all others three times, behind a short example.

    Below 4,096 tokens six times and once, as upstream has it.  Raises TaskError when it does not fit.
    """
    text = building.text
    short = cell.ctx < 4096
    often, rarely = (6, 1) if short else (30, 3)
    question, opening = text.encode(_CWE_QUESTION), text.encode(_CWE_OPENING)
    numbers = _Numbers(text)
    # A word with its number takes about four tokens and a half of a large vocabulary; where it is less, once more.
    size = building.room(cell) * 2 // (9 * rarely)
    while True:
        common, others = _apart(words.distinct_words(cell.rng(f"{size} words"), max(2 * _COMMON, size)))
        max_tokens = answer_tokens(text, [f"{i}. {word}" for i, word in enumerate(common, 1)], 120)
        layout = Layout(text)
        layout.add(_cwe_example(cell, *((20, 3, 1) if short else (40, 10, 3))) + "\n")
        layout.add(_CWE_HEAD)
        room = building.room(cell) - len(layout.ids) - len(question) - len(opening) - max_tokens
        room -= often * sum(len(text.encode(f" {word}")) for word in common) + numbers.tokens(often * _COMMON)
        used = _others_that_fit(text, others, numbers, often * _COMMON, rarely, room)
        if used < len(others):
            break
        size *= 2
    fits(cell, used, "the words that are not common (counted in words)", _COMMON)
    listed = common * often + others[:used] * rarely
    cell.rng("order").shuffle(listed)
    ids_of = {word: text.encode(f" {word}") for word in {*common, *others[:used]}}
    for i, word in enumerate(listed):
        layout.add(numbers[i])
        layout.add(ids_of[word])
    facts = {"words": len(listed), "different": _COMMON + used, "repeats": [often, rarely]}
    return finish(cell, building, layout.ids, [Question(question, common, opening, facts)], max_tokens)


class _Numbers:
    """The ids of "1.", " 2.", " 3." and so on, each encoded once."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[Ids] = []

    def __getitem__(self, index: int) -> Ids:
        while len(self._ids) <= index:
            number = len(self._ids) + 1
            self._ids.append(self._text.encode(f" {number}." if number > 1 else "1."))
        return self._ids[index]

    def tokens(self, count: int) -> int:
        """Tokens of the first ``count`` numbers."""
        return sum(len(self[index]) for index in range(count))


def _others_that_fit(text: Text, others: Sequence[str], numbers: _Numbers, first: int, times: int, room: int) -> int:
    """How many of ``others``, each ``times`` in the list behind ``first`` entries, fit ``room``."""
    for used, word in enumerate(others):
        entry = first + used * times
        room -= times * len(text.encode(f" {word}")) + sum(len(numbers[entry + i]) for i in range(times))
        if room < 0:
            return used
    return len(others)


def _apart(pool: Sequence[str]) -> tuple[list[str], list[str]]:
    """The first ten words of ``pool`` that stand in no other word of it, and the rest.

    The score looks for the words anywhere in an answer: "art" would be found in one that names "party".
    """
    joined = "\n".join(pool)
    common: list[str] = []
    for word in pool:
        if joined.count(word) == 1:
            common.append(word)
            if len(common) == _COMMON:
                chosen = set(common)
                return common, [other for other in pool if other not in chosen]
    raise TaskError("there are no ten words that stand in no other word", "Choose another seed.")


def _cwe_example(cell: Cell, number: int, often: int, rarely: int) -> str:
    """The short list with its answer that upstream puts first.  It glues the answer to the colon."""
    rng = cell.rng("example")
    chosen = words.distinct_words(rng, number)
    common, others = chosen[:_COMMON], chosen[_COMMON:]
    listed = common * often + others * rarely
    rng.shuffle(listed)
    return f"{_CWE_HEAD}{_numbered(listed)}{_CWE_QUESTION} {_CWE_OPENING}{_numbered(common)}"


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


def frequent_words(cell: Cell, building: Building) -> Sample:
    """fwe: words of random letters, the k-th most frequent in proportion to 1/k^2; the first rank is dots to ignore.

    Dots fill the room that the words leave.  Raises TaskError when it does not fit.
    """
    text, rng = building.text, cell.rng("words")
    question, opening = text.encode(_FWE_QUESTION), text.encode(_FWE_OPENING)
    coded = words.unique(
        lambda: words.letters(rng, _CODED_LETTERS, string.ascii_lowercase), max(4, building.room(cell) // 50 - 1)
    )
    expected = coded[:3]
    max_tokens = answer_tokens(text, expected, 50)
    layout = Layout(text)
    layout.add(_FWE_HEAD.rstrip())
    dots = text.encode(f" {_DOTS}")
    room = building.room(cell) - len(layout.ids) - len(question) - len(opening) - max_tokens
    spelt = [dots, *(text.encode(f" {word}") for word in coded)]

    def counts(total: int) -> list[int]:
        # int(n * k^-2 / zeta(2)), and zeta(2) is pi^2 / 6.
        return [int(total * 6 / (math.pi * rank) ** 2) for rank in range(1, len(spelt) + 1)]

    def tokens(total: int) -> int:
        return sum(len(ids) * times for ids, times in zip(spelt, counts(total), strict=True))

    low, high = 0, 2 * max(1, room)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= room else (low, middle - 1)
    times = counts(low)
    if not times[1] > times[2] > times[3] > (times[4] if len(times) > 4 else 0):
        raise TaskError(f"{cell.id} does not fit: the three words would not stand out", "Give a longer context.")
    times[0] += (room - tokens(low)) // len(dots)
    listed = [ids for ids, number in zip(spelt, times, strict=True) for _ in range(number)]
    rng.shuffle(listed)
    for ids in listed:
        layout.add(ids)
    facts = {"words": len(listed), "dots": times[0], "times": times[1:5], "different": sum(map(bool, times[1:]))}
    return finish(cell, building, layout.ids, [Question(question, expected, opening, facts)], max_tokens)
