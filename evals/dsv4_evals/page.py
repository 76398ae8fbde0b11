"""One self-contained HTML page of a run or a comparison: no script, no font, no image from elsewhere.

Owns how results read as a page; the numbers are those of results.py and compare.py.  Everything that comes from a
model or a file is escaped by the template engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .record import Line

SHOWN_FAILURES, SHOWN_CHARACTERS = 60, 300
_TEMPLATES = Path(__file__).parent / "templates"
_CIVIDIS = ((0, 34, 78), (124, 123, 120), (254, 232, 56))  # matplotlib's, at 0, 1/2 and 1


def run_page(results: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """The page of a run: scores by length and depth, what they cost, diagnostics, and the questions that failed.

    results: the document of results.json.  Of long answers the beginning is shown, which the page says.
    """
    failed = [line for line in lines if line.score != 1.0]
    return _render(
        "run.html",
        results=results,
        heat=heat_map(results["by_depth"]),
        failed=failed[:SHOWN_FAILURES],
        failures=len(failed),
        characters=SHOWN_CHARACTERS,
    )


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The page of a comparison (see compare.py)."""
    rows = [(f"{row['ctx']:,}", row) for row in comparison["by_length"]]
    rows += [("all", comparison["all"]), ("not there", comparison["negatives"])]
    return _render("comparison.html", comparison=comparison, rows=[row for row in rows if row[1] is not None])


def heat_map(by_depth: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rows by depth, columns by length: {"lengths", "depths", "values": [[mean or None]]}.

    None without two cells, and where half of them would be empty: chance places are no grid.
    """
    lengths = sorted({row["ctx"] for row in by_depth})
    depths = sorted({row["depth"] for row in by_depth})
    if len(by_depth) < 2 or 2 * len(by_depth) <= len(lengths) * len(depths):
        return None
    found = {(row["depth"], row["ctx"]): row["mean"] for row in by_depth}
    return {
        "lengths": lengths,
        "depths": depths,
        "values": [[found.get((depth, ctx)) for ctx in lengths] for depth in depths],
    }


def _render(name: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": lambda value: f"{value:,.0f}",
        "percent": lambda value: "" if value is None else f"{100 * value:.1f}%",
        "points": lambda value: f"{100 * value:+.1f}",
        "size": _size,
        "seconds": _seconds,
        "ratio": lambda row, name: _ratio(row[name], row[f"{name}_v32"]),
        "colour": _colour,
        "told": _told,
        "beginning": lambda text: text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …",
    }
    return environment.get_template(name).render(**values)


def _told(expected: Any) -> str:
    """What a task expects, for people: a mapping as its parts, everything else as it is."""
    return "; ".join(f"{k}: {v}" for k, v in expected.items()) if isinstance(expected, dict) else str(expected)


def _size(value: float | None) -> str:
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f} s" if value < 100 else f"{value / 60:,.1f} min"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "" if not ours or not theirs else f"{100 * ours / theirs:.3g}%"


def _colour(share: float | None) -> str:
    """CSS of a cell, dark blue for 0 to yellow for 1."""
    if share is None:
        return ""
    red, green, blue = cividis(share)
    return f"background:rgb({red},{green},{blue});color:{'#fff' if share < 0.55 else '#222'}"


def cividis(share: float) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a share from 0 (dark blue) to 1 (yellow): matplotlib's map of this name."""
    a, b, part = (*_CIVIDIS[:2], 2 * share) if share < 0.5 else (*_CIVIDIS[1:], 2 * share - 1)
    red, green, blue = (round(x + (y - x) * part) for x, y in zip(a, b, strict=True))
    return red, green, blue
