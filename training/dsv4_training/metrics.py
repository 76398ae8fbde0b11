"""The record of a run: one JSON object a line, and the plot of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Metrics:
    """metrics.jsonl of a run.  A run that goes on from a step drops what was written after it."""

    def __init__(self, path: Path, from_step: int = 0) -> None:
        self.path = path
        kept = [record for record in read(path) if record["step"] <= from_step] if path.exists() else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)

    def add(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[Record]:
    """A last line that was cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot(runs: Mapping[str, Iterable[Record]], path: Path) -> None:
    """Losses, lengths and the indexer's recall over the steps of one or several runs, as an image (PNG, SVG, ...).

    A panel in which nothing would change is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    every = {name: list(records) for name, records in runs.items()}
    rows = [r for records in every.values() for r in records]
    panels = ["loss"]
    panels += ["length"] if len({r["length"] for r in rows}) > 1 else []
    panels += ["recall"] if any(r["attention"] != "dense" for r in rows) else []
    heights = {"loss": 3.0, "length": 1.0, "recall": 1.4}
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 2 + 1.5 * sum(heights[p] for p in panels)), sharex=True, squeeze=False,
        height_ratios=[heights[p] for p in panels], layout="constrained",
    )  # fmt: skip
    panel = dict(zip(panels, axes[:, 0], strict=True))
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for number, (name, records) in enumerate(every.items()):
        colour, label = colours[number % len(colours)], f"{name}: " if len(every) > 1 else ""

        def draw(axis: str, key: str, words: str, style: str, shown: list[Record], to: Any = (colour, label)) -> None:
            if any(r[key] for r in shown):
                steps = [r["step"] for r in shown]
                panel[axis].plot(steps, [r[key] for r in shown], style, color=to[0], linewidth=1, label=to[1] + words)

        draw("loss", "text", "running text", "-", records)
        draw("loss", "value", "values asked for", "--", records)
        for r in records:
            if r.get("event"):
                panel["loss"].axvline(r["step"], color="grey", linewidth=0.8, linestyle=":")
        if "length" in panel:
            steps = [r["step"] for r in records]
            panel["length"].step(steps, [r["length"] for r in records], where="post", color=colour, linewidth=1)
        if "recall" in panel:
            taught = [r for r in records if r["attention"] != "dense"]
            draw("recall", "recall", "of the true top k", "-", taught)
            draw("recall", "mass", "of the attention", "--", taught)
    panel["loss"].set_yscale("log")
    panel["loss"].set_ylabel("loss (nats a token)")
    for which in (panel["loss"].yaxis.set_major_formatter, panel["loss"].yaxis.set_minor_formatter):
        which(ticker.FormatStrFormatter("%g"))
    if "length" in panel:
        panel["length"].set_yscale("log", base=2)
        panel["length"].yaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
        panel["length"].set_ylabel("tokens a sequence")
    if "recall" in panel:
        panel["recall"].set_ylim(0, 1.02)
        panel["recall"].set_ylabel("indexer's recall")
    axes[-1, 0].set_xlabel("step")
    for axis in panel.values():
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
