"""Reading a task's options: each is taken once, with its range and default, and what is left over is an error.

Knows no task; values come from the command line or from Python as JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import TaskError
from ..task import Cell


class Options:
    """``with Options("kv", given) as options: options.integer(...)``; TaskError for what is left at the block's end."""

    def __init__(self, task: str, given: Mapping[str, Any]) -> None:
        self._task, self._left = task, dict(given)
        self._known: list[str] = []

    def __enter__(self) -> Options:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._left:
            takes = f"It takes {', '.join(self._known)}." if self._known else "It takes no options of its own."
            raise TaskError(f"{self._task} does not take {', '.join(sorted(self._left))}", takes)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise TaskError(f"{name} of {self._task} is {value!r}", f"Give a whole number from {low} to {high}.")
        return value

    def integers(self, name: str, default: Sequence[int], low: int, high: int) -> list[int]:
        """Different whole numbers from ``low`` to ``high``, in the order given."""
        values = self._list(name, default)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise TaskError(f"{name} of {self._task} has {value!r}", f"Give whole numbers from {low} to {high}.")
        return values

    def names(self, name: str, known: Sequence[str], default: Sequence[str] | None = None) -> list[str]:
        """Different names out of ``known``, in the order given; all of them by default."""
        values = self._list(name, known if default is None else default)
        for value in values:
            if value not in known:
                raise TaskError(f"{name} of {self._task} has {value!r}", f"Known are {', '.join(known)}.")
        return values

    def depths(self, default: Sequence[float] = (0, 25, 50, 75, 100)) -> list[float]:
        """Option "depths": places in percent of the context, 0 the beginning and 100 the end."""
        values = self._list("depths", default)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
                raise TaskError(f"a depth of {self._task} is {value!r}", "Give percentages from 0 to 100.")
        return [int(value) if value == int(value) else value for value in values]

    def _take(self, name: str, default: Any) -> Any:
        self._known.append(name)
        return self._left.pop(name, default)

    def _list(self, name: str, default: Sequence[Any]) -> list[Any]:
        values = self._take(name, default)
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise TaskError(f"{name} of {self._task} is {values!r}", "Give a list with at least one value.")
        if any(values.count(value) > 1 for value in values):
            raise TaskError(f"{name} of {self._task} names something twice", "Give each value once.")
        return list(values)


def grid(
    task: str,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    varied: Sequence[Mapping[str, Any]] = ({},),
) -> list[Cell]:
    """Cells of lengths x samples x what the task varies, shortest first.  Raises TaskError for numbers below 1.

    Cells of one length and sample come together, because they may share a haystack.
    """
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise TaskError(f"the lengths of {task} are {list(lengths)}", "Give positive numbers of tokens.")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise TaskError(f"{samples!r} samples of {task} were asked for", "Give a number from 1 on.")
    return [
        Cell(task, ctx, seed, {**params, "sample": sample})
        for ctx in sorted(set(lengths))
        for sample in range(samples)
        for params in varied
    ]


def shared(cell: Cell) -> Cell:
    """What cells that differ in their parameters only have in common: draw a common haystack from its rng."""
    return Cell(cell.task, cell.ctx, cell.seed, {"sample": cell.params["sample"]})
