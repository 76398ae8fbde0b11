"""`dsv4 eval lm-eval`, `longbench` and `longbench2`: benchmarks from files or through lm-eval.

Flags only; what they do is in eval_lm_run.py.  `register` puts them on the group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4cli import options
from dsv4cli.commands.eval import _SHARED, _json_object, command
from dsv4cli.options import Many, list_of

REQUIRED = inspect.Parameter.empty
_SAMPLES, _ANSWER = "Samples", "Answer"
_Flags = Mapping[str, tuple[Any, Any]]

_TASKS = Annotated[
    list[str], typer.Argument(metavar="TASK...", help="lm-eval's tasks, groups, tags, patterns with *, or YAML files.")
]
_LONGBENCH_TASKS = Annotated[list[str] | None, typer.Argument(metavar="TASK...", help="By default all 21.")]
_LIMIT = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", rich_help_panel=_SAMPLES, help="Only the first so many of each task. By default all."
    ),
]
_SHORTEST = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=_SAMPLES, help="Only so many, the shortest. By default all."),
]
_LONGEST = Annotated[
    int | None,
    typer.Option(
        parser=options.parse_size,
        metavar="TOKENS",
        rich_help_panel=_SAMPLES,
        help="Leave out questions that take more with their answer. By default none.",
    ),
]
_ANSWER_SEED = Annotated[
    int,
    typer.Option(parser=options.parse_seed, metavar="NUMBER", rich_help_panel=_ANSWER, help="Of drawn answers."),
]
_FEWSHOT = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", rich_help_panel=_SAMPLES, help="Examples before each question. By default the task's."
    ),
]
_SEED = Annotated[
    int | None,
    typer.Option(
        parser=options.parse_seed,
        metavar="NUMBER",
        rich_help_panel=_SAMPLES,
        help="Of drawn examples, generated data and answers. By default lm-eval's own seeds.",
    ),
]
_METADATA = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=_json_object,
        metavar="JSON",
        rich_help_panel=_SAMPLES,
        help='What some tasks make their data by, such as {"max_seq_lengths": [4096]}.',
    ),
]
_INCLUDE = Annotated[
    list[Path] | None,
    typer.Option(
        exists=True, file_okay=False, metavar="FOLDER", rich_help_panel=_SAMPLES, help="Further task files; repeatable."
    ),
]
_CHAT = Annotated[
    bool,
    typer.Option(
        "--chat/--no-chat", rich_help_panel=_ANSWER, help="Ask in the model's chat template, or as plain text."
    ),
]
_TEMPERATURE = Annotated[
    float | None,
    typer.Option(
        parser=lambda text: options.parse_number(text, 0, 2),
        metavar="NUMBER",
        rich_help_panel=_ANSWER,
        help="By default what each task says: almost always 0.",
    ),
]
_DATA = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", rich_help_panel=_SAMPLES, help="The official files, a <task>.jsonl each. By default the hub."
    ),
]
_FILE = Annotated[
    Path, typer.Option("--data", metavar="FILE", rich_help_panel=_SAMPLES, help="The official data.json.")
]


def _several(about: str) -> Any:
    return Annotated[
        Many | None, typer.Option(parser=list_of(str.strip), metavar="NAME,...", rich_help_panel=_SAMPLES, help=about)
    ]


_WHERE: _Flags = {
    "ctx": (options.Ctx, None),
    **{name: _SHARED[name] for name in ("model", "dtype", "kv_dtype", "device", "device_map", "gpu_mem", "cpu_mem")},
    **{name: flag for name, flag in _SHARED.items() if name.startswith("endpoint")},
    **{name: _SHARED[name] for name in ("cache_dir", "no_cache")},
}
_ANSWERS: _Flags = {
    "think": _SHARED["think"],
    "max_tokens": _SHARED["max_tokens"],
    "temperature": (_TEMPERATURE, None),
    "top_p": _SHARED["top_p"],
}
_OUTPUT: _Flags = {"out": _SHARED["out"], "json": _SHARED["json"]}
_COMMON: _Flags = {"limit": (_LIMIT, None), "seed": (_SEED, None), **_WHERE, **_ANSWERS, **_OUTPUT}


def _lm_eval(**values: Any) -> None:
    from dsv4cli import eval_lm_run

    eval_lm_run.lm_eval(**values)


def _longbench(**values: Any) -> None:
    from dsv4cli import eval_lm_run

    eval_lm_run.longbench(**values)


def _longbench2(**values: Any) -> None:
    from dsv4cli import eval_lm_run

    eval_lm_run.longbench2(**values)


def register(app: typer.Typer) -> None:
    """Put the three commands on ``app``."""
    commands: tuple[tuple[str, str, tuple[str, ...], _Flags, Callable[..., None]], ...] = (
        (
            "lm-eval",
            "Any task of EleutherAI's lm-eval, scored by lm-eval, with this project's record, costs and resume.\n\n"
            "Requests with the same beginning are read once. Nothing is cut to fit: what is too long counts as such.",
            (
                "dsv4 eval lm-eval hellaswag --limit 100 --no-chat",
                "dsv4 eval lm-eval gsm8k ifeval --think high --endpoint http://localhost:8000/v1",
                """dsv4 eval lm-eval ruler_vt --metadata '{"max_seq_lengths": [4096]}' --limit 10""",
            ),
            {
                "tasks": (_TASKS, REQUIRED),
                "num_fewshot": (_FEWSHOT, None),
                "chat": (_CHAT, True),
                "metadata": (_METADATA, None),
                "include": (_INCLUDE, None),
                **_COMMON,
            },
            _lm_eval,
        ),
        (
            "longbench",
            "LongBench v1: 21 tasks of 5K to 15K tokens, with its prompts and scores as lm-eval has them.\n\n"
            "As published, few-shot and code tasks go without the chat template (and without thinking).",
            ("dsv4 eval longbench --data LongBench/data", "dsv4 eval longbench hotpotqa qasper --limit 20"),
            {"tasks": (_LONGBENCH_TASKS, None), "data": (_DATA, None), **_COMMON},
            _longbench,
        ),
        (
            "longbench2",
            "LongBench v2: 503 multiple-choice questions on up to two million words, by the official prompt and rule.",
            (
                "dsv4 eval longbench2 --data data.json --length short",
                "dsv4 eval longbench2 --data data.json --think high --endpoint http://localhost:8000/v1",
            ),
            {
                "data": (_FILE, REQUIRED),
                "difficulty": (_several("easy, hard"), None),
                "length": (_several("short, medium, long"), None),
                "domain": (_several("As the file names them."), None),
                "ctx": (_LONGEST, None),
                "limit": (_SHORTEST, None),
                **{name: flag for name, flag in _SHARED.items() if name != "samples"},
                "seed": (_ANSWER_SEED, 0),
            },
            _longbench2,
        ),
    )
    for name, about, examples, flags, call in commands:
        app.command(name, no_args_is_help=name != "longbench")(command(about, examples, flags, call))
