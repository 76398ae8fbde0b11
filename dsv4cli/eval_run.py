"""What every evaluation of tasks does around the runner: open the model, plan or run, show progress and a table.

Takes a Task object and flags as values; `evaluate` is the whole of a command.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from dsv4_evals.errors import TaskError
from dsv4_evals.model import Model
from dsv4_evals.task import Cell, Filler, Task
from dsv4cli.errors import FAILURE
from dsv4cli.evaluation import Where, open_model
from dsv4cli.options import ANYWHERE, Placed
from dsv4cli.output import count, duration, file_size, note, print_json, table, work_bar

if TYPE_CHECKING:
    from dsv4_evals.haystack import Haystack
    from dsv4_evals.record import Line, Record
    from dsv4_evals.run import Drawing

# Room for thinking on top of an answer.  The publisher asks for 384K of context for the longest.
THINKING_TOKENS = {"none": 0, "high": 32_768, "max": 131_072}
OUT = Path("dsv4-eval")
TELL_EVERY_S = 60.0  # a line so often where there is no terminal to draw a bar on


@dataclass(frozen=True)
class Flags:
    """The flags that all tasks share.  lengths: none where samples have the size they have."""

    lengths: tuple[int, ...] = ()
    samples: int = 1
    seed: int = 0
    files: tuple[str, ...] = ()
    out: Path | None = None
    dry_run: bool = False
    model: str = "tiny"
    device: str = "cpu"
    dtype: str = "float32"
    kv_dtype: str = "mixed"
    endpoint: str | None = None
    endpoint_model: str | None = None
    endpoint_timeout: float = 1800.0
    endpoint_body: Mapping[str, Any] | None = None
    think: Literal["none", "high", "max"] = "none"
    cache_dir: Path | None = None
    no_cache: bool = False
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    json: bool = False
    placed: Placed = ANYWHERE

    @property
    def thinking_tokens(self) -> int:
        return THINKING_TOKENS[self.think]

    @property
    def where(self) -> Where:
        longest = max(self.lengths, default=0)
        return Where(
            self.model,
            self.device,
            self.dtype,
            self.kv_dtype,
            longest + self.thinking_tokens if longest else 0,
            self.endpoint,
            self.endpoint_model,
            self.endpoint_timeout,
            self.endpoint_body,
            self.cache_dir,
            self.no_cache or self.dry_run,
            self.placed,
        )


def evaluate(
    task: Task,
    options: Mapping[str, Any],
    flags: Flags,
    *,
    hides: bool = True,
    more: Callable[[Sequence[Line]], Mapping[str, Any]] = lambda lines: {},
    show: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """Run ``task``, or with dry_run say what that would take.  Raises what wrong input raises, Exit(1) after errors.

    hides: the task hides things in a haystack.  more: further keys of the results.  show: prints them instead of
    `show_results`.

    The same command goes on where an earlier one stopped: the folder's name follows from everything that decides
    the answers, unless ``out`` names one.
    """
    from dsv4_evals.run import Drawing
    from dsv4cli.reporting import show_heat_map, write_report

    cells = task.cells(flags.lengths, flags.samples, flags.seed, options)
    haystack = _haystack(flags.files) if hides else None
    model = open_model(flags.where)
    _check_lengths(flags.lengths, model, served=flags.endpoint is not None)
    drawing = Drawing(flags.max_tokens, flags.temperature, flags.top_p, flags.think, flags.thinking_tokens)
    filler = _filler(haystack, model, flags.lengths)
    if flags.dry_run:
        _show_plan(task, cells, model, filler, drawing, flags)
        return
    identity = _identity(task, options, flags, drawing, haystack, model)
    folder = flags.out or folder_of(identity)
    found, lines = _run(task, cells, model, filler, drawing, identity, folder, more)
    written = write_report(folder, found, lines)
    if flags.json:
        print_json({**found, "out": str(folder)})
    else:
        (show or show_results)(found, folder)
        show_heat_map(found)
        print(f"to look at: {', '.join(str(path) for path in written)}")
    if found["questions"]["error"]:
        note(f"{found['questions']['error']} questions failed; the same command tries them again")
        raise typer.Exit(FAILURE)


def _haystack(files: Sequence[str]) -> Haystack:
    from dsv4_evals.haystack import Haystack
    from dsv4cli.files import read_paths, skipped_lines

    if not files:
        return Haystack.bundled()
    reading = read_paths(files)
    for line in skipped_lines(reading.skipped):
        note(line, style="dim")
    return Haystack.from_texts(document.text for document in reading.documents)


def _filler(haystack: Haystack | None, model: Model, lengths: Sequence[int]) -> Filler:
    """The haystack in the model's tokens; says so when samples will have to repeat it."""
    from dsv4_evals.haystack import NoFiller

    if haystack is None:
        return NoFiller()
    filler = haystack.filler(model)
    if lengths and filler.capacity() < max(lengths):
        note(f"note: this text has about {count(filler.capacity())} tokens; longer samples repeat it")
    return filler


