"""The whole job, laid out before a byte is written: every tensor of the result, where it comes from and where it lies.

Owns the result's shards (the source's, file by file) and their headers, and the units that are worked on and resumed.
Everything follows from the source's headers and the scheme, so every run of a job sees the same units.
Source of the file format: the safetensors specification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dsv4_engine.accounting import part_of
from dsv4_engine.checkpoint import DTYPES, INDEX_NAME, Checkpoint
from dsv4_engine.config import FP4_BLOCK, FP8_BLOCK, ModelConfig
from dsv4_engine.errors import CheckpointError, InputError
from dsv4_engine.strict_json import load_config_json
from dsv4_engine.weights import Form, Weights, scale_shape

from .schemes import PACKED, check_scheme, config_json, target

UNIT_VALUES = 1 << 24  # values that are worked on, counted as done and resumed together
ROWS = FP8_BLOCK  # units and their steps start at multiples of it, so that no block is ever cut
_VERSION = 1  # of the layout and the arithmetic: unfinished work of another version is not continued


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in a file: its type, and for packed types the scales beside it.  Offsets from the file's start.

    columns: values in a row; what is no matrix has rows of one value.
    """

    dtype: str
    columns: int
    start: int
    scale_start: int = 0
    scale_dtype: str = ""

    @property
    def form(self) -> Form:
        return PACKED.get(self.dtype, "plain") if self.scale_dtype else "plain"

    def data(self, first: int, last: int) -> tuple[int, int]:
        """Where the rows first..last lie: offset and bytes."""
        row = self.columns // 2 if self.form == "fp4" else self.columns * DTYPES[self.dtype].itemsize
        return self.start + first * row, (last - first) * row

    def scale(self, first: int, last: int) -> tuple[int, int]:
        """Where the scales of the rows first..last lie; first is a multiple of ROWS."""
        size = DTYPES[self.scale_dtype].itemsize
        if self.form == "fp4":
            row = self.columns // FP4_BLOCK * size
            return self.scale_start + first * row, (last - first) * row
        row = -(-self.columns // FP8_BLOCK) * size
        blocks = -(-last // FP8_BLOCK) - first // FP8_BLOCK
        return self.scale_start + first // FP8_BLOCK * row, blocks * row


@dataclass(frozen=True)
class Piece:
    """One tensor of the result, its scale included, and the source's files that hold it.  number: its place in the job.

    rows x columns: see Layout.
    """

    number: int
    name: str
    part: str
    rows: int
    columns: int
    file: Path
    scale_file: Path | None
    before: Layout
    after: Layout
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Unit:
    """Rows first..last of a piece."""

    piece: Piece
    first: int
    last: int

    @property
    def key(self) -> tuple[int, int]:
        return self.piece.number, self.first

    @property
    def source_bytes(self) -> int:
        size = self.piece.before.data(self.first, self.last)[1]
        return size + (self.piece.before.scale(self.first, self.last)[1] if self.piece.before.form != "plain" else 0)


@dataclass(frozen=True)
class Shard:
    """One file of the result: its header's bytes, the file's size, and what lies in it."""

    name: str
    header: bytes
    size: int
    pieces: tuple[Piece, ...]
    entries: tuple[str, ...]

    def units(self) -> Iterator[Unit]:
        for piece in self.pieces:
            step = max(ROWS, UNIT_VALUES // max(piece.columns, 1) // ROWS * ROWS)
            for first in range(0, piece.rows, step):
                yield Unit(piece, first, min(first + step, piece.rows))


@dataclass(frozen=True)
class Job:
    """What is to be done.  config: the result's config.json; identity: the same only for the same source and scheme."""

    weights: Weights
    scheme: str
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    identity: str

    @property
    def folder(self) -> Path:
        """The source."""
        return self.weights.checkpoint.folder

    @property
    def indexed(self) -> bool:
        return (self.folder / INDEX_NAME).is_file()

    def index_json(self) -> dict[str, Any]:
        total = sum(piece.bytes_after for shard in self.shards for piece in shard.pieces)
        weight_map = {name: shard.name for shard in self.shards for name in shard.entries}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def plan_job(folder: Path, scheme: str) -> Job:
    """Open and check the checkpoint ``folder`` and lay the job out.  Reads headers, no values.

    Raises an InputError that says what is wrong: files missing or damaged, types that the scheme cannot take, nothing
    to do.
    """
    check_scheme(scheme)
    config = ModelConfig.from_folder(folder)
    changed = config_json(load_config_json(folder / "config.json"), scheme)
    ModelConfig.from_dict(changed, f"{folder / 'config.json'}, once quantised")  # its sizes must suit the formats
    checkpoint = Checkpoint.open(folder)
    weights = Weights.open(checkpoint, config, values=False)
    shards = tuple(_Layouts(weights, scheme).shards())
    pieces = [piece for shard in shards for piece in shard.pieces]
    if all(piece.before.dtype == piece.after.dtype for piece in pieces):
        problem = f"{folder} has nothing that the scheme {scheme} would change: every tensor is in its form already"
        raise InputError(problem, "Use it as it is, or choose another scheme.")
    return Job(weights, scheme, shards, changed, identity(checkpoint, scheme))


def identity(checkpoint: Checkpoint, scheme: str) -> str:
    """SHA-256 over what decides every byte of the result.

    A shard's contents are told by its header, its size and when it was changed last.
    """
    told: list[Any] = [_VERSION, scheme, UNIT_VALUES]
    told.append(hashlib.sha256((checkpoint.folder / "config.json").read_bytes()).hexdigest())
    for file in sorted({info.file for info in checkpoint.names.values()}):
        try:
            status = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}", "Check the file.") from error
        told.append((file.name, status.st_size, status.st_mtime_ns, checkpoint.headers[file.name]))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class _Layouts:
    """Lays out the result's shards; used once."""

    def __init__(self, weights: Weights, scheme: str) -> None:
        self._weights, self._scheme = weights, scheme
        names = weights.checkpoint.names
        self._found = {name.removeprefix("model."): info for name, info in names.items()}

    def shards(self) -> Iterator[Shard]:
        """A matrix' scale goes where the matrix is, so a file that holds nothing but scales has no counterpart."""
        by_file: dict[str, list[str]] = {}
        for name in (*self._weights.specs, *self._weights.unused):
            by_file.setdefault(self._found[name].file.name, []).append(name)
        number = 0
        for file in sorted(by_file):
            shard = self._shard(file, by_file[file], number)
            number += len(shard.pieces)
            yield shard

    def _shard(self, file: str, names: list[str], number: int) -> Shard:
        entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in names:
            dtype, shape = self._target(name)
            form = PACKED.get(dtype) if name in self._weights.specs else None
            entries[name] = (dtype, (shape[0], shape[1] // 2) if form == "fp4" else shape)
            if form is not None:
                entries[_scale_name(name)] = ("F8_E8M0", scale_shape((shape[0], shape[1]), form))
        header, starts, size = _header(entries)
        pieces = tuple(self._piece(number + i, name, entries, starts) for i, name in enumerate(names))
        return Shard(file, header, size, pieces, tuple(entries))

    def _target(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type in the result and the shape in values."""
        info, spec = self._found[name], self._weights.specs.get(name)
        if spec is None:  # of a drafter, which is passed on as it is
            return info.dtype, info.shape
        return target(name, spec, self._weights.forms[name], info.dtype, self._scheme), spec.shape

    def _piece(self, number: int, name: str, entries: Mapping[str, Any], starts: Mapping[str, int]) -> Piece:
        info = self._found[name]
        dtype, shape = self._target(name)
        used = name in self._weights.specs
        form = self._weights.forms[name] if used else "plain"
        scale = self._found[_scale_name(name)] if form != "plain" else None
        packs = used and dtype in PACKED
        rows, columns = shape if form != "plain" or packs else (prod(shape), 1)
        before = Layout(info.dtype, columns, info.start)
        if scale is not None:
            before = Layout(info.dtype, columns, info.start, scale.start, scale.dtype)
        after = Layout(dtype, columns, starts[name])
        written = [name]
        if packs:
            written.append(_scale_name(name))
            after = Layout(dtype, columns, starts[name], starts[written[1]], "F8_E8M0")
        return Piece(
            number=number,
            name=name,
            part=part_of(name) if used else "unused",
            rows=rows,
            columns=columns,
            file=info.file,
            scale_file=None if scale is None else scale.file,
            before=before,
            after=after,
            bytes_before=info.nbytes + (scale.nbytes if scale is not None else 0),
            bytes_after=sum(_nbytes(*entries[each]) for each in written),
        )


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPES[dtype].itemsize


def _header(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file's first bytes, every tensor's offset in the file, and the file's size.

    Types of more bytes come first, so that every tensor is aligned to its own.
    """
    order = sorted(entries, key=lambda name: -DTYPES[entries[name][0]].itemsize)
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in order:
        dtype, shape = entries[name]
        offsets[name], end = end, end + _nbytes(dtype, shape)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end
