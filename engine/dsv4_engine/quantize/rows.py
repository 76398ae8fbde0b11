"""Rows of tensors from the source's files and into the result's, by plain reads and writes at their places.

Owns the bytes between Layout and tensors.  No file is mapped and none is held: memory is what the rows take.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dsv4_engine.checkpoint import DTYPES
from dsv4_engine.config import FP4_BLOCK, FP8_BLOCK
from dsv4_engine.errors import CheckpointError
from dsv4_kernels.linear import Weight

from .job import Layout, Piece


class Reader:
    """The files behind one piece; closed at the end of a with block."""

    def __init__(self, piece: Piece) -> None:
        self._piece = piece
        self._files: dict[Path, int] = {}

    @property
    def file(self) -> Path:
        return self._piece.file

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def rows(self, first: int, last: int) -> Weight:
        """Rows as the source holds them.  Raises CheckpointError when a file cannot be read or became shorter."""
        piece, layout = self._piece, self._piece.before
        count, columns = last - first, layout.columns
        width = columns // 2 if layout.form == "fp4" else columns
        data = self._read(piece.file, *layout.data(first, last)).view(DTYPES[layout.dtype]).view(count, width)
        if layout.form == "plain":
            return Weight(data)
        assert piece.scale_file is not None
        scale = self._read(piece.scale_file, *layout.scale(first, last)).view(DTYPES[layout.scale_dtype])
        return Weight(data, scale.view(-1, scale_columns(layout)), layout.form)

    def _read(self, file: Path, offset: int, size: int) -> Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        view = raw.numpy().data
        try:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            done = 0
            while done < size:
                count = os.preadv(self._files[file], [view[done:]], offset + done)
                if not count:
                    raise CheckpointError(f"{file} became shorter while it was read", "Leave the source alone.")
                done += count
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}", "Check the file.") from error
        return raw


def scale_columns(layout: Layout) -> int:
    """Scales in a row of scales."""
    return layout.columns // FP4_BLOCK if layout.form == "fp4" else -(-layout.columns // FP8_BLOCK)


def write_rows(handle: int, layout: Layout, first: int, last: int, rows: Weight) -> None:
    """Put rows where the layout has them.  OSError where the disk does not take them."""
    offset, size = layout.data(first, last)
    _write(handle, offset, size, rows.data)
    if layout.form != "plain":
        assert rows.scale is not None
        offset, size = layout.scale(first, last)
        _write(handle, offset, size, rows.scale)


def _write(handle: int, offset: int, size: int, data: Tensor) -> None:
    view = data.contiguous().view(torch.uint8).flatten().numpy().data
    assert len(view) == size, (offset, size, data.shape, data.dtype)
    write_all(handle, offset, view)


def write_all(handle: int, offset: int, data: memoryview | bytes) -> None:
    """All of ``data`` at ``offset``: a disk that is nearly full takes a part before it refuses."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)
