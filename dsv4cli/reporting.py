"""What a run leaves to look at beside its numbers: the heat map, in the terminal and as an image, and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4cli.output import context_size
from dsv4cli.plots import HeatMap, save_heat_map, terminal_heat_map

if TYPE_CHECKING:
    from dsv4_evals.record import Line

PAGE, HEAT_MAP = "report.html", "heatmap.png"


def write_report(folder: Path, found: Mapping[str, Any], lines: Sequence[Line]) -> list[Path]:
    """Write the page, and the heat map where there are cells for one; returns the paths."""
    from dsv4_evals.page import run_page

    page = folder / PAGE
    page.write_text(run_page(found, lines), "utf-8")
    written = [page]
    chart = heat_map(found)
    if chart is not None:
        save_heat_map(folder / HEAT_MAP, chart)
        written.append(folder / HEAT_MAP)
    return written


def heat_map(found: Mapping[str, Any]) -> HeatMap | None:
    """Score by depth and length; None where there are not two cells to compare."""
    from dsv4_evals.page import heat_map as cells

    grid = cells(found["by_depth"])
    if grid is None:
        return None
    return HeatMap(
        title=_title(found),
        x_label="tokens",
        y_label="depth",
        columns=[context_size(ctx) for ctx in grid["lengths"]],
        rows=[f"{depth:g}%" for depth in grid["depths"]],
        values=grid["values"],
    )


def show_heat_map(found: Mapping[str, Any]) -> None:
    """Print the heat map where there is one."""
    chart = heat_map(found)
    if chart is not None:
        print()
        print(terminal_heat_map(chart))


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['run']['task']} · {found['run']['model']['name']}"