def _check_lengths(lengths: Sequence[int], model: Model, served: bool) -> None:
    longest = max(lengths, default=0)
    if longest > model.ctx:
        why = "the endpoint takes" if served else "this model and this machine's memory hold"
        raise TaskError(
            f"{count(longest)} tokens are more than the {count(model.ctx)} that {why}",
            f"Give lengths up to {count(model.ctx)} with --ctx.",
        )


def _identity(
    task: Task, options: Mapping[str, Any], flags: Flags, drawing: Drawing, haystack: Haystack | None, model: Model
) -> dict[str, Any]:
    """Everything that decides the answers: two runs that agree in it are the same run."""
    return {
        "task": task.name,
        "lengths": sorted(flags.lengths),
        "samples": flags.samples,
        "seed": flags.seed,
        "options": dict(options),
        "settings": asdict(drawing),
        "haystack": haystack.about() if haystack else None,
        "model": {"name": model.name, "fingerprint": model.fingerprint},
    }


def folder_of(identity: Mapping[str, Any]) -> Path:
    """Where a run goes when nobody says: dsv4-eval/<task>-<model>-<8 hex digits of its identity>."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
    model = Path(str(identity["model"]["name"])).name or "model"
    return OUT / f"{identity['task']}-{model}-{digest}"


def _run(
    task: Task,
    cells: Sequence[Cell],
    model: Model,
    filler: Filler,
    drawing: Drawing,
    identity: Mapping[str, Any],
    folder: Path,
    more: Callable[[Sequence[Line]], Mapping[str, Any]],
) -> tuple[dict[str, Any], Sequence[Line]]:
    """Carry out what is left of a run and write its results, also when it is stopped half-way; returns both."""
    from dsv4_evals.record import Record
    from dsv4_evals.results import results
    from dsv4_evals.run import run

    with Record.open(folder, identity, model.ctx, len(cells), model.about()) as record:

        def found() -> dict[str, Any]:
            document = {**results(record.run, record.lines), **more(record.lines)}
            record.write_results(document)
            return document

        before = sum(record.cell_settled(cell.id) for cell in cells)
        if before:
            note(f"going on with {folder}: {count(before)} of {count(len(cells))} samples are done")
        try:
            with work_bar(task.name) as update:
                run(task, cells, model, filler, drawing, record, _Screen(cells, model, record, update))
        except BaseException:  # Ctrl-C as well: what was answered is kept and counted
            record.reread()
            if record.lines:
                found()
                note(f"{folder} keeps what was answered; the same command goes on from there")
            raise
        return found(), record.lines


# ---- progress --------------------------------------------------------------------------------------------------------


class _Screen:
    """A `Watch`: the bar on a terminal, else a line a sample, both with the time left by the work that is left."""

    def __init__(
        self, cells: Sequence[Cell], model: Model, record: Record, update: Callable[[float, str, str], None] | None
    ) -> None:
        from dsv4_evals.plan import work

        self._update = update
        self._work = {ctx: work(model, ctx) for ctx in {cell.ctx for cell in cells}}
        self._work_of = lambda tokens: work(model, tokens)
        self._cells, self._number = len(cells), 0
        self._left = sum(self._work[cell.ctx] for cell in cells if not record.cell_settled(cell.id))
        self._total = sum(self._work[cell.ctx] for cell in cells)
        self._spent = 0.0  # work of cells that ended since the start
        self._within = 0.0  # share of the current cell
        self._free: float | None = 0.0  # work of the current cell that the cache saved; None before that is known
        self._started = self._told = time.monotonic()
        self._cell: Cell | None = None
        self._lines: list[Line] = []

    def begins(self, cell: Cell) -> None:
        self._cell, self._within, self._lines, self._free = cell, 0.0, [], None
        self._show("building")

    def reads(self, done: int, total: int) -> None:
        self._within = 0.9 * self._work_of(done) / self._work_of(total)
        if self._free is None and self._cell is not None:
            self._free = self._within * self._work[self._cell.ctx]
            self._left -= self._free
        self._show(f"{count(done)} of {count(total)} tokens")

    def answered(self, line: Line) -> None:
        self._lines.append(line)
        self._within = 0.9 + 0.1 * len(self._lines) / line.questions
        self._show(f"{len(self._lines)} of {line.questions} answers")

    def ends(self, cell: Cell) -> None:
        self._number += 1
        if self._cell is None or self._cell.id != cell.id:
            return
        self._spent += self._work[cell.ctx] - (self._free or 0.0)
        self._within, self._cell, self._free = 0.0, None, 0.0
        if self._update is None:
            self._told = time.monotonic()
            scores = [line.score for line in self._lines if not line.negative and line.score is not None]
            score = f"{sum(scores) / len(scores):.2f}" if scores else "-"
            note(f"{self._number}/{self._cells} {cell.id}: {score}, {self._time_left()}", style="dim")

    def _show(self, what: str) -> None:
        if self._cell is None:
            return
        if self._update is not None:
            done = self._total - self._left + self._done()
            self._update(done / self._total, f"sample {self._number + 1} of {self._cells}, {what}", self._time_left())
        elif time.monotonic() - self._told > TELL_EVERY_S:
            self._told = time.monotonic()
            note(f"{self._number + 1}/{self._cells} {self._cell.id}: {what}, {self._time_left()}", style="dim")

    def _done(self) -> float:
        """Work done since the start."""
        doing = self._within * self._work[self._cell.ctx] - (self._free or 0.0) if self._cell else 0.0
        return self._spent + doing

    def _time_left(self) -> str:
        done = self._done()
        if done <= 0:
            return ""
        return f"{duration((time.monotonic() - self._started) * (self._left - done) / done)} left"


# ---- tables ----------------------------------------------------------------------------------------------------------


def show_results(found: Mapping[str, Any], folder: Path) -> None:
    """The table by length of a run's results, and what to say below it."""
    rows = found["by_length"]
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("tokens", lambda row: count(row["ctx"])),
        ("score", lambda row: _share(row["mean"])),
        ("95%", _interval),
        ("of", lambda row: count(row["count"])),
        ("absent", lambda row: _share(row["negatives"]["mean"]) if row["negatives"] else ""),
        ("no answer", lambda row: count(row["no_answer"])),
        ("too long", lambda row: count(row["too_long"])),
        ("failed", lambda row: count(row["error"])),
        ("cache", lambda row: "" if row["kv_bytes"] is None else file_size(row["kv_bytes"])),
        ("of V3.2", lambda row: _ratio(row, "kv_bytes")),
        ("FLOPs", lambda row: _ratio(row, "flops")),
        ("from disk", lambda row: "" if not row["from_cache"] else _share(row["from_cache"])),
        ("read", lambda row: _seconds(row["seconds"]["context"])),
        ("answer", lambda row: _seconds(_sum(row["seconds"]["prefill"], row["seconds"]["decode"]))),
    ]
    used = [(name, cell) for name, cell in columns if any(cell(row) not in ("", "0") for row in rows)]
    title = f"{found['run']['task']} · {found['run']['model']['name']}"
    if any(row["kv_bytes"] for row in rows):
        title += " · cache and FLOPs as shares of DeepSeek-V3.2's"
    table(title, [name for name, _ in used], [[cell(row) for _, cell in used] for row in rows])
    _show_kinds(found)
    effective = found["effective_length"]
    if effective is not None and len(rows) > 1:
        print(
            f"effective length {count(effective)}: up to there every length scores at least "
            f"{found['effective_share']:.0%} of the shortest one"
        )
    print(f"samples and results: {folder}")


