"""Where output goes: the answer to standard output, everything else to standard error.

Colours, bars and other decoration appear only on a terminal.  Rich is imported when something is drawn.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

Progress = Callable[[int, int], None]

_STYLES = {"red": "31", "cyan": "36", "dim": "2", "bold": "1"}
# C0 and C1 controls but for tab and newline: a model repeats what files hold, and must not steer the terminal with it.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_NUMBER = re.compile(r"[\d.,]+( [a-zA-Z]+|%)?|-|")  # in a table: 1,024 or 1.5 KiB or 12% or nothing


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def write(text: str, stream: TextIO | None = None, style: str = "") -> None:
    """Write part of a text at once; on a terminal in a style and without control characters."""
    stream = stream or sys.stdout
    if is_terminal(stream):
        text = text.translate(_CONTROLS)
        if style:
            text = f"\x1b[{_STYLES[style]}m{text}\x1b[0m"
    stream.write(text)
    stream.flush()


def note(text: str, style: str = "") -> None:
    """One line for the person, on standard error."""
    write(text, sys.stderr, style)
    sys.stderr.write("\n")
    sys.stderr.flush()


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a command that was asked for one."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; columns of numbers are set to the right.  Empty names draw no heading."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:  # the width is unknown there: as wide as needed rather than cut
        console = Console(file=sys.stdout, highlight=False, width=10_000)
    drawn = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, name in enumerate(columns):
        cells = [row[index] for row in rows]
        numeric = index > 0 and any(columns) and all(_NUMBER.fullmatch(cell) for cell in cells)
        drawn.add_column(Text(name), justify="right" if numeric else "left", header_style="dim")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    with console.capture() as captured:
        if title:
            console.print(Text(title, style="bold"))
        console.print(drawn)
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Progress]:
    """A bar on standard error with rate and time left; without a terminal, nothing is drawn.

    The callable it yields takes (done, total) in ``unit``: "bytes" or "tokens".
    """
    if not is_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(compact=True),
        console=Console(file=sys.stderr),
        transient=True,
    )
    show = file_size if unit == "bytes" else count
    started = time.monotonic()
    with bar:
        task = bar.add_task(label, total=None, amount="")

        def update(done: int, total: int) -> None:
            seconds = time.monotonic() - started
            rate = f" · {show(done / seconds)}/s" if seconds > 0 and done else ""
            name = "" if unit == "bytes" else f" {unit}"
            bar.update(task, completed=done, total=total, amount=f"{show(done)} of {show(total)}{name}{rate}")

        yield update


@contextmanager
def work_bar(label: str) -> Iterator[Callable[[float, str, str], None] | None]:
    """A bar on standard error for long work of many steps; None where there is no terminal.

    The callable it yields takes the share done (0 to 1), what is being done, and a text on the time left.
    """
    if not is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn())
    texts = (TextColumn("{task.fields[doing]}"), TextColumn("[cyan]{task.fields[left]}"))
    with Bar(*columns, *texts, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=1.0, doing="", left="")

        def update(share: float, doing: str, left: str) -> None:
            bar.update(task, completed=share, doing=doing, left=left)

        yield update


def duration(seconds: float) -> str:
    """A time to the precision that matters: 8 s, 4 min 20 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def count(number: float) -> str:
    """A whole number with separators: 131,072."""
    return f"{round(number):,}"


def short_count(number: float) -> str:
    """A large number in three digits: 13.3 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"


def context_size(tokens: int) -> str:
    """A length as --ctx takes it, 131072 -> 128K; what is no whole K or M in full."""
    for unit, name in ((1024**2, "M"), (1024, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return count(tokens)


def file_size(number: float) -> str:
    """Bytes in binary units: 148.7 GiB."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def per_second(tokens: int, seconds: float) -> float:
    """A rate that is 0 where nothing was measured."""
    return tokens / seconds if seconds > 0 else 0.0
