"""A run on disk: run.json says what it is, samples.jsonl holds one line a question, appended as answers come.

Owns the folder's files and what makes two runs the same; knows no model and no task.  A line is a recipe (seed,
parameters, places) and an answer, never a prompt.  Killed at any moment, a run goes on behind its last whole line.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, cast

from .errors import RunError

RUN, SAMPLES, RESULTS = "run.json", "samples.jsonl", "results.json"
FORMAT, VERSION = "dsv4-eval", 1
Status = Literal["ok", "no_answer", "too_long", "error"]
STATUSES: tuple[Status, ...] = ("ok", "no_answer", "too_long", "error")
Json = Any


@dataclass(frozen=True)
class Line:
    """One question: how it was made, what was answered, what it cost.  All values are JSON values.

    score: None for too_long and error, which have none.  prompt: hash of the token ids asked.  max_tokens: room the
    answer had, thinking included.  seconds: build, context (reading the shared part, told by the first question
    behind it, else 0), prefill, decode.
    """

    cell: str
    question: int
    questions: int
    task: str
    ctx: int
    seed: int
    params: Mapping[str, Json]
    facts: Mapping[str, Json]
    expected: Json
    prompt: str
    status: Status
    score: float | None
    answer: str
    reasoning: str
    finish: str | None
    message: str
    max_tokens: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: Mapping[str, float]
    kv_bytes: int | None
    cost: Mapping[str, float] | None
    diagnostics: Mapping[str, Json] | None

    @property
    def negative(self) -> bool:
        """Whether the right answer was that there is none."""
        return bool(self.facts.get("negative"))


_NAMES = {field.name for field in fields(Line)}


@dataclass(frozen=True)
class Run:
    """run.json.  identity: what makes it this run; starts: when and where it was started and gone on with."""

    identity: Mapping[str, Json]
    ctx: int
    cells: int
    starts: Sequence[Mapping[str, Json]]

    @property
    def about(self) -> Mapping[str, Json]:
        """The machine of the last start."""
        return cast(Mapping[str, Json], self.starts[-1]["about"])


class Record:
    """A run that is being written.  Close it, or use it as a context manager: it locks its folder."""

    def __init__(self, folder: Path, run: Run, samples: IO[str], lines: dict[tuple[str, int], Line]) -> None:
        self.folder, self.run = folder, run
        self._samples, self._lines = samples, lines

    @classmethod
    def open(
        cls, folder: Path, identity: Mapping[str, Json], ctx: int, cells: int, about: Mapping[str, Json]
    ) -> Record:
        """Begin a run in ``folder``, or go on with the one that is there.

        Raises RunError when the folder holds another run or something else, or another process writes to it.
        """
        identity = json.loads(json.dumps(identity, allow_nan=False))
        start = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "about": dict(about)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RunError(f"{folder} is a file", "Choose another --out.") from None
        samples = _locked(folder / SAMPLES) if (folder / RUN).exists() else _new(folder)
        try:
            run = Run(identity, ctx, cells, [start])
            if (folder / RUN).exists():
                before = _read_run(folder)
                _refuse_another(folder, before.identity, identity)
                run = Run(identity, ctx, cells, [*before.starts, start])
            lines = _repaired(folder / SAMPLES, samples)
            _write(folder / RUN, {"format": FORMAT, "version": VERSION, "run": identity, "ctx": ctx, "cells": cells,
                                  "starts": list(run.starts)})  # fmt: skip
        except BaseException:
            samples.close()
            raise
        return cls(folder, run, samples, lines)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._samples.close()

    @property
    def lines(self) -> list[Line]:
        """The latest line of every question."""
        return list(self._lines.values())

    def settled(self, cell: str, question: int) -> bool:
        """Whether a question needs no more asking.  Errors are tried again."""
        line = self._lines.get((cell, question))
        return line is not None and line.status != "error"

    def cell_settled(self, cell: str) -> bool:
        """Whether all questions of a cell are settled; False for one that was never built."""
        first = self._lines.get((cell, 0))
        return first is not None and all(self.settled(cell, i) for i in range(first.questions))

    def add(self, line: Line) -> None:
        """Append a line; it is on the disk when this returns."""
        self._samples.write(json.dumps(asdict(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._samples.flush()
        os.fsync(self._samples.fileno())
        self._lines[line.cell, line.question] = line

    def reread(self) -> None:
        """Count what the file holds: Ctrl-C may fall between a line's way to the disk and its being counted."""
        self._samples.flush()
        self._lines = _repaired(self.folder / SAMPLES, self._samples)

    def write_results(self, results: Mapping[str, Json]) -> None:
        """Replace results.json."""
        _write(self.folder / RESULTS, results)


