"""`dsv4 eval`: one command a task, made from a table; all tasks share the flags of the second table.

A task's own flags reach `Task.cells` as options under their names.  Commands of another shape register on ``app``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4cli import options
from dsv4cli.options import Many, list_of, parse_number, parse_size

app = typer.Typer(
    help="Scores at any length, with intervals, cache bytes and FLOPs beside DeepSeek-V3.2's.",
    epilog="Start with: dsv4 eval needle --ctx 1K,4K",
    no_args_is_help=True,
)

_SAMPLES, _WHERE = "Samples", "Where"


def _listed(name: str, parse: Callable[[str], Any], metavar: str, about: str) -> Any:
    return Annotated[
        Many, typer.Option(name, parser=list_of(parse), metavar=metavar, rich_help_panel=_SAMPLES, help=about)
    ]


def _depth(text: str) -> float:
    return parse_number(text, 0, 100)


def _json_object(text: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(text, dict):
        return text
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f'{text!r} is not a JSON object such as {{"top_k": 1}}.')
    return found


_LENGTHS = _listed("--ctx", parse_size, "TOKENS,...", "Lengths of prompt and answer together, such as 4K,128K,1M.")
_DEPTHS = _listed("--depths", _depth, "PERCENT,...", "How much of the text comes before the needle.")
_COUNT = Annotated[
    int, typer.Option(min=1, metavar="N", rich_help_panel=_SAMPLES, help="Samples of each kind at each length.")
]
_NEEDLES = Annotated[
    int, typer.Option(min=1, metavar="N", rich_help_panel=_SAMPLES, help="Needles in each text, all of them asked for.")
]


def _number(low: int, high: int, about: str) -> Any:
    return Annotated[int, typer.Option(min=low, max=high, metavar="N", rich_help_panel=_SAMPLES, help=about)]


_SEED = Annotated[
    int,
    typer.Option(
        parser=options.parse_seed, metavar="NUMBER", rich_help_panel=_SAMPLES, help="The same seed, the same samples."
    ),
]
_HAYSTACK = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        rich_help_panel=_SAMPLES,
        help="Your own text to hide things in: a file, a folder, a glob; may be given several times.",
    ),
]
_ENDPOINT = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        rich_help_panel=_WHERE,
        help="Ask an OpenAI-compatible server instead; --model then names the tokenizer. Key: $DSV4_API_KEY.",
    ),
]
_ENDPOINT_MODEL = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=_WHERE, help="The model's name there.")
]
_ENDPOINT_TIMEOUT = Annotated[
    float, typer.Option(min=1, metavar="SECONDS", rich_help_panel=_WHERE, help="How long one answer may take there.")
]
_ENDPOINT_BODY = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=_json_object,
        metavar="JSON",
        rich_help_panel=_WHERE,
        help="Fields merged into each request there; null takes one out.",
    ),
]
_TEMPERATURE = Annotated[
    float,
    typer.Option(
        parser=lambda text: parse_number(text, 0, 2),
        metavar="NUMBER",
        rich_help_panel="Answer",
        help="0 always takes the likeliest token.",
    ),
]
_MAX_TOKENS = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="TOKENS",
        rich_help_panel="Answer",
        help="The most for an answer, thinking included. By default what the task needs, and 32K (high) or 128K (max) "
        "for thinking.",
    ),
]
_OUT = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        rich_help_panel="Output",
        help="Where results go; a run that is there already goes on. By default dsv4-eval/<task>-<model>-<hash>.",
    ),
]
_NO_CACHE = Annotated[
    bool, typer.Option("--no-cache", rich_help_panel="Cache", help="Read and keep no prefixes on disk.")
]
_DRY_RUN = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel="Output", help="Only say what there is to do and what it takes.")
]

_FIVE_DEPTHS = "0,25,50,75,100"
_RULER = "all, or niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery, vt, cwe, fwe."

_Flags = Mapping[str, tuple[Any, Any]]  # name -> annotation and default

_BEFORE: _Flags = {"ctx": (_LENGTHS, "4K,16K,64K")}
_HIDING: _Flags = {"file": (_HAYSTACK, None)}
_SHARED: _Flags = {
    "samples": (_COUNT, 1),
    "seed": (_SEED, 0),
    "model": (options.Model, options.DEFAULT_MODEL),
    "dtype": (options.DtypeOption, options.Dtype.auto),
    "kv_dtype": (options.KvDtypeOption, options.KvDtype.mixed),
    "device": (options.Device, "cpu"),
    "device_map": (options.DeviceMap, "auto"),
    "gpu_mem": (options.GpuMem, None),
    "cpu_mem": (options.CpuMem, None),
    "endpoint": (_ENDPOINT, None),
    "endpoint_model": (_ENDPOINT_MODEL, None),
    "endpoint_timeout": (_ENDPOINT_TIMEOUT, 1800.0),
    "endpoint_body": (_ENDPOINT_BODY, None),
    "cache_dir": (options.CacheDir, None),
    "no_cache": (_NO_CACHE, False),
    "think": (options.ThinkOption, options.Think.none),
    "max_tokens": (_MAX_TOKENS, None),
    "temperature": (_TEMPERATURE, 0.0),
    "top_p": (options.TopP, 1.0),
    "out": (_OUT, None),
    "dry_run": (_DRY_RUN, False),
    "json": (options.Json, False),
}


@dataclass(frozen=True)
class _Task:
    """A row of the table: what help says, examples, and the task's own flags."""

    about: str
    examples: tuple[str, ...]
    own: _Flags = field(default_factory=dict)
    hides: bool = True  # things in a haystack, which --file may name