def _show_kinds(found: Mapping[str, Any]) -> None:
    """Scores of a task's kinds of samples (the tasks of RULER, say) by length, where there are several."""
    scores: dict[str, dict[int, float | None]] = {}
    for row in found["by_cell"]:
        name = ", ".join(str(value) for key, value in row["params"].items() if key != "depth")
        scores.setdefault(name, {})[row["ctx"]] = row["mean"]
    if len(scores) < 2 or any("depth" in row["params"] for row in found["by_cell"]):
        return
    lengths = [row["ctx"] for row in found["by_length"]]
    rows = [[name, *(_share(means.get(ctx)) for ctx in lengths)] for name, means in scores.items()]
    print()
    table("", ["kind", *map(count, lengths)], rows)
    print()


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f"{100 * row['low']:.0f}-{100 * row['high']:.0f}%"


def _ratio(row: Mapping[str, Any], name: str) -> str:
    ours, theirs = row[name], row[f"{name}_v32"]
    return "" if not ours or not theirs else f"{100 * ours / theirs:.2g}%"


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s" if value < 10 else duration(value)


def _show_plan(task: Task, cells: Sequence[Cell], model: Model, filler: Any, drawing: Drawing, flags: Flags) -> None:
    from dsv4_evals.plan import plan

    rows = plan(task, cells, model, filler, drawing)
    seconds = sum(row.seconds for row in rows)
    memory = model.about().get("memory")
    if flags.json:
        print_json(
            {
                "task": task.name,
                "model": model.name,
                "samples": sum(row.samples for row in rows),
                "questions": sum(row.questions for row in rows),
                "tokens": sum(row.tokens for row in rows),
                "seconds": seconds,
                "memory": memory,
                "by_length": [asdict(row) for row in rows],
                "cells": [cell.id for cell in cells],
            }
        )
        return
    shown = [
        [
            count(row.ctx),
            count(row.samples),
            count(row.questions),
            count(row.tokens),
            duration(row.seconds),
            file_size(row.kv_bytes) if row.kv_bytes else "",
            file_size(row.kv_bytes_v32) if row.kv_bytes_v32 else "",
        ]
        for row in rows
    ]
    names = ("tokens", "samples", "questions", "to read", "about", "cache", "cache of V3.2")
    table(f"{task.name} · {model.name}, planned", names, shown)
    tokens = sum(row.tokens for row in rows)
    samples = "1 sample" if len(cells) == 1 else f"{count(len(cells))} samples"
    print(f"{samples}, {count(tokens)} tokens to read, about {duration(seconds)}")
    if memory:
        most = max((row.kv_bytes or 0 for row in rows), default=0)
        need = memory["weights"] + memory["working_set"] + most
        print(f"memory: up to {file_size(need)} of {file_size(memory['available'])} available")
    if drawing.thinking != "none":
        print(f"not in it: thinking, up to {count(drawing.thinking_tokens)} tokens an answer")
