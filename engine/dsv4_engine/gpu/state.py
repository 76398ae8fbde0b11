"""One sequence's state on GPUs: per device one flat buffer for all that is small, and slabs of compressed rows.

Owns where things lie and how forks share them; knows nothing of weights.  A layer's window rows lie in a ring by
position, the compressor's projected tokens in another, so that one step can be repeated without a trace, and a copy of
the flat buffer is a copy of everything but the rows.  Rows lie in segments of SEGMENT_ROWS; a slab is the same segment
of all layers with one compress ratio.  Tables of their addresses are part of the flat buffer.
Letters: R ring slots, T segments, C channels, L lists of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv4_kernels.triton.rows import (
    SEGMENT_ROWS,
    from_block,
    index_key_bytes,
    row_bytes,
    to_block,
    value_bytes,
)

from ..config import ModelConfig
from ..state import BlockState, LayerState, RowFormat, Rows, SequenceState, row_formats

WINDOW_RING = 256  # twice what is read: writing a token's row never touches what the token before it saw
TOKEN_RING = {4: 8, 128: 128}  # tokens whose projections a compressor may still need
_ALIGNED = 256
RATIOS = (4, 128)


@dataclass(frozen=True)
class LayerBuffers:
    """Views of one layer's part of a flat buffer.

    window: uint8, a block of WINDOW_RING rows.  ring: float32 [R, 2E], kv and gate of recent tokens side by side, the
    gate with its position bias; index_ring: the same of the indexer's compressor.  entries, index_keys: int64 [1, T],
    addresses of segments.  None where the layer has no such thing.
    """

    ratio: int
    window: Tensor
    ring: Tensor | None
    index_ring: Tensor | None
    entries: Tensor | None
    index_keys: Tensor | None


class Layout:
    """Where everything of consecutive layers lies in their device's flat buffer and slabs."""

    def __init__(self, config: ModelConfig, ratios: Sequence[int], device: torch.device) -> None:
        """ratios: compress ratio of each of these layers."""
        self.config, self.ratios, self.device = config, tuple(ratios), device
        self.size = 0
        channels, index = config.head_dim, config.index_head_dim
        self.segments = {r: -(-(config.max_position_embeddings // r) // SEGMENT_ROWS) for r in RATIOS}
        self._entry_bytes = SEGMENT_ROWS * row_bytes(channels)
        self._key_bytes = SEGMENT_ROWS * index_key_bytes(index)
        # One slab: the entries of every layer of its ratio, then (ratio 4) their index keys.
        self.offsets: dict[int, Tensor] = {}
        self.slab_bytes: dict[int, int] = {}
        self._tables: dict[int, int] = {}
        for ratio in RATIOS:
            layers = self.ratios.count(ratio)
            starts = [i * self._entry_bytes for i in range(layers)]
            if ratio == 4:
                starts += [layers * self._entry_bytes + i * self._key_bytes for i in range(layers)]
            self.offsets[ratio] = torch.tensor(starts, dtype=torch.int64, device=device)
            self.slab_bytes[ratio] = layers * (self._entry_bytes + (self._key_bytes if ratio == 4 else 0))
            self._tables[ratio] = self._take(8 * len(starts) * self.segments[ratio])
        self._places = []
        for ratio in self.ratios:
            window = self._take(WINDOW_RING * row_bytes(channels))
            width = 2 * channels * (2 if ratio == 4 else 1)
            ring = self._take(4 * TOKEN_RING[ratio] * width) if ratio else 0
            index_ring = self._take(4 * TOKEN_RING[4] * 4 * index) if ratio == 4 else 0
            self._places.append((window, ring, index_ring, width))

    def _take(self, size: int) -> int:
        start = self.size
        self.size += size + -size % _ALIGNED
        return start

    def empty(self) -> Tensor:
        """The flat buffer before the first token."""
        return torch.zeros(self.size, dtype=torch.uint8, device=self.device)

    def table(self, flat: Tensor, ratio: int) -> Tensor:
        """int64 [L, T]: the segments' addresses of every list of rows with this ratio."""
        lists = self.offsets[ratio].shape[0]
        size = 8 * lists * self.segments[ratio]
        start = self._tables[ratio]
        return flat[start : start + size].view(torch.int64).view(lists, self.segments[ratio])

    def buffers(self, flat: Tensor) -> list[LayerBuffers]:
        """Each layer's views."""
        tables = {ratio: self.table(flat, ratio) for ratio in RATIOS}
        found, seen = [], dict.fromkeys((0, *RATIOS), 0)
        for ratio, (window, ring, index_ring, width) in zip(self.ratios, self._places, strict=True):
            number, layers = seen[ratio], self.ratios.count(ratio)
            seen[ratio] += 1
            slots = TOKEN_RING[ratio] if ratio else 0
            found.append(
                LayerBuffers(
                    ratio,
                    flat[window : window + WINDOW_RING * row_bytes(self.config.head_dim)],
                    _floats(flat, ring, slots, width) if ratio else None,
                    _floats(flat, index_ring, slots, 4 * self.config.index_head_dim) if ratio == 4 else None,
                    tables[ratio][number : number + 1] if ratio else None,
                    tables[4][layers + number : layers + number + 1] if ratio == 4 else None,
                )
            )
        return found

    def segment(self, slab: Tensor, layer: int, keys: bool = False) -> Tensor:
        """One layer's part of a slab: a block of attention rows, or index keys [SEGMENT_ROWS, B]."""
        ratio = self.ratios[layer]
        number = self.ratios[:layer].count(ratio)
        if not keys:
            return slab[number * self._entry_bytes : (number + 1) * self._entry_bytes]
        start = self.ratios.count(4) * self._entry_bytes + number * self._key_bytes
        return slab[start : start + self._key_bytes].view(SEGMENT_ROWS, -1)


def _floats(flat: Tensor, start: int, rows: int, width: int) -> Tensor:
    return flat[start : start + 4 * rows * width].view(torch.float32).view(rows, width)


@dataclass
class Part:
    """What one device holds of a sequence: its flat buffer and, by compress ratio, its slabs."""

    layout: Layout
    flat: Tensor
    slabs: dict[int, list[Tensor]] = field(default_factory=lambda: {ratio: [] for ratio in RATIOS})
    _views: tuple[Tensor, list[LayerBuffers]] | None = field(default=None, repr=False)

    @property
    def buffers(self) -> list[LayerBuffers]:
        """Each layer's views of the flat buffer."""
        if self._views is None or self._views[0] is not self.flat:
            self._views = (self.flat, self.layout.buffers(self.flat))
        return self._views[1]

    @classmethod
    def unread(cls, layout: Layout) -> Part:
        """A part whose tables point to one slab again and again: rows written there are never read."""
        part = cls(layout, layout.empty())
        for ratio, slabs in part.slabs.items():
            slabs.append(torch.empty(layout.slab_bytes[ratio], dtype=torch.uint8, device=layout.device))
            layout.table(part.flat, ratio).copy_((layout.offsets[ratio] + slabs[0].data_ptr())[:, None])
        return part

    def reserve(self, tokens: int) -> None:
        """Room for the rows of so many tokens."""
        for ratio, slabs in self.slabs.items():
            if not self.layout.slab_bytes[ratio]:
                continue
            while len(slabs) * SEGMENT_ROWS < tokens // ratio:
                slabs.append(torch.empty(self.layout.slab_bytes[ratio], dtype=torch.uint8, device=self.flat.device))
                self.point(ratio, len(slabs) - 1)

    def point(self, ratio: int, number: int) -> None:
        """Let the table know where a slab lies."""
        column = self.layout.table(self.flat, ratio)[:, number]
        torch.add(self.layout.offsets[ratio], self.slabs[ratio][number].data_ptr(), out=column)

    def mark(self) -> Part:
        return Part(self.layout, self.flat.clone(), {ratio: list(slabs) for ratio, slabs in self.slabs.items()})

    def fork(self, position: int) -> Part:
        """A mark whose last slabs, where rows are still added, are its own."""
        other = self.mark()
        for ratio, slabs in other.slabs.items():
            full = position // ratio // SEGMENT_ROWS
            for number in range(full, len(slabs)):
                slabs[number] = slabs[number].clone()
                other.point(ratio, number)
        return other


@dataclass
class GpuState:
    """A sequence after ``position`` tokens; the interface of dsv4_engine.state.SequenceState.

    known: rows of the first so many tokens are there already; those behind ``position`` are not written again when
    their tokens are run to find the windows.  watched: steps are launched one by one, so that layers can be watched.
    """

    parts: list[Part]
    config: ModelConfig
    position: int = 0
    known: int = 0
    watched: bool = False
    _saved: int | None = field(default=None, repr=False)
    _backup: list[Tensor] | None = field(default=None, repr=False)

    @classmethod
    def empty(cls, layouts: Sequence[Layout], config: ModelConfig) -> GpuState:
        return cls([Part(layout, layout.empty()) for layout in layouts], config)

    def mark(self) -> GpuState:
        """See LayerState.mark."""
        return GpuState([part.mark() for part in self.parts], self.config, self.position, self.known, self.watched)

    def fork(self) -> GpuState:
        """See LayerState.fork."""
        parts = [part.fork(max(self.position, self.known)) for part in self.parts]
        return GpuState(parts, self.config, self.position, self.known, self.watched)

    def save(self) -> None:
        """Remember this point.  A step of one token needs nothing more; before a chunk see `backup`."""
        self._saved, self._backup = self.position, None

    def backup(self) -> None:
        """Keep what a chunk of several tokens overwrites."""
        self._backup = [part.flat.clone() for part in self.parts]

    def restore(self) -> None:
        """Back to the last `save`."""
        assert self._saved is not None
        self.position, self._saved = self._saved, None
        if self._backup is not None:
            for part, flat in zip(self.parts, self._backup, strict=True):
                tables = {ratio: part.layout.table(part.flat, ratio).clone() for ratio in RATIOS}
                part.flat.copy_(flat)
                for ratio, table in tables.items():  # slabs that were added meanwhile stay
                    part.layout.table(part.flat, ratio).copy_(table)
            self._backup = None

    def reserve(self, tokens: int) -> None:
        for part in self.parts:
            part.reserve(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of rows, windows and open blocks held, as SequenceState counts them: not the rings' reserve."""
        formats, total = row_formats(self.config, "mixed"), 0
        window = min(self.position, self.config.sliding_window - 1) * row_bytes(self.config.head_dim)
        for part in self.parts:
            for ratio in part.layout.ratios:
                total += window
                if not ratio:
                    continue
                for fmt in formats[: 2 if ratio == 4 else 1]:
                    size = index_key_bytes(fmt.channels) if fmt.index_keys else row_bytes(fmt.channels)
                    halves = 2 if ratio == 4 else 1
                    total += self.position // ratio * size + self.position % ratio * 8 * halves * fmt.channels
                    total += 8 * 4 * fmt.channels if ratio == 4 else 0
        return total

    # ---- as the other backends hold it -------------------------------------------------------------------------------

    @property
    def layers(self) -> list[LayerState]:
        """Every layer's state as SequenceState holds it, to be read: windows as values, rows as they are stored.

        Open blocks are shown where there is none, at multiples of 128 tokens; elsewhere the whole blocks before them.
        """
        return [
            _layer_state(part, number, buffers, self.position, self.config)
            for part in self.parts
            for number, buffers in enumerate(part.buffers)
        ]

    @classmethod
    def adopted(cls, state: SequenceState, layouts: Sequence[Layout], config: ModelConfig) -> GpuState:
        """The same sequence, which ends on a multiple of 128 tokens, in this form."""
        assert state.position % 128 == 0
        new = cls.empty(layouts, config)
        known = [
            sum(some.shape[0] for some in layer.entries.held()) * ratio
            for layer, ratio in zip(state.layers, config.compress_ratios, strict=True)
            if layer.entries is not None
        ]
        new.position, new.known = state.position, max(known, default=0)
        new.reserve(new.known)
        layers = iter(state.layers)
        for part in new.parts:
            for number, buffers in enumerate(part.buffers):
                _adopt_layer(part, number, buffers, next(layers), state.position, config)
        return new


class SegmentRows(Rows):
    """Rows in segments, read as others are; nothing can be appended here."""

    def __init__(self, fmt: RowFormat, segments: Sequence[Tensor], count: int) -> None:
        """segments: blocks of attention rows, or index keys [SEGMENT_ROWS, B]."""
        super().__init__(fmt, segments[0].device if segments else torch.device("cpu"))
        self._segments, self._count = segments, count

    @property
    def nbytes(self) -> int:
        size = index_key_bytes if self.fmt.index_keys else row_bytes
        return self._count * size(self.fmt.channels)

    def append(self, x_NC: Tensor) -> None:
        raise AssertionError("rows on a GPU are written by its kernels")

    def _slices(self, start: int, end: int) -> list[tuple[int, Tensor]]:
        found = []
        for number in range(start // SEGMENT_ROWS, -(-end // SEGMENT_ROWS)):
            first, segment = number * SEGMENT_ROWS, self._segments[number]
            rows = segment if self.fmt.index_keys else from_block(segment, self.fmt.channels)
            low, high = max(start - first, 0), min(end - first, SEGMENT_ROWS)
            found.append((first + low, rows[low:high]))
        return found


def ring_rows(block: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """A block's values [R, V] and scales [R, B], as views."""
    values, size = value_bytes(channels), block.numel() // row_bytes(channels)
    return block[: size * values].view(size, values), block[size * values :].view(size, -1)


def _layer_state(part: Part, number: int, buffers: LayerBuffers, position: int, config: ModelConfig) -> LayerState:
    attention, index = row_formats(config, "mixed")
    ratio, device = buffers.ratio, part.flat.device
    seen = torch.arange(max(0, position - config.sliding_window + 1), position, device=device) % WINDOW_RING
    window = attention.decode(torch.cat([some[seen] for some in ring_rows(buffers.window, config.head_dim)], 1))
    if not ratio:
        return LayerState(window)
    count, slabs = position // ratio, part.slabs[ratio]
    segments = [part.layout.segment(slab, number) for slab in slabs]
    assert buffers.ring is not None
    state = LayerState(window, _open_block(buffers.ring, ratio, position), SegmentRows(attention, segments, count))
    if ratio == 4:
        assert buffers.index_ring is not None
        keys = [part.layout.segment(slab, number, keys=True) for slab in slabs]
        state.index_block = _open_block(buffers.index_ring, ratio, position)
        state.index_keys = SegmentRows(index, keys, count)
    return state


def _open_block(ring: Tensor, ratio: int, position: int) -> BlockState:
    """What BlockState holds after the last whole block."""
    width = ring.shape[1] // 2
    pending = ring.new_empty(0, 2 * width)
    if ratio != 4:
        return BlockState(pending)
    channels = width // 2
    if position < ratio:
        return BlockState.empty(ratio, channels, overlap=True, device=ring.device)
    end = position // ratio * ratio
    rows = ring[torch.arange(end - ratio, end, device=ring.device) % ring.shape[0]]
    return BlockState(pending, (rows[:, :channels].clone(), rows[:, width : width + channels].clone()))


def _adopt_layer(
    part: Part, number: int, buffers: LayerBuffers, layer: LayerState, position: int, config: ModelConfig
) -> None:
    attention, _ = row_formats(config, "mixed")
    device, ratio = part.flat.device, buffers.ratio
    rows = attention.encode(layer.window.to(device))
    slots = torch.arange(position - rows.shape[0], position, device=device) % WINDOW_RING
    values, scales = ring_rows(buffers.window, config.head_dim)
    values[slots], scales[slots] = rows[:, : values.shape[1]], rows[:, values.shape[1] :]
    for block, ring in ((layer.block, buffers.ring), (layer.index_block, buffers.index_ring)):
        if block is not None and block.previous is not None and position:
            assert ring is not None
            kv, gate = block.previous
            slots = torch.arange(position - ratio, position, device=device) % ring.shape[0]
            width, channels = ring.shape[1] // 2, kv.shape[1]
            ring[slots, :channels], ring[slots, width : width + channels] = kv.to(device), gate.to(device)
    for held, keys in ((layer.entries, False), (layer.index_keys, True)):
        if held is None:
            continue
        stored = held.held()
        all_rows = torch.cat(stored) if stored else torch.empty(0)
        for first in range(0, all_rows.shape[0], SEGMENT_ROWS):
            some = all_rows[first : first + SEGMENT_ROWS].to(device)
            segment = part.layout.segment(part.slabs[ratio][first // SEGMENT_ROWS], number, keys)
            if keys:
                segment[: some.shape[0]] = some
            else:
                segment.copy_(to_block(some, config.head_dim, SEGMENT_ROWS))