_TASKS = {
    "needle": _Task(
        "Find one fact in a long text, at each depth; and say so where there is none.\n\n"
        "Beside each question about a needle another asks for a key that is not in the text; those are scored apart.",
        (
            "dsv4 eval needle --ctx 1K,4K",
            "dsv4 eval needle --ctx 4K,64K --depths 10,50,90 --samples 10 --file ~/notes --json",
            "dsv4 eval needle --ctx 4K,16K,64K --dry-run",
        ),
        {"depths": (_DEPTHS, "0,25,50,75,100")},
    ),
    "needle-batch": _Task(
        "Find many facts in one long text that is read once; every question runs on a fork of it.",
        ("dsv4 eval needle-batch --ctx 32K", "dsv4 eval needle-batch --ctx 1M --needles 100 --out million"),
        {"needles": (_NEEDLES, 50)},
    ),
    "ruler": _Task(
        "RULER's eleven tasks that need no download: eight kinds of needles, variable tracking, common and frequent "
        "words.\n\nPrompts and scoring are upstream's; instead of its essays the text is yours or the bundled one.",
        (
            "dsv4 eval ruler --ctx 4K --samples 5",
            "dsv4 eval ruler --ctx 128K,1M --tasks niah_multikey_3,vt,cwe --samples 20",
        ),
        {"tasks": (_listed("--tasks", str, "NAME,...", _RULER), "all")},
    ),
    "graphwalks": _Task(
        "Search a directed graph that is given as its list of edges (OpenAI's GraphWalks, graphs drawn anew).",
        ("dsv4 eval graphwalks --ctx 8K --samples 5", "dsv4 eval graphwalks --operations bfs --bfs-depth 5 --ctx 256K"),
        {
            "operations": (_listed("--operations", str, "NAME,...", "bfs, parents, or both."), "bfs,parents"),
            "bfs_depth": (_number(1, 8, "Steps of the search."), 3),
        },
        hides=False,
    ),
    "kv": _Task(
        "Look up keys of a JSON object of random identifiers that fills the context; it is read once for all of them.",
        ("dsv4 eval kv --ctx 4K,16K", "dsv4 eval kv --ctx 1M --depths 0,10,20,30,40,50,60,70,80,90,100"),
        {"depths": (_listed("--depths", _depth, "PERCENT,...", "How much comes before the entry."), _FIVE_DEPTHS)},
        hides=False,
    ),
    "passkey": _Task(
        "Find a number that is said twice in one sentence of a long text, at each depth.",
        ("dsv4 eval passkey --ctx 4K,16K", "dsv4 eval passkey --ctx 64K --digits 10 --file ~/notes"),
        {"depths": (_DEPTHS, _FIVE_DEPTHS), "digits": (_number(3, 20, "Digits of the number."), 5)},
    ),
    "variable-tracking": _Task(
        "Follow one of several chains of assignments through a long text: which variables have its value?",
        (
            "dsv4 eval variable-tracking --ctx 4K,16K",
            "dsv4 eval variable-tracking --chains 8 --hops 10 --ctx 128K --samples 10",
        ),
        {
            "chains": (_number(1, 64, "Chains, of which one is asked for."), 4),
            "hops": (_number(1, 64, "Assignments of one variable to the next in each."), 4),
        },
    ),
    "mrcr-style": _Task(
        "Give back the i-th of several replies to the same request in a long conversation.\n\n"
        "In the manner of OpenAI's MRCR, but made up: not comparable with its scores, which `dsv4 eval mrcr` gives.",
        ("dsv4 eval mrcr-style --ctx 8K", "dsv4 eval mrcr-style --ctx 64K,1M --needles 4 --samples 5"),
        {"needles": (_number(2, 64, "How often the same is asked for; each is a question."), 8)},
    ),
    "corpus-agg": _Task(
        "Count, add up and compare reports that are scattered over a long text, which is read once.",
        ("dsv4 eval corpus-agg --ctx 8K,64K", "dsv4 eval corpus-agg --reports 100 --ctx 1M --file ~/notes"),
        {"reports": (_number(10, 4096, "How many reports there are, at every length."), 24)},
    ),
}