def read_run(folder: Path) -> tuple[Run, list[Line]]:
    """A run and the latest line of each question, for reports and comparisons.  Raises RunError if it is none."""
    if not (folder / RUN).exists():
        raise RunError(f"{folder} holds no run", "Give a folder that `dsv4 eval` wrote.")
    run = _read_run(folder)
    samples = folder / SAMPLES
    text = samples.read_text("utf-8") if samples.exists() else ""
    return run, list(_latest(samples, text[: text.rfind("\n") + 1]).values())


def _new(folder: Path) -> IO[str]:
    left = {SAMPLES, f".{RUN}.part"}  # what a kill in the first moment leaves
    there = sorted(entry.name for entry in folder.iterdir() if entry.name not in left)
    if there:
        raise RunError(f"{folder} is not empty and holds no run: {there[0]}", "Choose another --out.")
    return _locked(folder / SAMPLES)


def _locked(path: Path) -> IO[str]:
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(
            f"another process is writing to {path.parent}", "Wait for it, or choose another --out."
        ) from None
    return file


def _read_run(folder: Path) -> Run:
    path = folder / RUN
    try:
        document = json.loads(path.read_text("utf-8"))
        if document["format"] != FORMAT:
            raise RunError(f"{path} is no run of `dsv4 eval`", "Choose another folder.")
        if document["version"] != VERSION:
            raise RunError(f"{path} is of version {document['version']!r}, not {VERSION}", "Choose another folder.")
        return Run(document["run"], document["ctx"], document["cells"], document["starts"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} is damaged: {error}", "Choose another folder.") from error


def _refuse_another(folder: Path, before: Mapping[str, Json], now: Mapping[str, Json]) -> None:
    different = list(_differences(before, now))
    if different:
        name, was, would = different[0]
        raise RunError(
            f"{folder} holds another run: {name} was {_short(was)}, now it is {_short(would)}",
            "Choose another --out, or give the options of that run to go on with it.",
        )


def _differences(before: Mapping[str, Json], now: Mapping[str, Json], at: str = "") -> Iterator[tuple[str, Json, Json]]:
    for name in sorted({*before, *now}):
        was, would = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(would, dict):
            yield from _differences(was, would, f"{at}{name}.")
        elif was != would:
            yield at + name, was, would


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _repaired(path: Path, samples: IO[str]) -> dict[tuple[str, int], Line]:
    """The lines of the file; a last one without its end, which a kill leaves, is cut off."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(samples.fileno(), whole)
    try:
        return _latest(path, data[:whole].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged at byte {error.start}", "Choose another --out.") from error


def _latest(path: Path, text: str) -> dict[tuple[str, int], Line]:
    lines: dict[tuple[str, int], Line] = {}
    for number, row in enumerate(text.split("\n")[:-1], 1):
        try:
            found = json.loads(row)
            if not isinstance(found, dict) or set(found) != _NAMES or found["status"] not in STATUSES:
                raise ValueError("its keys are not those of a sample")
        except ValueError as error:
            raise RunError(f"{path}, line {number}, is damaged: {error}", "Remove the line, or start anew.") from error
        line = Line(**found)
        lines[line.cell, line.question] = line
    return lines


def _write(path: Path, document: Mapping[str, Json]) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")  # ours alone: the folder is locked
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
