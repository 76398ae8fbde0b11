"""What a job did to the values, added up: by part and change of type, by tensor, and the blocks that were not exact.

Owns the sums.  They run over units in the job's order, so the report does not depend on workers or interruptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsv4_engine.accounting import PARTS

from .convert import InexactBlock, Tally
from .job import Job, Piece

SHOWN_BLOCKS = 8  # of one tensor that are named; all are counted


@dataclass(frozen=True)
class Row:
    """One part's tensors that changed alike.  before, after: types and bytes; relative_error: root mean square.

    worst: the tensor with the largest relative error, and that error; None where nothing changed.
    """

    part: str
    before: str
    after: str
    tensors: int
    bytes_before: int
    bytes_after: int
    tally: Tally
    worst: tuple[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        t = self.tally
        return {
            "part": self.part,
            "from": self.before,
            "to": self.after,
            "tensors": self.tensors,
            "values": t.values,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "relative_error": t.relative_error,
            "saturated": t.saturated,
            "zeroed": t.zeroed,
            "worst": None if self.worst is None else {"tensor": self.worst[0], "relative_error": self.worst[1]},
        }


@dataclass(frozen=True)
class Inexact:
    """A tensor that FP8 does not hold without loss: how many of its blocks, and the first of them."""

    tensor: str
    blocks: int
    changed: int
    error: float
    shown: tuple[InexactBlock, ...]


@dataclass(frozen=True)
class Report:
    """The whole account.  lossless: of a scheme that promises it, whether it was kept; None for others."""

    job: str
    scheme: str
    rows: tuple[Row, ...]
    inexact: tuple[Inexact, ...]
    lossless: bool | None

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {
            "job": self.job,
            "scheme": self.scheme,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "lossless": self.lossless,
            "kinds": [row.to_dict() for row in self.rows],
            "inexact": [asdict(tensor) for tensor in self.inexact],
        }


def unit_record(tallies: Sequence[Tally], blocks: Sequence[InexactBlock]) -> list[Any]:
    """What the journal keeps of a unit, from its steps in order."""
    tally = sum(tallies, Tally())
    record: list[Any] = [getattr(tally, f.name) for f in fields(tally)]
    if blocks:
        counts = [len(blocks), max(block.error for block in blocks), sum(block.changed for block in blocks)]
        record.append([*counts, [[getattr(b, f.name) for f in fields(b)] for b in blocks[:SHOWN_BLOCKS]]])
    return record


def make_report(job: Job, done: Mapping[tuple[int, int], list[Any]]) -> Report:
    """The account of a job all of whose units are in ``done``."""
    groups: dict[tuple[str, str, str], list[tuple[Piece, Tally]]] = {}
    inexact = []
    width = len(fields(Tally))
    for shard in job.shards:
        records: dict[int, list[list[Any]]] = {}
        for unit in shard.units():
            records.setdefault(unit.piece.number, []).append(done[unit.key])
        for piece in shard.pieces:
            mine = records[piece.number]
            tally = sum((Tally(*record[:width]) for record in mine), Tally())
            groups.setdefault((piece.part, _name(piece.before.dtype), _name(piece.after.dtype)), []).append(
                (piece, tally)
            )
            if bad := [record[width] for record in mine if len(record) > width]:
                shown = [InexactBlock(*block) for *_, blocks in bad for block in blocks][:SHOWN_BLOCKS]
                counted = sum(count for count, *_ in bad)
                worst = max(error for _, error, *_ in bad)
                changed = sum(number for _, _, number, _ in bad)
                inexact.append(Inexact(piece.name, counted, changed, worst, tuple(shown)))
    order = (*PARTS, "mtp", "unused")
    rows = tuple(_row(*names, groups[names]) for names in sorted(groups, key=lambda names: order.index(names[0])))
    return Report(job.identity, job.scheme, rows, tuple(inexact), not inexact if job.scheme == "fp8" else None)


def _row(part: str, before: str, after: str, group: list[tuple[Piece, Tally]]) -> Row:
    changed = [(tally.relative_error, piece.name) for piece, tally in group if tally.error]
    worst = max(changed, key=lambda pair: pair[0]) if changed else None
    return Row(
        part=part,
        before=before,
        after=after,
        tensors=len(group),
        bytes_before=sum(piece.bytes_before for piece, _ in group),
        bytes_after=sum(piece.bytes_after for piece, _ in group),
        tally=sum((tally for _, tally in group), Tally()),
        worst=None if worst is None else (worst[1], worst[0]),
    )


def _name(dtype: str) -> str:
    """How people call it."""
    return {"I8": "FP4", "F8_E4M3": "FP8"}.get(dtype, dtype)
