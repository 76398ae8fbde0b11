"""A sequence's state as bytes and back: compressed rows of a span of tokens, and what is left at one position.

Owns the order of the bytes, which follows from the configuration and the position alone, so that nothing but tensors is
written: layer by layer, rows as they are held (the published layouts for kv_dtype "mixed"), windows in the same format,
open blocks in float32.  Knows no file and no key.
Letters: N rows, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..accounting import kv_bytes
from ..model import Model
from ..state import BlockState, LayerState, RowFormat, Rows, SequenceState, row_formats

ALIGNED = 128  # lcm of the compress ratios: where no block is open


class PayloadError(Exception):
    """Bytes of another size than configuration and position ask for."""


class StateCodec:
    """Turns states of one model into bytes and back."""

    def __init__(self, model: Model) -> None:
        self._model, self._config = model, model.config
        self._window_format = row_formats(model.config, model.kv_dtype)[0]

    # ---- out ---------------------------------------------------------------------------------------------------------

    def rows(self, state: SequenceState, start: int, end: int) -> list[memoryview]:
        """The rows of tokens [start, end), both multiples of 128; not copied where they lie in the CPU's memory."""
        assert start % ALIGNED == 0 and end % ALIGNED == 0
        return [
            _bytes(part)
            for layer, ratio in self._layers(state)
            for rows in _lists(layer)
            for part in rows.stored(start // ratio, end // ratio)
        ]

    def position(self, state: SequenceState) -> list[memoryview]:
        """Everything but the rows: windows and open blocks."""
        fmt = self._window_format
        return [_bytes(t) for layer in state.layers for t in (fmt.encode(layer.window), *_open(layer))]

    # ---- and back ----------------------------------------------------------------------------------------------------

    def blank(self, position: int) -> SequenceState:
        """The state after ``position`` tokens in shape, with zeros for windows and open blocks, and without rows.

        The shapes are those of the real state, and all values finite: what is computed from it has the same shapes at
        every step, which is what makes equal bits possible where the zeros no longer matter.
        """
        state, config = self._model.blank_state(), self._config
        state.position = position
        for layer, ratio in self._layers(state):
            layer.window = layer.window.new_zeros(min(position, config.sliding_window - 1), config.head_dim)
            for block in _blocks(layer):
                block.pending = block.pending.new_zeros(position % ratio, block.pending.shape[1])
                if block.previous is not None and position >= ratio:
                    block.previous = (torch.zeros_like(block.previous[0]), torch.zeros_like(block.previous[1]))
        return state

    def fill(self, state: SequenceState, payload: memoryview) -> None:
        """Put into a `blank` state what `position` gave there.  Raises PayloadError."""
        fmt = self._window_format
        windows = [_like(fmt, layer.window.shape[0]) for layer in state.layers]
        opened = [[torch.empty_like(t, device="cpu") for t in _open(layer)] for layer in state.layers]
        _fill([t for window, parts in zip(windows, opened, strict=True) for t in (window, *parts)], payload)
        for layer, window, parts in zip(state.layers, windows, opened, strict=True):
            device = layer.window.device
            layer.window = fmt.decode(window.to(device))
            moved = iter([t.to(device) for t in parts])
            for block in _blocks(layer):
                block.pending = next(moved)
                if block.previous is not None:
                    block.previous = (next(moved), next(moved))

    def rows_bytes(self, tokens: int) -> int:
        """How many bytes `rows` gives for so many tokens, a multiple of 128."""
        return kv_bytes(self._config, self._model.kv_dtype, tokens)

    def room(self, tokens: int) -> KnownRows:
        """Room for the rows of ``tokens`` tokens, a multiple of 128."""
        assert tokens % ALIGNED == 0
        empty = self._model.blank_state()
        return KnownRows(
            [[_like(rows.fmt, tokens // ratio) for rows in _lists(layer)] for layer, ratio in self._layers(empty)],
            self._config.compress_ratios,
        )

    def _layers(self, state: SequenceState) -> list[tuple[LayerState, int]]:
        return list(zip(state.layers, self._config.compress_ratios, strict=True))


class KnownRows:
    """The rows of a sequence's first tokens, one tensor for each list of each layer, filled from bytes."""

    def __init__(self, lists: list[list[Tensor]], ratios: tuple[int, ...]) -> None:
        self._lists, self._ratios = lists, ratios

    def put(self, payload: memoryview, start: int, end: int) -> None:
        """Take in what `StateCodec.rows` gave for [start, end).  Raises PayloadError."""
        _fill(
            [
                held[start // ratio : end // ratio]
                for lists, ratio in zip(self._lists, self._ratios, strict=True)
                for held in lists
            ],
            payload,
        )

    def give(self, state: SequenceState, end: int) -> None:
        """Let ``state`` hold the rows of its tokens, and those up to token ``end`` behind them (see `Rows.known`)."""
        for layer, lists, ratio in zip(state.layers, self._lists, self._ratios, strict=True):
            given = [
                Rows.known(rows.fmt, held[: end // ratio].to(rows.device), state.position // ratio)
                for rows, held in zip(_lists(layer), lists, strict=True)
            ]
            if given:
                layer.entries = given[0]
            if len(given) > 1:
                layer.index_keys = given[1]


def _blocks(layer: LayerState) -> list[BlockState]:
    return [block for block in (layer.block, layer.index_block) if block is not None]


def _lists(layer: LayerState) -> list[Rows]:
    return [rows for rows in (layer.entries, layer.index_keys) if rows is not None]


def _open(layer: LayerState) -> list[Tensor]:
    return [tensor for block in _blocks(layer) for tensor in (block.pending, *(block.previous or ()))]


def _like(fmt: RowFormat, rows: int) -> Tensor:
    """Uninitialised storage for ``rows`` rows, in the CPU's memory."""
    one = fmt.encode(torch.zeros(1, fmt.channels))
    return torch.empty(rows, *one.shape[1:], dtype=one.dtype)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _fill(targets: list[Tensor], payload: memoryview) -> None:
    """Copy ``payload`` into the contiguous CPU tensors ``targets``, in order."""
    expected = sum(target.nbytes for target in targets)
    if len(payload) != expected:
        raise PayloadError(f"{len(payload)} bytes instead of {expected}")
    done = 0
    for target in targets:
        if target.numel():
            target.flatten().view(torch.uint8).numpy().data[:] = payload[done : done + target.nbytes]
        done += target.nbytes
