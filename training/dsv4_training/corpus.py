"""The text behind training: the bundled corpus, its split, and the words that keys are made of.

Knows nothing of tokens.  Sources and licences: evals/dsv4_evals/data/SOURCES.md; the text ships there as
the haystack of evaluations.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parents[2] / "evals" / "dsv4_evals" / "data" / "corpus.txt.xz"
RECORD = "\x1e"
HELD_OUT_SHARE = 10  # one record, and one key, in so many is kept for evaluation


def is_held_out(name: str) -> bool:
    """Whether a record or key belongs to evaluation: a fixed function of its name alone."""
    return hashlib.sha256(name.encode("utf-8")).digest()[0] * HELD_OUT_SHARE < 256


@dataclass(frozen=True)
class Document:
    """One text of the corpus; the kind is the first part of its name: kjv, python-docs or python-lib."""

    name: str
    text: str

    @property
    def kind(self) -> str:
        return self.name.split("/", 1)[0]


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for evaluation, and lower-case words of 3 to 10 letters that occur in them."""

    training: tuple[Document, ...]
    evaluation: tuple[Document, ...]
    words: tuple[str, ...]

    def documents(self, evaluation: bool) -> tuple[Document, ...]:
        return self.evaluation if evaluation else self.training


def parse(text: str) -> Corpus:
    documents = [Document(*record.split("\n", 1)) for record in text.split(RECORD)[1:]]
    counts = Counter(word for d in documents for word in re.findall(r"\b[a-z]{3,10}\b", d.text))
    words = tuple(sorted(word for word, count in counts.items() if count >= 3))
    return Corpus(
        tuple(d for d in documents if not is_held_out(d.name)),
        tuple(d for d in documents if is_held_out(d.name)),
        words,
    )


def load(path: Path = CORPUS) -> Corpus:
    """Raises ValueError when the file is missing: it lies in a checkout, not beside the installed package."""
    if not path.is_file():
        raise ValueError(f"no corpus at {path}; train from a checkout of the repository, which holds it")
    return parse(lzma.decompress(path.read_bytes()).decode("utf-8"))
