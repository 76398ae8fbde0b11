"""The arrays of a step of one token on a CPU (token_step.py): matrices laid out to be streamed, rows that grow, phases.

Knows no layer and no state.  Letters: O outputs, I inputs, N rows, C channels, R frequencies.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor

from dsv4_kernels import one_token as np1
from dsv4_kernels.linear import ACTIVATION_BLOCK, Weight
from dsv4_kernels.one_token import Floats, Turns


class Arena:
    """Copies of matrices in a few large arrays: those lie in huge pages, which reads 10 to 15% faster."""

    BLOCK = 4 << 20

    def __init__(self) -> None:
        self._free: Floats = np.empty(0, np.float32)

    def copy(self, *parts: Tensor) -> Floats:
        """The matrices, one below the other."""
        rows, width = sum(part.shape[0] for part in parts), parts[0].shape[1:]
        size = rows * width.numel()
        if self._free.size < size:
            self._free = np.empty(max(self.BLOCK, size), np.float32)
        taken, self._free = self._free[:size].reshape(rows, *width), self._free[size:]
        first = 0
        for part in parts:
            taken[first : first + part.shape[0]] = part.numpy()
            first += part.shape[0]
        return taken


class Matrix:
    """Plain weights with the same input, one below the other, and whether the input is rounded first."""

    def __init__(self, arena: Arena, *weights: Weight) -> None:
        self.data_OI = arena.copy(*(weight.data for weight in weights))
        self.rounds = weights[0].round_activations

    def __call__(self, x_I: Floats, out_O: Floats | None = None) -> Floats:
        return np1.product(self.data_OI, self.input(x_I) if self.rounds else x_I, out_O)

    def input(self, x: Floats) -> Floats:
        return np1.round_fp8(x, ACTIVATION_BLOCK) if self.rounds else x


class SameInput:
    """Matrices with the same input: one product where they round it alike, and the outputs of each."""

    def __init__(self, arena: Arena, *weights: Weight) -> None:
        alike = all(weight.round_activations == weights[0].round_activations for weight in weights)
        self._matrices = [Matrix(arena, *some) for some in ([weights] if alike else [[w] for w in weights])]
        ends = [0, *accumulate(weight.shape[0] for weight in weights)]
        self._slices = [slice(*pair) for pair in pairwise(ends)]

    def __call__(self, x_I: Floats) -> list[Floats]:
        if len(self._matrices) > 1:
            return [matrix(x_I) for matrix in self._matrices]
        outputs = self._matrices[0](x_I)
        return [outputs[some] for some in self._slices]


class Growing:
    """Rows of the sequence that was run last, with room behind them: one more needs no copy of the others then."""

    def __init__(self, room: int) -> None:
        self._room = room
        # The rows given last, and the array whose first ``end`` rows they close: taken out while a thread is at it.
        self._kept: list[tuple[Floats, Floats, int]] = []

    def append(self, past: Tensor | Floats, row_C: Floats, most: int) -> tuple[Floats, Floats]:
        """``past`` [N, C] and this row: all [N + 1, C], and the last ``most`` of them, which the state keeps.

        Only the rows that this gave last are followed by free room; others, of a fork for instance, are copied.
        """
        count = past.shape[0]
        try:
            last, rows, end = self._kept.pop()
            fits = past is last and end < rows.shape[0]
        except IndexError:
            fits = False
        if not fits:
            rows, end = np.empty((count + self._room, row_C.size), np.float32), count
            rows[:count] = past.numpy() if isinstance(past, Tensor) else past
        rows[end] = row_C
        end += 1
        all_rows = rows[end - count - 1 : end]
        last = all_rows[1:] if count == most else all_rows
        self._kept = [(last, rows, end)]
        return all_rows, last


class Phases:
    """RoPE phases by position, made for some positions at a time."""

    POSITIONS = 64

    def __init__(self, freqs_2R: Floats, channels: tuple[int, ...]) -> None:
        """freqs: of window layers and of layers with a compressor.  channels: widths that rows have."""
        self._freqs_2R, self._channels = freqs_2R, set(channels)
        self._blocks: dict[int, dict[int, tuple[Turns, ...]]] = {}

    def of(self, position: int, channels: int) -> Turns:
        """complex64 [2, 2, C / 2]: of window layers and of others, forwards and back."""
        number, row = divmod(position, self.POSITIONS)
        block = self._blocks.get(number)
        if block is None:
            positions, block = np.arange(number * self.POSITIONS, (number + 1) * self.POSITIONS), {}
            for width in self._channels:
                forwards = np1.rope_phases(positions, self._freqs_2R, width)
                block[width] = tuple(np.stack((forwards, forwards.conj()), 2))
            before = {key: value for key, value in self._blocks.items() if key == number - 1}
            self._blocks = {**before, number: block}
        return block[channels][row]
