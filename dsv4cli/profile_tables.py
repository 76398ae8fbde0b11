"""How `profile` shows its document to a person: tables, plots and the lines under them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4cli.output import context_size, count, file_size, is_terminal, note, short_count, table, write
from dsv4cli.profiling import sums_by

if TYPE_CHECKING:
    from dsv4cli.plots import Panel

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
_PART_WORDS = {
    "indexer": "index scores",
    "csa": "CSA entries",
    "hca": "HCA entries",
    "dsa": "DSA tokens",
}


def _remark(text: str) -> None:
    if is_terminal(sys.stdout):
        text = textwrap.fill(text, shutil.get_terminal_size().columns)
    write(f"{text}\n", style="dim")


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share >= 0.001 else f"{100 * share:.3f}%"


def _amount(number: float) -> str:
    """FLOPs or bytes in decimal units, in three or four digits: 1,158 G, 140.3 G, 14.1 M."""
    size, unit = _unit(number, 2)
    value = number / size
    return (
        f"{value:,.0f} {unit}" if value >= 1000 else f"{value:,.1f} {unit}" if value >= 10 else f"{value:,.2f} {unit}"
    )


def _unit(largest: float, least: float = 10.0) -> tuple[float, str]:
    """The largest unit of which the value has at least ``least``."""
    return next((unit for unit in _UNITS if largest >= least * unit[0]), _UNITS[-1])


def _short_time(seconds: float) -> str:
    for limit, size, unit in ((120, 60.0, "min"), (1, 1.0, "s"), (1e-3, 1e-3, "ms")):
        if seconds >= limit:
            return f"{seconds / size:,.1f} {unit}" if seconds / size < 100 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def show(found: Mapping[str, Any], plots_too: bool) -> None:
    """The whole document; plots_too: the sweep, where there is one, with its plots."""
    show_costs(found)
    if plots_too:
        show_sweep(found["sweep"])
    show_rooflines(found["roofline"], found["ctx"])
    if "measured" in found:
        show_measured(found["measured"])


# ---- from the configurations -----------------------------------------------------------------------------------------


def show_costs(found: Mapping[str, Any]) -> None:
    models, base = found["models"], found["baseline"]
    columns = list(models)

    def row(words: str, value: Any) -> list[str]:
        return [words, *(value(model) for model in models.values())]

    table(
        f"One sequence of {count(found['ctx'])} tokens",
        ["", *columns],
        [
            row("parameters", lambda m: short_count(m["total_params"])),
            row("  active a token", lambda m: short_count(m["active_params"])),
            row("KV cache", lambda m: file_size(m["kv_bytes"])),
            row(f"  of {base}", lambda m: percent(m["kv_ratio"])),
            row("  of GQA8", lambda m: percent(m["gqa8_ratio"])),
            row("one decoded token, FLOP", lambda m: _amount(m["flops_raw"])),
            row(f"  of {base}", lambda m: percent(m["flops_ratio_raw"])),
            row("  equivalent FP8", lambda m: _amount(m["flops_weighted"])),
            row(f"  of {base}, equivalent FP8", lambda m: percent(m["flops_ratio"])),
            row("  bytes read", lambda m: file_size(m["bytes_read"]["total"])),
            row("whole prefill, FLOP", lambda m: _amount(m["prefill"]["flops_raw"])),
            row(f"  of {base}", lambda m: percent(m["prefill"]["flops_ratio_raw"])),
            row("  equivalent FP8", lambda m: _amount(m["prefill"]["flops_weighted"])),
            row(f"  of {base}, equivalent FP8", lambda m: percent(m["prefill"]["flops_ratio"])),
        ],
    )
    others = [name for name in columns if name != base]
    if len(others) == 1:
        _show_one(others[0], models[others[0]])
    else:
        _show_parts(models)
    _remark(f"In {found['weighting']}. GQA8: {found['gqa8']}.")


def _show_parts(models: Mapping[str, Any]) -> None:
    """Decode by part for several models side by side."""
    from dsv4_engine.costs import PARTS

    size, unit = _unit(max(m["flops_raw"] for m in models.values()))
    parts = [part for part in PARTS if any(part in model["by_part"] for model in models.values())]
    rows = []
    for part in [*parts, "all"]:
        costs = [_part(model["by_part"], part) for model in models.values()]
        flops = [f"{c['flops'] / size:,.1f}" if c["flops"] else "-" for c in costs]
        read = [file_size(c["weight_bytes"] + c["cache_bytes"]) if c["flops"] else "-" for c in costs]
        rows.append([_PART_WORDS.get(part, part), *flops, *read])
    table(f"\nOne decoded token: {unit}FLOP, then bytes read", ["", *models, *models], rows)


def _show_one(name: str, model: Mapping[str, Any]) -> None:
    """Decode and prefill of one model by part and by layer kind."""
    decode_size, decode_unit = _unit(model["flops_raw"])
    prefill_size, prefill_unit = _unit(model["prefill"]["flops_raw"])
    rows = []
    for key, words in (("by_part", _PART_WORDS), ("by_kind", {})):
        for part in model[key]:
            decode, prefill = model[key][part], model["prefill"][key][part]
            rows.append(_cost_row(words.get(part, part), decode, prefill, decode_size, prefill_size))
        if key == "by_part":
            decode, prefill = _part(model[key], "all"), _part(model["prefill"][key], "all")
            rows.append(_cost_row("all", decode, prefill, decode_size, prefill_size))
            rows.append(["by layer kind", *[""] * 6])
    title = f"{name}: {decode_unit}FLOP and bytes read of one decoded token, {prefill_unit}FLOP of the prefill"
    columns = ["by part", f"{decode_unit}FLOP", "eq. FP8", "weights", "cache", f"{prefill_unit}FLOP", "eq. FP8"]
    table(f"\n{title}", columns, rows)


def _cost_row(
    words: str, decode: Mapping[str, float], prefill: Mapping[str, float], decode_size: float, prefill_size: float
) -> list[str]:
    return [
        words,
        f"{decode['flops'] / decode_size:,.2f}",
        f"{decode['flops_weighted'] / decode_size:,.2f}",
        file_size(decode["weight_bytes"]) if decode["weight_bytes"] else "-",
        file_size(decode["cache_bytes"]) if decode["cache_bytes"] else "-",
        f"{prefill['flops'] / prefill_size:,.2f}",
        f"{prefill['flops_weighted'] / prefill_size:,.2f}",
    ]


def _part(by_part: Mapping[str, Mapping[str, float]], part: str) -> dict[str, float]:
    keys = ("flops", "flops_weighted", "weight_bytes", "cache_bytes")
    chosen = by_part.values() if part == "all" else [by_part[part]] if part in by_part else []
    return {key: sum(row[key] for row in chosen) for key in keys}


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def show_sweep(found: Mapping[str, Any]) -> None:
    from dsv4cli.plots import terminal_panel

    models = found["models"]
    columns = ["context"]
    for name in models:
        columns += [name] if name == "v3.2" else [name, "of v3.2"]
    for title, key, ratio, show in (
        ("One decoded token, GFLOP in equivalent FP8", "flops_weighted", "flops_ratio", lambda v: f"{v / 1e9:,.1f}"),
        ("KV cache", "kv_bytes", "kv_ratio", file_size),
    ):
        rows = []
        for i, length in enumerate(found["lengths"]):
            row = [context_size(length)]
            for name, model in models.items():
                row.append(show(model[key][i]))
                if name != "v3.2":
                    row.append(percent(model[ratio][i]))
            rows.append(row)
        table(f"\n{title}, by context", columns, rows)
    for panel in sweep_panels(found):
        print(f"\n{terminal_panel(panel)}")


def sweep_panels(found: Mapping[str, Any]) -> list[Panel]:
    """The report's figure 1: FLOPs of one token and the cache over the context."""
    from dsv4cli.plots import Panel, Series

    lengths = found["lengths"]
    # Round numbers where the longest context is one, and its quarters.
    ticks = [
        (lengths[-1] * quarter / 4, context_size(lengths[-1] * quarter // 4) if quarter else "0")
        for quarter in range(5)
    ]
    peak = max(max(model["flops_weighted"]) for model in found["models"].values())
    size, unit = _unit(peak, 1)
    panels = []
    for title, y_label, key, ratio, scale in (
        ("FLOPs of one decoded token", f"{unit}FLOP, equivalent FP8", "flops_weighted", "flops_ratio", size),
        ("KV cache", "GiB", "kv_bytes", "kv_ratio", 2.0**30),
    ):
        series = [
            Series(name, lengths, [value / scale for value in model[key]],
                   "" if name == "v3.2" else f"{100 * model[ratio][-1]:.0f}%")
            for name, model in found["models"].items()
        ]  # fmt: skip
        panels.append(Panel(title, "context, tokens", y_label, series, ticks))
    return panels


def save_sweep(path: Path, found: Mapping[str, Any]) -> None:
    """Write the document's sweep as an image."""
    from dsv4cli.plots import save_panels

    words = f"From the configurations. Shares are of v3.2 at {context_size(found['ctx'])}, in {found['weighting']}."
    save_panels(path, sweep_panels(found["sweep"]), "What a token costs as the context grows", words)
    note(f"wrote {path}", style="dim")


# ---- rooflines -------------------------------------------------------------------------------------------------------


def show_rooflines(found: Sequence[Mapping[str, Any]], ctx: int) -> None:
    rows = []
    for name in found[0]["models"]:
        for device in found:
            row = device["models"][name]
            rows.append([
                name,
                device["device"],
                count(row["devices_needed"]) if row["devices_needed"] else "-",
                count(row["decode"]["tok_s"]),
                row["decode"]["bound"],
                count(row["prefill"]["tok_s"]),
                row["prefill"]["bound"],
                _short_time(row["prefill"]["seconds"]),
                context_size(row["max_ctx"] // 1024 * 1024 or row["max_ctx"]),
            ])  # fmt: skip
    columns = ["model", "device", "needed", "decode", "bound by", "prefill", "bound by", "takes", "fits"]
    table(f"\nRoofline of one sequence of {count(ctx)} tokens: tokens a second at best", columns, rows)
    _remark(
        "Needed: devices that hold the weights and this cache; their layers work in turn, so the rates are one "
        "device's. Fits: the longest context on so many."
    )
    for device in found:
        rates = ", ".join(f"{name} {_amount(rate)}FLOP/s" for name, rate in device["flops_s"].items())
        memory = f"{file_size(device['memory_bytes'])}, {_amount(device['bandwidth_bytes_s'])}B/s"
        _remark(f"{device['device']}: {memory}, {rates} ({device['source']})")


# ---- measured --------------------------------------------------------------------------------------------------------


def show_measured(found: Mapping[str, Any]) -> None:
    label = f"{found['model']} on {found['device']}"
    if found["weights"] == "random":
        label += f", RANDOM WEIGHTS, {found['layers_timed']} layers timed for {found['layers']}"
    rows = []
    for words, key in (("prefill", "prefill"), ("one decoded token", "decode")):
        phase = found[key]
        rows.append([
            words, count(phase["ctx"]), _short_time(phase["seconds"]), f"{phase['tok_s']:,.1f}",
            _short_time(phase["roofline_s"]), percent(phase["share_of_roofline"]),
        ])  # fmt: skip
    table(f"\nMeasured: {label}", ["", "context", "time", "tok/s", "roofline", "of the roofline"], rows)
    _show_phases(found)
    _show_cache(found["cache"], found)
    if any(part["least_s"] > part["seconds"] > 0 for key in ("prefill", "decode") for part in found[key]["parts"]):
        _remark("Above 100% of the roofline: what is read again stays in the processor's caches.")
    if found["scaled"]:
        _remark("Times of each kind of layer are multiplied by the number of such layers; the cache is as timed.")


def _show_phases(found: Mapping[str, Any]) -> None:
    """Parts, and each part by kind of layer, of both phases side by side."""
    for key in ("part", "kind"):
        both = [sums_by(found[phase]["parts"], key, "seconds", "least_s") for phase in ("prefill", "decode")]
        rows = []
        for name in both[0]:
            row = [name]
            for sums in both:
                whole = sum(part["seconds"] for part in sums.values()) or 1.0
                part = sums.get(name, {"seconds": 0.0, "least_s": 0.0})
                row += (
                    ["-"] * 3
                    if not part["seconds"]
                    else [
                        _short_time(part["seconds"]),
                        percent(part["seconds"] / whole),
                        percent(part["least_s"] / part["seconds"]) if part["least_s"] else "-",
                    ]
                )
            rows.append(row)
        columns = [
            f"by {'layer kind' if key == 'kind' else key}",
            "prefill",
            "share",
            "of roofline",
            "decode",
            "share",
            "of roofline",
        ]
        print()
        table("", columns, rows)


def _show_cache(cache: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    rows = [
        [count(length), file_size(held), file_size(entries), file_size(held - entries), file_size(allocated)]
        for length, held, entries, allocated in zip(
            cache["lengths"], cache["held"], cache["analytic_entries"], cache["allocated"], strict=True
        )
    ]
    columns = ["tokens", "measured", "analytic entries", "rest", "memory behind it"]
    table(f"\nCache, {found['kv_dtype']}", columns, rows)
    table(
        "",
        ["", "measured", "analytic"],
        [
            ["slope, bytes a token", f"{cache['slope']:,.1f}", f"{cache['analytic_slope']:,.1f}"],
            ["intercept: window, open blocks", file_size(cache["intercept"]),
             f"{file_size(cache['analytic_state'])} at most"],
            ["slope differs by", f"{100 * cache['difference']:.2f}%", ""],
        ],
    )  # fmt: skip
