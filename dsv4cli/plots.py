"""Plots: line panels and heat maps, as an image file (matplotlib) and in the terminal (plotext, Rich).

Owns how plots look: Okabe and Ito's colours, which colour-blind readers tell apart, a different marker and line style
for each series, and words at the lines rather than beside them.  Knows nothing of what is plotted.  The libraries are
imported when something is drawn; images are drawn without a display.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4cli.errors import InputProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
_INK, _FAINT = "#222222", "#d9d9d9"
# Okabe and Ito, "Color Universal Design"; grey first, for what others are compared with.
_COLOURS = ("#6e6e6e", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_TERMINAL = ((150, 150, 150), (86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66))
_STYLES = (("-", "s"), ("-", "o"), ("-", "^"), ("--", "D"), ("--", "v"), (":", "P"))
_LETTERS = "#ox+*%"  # where there is no colour
MAX_SERIES = len(_COLOURS)


@dataclass(frozen=True)
class Series:
    """One line.  note: said at its last point, such as "27%"."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """One set of axes with at most MAX_SERIES lines; ticks: (position, label) along x; log: both axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values from ``low`` to ``high`` by row and column; None where there is none.  cell: how a value is written."""

    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float = 0.0
    high: float = 1.0
    cell: Callable[[float], str] = "{:.2f}".format


def check_image_path(path: Path) -> None:
    """Refuse, before anything is computed, what no image could be written to."""
    if path.suffix.lower() not in FORMATS:
        raise InputProblem(f"{path}: an image ends in {', '.join(FORMATS)}", "Name the file plot.png, for instance.")
    if not path.absolute().parent.is_dir():
        raise InputProblem(f"{path}: there is no folder {path.absolute().parent}", "Make the folder, or name another.")


# ---- image files -----------------------------------------------------------------------------------------------------


def save_panels(path: Path, panels: Sequence[Panel], title: str = "", note: str = "") -> None:
    """Write the panels side by side; ``note`` stands small below them."""
    figure, axes = _figure(len(panels), width=5.4 * len(panels), height=4.3)
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, panel)
    _finish(figure, path, title, note)


def save_heat_map(path: Path, chart: HeatMap, note: str = "") -> None:
    """Write a heat map with its values in the cells, dark for high."""
    rows, columns = len(chart.rows), len(chart.columns)
    figure, (ax,) = _figure(1, width=max(4.5, 1.6 + 0.8 * columns), height=max(2.6, 1.5 + 0.42 * rows))
    span = (chart.high - chart.low) or 1.0
    grid = [[float("nan") if value is None else value for value in row] for row in chart.values]
    image = ax.imshow(grid, cmap="cividis", vmin=chart.low, vmax=chart.high, aspect="auto")
    for y, row in enumerate(chart.values):
        for x, value in enumerate(row):
            dark = value is not None and (value - chart.low) / span < 0.55
            text = "–" if value is None else chart.cell(value)
            ax.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else _INK)
    ax.set_xticks(range(columns), chart.columns)
    ax.set_yticks(range(rows), chart.rows)
    ax.set_xlabel(chart.x_label)
    ax.set_ylabel(chart.y_label)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    # Thin lines between cells keep neighbours of one value apart.
    ax.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    ax.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    ax.grid(which="minor", color="white", linewidth=1.2)
    ax.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    _finish(figure, path, chart.title, note)


def _figure(count: int, width: float, height: float) -> tuple[Any, Sequence[Axes]]:
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display is looked for, and nothing is kept

    with matplotlib.rc_context({"font.size": 10.5, "text.color": _INK, "axes.labelcolor": _INK}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, count, squeeze=False)[0]


def _draw_panel(ax: Axes, panel: Panel) -> None:
    for number, series in enumerate(panel.series):
        line, marker = _STYLES[number]
        ax.plot(series.x, series.y, line, marker=marker, markersize=4.5, linewidth=2, color=_COLOURS[number],
                clip_on=False, zorder=3)  # fmt: skip
    if panel.log:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
        ax.set_xlim(0, max(x for series in panel.series for x in series.x))
    _name_lines(ax, panel)
    if panel.ticks:
        ax.set_xticks([place for place, _ in panel.ticks], [label for _, label in panel.ticks])
        ax.minorticks_off()
    ax.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", pad=10)
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(panel.y_label)
    ax.grid(axis="y", color=_FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _name_lines(ax: Axes, panel: Panel) -> None:
    """Each line's name and note right of its last point, moved apart where two would touch."""
    least, last = 0.062, -1.0  # of the height
    for number, series in sorted(enumerate(panel.series), key=lambda item: item[1].y[-1]):
        place = ax.transData.transform((series.x[-1], series.y[-1]))
        last = max(ax.transAxes.inverted().transform(place)[1], last + least)
        words = f"{series.name}  {series.note}".strip()
        ax.annotate(words, (1.025, last), xycoords="axes fraction", va="center", color=_COLOURS[number],
                    fontsize=10, fontweight="bold", annotation_clip=False)  # fmt: skip


