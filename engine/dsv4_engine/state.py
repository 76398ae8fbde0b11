"""One sequence's state: window rows, compressed rows, unfinished blocks, and the formats rows are kept in.

Owns how rows are stored and shared between forks; knows nothing of weights, of files, or of what a row means.
Compressed rows are append-only, so forks share them; everything else is replaced, never written in place.
Letters: N rows, C channels, R tokens of a block, E channels of the compressor's projections.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_kernels.rounding import hadamard, round_fp4

from .config import ModelConfig
from .formats import pack_index_keys, pack_rows, unpack_index_keys, unpack_rows

KvDtype = Literal["mixed", "bf16", "fp32"]
KV_DTYPES: tuple[str, ...] = get_args(KvDtype)
SEGMENT_ROWS = 2048
GPU_SEGMENT_ROWS = 32_768  # every segment costs a read some launches, which a GPU feels more than the reserve
FIRST_ROWS = 64
CPU = torch.device("cpu")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RowFormat:
    """How rows of ``channels`` float32 values are stored: ``encode`` to a storage tensor [N, ...], ``decode`` back.

    kind "mixed": the published bytes (attention rows: e4m3 + bf16 rope channels + e8m0 scales; index keys: e2m1 +
    e8m0 after a Hadamard turn).  "bf16" and "fp32": the values in that type.
    """

    kind: KvDtype
    channels: int
    rope_dim: int
    index_keys: bool = False

    def encode(self, x_NC: Tensor) -> Tensor:
        if self.kind == "fp32":
            return x_NC
        if self.kind == "bf16":
            return x_NC.to(torch.bfloat16)
        return pack_index_keys(hadamard(x_NC)) if self.index_keys else pack_rows(x_NC, self.rope_dim)

    def decode(self, rows: Tensor) -> Tensor:
        if self.kind != "mixed":
            return rows.float()
        if self.index_keys:
            return unpack_index_keys(rows)
        return unpack_rows(rows, self.channels, self.rope_dim)

    def rounded(self, x_NC: Tensor) -> Tensor:
        """``x`` as it would come back from storage, so that a row is the same before and after it is stored."""
        return x_NC if self.kind == "fp32" else self.decode(self.encode(x_NC))

    def queries(self, q: Tensor) -> Tensor:
        """Index queries in the space and precision of the index keys."""
        return round_fp4(hadamard(q)) if self.kind == "mixed" else q


class Rows:
    """An append-only list of rows in a `RowFormat`, stored in segments that forks share.

    Only the unshared tail is ever written, beyond its last row: a plain copy of this object stays what it is while the
    list goes on, and after `freeze` both may go on, apart.
    """

    def __init__(self, fmt: RowFormat, device: torch.device = CPU) -> None:
        self.fmt, self.device = fmt, device
        self._segment_rows = SEGMENT_ROWS if device.type == "cpu" else GPU_SEGMENT_ROWS
        self._full: tuple[Tensor, ...] = ()
        self._tail: Tensor | None = None
        self._tail_array: Floats | None = None  # the same memory, where it holds float32 on the host
        self._tail_rows = 0
        self._count = 0
        self._ahead = 0  # rows behind the last one that are known already (see `known`)

    @classmethod
    def known(cls, fmt: RowFormat, stored: Tensor, count: int) -> Rows:
        """A list over rows in storage, [N, ...], which are not copied.  It shows the first ``count``.

        `append` shows the others, N - count in all, in place of what it is given: tokens that are run again only to
        find their windows have rows that are right already.
        """
        rows = cls(fmt, stored.device)
        rows._full, rows._count, rows._ahead = (stored,), count, stored.shape[0] - count
        return rows

    def __len__(self) -> int:
        return self._count

    def __copy__(self) -> Rows:
        other = object.__new__(type(self))  # `copy` goes a longer way, which a decoded token of a small model feels
        other.__dict__.update(self.__dict__)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held (not of the reserve behind the last one)."""
        if self._count == 0:
            return 0
        some = self._full[0] if self._full else self._tail
        assert some is not None
        return self._count * some[:1].nbytes

    def append(self, x_NC: Tensor) -> None:
        """Add float32 rows [N, C] at the end."""
        if not x_NC.shape[0]:
            return
        if self._ahead:
            assert x_NC.shape[0] <= self._ahead, "known rows end within a chunk"
            self._ahead -= x_NC.shape[0]
            self._count += x_NC.shape[0]
            return
        new = self.fmt.encode(x_NC)
        while new.shape[0]:
            if self._tail is not None and self._tail_rows == self._segment_rows:
                self.freeze()
            space = min(self._segment_rows, self._tail_rows + new.shape[0])
            if self._tail is None or self._tail.shape[0] < space:
                self._grow(space, new)
            assert self._tail is not None
            taken = min(new.shape[0], self._tail.shape[0] - self._tail_rows)
            self._tail[self._tail_rows : self._tail_rows + taken] = new[:taken]
            self._tail_rows += taken
            self._count += taken
            new = new[taken:]

    def read(self, start: int, end: int) -> Tensor:
        """Rows [start, end) as float32 [end - start, C]."""
        parts = self._slices(start, end)
        if len(parts) == 1:
            return self.fmt.decode(parts[0][1])
        out = torch.empty(end - start if parts else 0, self.fmt.channels, device=self.device)
        for first, part in parts:
            out[first - start : first - start + part.shape[0]] = self.fmt.decode(part)
        return out

    def in_place(self) -> Floats | None:
        """All rows where they are stored, [N, C], if as one piece of float32 on the host.  Not to be written to."""
        return None if self._tail_array is None or self._full else self._tail_array[: self._count]

    def stored(self, start: int, end: int) -> list[Tensor]:
        """Rows [start, end) as they are stored, in order, in tensors [n, ...] that must not be written to."""
        return [part for _, part in self._slices(start, end)]

    def held(self) -> list[Tensor]:
        """All rows as they are stored, with those `known` behind the last one."""
        return [part for _, part in self._slices(0, self._count + self._ahead)]

    def gather(self, index: Tensor) -> Tensor:
        """Rows at ``index`` (int64 [N], rising) as float32 [N, C]."""
        slices = self._slices(0, self._count)
        if len(slices) == 1:
            return self.fmt.decode(slices[0][1].index_select(0, index))
        starts = torch.tensor([start for start, _ in slices], device=index.device)
        bounds = [*torch.searchsorted(index, starts).tolist(), index.shape[0]]
        parts = [
            part.index_select(0, index[low:high] - start)
            for (start, part), (low, high) in zip(slices, pairwise(bounds), strict=True)
            if high > low
        ]
        return self.fmt.decode(torch.cat(parts) if len(parts) > 1 else parts[0])

    def freeze(self) -> None:
        """Give up the reserve behind the last row, so that copies made from now on share no memory that is written."""
        if self._tail is not None and self._tail_rows:
            self._full = (*self._full, self._tail[: self._tail_rows])
        self._tail, self._tail_array, self._tail_rows = None, None, 0

    def _grow(self, rows: int, like: Tensor) -> None:
        size = FIRST_ROWS
        while size < rows:
            size *= 2
        grown = torch.empty((min(size, self._segment_rows), *like.shape[1:]), dtype=like.dtype, device=like.device)
        if self._tail is not None:
            grown[: self._tail_rows] = self._tail[: self._tail_rows]
        self._tail = grown
        self._tail_array = grown.numpy() if self.fmt.kind == "fp32" and grown.device.type == "cpu" else None

    def _slices(self, start: int, end: int) -> list[tuple[int, Tensor]]:
        if not self._full and self._tail is not None and start < end <= self._tail_rows:
            return [(start, self._tail[start:end])]
        parts = self._full if self._tail is None else (*self._full, self._tail[: self._tail_rows])
        found, first = [], 0
        for part in parts:
            low, high = max(start - first, 0), min(end - first, part.shape[0])
            if low < high:
                found.append((first + low, part[low:high]))
            first += part.shape[0]
        return found


