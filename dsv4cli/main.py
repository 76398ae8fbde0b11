"""The app: its commands and what `dsv4` alone says.  Machinery is imported by each command when it is called."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from dsv4cli.commands import (
    cache,
    chat,
    doctor,
    download,
    eval,
    eval_lm,
    eval_mrcr,
    eval_report,
    inspect,
    profile,
    quantize,
    run,
)

app = typer.Typer(
    name="dsv4",
    help="Run DeepSeek-V4 on your own machine, from the published checkpoints.",
    epilog='Start with: dsv4 run "What does this do?" --file main.py',
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    # Tracebacks belong in a bug report (DSV4_DEBUG=1), without the values of local variables.
    pretty_exceptions_enable=False,
)
app.command("run", no_args_is_help=True)(run.run)
app.command("chat")(chat.chat)
eval_lm.register(eval.app)
eval_mrcr.register(eval.app)
eval_report.register(eval.app)
app.add_typer(eval.app, name="eval")
app.add_typer(cache.app, name="cache")
app.command("download", no_args_is_help=True)(download.download)
app.command("inspect")(inspect.inspect)
app.command("quantize", no_args_is_help=True)(quantize.quantize)
app.command("profile")(profile.profile)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        number = version("dsv4")
    except PackageNotFoundError:
        number = "(source tree, not installed)"
    print(f"dsv4 {number}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run DeepSeek-V4 on your own machine, from the published checkpoints."""


def main() -> None:
    """The entry point.  Whatever the locale, a character that the terminal cannot show is replaced, not an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        app(prog_name="dsv4")
    else:  # one of several processes of torchrun
        from dsv4cli.ranks import run_ranked

        run_ranked(lambda: app(prog_name="dsv4"))


if __name__ == "__main__":
    main()
