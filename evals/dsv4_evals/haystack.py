"""Diverse text to hide things in: the user's own files, or the text that ships with the package.

Owns the records, their order and their cutting; knows nothing of tasks.  The bundled text is the King James Bible and
Python's documentation and library (data/SOURCES.md).
"""

from __future__ import annotations

import hashlib
import lzma
import random
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from .errors import DataError
from .model import Ids
from .task import Text

RECORD = "\x1e"
# Longer texts are cut at a paragraph's end, so that every sample can begin with another one.
RECORD_CHARACTERS = 32_768
# A paragraph of at least so many characters is kept once, wherever it comes again; shorter ones are headings and such.
PARAGRAPH_CHARACTERS = 80
_GAP = "\n\n"


@dataclass(frozen=True)
class Haystack:
    """Records of running text, none with a paragraph of another.  digest: of all of it, for the record of a run."""

    name: str
    records: tuple[str, ...]
    digest: str

    @classmethod
    def bundled(cls) -> Haystack:
        """The text of the package: about 7 MB in English."""
        packed = files("dsv4_evals").joinpath("data", "corpus.txt.xz").read_bytes()
        text = lzma.decompress(packed).decode("utf-8")
        return cls._of("bundled", (record.partition("\n")[2] for record in text.split(RECORD)[1:]))

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Haystack:
        """The user's own texts.  Raises DataError when there are no words in them."""
        return cls._of("files", texts)

    @classmethod
    def _of(cls, name: str, texts: Iterable[str]) -> Haystack:
        seen: set[bytes] = set()
        records = tuple(record for text in texts for record in _cut(_new_paragraphs(text, seen)))
        if not records:
            raise DataError("the haystack has no text", "Give files with text in them, or leave --file out.")
        digest = hashlib.blake2b("\0".join(records).encode("utf-8"), digest_size=16).hexdigest()
        return cls(name, records, digest)

    @property
    def characters(self) -> int:
        return sum(map(len, self.records))

    def about(self) -> dict[str, Any]:
        """For the record of a run."""
        return {
            "name": self.name,
            "records": len(self.records),
            "characters": self.characters,
            "digest": self.digest,
        }

    def filler(self, text: Text) -> TokenFiller:
        """The haystack in a model's tokens."""
        return TokenFiller(self, text)


class TokenFiller:
    """A haystack in the tokens of one model; records are encoded when first needed.  A `dsv4_evals.task.Filler`."""

    def __init__(self, haystack: Haystack, text: Text) -> None:
        self.haystack, self._text = haystack, text
        self._encoded: dict[int, array[int]] = {}

    def take(self, tokens: int, rng: random.Random) -> list[int]:
        """Exactly ``tokens`` ids: records in an order drawn from ``rng``, from a paragraph of the first one on.

        All of the text comes once before any of it comes again.  With an rng in the same state, a shorter take is
        the beginning of a longer one.
        """
        taken: list[int] = []
        while len(taken) < tokens:
            for part in self._round(rng):
                taken.extend(part)
                if len(taken) >= tokens:
                    break
        return taken[:tokens]

    def capacity(self) -> int:
        """About how many tokens there are before text comes again, judged by a few records."""
        some = range(0, len(self.haystack.records), max(1, len(self.haystack.records) // 8))
        tokens = sum(len(self._record(i)) for i in some)
        return round(self.haystack.characters * tokens / sum(len(self.haystack.records[i]) for i in some))

    def _round(self, rng: random.Random) -> Iterator[Ids]:
        """All of the text once.  What is left out before the starting place comes last."""
        order = list(range(len(self.haystack.records)))
        rng.shuffle(order)
        first = self.haystack.records[order[0]]
        start = rng.choice([0, *(match.end() for match in re.finditer(r"\n\n", first) if match.end() < len(first))])
        yield self._text.encode(first[start:] + _GAP)
        for index in order[1:]:
            yield self._record(index)
        if start:
            yield self._text.encode(first[:start])

    def _record(self, index: int) -> array[int]:
        if index not in self._encoded:
            self._encoded[index] = array("i", self._text.encode(self.haystack.records[index] + _GAP))
        return self._encoded[index]


class NoFiller:
    """For tasks that hide nothing."""

    def take(self, tokens: int, rng: random.Random) -> list[int]:
        raise AssertionError("this task was said to need no haystack")


def _new_paragraphs(text: str, seen: set[bytes]) -> list[str]:
    """The paragraphs of a text without those that were seen before, here or in another text."""
    kept = []
    for paragraph in re.split(r"\n[ \t\r\f\v]*\n", text.replace("\r\n", "\n")):
        paragraph = paragraph.strip("\n").rstrip()
        if len(paragraph) >= PARAGRAPH_CHARACTERS:
            mark = hashlib.blake2b(" ".join(paragraph.split()).encode("utf-8"), digest_size=16).digest()
            if mark in seen:
                continue
            seen.add(mark)
        if paragraph:
            kept.append(paragraph)
    return kept


def _cut(paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs joined to records of at most about RECORD_CHARACTERS."""
    record: list[str] = []
    size = 0
    for paragraph in (piece for whole in paragraphs for piece in _pieces(whole)):
        if record and size + len(paragraph) > RECORD_CHARACTERS:
            yield _GAP.join(record)
            record, size = [], 0
        record.append(paragraph)
        size += len(paragraph) + len(_GAP)
    if record:
        yield _GAP.join(record)


def _pieces(paragraph: str) -> Iterator[str]:
    """A paragraph, or where it is longer than a record, pieces of it that end with a line or a word if they can."""
    while len(paragraph) > RECORD_CHARACTERS:
        ends = (paragraph.rfind(mark, RECORD_CHARACTERS // 2, RECORD_CHARACTERS) for mark in ("\n", " "))
        end = next((end + 1 for end in ends if end >= 0), RECORD_CHARACTERS)
        yield paragraph[:end].rstrip()
        paragraph = paragraph[end:].lstrip("\n")
    if paragraph:
        yield paragraph