@dataclass
class BlockState:
    """A compressor's open end: the unfinished block and, for overlapping blocks, half of the last finished one.

    pending: float32 [< R, 2E], the projections kv and gate side by side.  previous: kv and gate, float32 [R, C] each,
    position bias added; None without overlap.
    """

    pending_rows: Tensor | Floats  # an array where a step of one token left it: a tensor costs such a step too much
    previous: tuple[Tensor, Tensor] | None = None

    @property
    def pending(self) -> Tensor:
        self.pending_rows = _tensor(self.pending_rows)
        return self.pending_rows

    @pending.setter
    def pending(self, rows: Tensor) -> None:
        self.pending_rows = rows

    @classmethod
    def empty(cls, ratio: int, channels: int, overlap: bool, device: torch.device = CPU) -> BlockState:
        if not overlap:
            return cls(torch.empty(0, 2 * channels, device=device))
        kv, gate = torch.zeros(ratio, channels, device=device), torch.full((ratio, channels), -torch.inf, device=device)
        return cls(torch.empty(0, 4 * channels, device=device), (kv, gate))


@dataclass
class LayerState:
    """One layer's state.  window: float32 values of at most sliding_window - 1 past rows [.., C]."""

    window_rows: Tensor | Floats  # an array as in BlockState
    block: BlockState | None = None
    entries: Rows | None = None
    index_block: BlockState | None = None
    index_keys: Rows | None = None

    @property
    def window(self) -> Tensor:
        self.window_rows = _tensor(self.window_rows)
        return self.window_rows

    @window.setter
    def window(self, rows: Tensor) -> None:
        self.window_rows = rows

    def mark(self) -> LayerState:
        """This state as it is now: it stays so while this one goes on.  Only one of the two may go on (else `fork`)."""
        block, index_block = self.block, self.index_block
        return LayerState(
            self.window_rows,
            block and BlockState(block.pending_rows, block.previous),
            copy(self.entries),
            index_block and BlockState(index_block.pending_rows, index_block.previous),
            copy(self.index_keys),
        )

    def fork(self) -> LayerState:
        """A state with the same past that grows apart; the past's rows are shared, not copied."""
        for rows in (self.entries, self.index_keys):
            if rows is not None:
                rows.freeze()
        return self.mark()

    @property
    def nbytes(self) -> int:
        blocks = [b for b in (self.block, self.index_block) if b is not None]
        tensors = [t for b in blocks for t in (b.pending, *(b.previous or ()))]
        rows = [r for r in (self.entries, self.index_keys) if r is not None]
        return self.window.nbytes + sum(t.nbytes for t in tensors) + sum(r.nbytes for r in rows)


