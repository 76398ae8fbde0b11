"""LongBench v2: its official prompt, its rule for reading an answer, and its breakdown, over the official data file.

Owns the file's schema.  A cell is one question; its context has the length it has, and what does not fit the model is
"too long", never shortened (the official script cuts the middle out).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import DataError, TaskError
from .model import Progress, Prompt
from .record import Line
from .stats import mean_of
from .task import Building, Cell, Json, Question, Sample, Text

# Source: the LongBench repository, prompts/0shot.txt, pred.py (query_llm's max_new_tokens, extract_answer), result.py.
_DOCUMENT = "Please read the following text and answer the question below.\n\n<text>\n$DOC$\n</text>\n\n"
_QUESTION = (
    "What is the correct answer to this question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
_MAX_TOKENS = 128
_LETTERS = ("A", "B", "C", "D")
DIFFICULTIES, LENGTHS = ("easy", "hard"), ("short", "medium", "long")


@dataclass(frozen=True)
class Item:
    """One record of the official file, under its own keys (``id`` is its _id)."""

    id: str
    domain: str
    sub_domain: str
    difficulty: str
    length: str
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: str
    context: str

    def prompt(self) -> tuple[str, str]:
        """The official prompt in two parts: the document, and the question behind it.

        Placeholders are filled one after the other, so that one that occurs in a document ("$Q$" is common in
        papers) is filled as well, as by the official script.
        """
        values = {
            "$DOC$": self.context,
            "$Q$": self.question,
            "$C_A$": self.choice_A,
            "$C_B$": self.choice_B,
            "$C_C$": self.choice_C,
            "$C_D$": self.choice_D,
        }
        document, question = _DOCUMENT, _QUESTION
        for name, value in values.items():
            document, question = document.replace(name, value.strip()), question.replace(name, value.strip())
        return document, question


def answer_of(response: str) -> str | None:
    """The letter that a response settles on, by the official rule; None when it names none."""
    response = response.strip().replace("*", "")
    match = re.search(r"The correct answer is \(([A-D])\)", response) or re.search(
        r"The correct answer is ([A-D])", response
    )
    return match[1] if match else None


class LongBench2:
    """The task over a data file's records, for one model's tokenizer.

    A cell's ctx is the power of two that its question and answer fit into.  Options: difficulty, length, domain, each
    a list of what to keep (empty keeps all), and "data", the file's digest, for the record.
    """

    name = "longbench2"
    max_tokens = _MAX_TOKENS

    def __init__(self, items: Sequence[Item], text: Text, overhead: Callable[[Prompt], int]) -> None:
        self.items = tuple(items)
        self._text, self._overhead = text, overhead
        self._tokens: dict[int, int] = {}

    @property
    def digest(self) -> str:
        """Of all records: what makes a run over them the same run."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            digest.update(json.dumps([getattr(item, field.name) for field in fields(item)]).encode())
        return digest.hexdigest()

    def cells(
        self,
        lengths: Sequence[int],
        samples: int,
        seed: int,
        options: Mapping[str, Json],
        progress: Progress = lambda done, total: None,
    ) -> list[Cell]:
        """A cell for each record that the options keep, shortest first; the first ``samples`` of them, 0 for all.

        lengths: records that take more tokens than the last of them are left out; none are, where there is none.
        progress counts records as their tokens are counted, which takes minutes for the whole file, once.
        """
        kept = [i for i, item in enumerate(self.items) if _kept(item, options)]
        if not kept:
            raise TaskError("no record of the file is left", "Leave out some of the conditions.")
        # Equal documents come together: a model that keeps prefixes reads them once.
        kept.sort(key=lambda i: (len(self.items[i].context), self.items[i].context))
        cells: list[Cell] = []
        for number, i in enumerate(kept, 1):
            if not lengths or self._count(i) <= lengths[-1]:
                cells.append(self._cell(i, seed))
            progress(number, len(kept))
            if len(cells) == samples:
                break
        if not cells:
            raise TaskError(f"no record fits {lengths[-1]:,} tokens", "Give a larger --ctx, or other conditions.")
        return sorted(cells, key=lambda cell: cell.ctx)

    def build(self, cell: Cell, building: Building) -> Sample:
        prompt, question = self._asked(self.items[cell.params["sample"]])
        return Sample(cell, prompt, (question,), self.max_tokens)

    def score(self, question: Question, answer: str) -> float:
        return float(answer_of(answer) == question.expected)

    def _asked(self, item: Item) -> tuple[Prompt, Question]:
        document, question = item.prompt()
        facts = {"id": item.id, "sub_domain": item.sub_domain}
        asked = Question(tuple(self._text.encode(question)), item.answer, facts=facts)
        return Prompt(tuple(self._text.encode(document))), asked

    def _cell(self, place: int, seed: int) -> Cell:
        item = self.items[place]
        params = {"difficulty": item.difficulty, "length": item.length, "domain": item.domain, "sample": place}
        return Cell(self.name, 1 << (self._count(place) - 1).bit_length(), seed, params)

    def _count(self, place: int) -> int:
        """Tokens of a record's question and answer."""
        if place not in self._tokens:
            prompt, question = self._asked(self.items[place])
            self._tokens[place] = self._overhead(prompt) + len(prompt.ids) + len(question.ids) + self.max_tokens
        return self._tokens[place]


