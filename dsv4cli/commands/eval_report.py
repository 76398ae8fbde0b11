"""`dsv4 eval report` and `dsv4 eval compare`: looking at runs that are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4cli import options

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `dsv4 eval` wrote.")]
_Html = Annotated[
    Path | None, typer.Option("--html", metavar="PATH", help="Also write a self-contained page for a browser.")
]


def report(run: _Run, json: options.Json = False) -> None:
    """Show a run again, finished or not, and write its page and plots anew.

    Examples:

    [bold]dsv4 eval report dsv4-eval/needle-tiny-1a2b3c4d[/bold]
    """
    from dsv4cli.errors import reported
    from dsv4cli.output import print_json

    with reported():
        from dsv4_evals.record import read_run
        from dsv4_evals.results import results
        from dsv4cli.eval_run import show_results
        from dsv4cli.reporting import show_heat_map, write_report

        about, lines = read_run(run)
        found = results(about, lines)
        written = write_report(run, found, lines)
        if json:
            print_json({**found, "out": str(run)})
            return
        show_results(found, run)
        show_heat_map(found)
        for path in written:
            print(path)


def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A run of `dsv4 eval`.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another run of the same task.")],
    html: _Html = None,
    json: options.Json = False,
) -> None:
    """Compare two runs of one task, question by question, with paired 95% intervals.

    Only questions that both scored count. Runs with the same --ctx, --samples and --seed ask the same questions.

    Examples:

    [bold]dsv4 eval compare dsv4-eval/needle-tiny-1a2b3c4d dsv4-eval/needle-mine-5e6f7a8b[/bold]
    """
    from dsv4cli.errors import InputProblem, reported
    from dsv4cli.output import print_json

    with reported():
        from dsv4_evals.compare import compare as compared
        from dsv4_evals.page import comparison_page
        from dsv4_evals.record import read_run

        if html is not None and not html.absolute().parent.is_dir():
            raise InputProblem(f"{html}: there is no folder {html.absolute().parent}", "Make it, or name another.")
        found = compared(read_run(first), read_run(second))
        if html is not None:
            html.write_text(comparison_page(found), "utf-8")
        if json:
            print_json(found)
        else:
            _show(found)


def _show(found: Mapping[str, Any]) -> None:
    from dsv4cli.output import count, table

    names = found["first"]["model"]["name"], found["second"]["model"]["name"]
    rows = [
        [
            name,
            f"{100 * row['first']:.1f}%",
            f"{100 * row['second']:.1f}%",
            f"{100 * row['difference']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            count(row["better"]),
            count(row["worse"]),
            count(row["equal"]),
        ]
        for name, row in [
            *((count(row["ctx"]), row) for row in found["by_length"]),
            ("all", found["all"]),
            ("not there", found["negatives"]),
        ]
        if row is not None
    ]
    columns = ("tokens", "first", "second", "points", "95% interval", "better", "worse", "equal")
    table(f"{found['task']}: {names[1]} (second) against {names[0]} (first)", columns, rows)
    if found["unpaired"]:
        print(f"{count(found['unpaired'])} questions are in one run only and not compared")
    if found["other_prompts"]:
        print(f"{count(found['other_prompts'])} pairs did not have the same prompt (other tokenizer or other text)")
    if found["other_options"]:
        print(f"the runs also differ in: {', '.join(found['other_options'])}")


def register(app: typer.Typer) -> None:
    """Put the commands on ``app``."""
    app.command("report", no_args_is_help=True)(report)
    app.command("compare", no_args_is_help=True)(compare)
