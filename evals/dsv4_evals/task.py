"""What a task is: cells (one sample each, by seed and parameters), how a sample is built, and how answers are scored.

A cell's sample depends on its seed and parameters alone: never on the order of cells, on other cells, or on a kill in
between.  The run's record keeps the recipe, not the prompt.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .model import Ids, Prompt

Json = Any


@dataclass(frozen=True)
class Cell:
    """One sample to be made.  ctx: tokens of prompt and answer together; params: JSON values that name the cell."""

    task: str
    ctx: int
    seed: int
    params: Mapping[str, Json] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same for equal cells, in any run: "needle/ctx=4096/seed=0/depth=50"."""
        parts = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in sorted(self.params.items())]
        return "/".join([self.task, f"ctx={self.ctx}", f"seed={self.seed}", *parts])

    def rng(self, purpose: str = "") -> random.Random:
        """Randomness of this cell alone; different purposes draw independently of each other."""
        digest = hashlib.blake2b(f"{self.id}|{purpose}".encode(), digest_size=16, person=b"dsv4-eval").digest()
        return random.Random(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class Question:
    """One question behind a sample's context.

    expected: what the scorer compares with (references, a graph's nodes, ...: JSON values).  facts: where things
    are (token offsets of needles in the prompt's ids, depths, distractors), for the record and the diagnostics.
    """

    ids: Ids
    expected: Json
    opening: Ids = ()
    facts: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A context and the questions behind it.  max_tokens: the room that the sample leaves for each answer."""

    cell: Cell
    prompt: Prompt
    questions: tuple[Question, ...]
    max_tokens: int


class Text(Protocol):
    """What building needs of a model: dsv4_evals.model.Model has it."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Ids) -> str: ...


class Filler(Protocol):
    """Diverse text to hide things in (haystack.py)."""

    def take(self, tokens: int, rng: random.Random) -> list[int]:
        """Exactly this many token ids of running text, starting at a random place; no paragraph comes twice while
        there is unused text left."""
        ...


@dataclass(frozen=True)
class Building:
    """What a task builds with.

    room: tokens of a cell's ctx that the template leaves to the prompt and the answer, for a prompt without earlier
    turns.  overhead: tokens that the template puts around a prompt's turns and ids, theirs not counted.
    """

    text: Text
    filler: Filler
    room: Callable[[Cell], int]
    overhead: Callable[[Prompt], int]


class Task(Protocol):
    """One task.  Stateless: everything is in the cell."""

    @property
    def name(self) -> str: ...
    @property
    def max_tokens(self) -> int: ...  # the most an answer needs (without thinking)

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """All cells of a run, shortest first.  Raises TaskError for options out of range or unknown."""
        ...

    def build(self, cell: Cell, building: Building) -> Sample:
        """The cell's sample; takes seconds even at a million tokens.  Raises TaskError when it cannot fit."""
        ...

    def score(self, question: Question, answer: str) -> float:
        """0 to 1."""
        ...