def breakdown(lines: Sequence[Line]) -> dict[str, Any]:
    """Means as the official table has them: overall, by difficulty and by length, and here by domain too.

    An answer that names no letter is wrong; ``unread`` counts these.  "compensated" gives them a quarter, as the
    official script can.  What did not fit or failed is in no mean (its count is in the run's questions).
    """
    scored = [line for line in lines if line.score is not None]
    unread = [line for line in scored if answer_of(line.answer) is None]

    def rows(name: Callable[[Line], str], order: Sequence[str]) -> dict[str, Any]:
        return {value: _mean([line for line in scored if name(line) == value]) for value in order}

    def found(name: Callable[[Line], str]) -> list[str]:
        return [value for value, _ in sorted(Counter(map(name, scored)).items())]

    def sub_domain(line: Line) -> str:
        return f"{line.params['domain']} / {line.facts['sub_domain']}"

    overall = _mean(scored)
    compensated = (sum(line.score or 0.0 for line in scored) + 0.25 * len(unread)) / len(scored) if scored else None
    return {
        "overall": overall,
        "compensated": compensated,
        "unread": len(unread),
        "difficulty": rows(lambda line: str(line.params["difficulty"]), DIFFICULTIES),
        "length": rows(lambda line: str(line.params["length"]), LENGTHS),
        "domain": rows(lambda line: str(line.params["domain"]), found(lambda line: str(line.params["domain"]))),
        "sub_domain": rows(sub_domain, found(sub_domain)),
    }


def _mean(lines: Sequence[Line]) -> dict[str, Any]:
    found = mean_of([line.score or 0.0 for line in lines], [line.cell for line in lines])
    return {"mean": found.mean, "low": found.low, "high": found.high, "count": found.count}


def _kept(item: Item, options: Mapping[str, Json]) -> bool:
    known = {"difficulty": DIFFICULTIES, "length": LENGTHS, "domain": None}
    for name, wanted in options.items():
        if name == "data":  # the file's digest, for the record
            continue
        if name not in known:
            raise TaskError(f"longbench2 has no option {name!r}", f"It has {', '.join(known)}.")
        allowed = known[name]
        wrong = [value for value in wanted if allowed and value not in allowed]
        if wrong:
            raise TaskError(f"{wrong[0]!r} is no {name} of LongBench v2", f"Choose among {', '.join(allowed or ())}.")
        if wanted and getattr(item, name) not in wanted:
            return False
    return True


# -- the data file


def read_items(file: Path) -> Iterator[Item]:
    """Records of the official data.json (one list) or of the same as JSON lines."""
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no {file}", "Give LongBench v2's data.json with --data.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}", "Copy the official data.json again.") from error
    empty = True
    seen: dict[str, int] = {}
    for line, record in _objects(file, text):
        item = _item(file, line, record)
        if item.id in seen:
            raise _wrong(file, line, f"_id {item.id!r} was on line {seen[item.id]} before")
        seen[item.id] = line
        empty = False
        yield item
    if empty:
        raise DataError(f"{file} has no records", "Copy the official data.json again.")


def _objects(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Values and the lines they begin on, of a JSON list or of one value after another."""
    decoder, place, line, counted = json.JSONDecoder(), 0, 1, 0
    space = re.compile(r"[ \t\r\n]*")

    def skip(place: int) -> int:
        found = space.match(text, place)
        assert found is not None
        return found.end()

    place = skip(place)
    listed = text.startswith("[", place)
    if listed:
        place = skip(place + 1)
    first = True
    while place < len(text) and not (listed and text[place] == "]"):
        if listed and not first:
            if text[place] != ",":
                raise _wrong(file, line + text.count("\n", counted, place), "a comma is missing between two records")
            place = skip(place + 1)
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            # Its own line and column are of the whole text.
            raise _wrong(file, getattr(error, "lineno", line), f"not JSON: {getattr(error, 'msg', error)}") from None
        yield line, value
        first = False
        place = skip(place)
    if listed and place >= len(text):
        raise _wrong(file, line + text.count("\n", counted), "the list has no end: the file is cut off")


def _item(file: Path, line: int, record: Any) -> Item:
    if not isinstance(record, dict):
        raise _wrong(file, line, f"a {type(record).__name__}, not an object")
    values = {}
    for field in fields(Item):
        key = "_id" if field.name == "id" else field.name
        if not isinstance(record.get(key), str):
            kind = json.dumps(record[key])[:40] if key in record else "missing"
            raise _wrong(file, line, f"{key!r} is {kind}, not text")
        values[field.name] = record[key]
    for key, allowed in (("difficulty", DIFFICULTIES), ("length", LENGTHS), ("answer", _LETTERS)):
        if values[key] not in allowed:
            raise _wrong(file, line, f"{key!r} is {values[key][:40]!r}, not one of {', '.join(allowed)}")
    return Item(**values)


def _wrong(file: Path, line: int, what: str) -> DataError:
    return DataError(f"{file}, line {line}: {what}", "Give LongBench v2's data.json, or its records as JSON lines.")