def flags_of(values: dict[str, Any]) -> Any:
    """The shared flags among a command's values (taken out of them), as `dsv4cli.eval_run.Flags`."""
    from dsv4cli.eval_run import Flags

    given = {name: values.pop(name) for name in list(values) if name in {**_BEFORE, **_HIDING, **_SHARED}}
    given["placed"] = options.Placed.of(given.pop("device_map"), given.pop("gpu_mem"), given.pop("cpu_mem"))
    given["lengths"] = tuple(given.pop("ctx", ()))
    given["files"] = tuple(given.pop("file", None) or ())
    given["dtype"] = options.computed_in(given["dtype"], given["device"])
    for name in ("kv_dtype", "think"):
        given[name] = given[name].value
    return Flags(**given)


def command(about: str, examples: tuple[str, ...], flags: _Flags, call: Callable[..., None]) -> Callable[..., None]:
    """A function that Typer takes as a command with these flags; ``call`` gets their values by name.

    Typer reads a signature, which is written here once instead of in every task's command.
    """

    def run(**values: Any) -> None:
        from dsv4cli.errors import reported

        with reported():
            call(**values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in flags.items()]
    )
    run.__annotations__ = {name: kind for name, (kind, _) in flags.items()}
    shown = "\n\n".join(f"[bold]{example}[/bold]" for example in examples)
    run.__doc__ = f"{about}\n\nExamples:\n\n{shown}"
    return run


def _native(name: str) -> Callable[..., None]:
    task = _TASKS[name]

    def call(**values: Any) -> None:
        from dsv4_evals.tasks import task_named
        from dsv4cli.eval_run import evaluate

        flags = flags_of(values)
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        evaluate(task_named(name), own, flags, hides=task.hides)

    hiding = _HIDING if task.hides else {}
    return command(task.about, task.examples, {**_BEFORE, **task.own, **hiding, **_SHARED}, call)


for _name in _TASKS:
    app.command(_name)(_native(_name))