def _tensor(rows: Tensor | Floats) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.from_numpy(rows)


class Version:
    """What a state holds, by number, where several processes keep the same states (following.py)."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class SequenceState:
    """All layers' states after ``position`` tokens.  version: None unless other processes hold the same state."""

    layers: list[LayerState]
    position: int = 0
    version: Version | None = None
    watched: bool = False  # the layers are watched from outside: only the GPU's engine has another way to run them
    _saved: SequenceState | None = field(default=None, repr=False)

    def mark(self) -> SequenceState:
        """See LayerState.mark."""
        return SequenceState([layer.mark() for layer in self.layers], self.position, self.version)

    def fork(self) -> SequenceState:
        """See LayerState.fork."""
        return SequenceState([layer.fork() for layer in self.layers], self.position, self.version)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def save(self) -> None:
        """Remember this point, so that `restore` undoes an advance that was interrupted half way."""
        self._saved = self.mark()

    def restore(self) -> None:
        """Back to the last `save`."""
        assert self._saved is not None
        self.layers, self.position, self.version = self._saved.layers, self._saved.position, self._saved.version
        self._saved = None


def row_formats(config: ModelConfig, kv_dtype: KvDtype) -> tuple[RowFormat, RowFormat]:
    """The formats of attention rows and of index keys."""
    rope = config.qk_rope_head_dim
    return (
        RowFormat(kv_dtype, config.head_dim, rope),
        RowFormat(kv_dtype, config.index_head_dim, rope, index_keys=True),
    )


def new_layer_state(config: ModelConfig, ratio: int, kv_dtype: KvDtype, device: torch.device = CPU) -> LayerState:
    """The state of a layer with this compress ratio before the first token."""
    attention, index = row_formats(config, kv_dtype)
    state = LayerState(torch.empty(0, config.head_dim, device=device))
    if ratio:
        state.block = BlockState.empty(ratio, config.head_dim, overlap=ratio == 4, device=device)
        state.entries = Rows(attention, device)
    if ratio == 4:
        state.index_block = BlockState.empty(ratio, config.index_head_dim, overlap=True, device=device)
        state.index_keys = Rows(index, device)
    return state
