"""`quantize`: the job from its plan to a whole folder, unit by unit on several threads.

Owns the order of work and what happens when it ends early.  A unit's bytes depend on nothing but the source and the
scheme, and lie at places known beforehand, so neither workers nor interruptions show in the result.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dsv4_engine.errors import CheckpointError, InputError
from dsv4_engine.locate import resolve_model

from .convert import BadValues, Converted, InexactBlock, Tally, convert
from .folder import Folder, begins, finished
from .job import ROWS, Job, Shard, Unit, identity, plan_job
from .report import Report, make_report, unit_record
from .rows import Reader, write_rows

Progress = Callable[[int, int], None]
STEP_VALUES = 1 << 19  # values in flight in one worker; what they pass through takes about 40 bytes each
_KEPT_BYTES = 24 << 20
MOST_WORKERS = 8  # that are started unless more are asked for
SAVE_BYTES = 64 << 20  # of the result between two entries in the journal: the most that a kill costs


class DiskProblem(OSError):
    """The disk did not take what was to be written; `hint` is the next step."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return self.message


class Paused(KeyboardInterrupt):
    """Ctrl-C between two units; `hint` is the next step."""

    hint = "The same command goes on where this one stopped."


def quantize(
    source: str | Path,
    destination: str | Path,
    scheme: str = "published",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint ``source`` (as Engine.load takes it) under a scheme into the folder ``destination``.

    scheme: see schemes.SCHEMES.  workers: threads, by default one a CPU that this process may use; they change no byte
    of the result.  progress(done, total) counts bytes of the source.  A run that ended early, by whatever means, is
    gone on with by the same call.

    Raises an InputError for anything wrong with the arguments, the source's files or values, or the free space;
    DiskProblem when the disk fails on the way.  The source is only read.
    """
    if workers is not None and workers < 1:
        raise InputError(f"{workers} workers cannot work", "Give at least 1.")
    job = plan_job(resolve_model(source), scheme)
    if begins(Path(destination), job):
        job.weights.check_values()  # of what is small: hours of work should not end in what can be seen beforehand
    with Folder.open(Path(destination), job) as folder, _disk_problems(folder), _single_threaded_torch():
        _Run(job, folder, workers or default_workers(), progress).all()
        if identity(job.weights.checkpoint, scheme) != job.identity:
            raise CheckpointError(
                f"{job.folder} was changed while it was read", f"Remove {folder.path} and begin again."
            )
        report = make_report(job, folder.done)
        folder.finish(report.to_dict())
    return report


def finished_report(source: str | Path, destination: str | Path, scheme: str) -> Mapping[str, Any] | None:
    """The report in ``destination`` if that folder is the whole result of this very job, else None.

    Raises an InputError for a source that cannot be quantised so.
    """
    return finished(Path(destination), plan_job(resolve_model(source), scheme))


def default_workers() -> int:
    """One for each CPU that this process may use, at most MOST_WORKERS."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_WORKERS)


class _Run:
    def __init__(self, job: Job, folder: Folder, workers: int, progress: Progress | None) -> None:
        self._job, self._folder, self._workers = job, folder, workers
        self._progress = progress
        units = [unit for shard in job.shards for unit in shard.units()]
        self._total = sum(unit.source_bytes for unit in units)
        self._seen = sum(unit.source_bytes for unit in units if unit.key in folder.done)

    def all(self) -> None:
        self._tell(0)
        # Freeing one large block makes glibc keep blocks up to that size instead of returning them to the system and
        # taking them anew in each step, which would cost a third of the time.
        torch.empty(_KEPT_BYTES, dtype=torch.uint8)
        # torch's own threads would only get in each other's way; sums must not depend on how many there are.
        pool = ThreadPoolExecutor(self._workers, "quantize", initializer=torch.set_num_threads, initargs=(1,))
        try:
            for shard in self._job.shards:
                todo = [unit for unit in shard.units() if unit.key not in self._folder.done]
                if todo:
                    self._shard(pool, shard, todo)
        finally:
            pool.shutdown(cancel_futures=True)

    def _shard(self, pool: ThreadPoolExecutor, shard: Shard, todo: Sequence[Unit]) -> None:
        with self._folder.part(shard) as handle:
            waiting: deque[tuple[Unit, Future[list[Any]]]] = deque()
            records: dict[tuple[int, int], list[Any]] = {}
            held = 0
            try:
                for unit in (*todo, None):
                    if unit is not None:
                        waiting.append((unit, pool.submit(_do, handle, unit)))
                    while waiting and (unit is None or len(waiting) > 2 * self._workers):
                        done, future = waiting.popleft()
                        records[done.key] = future.result()
                        self._tell(done.source_bytes)
                        held += done.piece.after.data(done.first, done.last)[1]
                        if held >= SAVE_BYTES:
                            self._folder.save(handle, records)
                            records, held = {}, 0
                self._folder.save(handle, records)
            except KeyboardInterrupt:
                self._folder.save(handle, records)
                raise Paused from None
            finally:  # nobody may write into a file that is closed, or into another that got its number
                for _, future in waiting:
                    future.cancel()
                for _, future in waiting:
                    if not future.cancelled():
                        future.exception()

    def _tell(self, size: int) -> None:
        self._seen += size
        if self._progress is not None:
            self._progress(self._seen, self._total)


def _do(handle: int, unit: Unit) -> list[Any]:
    """One unit, step by step; what the journal keeps of it."""
    tallies, inexact = list[Tally](), list[InexactBlock]()
    piece = unit.piece
    step = max(ROWS, STEP_VALUES // piece.columns // ROWS * ROWS)
    with torch.inference_mode(), Reader(piece) as reader:
        for first in range(unit.first, unit.last, step):
            last = min(first + step, unit.last)
            done = _convert(reader, piece.name, piece.after.dtype, first, last)
            write_rows(handle, piece.after, first, last, done.rows)
            tallies.append(done.tally)
            inexact += done.inexact
    return unit_record(tallies, inexact)


def _convert(reader: Reader, name: str, dtype: str, first: int, last: int) -> Converted:
    try:
        return convert(reader.rows(first, last), dtype, first)
    except BadValues as error:
        hint = "Get the file again: such values are no weights."
        raise CheckpointError(f"{reader.file}: {name} {error}", hint) from None


@contextmanager
def _disk_problems(folder: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DiskProblem(
            f"{error.filename or folder.path}: {reason}",
            "Once that is mended, run the same command again: it goes on where it stopped.",
        ) from error


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """The setting of the workers reaches threads that start later: put it back."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
