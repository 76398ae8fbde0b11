"""What `dsv4 eval lm-eval`, `longbench` and `longbench2` do: prepare tasks, run them, show what came out.

lm-eval logs, warns, prints and draws bars of its own: here it is kept quiet.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_evals.errors import EvalError, TaskError
from dsv4cli.eval_run import THINKING_TOKENS, evaluate, folder_of, show_results
from dsv4cli.evaluation import PromptText, Where, open_model
from dsv4cli.options import Placed, computed_in
from dsv4cli.output import count, duration, file_size, note, print_json, progress_bar, table, work_bar

if TYPE_CHECKING:
    from dsv4_evals.lm_eval_run import Plan

Values = Mapping[str, Any]


def lm_eval(
    tasks: Sequence[str],
    num_fewshot: int | None,
    chat: bool,
    metadata: Mapping[str, Any] | None,
    include: Sequence[Path] | None,
    **values: Any,
) -> None:
    """Any of lm-eval's tasks.  ``values``: the flags that all commands through lm-eval share."""
    with _quiet():
        from dsv4_evals.lm_eval_run import Plan

    plan = Plan(
        names=tuple(tasks),
        chat=chat,
        num_fewshot=num_fewshot,
        limit=values["limit"],
        ctx=values["ctx"],
        seed=values["seed"],
        metadata=metadata or {},
        include=tuple(include or ()),
    )
    _run(plan, values)


def longbench(tasks: Sequence[str] | None, data: Path | None, **values: Any) -> None:
    """LongBench v1, from local files where ``data`` is given."""
    from dsv4_evals import longbench as bench

    chosen = bench.chosen(tasks or ())
    with _quiet():
        from dsv4_evals.lm_eval_run import Plan
    with tempfile.TemporaryDirectory(prefix="dsv4-longbench-") as work:
        prepared = bench.from_hub(chosen) if data is None else bench.from_folder(chosen, data, Path(work))
        plan = Plan(
            names=prepared.names,
            plain=prepared.plain,
            limit=values["limit"],
            ctx=values["ctx"],
            seed=values["seed"],
            include=(prepared.folder,),
            defaults=False,
            task="longbench",
            about_data=prepared.digests,
        )
        _run(plan, values, more=lambda found: {"categories": bench.categories(found)})


def longbench2(
    data: Path,
    difficulty: Sequence[str] | None,
    length: Sequence[str] | None,
    domain: Sequence[str] | None,
    ctx: int | None,
    limit: int | None,
    **values: Any,
) -> None:
    """LongBench v2 from its data file.  ctx: leaves out longer questions."""
    from dsv4_evals.longbench2 import LongBench2, breakdown, read_items
    from dsv4_evals.model import Settings
    from dsv4cli.commands.eval import flags_of

    items = list(read_items(data))
    flags = flags_of({**values, "ctx": (ctx,) if ctx else (), "samples": limit or 0})
    text = PromptText.load(flags.model)
    task = LongBench2(items, text, lambda prompt: text.overhead(prompt, Settings(1, thinking=flags.think)))
    chosen = {"difficulty": list(difficulty or ()), "length": list(length or ()), "domain": list(domain or ())}
    with progress_bar("counting tokens", "questions") as progress:
        task.cells(flags.lengths, flags.samples, flags.seed, chosen, progress)
    evaluate(
        task,
        {**chosen, "data": task.digest},
        flags,
        hides=False,
        more=lambda lines: {"breakdown": breakdown(lines)},
        show=_show_longbench2,
    )


# -- running


def _run(plan: Plan, values: Values, more: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda found: {}) -> None:
    from dsv4_evals.lm_eval_model import LmDrawing
    from dsv4_evals.record import read_run
    from dsv4cli.reporting import write_report

    think = values["think"].value
    drawing = LmDrawing(
        max_tokens=values["max_tokens"],
        temperature=values["temperature"],
        top_p=values["top_p"],
        seed=values["seed"] or 0,
        thinking=think,
        thinking_tokens=THINKING_TOKENS[think],
    )
    with _quiet():
        from dsv4_evals.lm_eval_run import load, run

        note("looking up the tasks and their data", style="dim")
        tasks = load(replace(plan, tokenizer=_tokenizer(values["model"])))
    same = (
        "model",
        "device",
        "endpoint",
        "endpoint_model",
        "endpoint_timeout",
        "endpoint_body",
        "cache_dir",
        "no_cache",
    )
    where = Where(
        dtype=computed_in(values["dtype"], values["device"]),
        kv_dtype=values["kv_dtype"].value,
        ctx=values["ctx"] or 0,
        placed=Placed.of(values["device_map"], values["gpu_mem"], values["cpu_mem"]),
        **{name: values[name] for name in same},
    )
    model = open_model(where)
    if plan.ctx is not None and plan.ctx > model.ctx:
        raise TaskError(
            f"{count(plan.ctx)} tokens are more than the {count(model.ctx)} there are", "Give a smaller --ctx."
        )
    folder = values["out"] or folder_of(plan.identity(model, drawing))
    if (folder / "run.json").exists():
        note(f"going on with {folder}", style="dim")
    try:
        with _quiet(), _progress(plan.task, [one.name for one in tasks]) as progress:
            found = run(plan, tasks, model, drawing, folder, progress, more)
    except BaseException:  # Ctrl-C as well
        if folder.exists():
            note(f"{folder} keeps what was answered; the same command goes on from there")
        raise
    written = write_report(folder, found, read_run(folder)[1])
    if values["json"]:
        print_json({**found, "out": str(folder)})
    else:
        _show(found, folder)
        print(f"to look at: {', '.join(str(path) for path in written)}")


