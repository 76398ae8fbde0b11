"""Safetensors files as one collection of named tensors, memory-mapped and checked before any of it is used.

Owns the file format: a folder with model.safetensors.index.json and its shards, or one model.safetensors.  Knows no
model: which names and shapes belong there is weights.py's business.
Source of the format: the safetensors specification (header length, JSON header, data without holes).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4_engine.errors import CheckpointError
from dsv4_engine.locate import INDEX_NAME, SINGLE_NAME
from dsv4_engine.strict_json import parse_json

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMS = 64

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_AGAIN = "The file is damaged or incomplete: run dsv4 download again, which checks every file and repairs it."


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; offsets in bytes from the start of its file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors.  `names` maps every name to its TensorInfo; `headers` holds each shard's header digest."""

    folder: Path
    names: Mapping[str, TensorInfo]
    headers: Mapping[str, str]
    _bytes: Mapping[Path, Tensor] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Map the files and check every header.  Reads headers only, so it is quick whatever the size.

        Raises CheckpointError that names the file: missing, unreadable, truncated, damaged, or not what the index says.
        """
        folder = Path(folder)
        shards = _shards_of(folder)
        names: dict[str, TensorInfo] = {}
        headers: dict[str, str] = {}
        data: dict[Path, Tensor] = {}
        for file, listed in shards.items():
            data[file] = _map(file)
            found, headers[file.name] = _read_header(file, data[file])
            if listed is not None:
                _check_index(file, listed, found)
            names |= found
        return cls(folder, MappingProxyType(names), MappingProxyType(headers), MappingProxyType(data))

    def tensor(self, name: str) -> Tensor:
        """The tensor as it lies in the file, without a copy: pages are read when first touched, and the system may drop
        them again.  It must never be written to (the mapping is read-only).  KeyError for an unknown name.
        """
        info = self.names[name]
        dtype = DTYPES[info.dtype]
        raw = self._bytes[info.file][info.start : info.end]
        if info.start % dtype.itemsize:
            raw = raw.clone()  # legal in the format, written by nobody: torch cannot view unaligned data
        return raw.view(dtype).view(info.shape) if raw.numel() else torch.empty(info.shape, dtype=dtype)

    def copy(self, name: str) -> Tensor:
        """The tensor read into memory of its own.  For passes over much data that is not needed again: a mapping would
        pay a page fault for every 4 KiB, tens of times the cost of reading.  Raises CheckpointError when it cannot.
        """
        info = self.names[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        try:
            with info.file.open("rb", buffering=0) as handle:
                handle.seek(info.start)
                done = 0
                while done < info.nbytes:
                    count = handle.readinto(raw.numpy()[done:].data)
                    if not count:
                        raise CheckpointError(f"{info.file} became shorter while it was read", _AGAIN)
                    done += count
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error.strerror}", "Check the file.") from error
        return raw.view(DTYPES[info.dtype]).view(info.shape)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self.names.values())


def _shards_of(folder: Path) -> dict[Path, set[str] | None]:
    """Every file to read, with the names the index puts there (None for a single file without an index)."""
    try:
        present = {p.name for p in folder.iterdir()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} does not exist", "Give the folder of a downloaded checkpoint.") from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder} is not a folder", "Give the folder that holds config.json.") from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}", "Check its permissions.") from error
    if INDEX_NAME not in present:
        if SINGLE_NAME in present:
            return {folder / SINGLE_NAME: None}
        problem = f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}"
        hint = "If its download is unfinished, run dsv4 download again; else give a folder with safetensors files."
        raise CheckpointError(problem, hint)

    shards: dict[Path, set[str] | None] = {}
    for name, shard in _read_index(folder / INDEX_NAME).items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX_NAME} puts {name} into {shard!r}, which is no shard's name", _AGAIN)
        names = shards.setdefault(folder / shard, set())
        assert names is not None
        names.add(name)
    if absent := sorted(file.name for file in shards if file.name not in present):
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(shards)} shards: {', '.join(absent[:3])}"
            + (", ..." if len(absent) > 3 else ""),
            "The download is unfinished: run dsv4 download again.",
        )
    return dict(sorted(shards.items()))


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "Check its permissions.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}", _AGAIN) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from names to shards", _AGAIN)
    return weight_map


def _map(file: Path) -> Tensor:
    """The whole file as a read-only uint8 tensor."""
    try:
        with file.open("rb") as handle:
            size = handle.seek(0, 2)
            if size < 8:
                raise CheckpointError(f"{file} is truncated: {size} bytes hold no safetensors header", _AGAIN)
            mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}", "Check the file.") from error
    with warnings.catch_warnings():
        # torch warns that one must not write to a read-only buffer; nobody does, and a copy would double the memory.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _read_header(file: Path, data: Tensor) -> tuple[dict[str, TensorInfo], str]:
    """Every tensor of one file, and the header's SHA-256.  Nothing is taken on trust."""
    size = data.numel()
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if length > min(MAX_HEADER, size - 8):
        if data[:8].numpy().tobytes() == b"version ":
            raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself", "Run `git lfs pull` there.")
        raise CheckpointError(f"{file} is damaged or truncated: a header of {length} bytes in {size}", _AGAIN)
    text = data[8 : 8 + length].numpy().tobytes()
    try:
        header = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: its header is not JSON ({error})", _AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is damaged: its header is not a JSON object", _AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file} is damaged: its metadata are not strings", _AGAIN)

    found = {name: _read_entry(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise CheckpointError(f"{file} is damaged: {name} {what}", _AGAIN)
        end = info.end
    if end != size:
        raise CheckpointError(f"{file} is damaged or truncated: {size} bytes, but its header describes {end}", _AGAIN)
    return found, hashlib.sha256(text).hexdigest()


def _read_entry(file: Path, name: str, entry: object, base: int) -> TensorInfo:
    def bad(problem: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged: {name} {problem}", _AGAIN)

    if not name.isprintable():
        raise CheckpointError(f"{file} is damaged: it names a tensor {name!r}", _AGAIN)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _sizes(shape) or len(shape) > MAX_DIMS:
        raise bad(f"has the shape {str(shape)[:80]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"has the offsets {str(offsets)[:80]}")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise bad(f"has {end - start} bytes, which {dtype} {shape} does not fill")
    return TensorInfo(dtype, tuple(shape), file, base + start, base + end)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_index(file: Path, listed: set[str], found: Mapping[str, TensorInfo]) -> None:
    if absent := sorted(listed - found.keys()):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(f"{file} lacks {absent[0]}{more}, which {INDEX_NAME} puts there", _AGAIN)
    if extra := sorted(found.keys() - listed):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        hint = "The index and the shard are of different downloads; get both again."
        raise CheckpointError(f"{file} holds {extra[0]}{more}, which {INDEX_NAME} does not put there", hint)