def _finish(figure: Any, path: Path, title: str, note: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=_INK)
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color="#555555")
    figure.savefig(path, dpi=150, facecolor="white")


# ---- the terminal ----------------------------------------------------------------------------------------------------


def terminal_panel(panel: Panel, *, width: int = 0, height: int = 17, colour: bool | None = None) -> str:
    """The panel in characters.  By default as wide as the terminal, at most 96; in colour where standard output is a
    terminal, else with a letter for each line.
    """
    import plotext

    from dsv4cli.output import is_terminal

    colour = is_terminal(sys.stdout) if colour is None else colour
    figure = plotext.figure  # plotext has one figure; everything about it is set below
    figure.clear()
    figure.theme("simple" if colour else "colorless")
    figure.plot_size(width or min(96, shutil.get_terminal_size((80, 24)).columns), height)
    for number, series in enumerate(panel.series):
        marker = plotext.marker("braille", _TERMINAL[number]) if colour else plotext.marker(_LETTERS[number])
        line = figure.signal(list(series.x), list(series.y), marker=marker)
        line.lines()
        figure.draw(line)
    figure.title(f"{panel.title}, {panel.y_label}")
    figure.label(panel.x_label, "x")
    if panel.log:
        figure.ruler("both").scale("log")
    else:
        figure.ruler("y").lim(0, None)
    if panel.ticks:
        figure.ruler("x").ticks([place for place, _ in panel.ticks], [label for _, label in panel.ticks])
    text = figure.build().string(colorless=not colour)
    key = (
        f"{_painted('━━', _TERMINAL[n]) if colour else _LETTERS[n]} {series.name} {series.note}".rstrip()
        for n, series in enumerate(panel.series)
    )
    return "\n".join([*(line.rstrip() for line in text.splitlines()), "    " + "    ".join(key)])


def _painted(text: str, rgb: tuple[int, int, int]) -> str:
    return f"\x1b[38;2;{rgb[0]};{rgb[1]};{rgb[2]}m{text}\x1b[0m"


def terminal_heat_map(chart: HeatMap, *, colour: bool | None = None) -> str:
    """The heat map as a table, cells coloured where standard output is a terminal."""
    import io

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dsv4cli.output import is_terminal

    colour = is_terminal(sys.stdout) if colour is None else colour
    table = Table(box=None, padding=(0, 0), title=chart.title, title_justify="left", title_style="bold")
    table.add_column(Text(f"{chart.y_label} \\ {chart.x_label}"), justify="right", header_style="dim")
    width = max(len(chart.cell(v)) for row in chart.values for v in row if v is not None) if any(
        v is not None for row in chart.values for v in row
    ) else 1  # fmt: skip
    width = max(width, *(len(name) for name in chart.columns)) + 2
    for name in chart.columns:
        table.add_column(Text(name), justify="center", header_style="dim", min_width=width)
    for name, row in zip(chart.rows, chart.values, strict=True):
        cells = [Text("–" if v is None else chart.cell(v), style=_cell_style(v, chart) if colour else "") for v in row]
        for cell in cells:
            cell.align("center", width)
        table.add_row(Text(f"{name} "), *cells)
    out = io.StringIO()
    console = Console(file=out, force_terminal=colour, color_system="truecolor" if colour else None, width=10_000)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _cell_style(value: float | None, chart: HeatMap) -> str:
    """Dark blue for low to yellow for high, as in the image and on the page."""
    from dsv4_evals.page import cividis

    if value is None:
        return "dim"
    share = min(1.0, max(0.0, (value - chart.low) / ((chart.high - chart.low) or 1.0)))
    red, green, blue = cividis(share)
    return f"{'white' if share < 0.55 else 'black'} on #{red:02x}{green:02x}{blue:02x}"