def _tokenizer(model: str) -> str:
    """The folder of the model's tokenizer, for tasks that make their data to its measure."""
    from dsv4_engine.locate import resolve_model

    return str(resolve_model(model))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval and its tasks print, log, warn of and draw; their errors come as exceptions."""
    if find_spec("lm_eval") is None:
        raise EvalError("lm-eval is not installed", "pip install 'dsv4[eval]'")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _progress(label: str, names: Sequence[str]) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the requests of one task after another; without a terminal a line a task."""
    started: dict[str, tuple[float, int]] = {}

    with work_bar(label) as update:

        def advance(name: str, done: int, total: int) -> None:
            begun, before = started.setdefault(name, (time.monotonic(), done))
            place = f"{names.index(name) + 1}/{len(names)} {name}"
            if update is None:
                if done == total:
                    note(f"{place}: {count(total)} requests", style="dim")
                return
            fresh = done - before
            left = f"{duration((time.monotonic() - begun) / fresh * (total - done))} left" if fresh else ""
            update(done / total if total else 1.0, f"{place}, {count(done)} of {count(total)} requests", left)

        yield advance


# -- tables


_COLUMNS = ("task", "documents", "chat", "figure", "value", "no answer", "too long", "tokens in", "cache")
_RATIOS = ("of V3.2", "FLOPs of V3.2")


def _show(found: Mapping[str, Any], folder: Path) -> None:
    rows = []
    for name, row in found["tasks"].items():
        left = [name, count(row["documents"]["effective"]), "yes" if row["chat"] else "no"]
        right = _costs(row)
        for metric, value in _figures(row["metrics"]):
            rows.append([*left, metric, value, *right])
            left, right = [""] * len(left), [""] * len(right)  # what is the task's stands on its first line
    names = (*_COLUMNS, *_RATIOS)
    used = [i for i in range(len(names)) if any(row[i] not in ("", "0") for row in rows)]
    title = f"{found['run']['task']} · {found['run']['model']['name']}"
    table(title, [names[i] for i in used], [[row[i] for i in used] for row in rows])
    groups = [[name, metric, value] for name, row in found["groups"].items() for metric, value in _figures(row)]
    if groups:
        table("groups", ("group", "figure", "value"), groups)
    if categories := found.get("categories"):
        table("categories", ("category", "score"), [[name, _share(value)] for name, value in categories.items()])
    if too_long := found["questions"]["too_long"]:
        print(f"{count(too_long)} documents did not fit: lm-eval counts them as wrong, our scores leave them out")
    print(f"samples and results: {folder}")


def _figures(metrics: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    """lm-eval's figures with their standard errors: ("acc", "0.712 ± 0.014"); the filter is named where it is one."""
    names = [key.split(",", 1) for key in metrics if not key.split(",")[0].endswith("_stderr")]
    for name, filter_name in names:
        value, error = (metrics.get(f"{name}{suffix},{filter_name}") for suffix in ("", "_stderr"))
        # LongBench tells its score twice, the second time under the name of its rule.
        if name == "score" and any(other != name and metrics[f"{other},{kept}"] == value for other, kept in names):
            continue
        shown = "-" if value is None else f"{value:.3f}"
        label = name if filter_name == "none" else f"{name} ({filter_name})"
        yield label, shown if error is None else f"{shown} ± {error:.3f}"


def _costs(row: Mapping[str, Any]) -> list[str]:
    """The columns behind the figures."""
    cells = [count(row["questions"]["no_answer"]), count(row["questions"]["too_long"])]
    cells.append("" if row.get("prompt_tokens") is None else count(row["prompt_tokens"]))
    if row.get("kv_bytes") is None:
        return [*cells, *[""] * (1 + len(_RATIOS))]
    ratios = (row[name] / row[f"{name}_v32"] for name in ("kv_bytes", "flops"))
    return [*cells, file_size(row["kv_bytes"]), *(f"{100 * ratio:.2g}%" for ratio in ratios)]


def _show_longbench2(found: Mapping[str, Any], folder: Path) -> None:
    parts = found["breakdown"]
    rows = [["overall", "", *_row(parts["overall"])]]
    for kind in ("difficulty", "length", "domain", "sub_domain"):
        rows += [
            ["" if number else kind.replace("_", "-"), name, *_row(mean)]
            for number, (name, mean) in enumerate(parts[kind].items())
        ]
    table("breakdown", ("by", "", "score", "95% interval", "questions"), rows)
    if parts["unread"]:
        quarter = _percent(parts["compensated"])
        print(f"{count(parts['unread'])} answers name no letter and count as wrong (at a quarter each: {quarter})")
    show_results(found, folder)


def _row(mean: Mapping[str, Any]) -> list[str]:
    interval = "" if mean["low"] is None else f"{100 * mean['low']:.1f} to {100 * mean['high']:.1f}%"
    return [_percent(mean["mean"]), interval, count(mean["count"])]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
