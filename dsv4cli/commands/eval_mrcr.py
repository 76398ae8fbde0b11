"""`dsv4 eval mrcr`: OpenAI's MRCR from its official files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4cli.commands.eval import _LENGTHS, _SAMPLES, _SHARED, _listed, command, flags_of
from dsv4cli.options import parse_number

_DATA = Annotated[
    Path,
    typer.Option(
        "--data", metavar="PATH", rich_help_panel=_SAMPLES, help="A .parquet or .jsonl file, or a folder of them."
    ),
]
_NEEDLES = _listed(
    "--needles",
    lambda text: int(parse_number(text, 2, 64)),
    "N,...",
    "How often the same is asked for in a conversation: 2, 4, 8.",
)


def _mrcr(data: Path, needles: tuple[int, ...], **values: Any) -> None:
    from dsv4_evals.model import Settings
    from dsv4_evals.tasks.mrcr import Mrcr
    from dsv4cli.eval_run import evaluate
    from dsv4cli.evaluation import PromptText
    from dsv4cli.output import progress_bar

    flags = flags_of(values)
    text = PromptText.load(flags.model)
    task = Mrcr(data, text, lambda prompt: text.overhead(prompt, Settings(1, thinking=flags.think)))
    own = {"needles": list(needles), "data": task.digest}
    with progress_bar("counting tokens", "conversations") as progress:
        task.cells(flags.lengths, flags.samples, flags.seed, own, progress)
    evaluate(task, own, flags, hides=False)


def register(app: typer.Typer) -> None:
    """Put the command on ``app``."""
    about = (
        "OpenAI's MRCR from its official files: give back the i-th of several replies to the same request.\n\n"
        "Lengths are the upper ends of its bins, 8K to 1M; a conversation is in a bin by this model's tokens. "
        "Published scores for a million tokens are means over all bins."
    )
    examples = (
        "dsv4 eval mrcr --data openai-mrcr/8needle --needles 8 --ctx 8K,16K,32K --samples 10",
        "dsv4 eval mrcr --data 2needle.parquet --needles 2 --ctx 1M --endpoint http://localhost:8000/v1",
    )
    flags = {
        "data": (_DATA, inspect.Parameter.empty),
        "ctx": (_LENGTHS, "8K,16K,32K"),
        "needles": (_NEEDLES, "8"),
        **_SHARED,
    }
    app.command("mrcr", no_args_is_help=True)(command(about, examples, flags, _mrcr))
