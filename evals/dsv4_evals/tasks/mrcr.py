"""`mrcr`: OpenAI's MRCR from its official files (MIT, huggingface.co/datasets/openai/mrcr), by its official rule.

Owns reading the files and dealing their records to bins of length; the conversations are asked as they are.  The
published bins count tokens of OpenAI's o200k_base; here a record is in the smallest bin that holds it with this
model's tokens, its template's, and room for the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError, TaskError
from ..model import Progress, Prompt, Turn
from ..scoring import mrcr
from ..task import Building, Cell, Json, Question, Sample, Text
from .options import Options

# Upper ends of the published bins; the first begins at 4,096 tokens.
BINS = tuple(1 << power for power in range(13, 21))
_FIELDS: dict[str, type] = {
    "prompt": str,
    "answer": str,
    "random_string_to_prepend": str,
    "n_needles": int,
    "desired_msg_index": int,
    "total_messages": int,
    "n_chars": int,
}
# A record of c characters takes more than c / 16 tokens and fewer than 16 c, whatever the tokenizer and the template.
_BOUND = 16
_HINT = "Give a .parquet or .jsonl file in the schema of openai/mrcr, or a folder of them."


@dataclass(frozen=True)
class _Place:
    """A record that has not been read: where it is, how many needles it has, characters of its prompt."""

    source: _Source
    row: int
    needles: int
    characters: int

    def __str__(self) -> str:
        return f"{self.source.path.name}:{self.row + 1}"

    def read(self) -> _Record:
        return _Record.of(self.source.read(self.row), f"{self.source.path}, record {self.row + 1}")


@dataclass(frozen=True)
class _Record:
    messages: tuple[tuple[str, str], ...]
    answer: str
    prefix: str
    needles: int
    depth: float

    @classmethod
    def of(cls, fields: Mapping[str, Any], where: str) -> _Record:
        """Raises DataError, which says ``where``, for anything but the published schema."""
        for name, kind in _FIELDS.items():
            if name not in fields:
                raise DataError(f"{where} has no {name}", _HINT)
            if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
                raise DataError(f"{where}: {name} is {fields[name]!r:.40}, not a {kind.__name__}", _HINT)
        try:
            messages = json.loads(fields["prompt"])
        except ValueError:
            raise DataError(f"{where}: the prompt is no JSON text", _HINT) from None
        if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
            raise DataError(f"{where}: the prompt is no list of messages with role and content", _HINT)
        if messages[-1]["role"] != "user":
            raise DataError(f"{where}: the last message is not the user's", _HINT)
        depth = 100 * fields["desired_msg_index"] / max(1, fields["total_messages"])
        return cls(
            tuple((message["role"], message["content"]) for message in messages),
            fields["answer"],
            fields["random_string_to_prepend"],
            fields["n_needles"],
            round(depth, 2),
        )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    )


class Mrcr:
    """Cells are bins x needles x samples, dealt from the records in an order that the seed draws.

    Made from a file or folder.  overhead: see `dsv4_evals.task.Building`.  Raises DataError for files in another
    schema, and names the record.
    """

    name = "mrcr"
    max_tokens = 2048

    def __init__(self, data: Path, text: Text, overhead: Callable[[Prompt], int]) -> None:
        self._text, self._overhead = text, overhead
        self._files = _files(data)
        self._places = [place for path in self._files for place in _index(path)]
        self._tokens: dict[_Place, int] = {}
        if not self._places:
            raise DataError(f"{data} has no records", _HINT)

    def cells(
        self,
        lengths: Sequence[int],
        samples: int,
        seed: int,
        options: Mapping[str, Json],
        progress: Progress = lambda done, total: None,
    ) -> list[Cell]:
        """lengths: upper ends of bins.  Options: needles (2, 4, 8: those that there are), data (the files' digest).

        At most ``samples`` cells of each bin and number of needles, fewer where there are fewer records; TaskError
        where there is none.  Counts the tokens of as many records as it takes to find those, once: ``progress`` gets
        how many have been counted, of all there are.
        """
        with Options(self.name, {name: value for name, value in options.items() if name != "data"}) as given:
            known = sorted({place.needles for place in self._places})
            needles = given.integers("needles", known, 1, 1024)
        for ctx in lengths:
            if ctx not in BINS:
                raise TaskError(f"{ctx:,} tokens are no bin of MRCR", f"Bins end at {', '.join(map(str, BINS))}.")
        if not lengths or samples < 1:
            raise TaskError("mrcr needs lengths and at least one sample", "Give for example --ctx 8K,16K --samples 10.")
        cells = []
        for ctx in sorted(set(lengths)):
            for number in needles:
                found = sum(1 for _ in islice(self._in_bin(ctx, number, seed, progress), samples))
                if not found:
                    raise TaskError(
                        f"no record with {number} needles has more than {ctx // 2:,} and at most {ctx:,} tokens",
                        "Choose other lengths, other needles, or the file that has them.",
                    )
                cells += [Cell(self.name, ctx, seed, {"needles": number, "sample": i}) for i in range(found)]
        return cells

    @cached_property
    def digest(self) -> str:
        """Of the files' contents: what a run's identity knows of them."""
        found = hashlib.blake2b(digest_size=16)
        for path in self._files:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "blake2b").digest())
        return found.hexdigest()

    def build(self, cell: Cell, building: Building) -> Sample:
        """The record's conversation.  The answer may be twice as long as the right one, and is cut off there."""
        of_cell = self._in_bin(cell.ctx, cell.params["needles"], cell.seed)
        place = next(islice(of_cell, cell.params["sample"], None), None)
        if place is None:
            raise TaskError(f"the data has no record for {cell.id}", "Use the data that the run began with.")
        record = place.read()
        prompt, question = self._asked(record)
        asked = Question(
            question,
            {"answer": record.answer, "prefix": record.prefix},
            facts={"record": str(place), "depth": record.depth},
        )
        return Sample(cell, prompt, (asked,), self._answer_tokens(record))

    def score(self, question: Question, answer: str) -> float:
        """MRCR's: 0 without the prefix, else the likeness of the rest."""
        return mrcr(answer, question.expected["answer"], question.expected["prefix"])

    def _in_bin(
        self, ctx: int, needles: int, seed: int, progress: Progress = lambda done, total: None
    ) -> Iterator[_Place]:
        """Records of a bin, in the seed's order.  Long texts are measured only when they may be in the bin."""
        places = [place for place in self._places if place.needles == needles]
        Cell(self.name, 0, seed, {"needles": needles}).rng("order").shuffle(places)
        least = 4095 if ctx == BINS[0] else ctx // 2
        for place in places:
            if not least / _BOUND < place.characters < ctx * _BOUND:
                continue
            if place not in self._tokens:
                self._tokens[place] = self._measure(place.read())
                progress(len(self._tokens), len(self._places))
            if least < self._tokens[place] <= ctx:
                yield place

    def _measure(self, record: _Record) -> int:
        prompt, question = self._asked(record)
        content = sum(len(turn.ids) for turn in prompt.turns) + len(prompt.ids) + len(question)
        return content + self._overhead(prompt) + self._answer_tokens(record)

    def _asked(self, record: _Record) -> tuple[Prompt, list[int]]:
        turns = [Turn(role, self._text.encode(content)) for role, content in record.messages]  # type: ignore[arg-type]
        return Prompt((), tuple(turns[:-1])), list(turns[-1].ids)

    def _answer_tokens(self, record: _Record) -> int:
        return 2 * len(self._text.encode(record.answer))


class _Source(Protocol):
    """A file of records."""

    @property
    def path(self) -> Path: ...
    def read(self, row: int) -> Mapping[str, Any]: ...


class _Lines:
    """JSON, a record a line.  Keeps where lines begin, not the lines: a record may have five million characters."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begins: list[int] = []

    def index(self) -> Iterator[_Place]:
        begin = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    fields = self._parsed(line, number)
                    _Record.of(fields, f"{self.path}, line {number}")
                    self._begins.append(begin)
                    yield _Place(self, len(self._begins) - 1, fields["n_needles"], len(fields["prompt"]))
                begin += len(line)

    def read(self, row: int) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._begins[row])
            return self._parsed(file.readline(), row + 1)

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            fields = json.loads(line)
        except ValueError:
            raise DataError(f"{self.path}, line {number}: no JSON", _HINT) from None
        if not isinstance(fields, dict):
            raise DataError(f"{self.path}, line {number}: no record", _HINT)
        return fields


class _Parquet:
    """A Parquet file, as published; one group of rows is held at a time."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise DataError(
                f"{path} needs the package pyarrow to be read", "Install it with: pip install 'dsv4[eval]'"
            ) from error
        self.path = path
        try:
            self._file = ParquetFile(path)
            counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}", _HINT) from error
        self._groups = [(group, row) for group, rows in enumerate(counts) for row in range(rows)]
        self._held: tuple[int, Any] = (-1, None)

    def index(self) -> Iterator[_Place]:
        missing = [name for name in _FIELDS if name not in self._file.schema_arrow.names]
        if missing:
            raise DataError(f"{self.path} has no column {missing[0]}", _HINT)
        table = self._file.read(columns=["n_needles", "n_chars"]).to_pylist()
        for row, fields in enumerate(table):
            if not all(isinstance(value, int) for value in fields.values()):
                raise DataError(f"{self.path}, record {row + 1}: n_needles and n_chars are no numbers", _HINT)
            yield _Place(self, row, fields["n_needles"], fields["n_chars"])

    def read(self, row: int) -> Mapping[str, Any]:
        group, place = self._groups[row]
        if self._held[0] != group:
            self._held = (group, self._file.read_row_group(group, columns=list(_FIELDS)))
        record: dict[str, Any] = self._held[1].slice(place, 1).to_pylist()[0]
        return record


def _files(data: Path) -> list[Path]:
    if data.is_dir():
        found = sorted(path for path in data.rglob("*") if path.suffix in (".parquet", ".jsonl"))
        if not found:
            raise DataError(f"{data} has no .parquet or .jsonl file", _HINT)
        return found
    if not data.is_file():
        raise DataError(f"there is no {data}", _HINT)
    return [data]


def _index(path: Path) -> Iterator[_Place]:
    return (_Parquet(path) if path.suffix == ".parquet" else _Lines(path)).index()
