"""Runs of lm-eval's tasks: loads them, has them evaluated by lm-eval itself, and keeps a record like any other run's.

Owns seeds, what may go wrong in loading, and the way from lm-eval's results to ours (one line a document in
samples.jsonl, one request a line in requests.jsonl).  Scores are lm-eval's own.  Importing it needs lm-eval.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from .errors import DataError, EvalError, TaskError
from .lm_eval_model import Journal, LmDrawing, ProtocolLM
from .model import Model
from .record import Line, Record, Status
from .results import results as summary

REQUESTS = "requests.jsonl"
# What lm-eval's own command takes; its published few-shot prompts are drawn with them.
_RANDOM_SEED, _OTHER_SEED = 0, 1234
# Draws of the bootstrap behind lm-eval's standard errors; means have a formula.
_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Plan:
    """What to run.  names: lm-eval's tasks, groups, tags, patterns with *, or YAML files.

    chat: with the model's template, but for the tasks in ``plain``.  limit: documents of each task, from its first.
    ctx: the longest request, by default what the model takes.  seed: None for lm-eval's own seeds.  metadata: what some
    tasks make their data by (RULER: max_seq_lengths), beside ``tokenizer``, the folder of the model's.
    include: folders with further task files; defaults: whether lm-eval's are there too.  about_data: whatever else
    makes the run what it is (digests of data files), for the record.
    """

    names: tuple[str, ...]
    chat: bool = True
    plain: frozenset[str] = frozenset()
    num_fewshot: int | None = None
    limit: int | None = None
    ctx: int | None = None
    seed: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    include: tuple[Path, ...] = ()
    defaults: bool = True
    task: str = "lm-eval"
    about_data: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, model: Model, drawing: LmDrawing) -> dict[str, Any]:
        """What makes two runs the same, in the shape of every run's."""
        return {
            "task": self.task,
            "lengths": [] if self.ctx is None else [self.ctx],
            "samples": self.limit,
            "seed": self.seed,
            "options": {
                "tasks": list(self.names),
                "chat": self.chat,
                "num_fewshot": self.num_fewshot,
                "metadata": dict(self.metadata),
                "include": [_digest(folder) for folder in self.include] if self.defaults else [],
                "data": dict(self.about_data),
                "lm_eval": lm_eval.__version__,
            },
            "settings": asdict(drawing),
            "haystack": None,
            "model": {"name": model.name, "fingerprint": model.fingerprint},
        }


@dataclass(frozen=True)
class Loaded:
    """One named task, group or tag of a plan: ``dictionary`` is what lm-eval's evaluate takes."""

    name: str
    dictionary: Mapping[str, Any]

    @property
    def tasks(self) -> Mapping[str, Any]:
        """lm-eval's task objects by name."""
        tasks: Mapping[str, Any] = self.dictionary["tasks"]
        return tasks


def documents(loaded: Sequence[Loaded], limit: int | None) -> int:
    """How many there are to ask about; a task that came by two names counts once."""
    tasks = {name: task for one in loaded for name, task in one.tasks.items()}
    counts = (len(task.eval_docs) for task in tasks.values())
    return sum(count if limit is None else min(limit, count) for count in counts)


def load(plan: Plan) -> list[Loaded]:
    """The plan's tasks with their data.  Names are checked before anything is loaded.

    Each name is loaded after seeding anew, so that generated data does not depend on the names before it.
    Raises TaskError for unknown names and tasks that cannot be run here, DataError where their data cannot be had.
    """
    manager = TaskManager(
        include_path=[str(folder) for folder in plan.include] or None,
        include_defaults=plan.defaults,
        metadata={**({"tokenizer": plan.tokenizer} if plan.tokenizer else {}), **plan.metadata},
    )
    loaded = []
    for name in _known(manager, plan.names):
        _seed(plan.seed)
        dictionary = _loaded(manager, name)
        for task in dictionary["tasks"].values():
            _prepare(task, plan)
        loaded.append(Loaded(name, dictionary))
    return loaded


def run(
    plan: Plan,
    loaded: Sequence[Loaded],
    model: Model,
    drawing: LmDrawing,
    folder: Path,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    more: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda found: {},
) -> dict[str, Any]:
    """Evaluate, or go on where a run in ``folder`` stopped.  Returns what results.json then holds.

    That is every run's results document (a document of a task is a question, each task a "cell" row) with lm-eval's
    own figures under "tasks" and "groups".  In those, an answer that is missing or did not fit counts as an empty
    one; our means leave out what did not fit.  progress(task, done, total) counts requests.  more: makes further keys
    of the document from it.
    Raises RunError for a folder of another run, and what tasks and models raise; all answers so far stay.
    """
    if drawing.thinking != "none" and not plan.chat:
        raise EvalError("thinking needs the chat template", "Leave out --no-chat or --think.")
    about = {**model.about(), "lm_eval": lm_eval.__version__}
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with Record.open(folder, plan.identity(model, drawing), model.ctx, documents(loaded, plan.limit), about) as record:
        journal = Journal(folder / REQUESTS)
        for one in loaded:
            chat = plan.chat and one.name not in plan.plain

            def advance(done: int, total: int, name: str = one.name) -> None:
                progress(name, done, total)

            how = drawing if chat else replace(drawing, thinking="none")
            lm = ProtocolLM(model, how, chat=chat, ctx=plan.ctx, journal=journal, progress=advance)
            _seed(plan.seed)
            found = evaluate(
                lm=lm,
                task_dict=one.dictionary,
                limit=plan.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
            known = {line.cell: line for line in record.lines}
            for line in _lines(plan, found, lm.lines):
                if line != known.get(line.cell):
                    record.add(line)
            names = [name for name in found["results"] if name not in found.get("group_subtasks", {})]
            tasks |= {name: _figures(found, name, chat) for name in names}
            groups |= {name: _metrics(found["results"][name]) for name in found.get("groups", {})}
            document = _document(record, tasks, groups)
            document |= more(document)
            record.write_results(document)
    return document


# -- loading


def _known(manager: TaskManager, names: Sequence[str]) -> list[str]:
    known: dict[str, None] = {}
    for name in names:
        there = [name] if name in manager.task_index or Path(name).is_file() else manager.match_tasks([name])
        if not there:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"Close to it: {', '.join(close)}." if close else "lm-eval's documentation lists its tasks."
            raise TaskError(f"lm-eval has no task {name!r}", hint)
        known |= dict.fromkeys(there)
    return list(known)


def _loaded(manager: TaskManager, name: str) -> Mapping[str, Any]:
    try:
        return manager.load([name])
    except ImportError as error:
        raise TaskError(f"the task {name} needs a package: {error}", "Install it, or choose another task.") from error
    except (ConnectionError, FileNotFoundError) as error:  # what datasets raises without a network or a data set
        raise DataError(
            f"the data of {name} is not on this machine, and the hub does not give it: {error}",
            "Load the data where there is a network and copy its cache (HF_HOME) here; LongBench takes --data.",
        ) from error
    except (DatasetsError, StopIteration) as error:  # the latter for an empty file
        raise DataError(f"the data of {name} cannot be read: {error}", "Look at the files its task names.") from error
    except ValueError as error:
        raise TaskError(f"the task {name} cannot be loaded: {error}", "Correct its file.") from error
    except AssertionError as error:  # RULER's, when nobody told it a tokenizer
        raise TaskError(f"the task {name} cannot be made: {error}", "Pass what it needs with --metadata.") from error


def _prepare(task: Any, plan: Plan) -> None:
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise TaskError(f"the task {name} runs code that the model writes", "Run it with lm-eval in a sandbox.")
    if getattr(task, "MULTIMODAL", False):
        raise TaskError(f"the task {name} shows images or sound, and the model reads text only", "Choose another.")
    if not len(task.eval_docs):
        raise DataError(f"the task {name} has no documents", "Look at the files its task names.")
    if plan.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 is a task's way to say "never"
        task.set_config(key="num_fewshot", value=plan.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_OTHER_SEED if plan.seed is None else plan.seed)


def _digest(folder: Path) -> str:
    """Of a folder's task files and the code beside them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".yaml", ".yml", ".py")):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _seed(seed: int | None) -> None:
    """lm-eval's tasks draw from the global generators."""
    random.seed(_RANDOM_SEED if seed is None else seed)
    np.random.seed(_OTHER_SEED if seed is None else seed % 2**32)


# -- from lm-eval's results to ours


def _lines(plan: Plan, found: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> list[Line]:
    """One line a document: lm-eval's samples (one a filter) joined with the requests behind them."""
    asked: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for request in requests:
        asked.setdefault((request["task"], request["doc"]), []).append(request)
    lines = []
    for task, samples in found["samples"].items():
        better = found["higher_is_better"].get(task) or {}
        documents: dict[int, list[Mapping[str, Any]]] = {}
        for sample in samples:
            documents.setdefault(sample["doc_id"], []).append(sample)
        for doc, kept in documents.items():
            lines.append(_line(plan, task, doc, kept, asked[task, doc], better))
    return lines


def _line(
    plan: Plan,
    task: str,
    doc: int,
    samples: Sequence[Mapping[str, Any]],
    requests: Sequence[Mapping[str, Any]],
    better: Mapping[str, bool],
) -> Line:
    statuses: list[Status] = [request["status"] for request in requests]
    status: Status = next((one for one in ("too_long", "no_answer") if one in statuses), "ok")
    metrics = {f"{name},{sample['filter']}": _json(sample[name]) for sample in samples for name in sample["metrics"]}
    facts: dict[str, Any] = {"metrics": metrics, "document": samples[0]["doc_hash"]}
    scored = [request["logprob"] for request in requests if "logprob" in request]
    if scored:
        facts["logprobs"] = scored
    answers = [request["answer"] for request in requests if "answer" in request]
    if len(answers) > 1:
        facts["answers"] = answers
    costs = [request["cost"] for request in requests if request["cost"]]
    longest = max(one["prompt_tokens"] + max(one.get("max_tokens", 0), one["completion_tokens"], 1) for one in requests)
    return Line(
        cell=f"{plan.task}/{task}/doc={doc}",
        question=0,
        questions=1,
        task=plan.task,
        ctx=1 << (longest - 1).bit_length(),  # the power of two that it fits into
        seed=plan.seed or 0,
        params={"task": task, "sample": doc},
        facts=facts,
        expected=_json(samples[0]["target"]),
        prompt=samples[0]["prompt_hash"][:16],
        status=status,
        score={"too_long": None, "no_answer": 0.0}.get(status, _score(samples[0], better)),
        answer=answers[0] if answers else "",
        reasoning=next((request["reasoning"] for request in requests if request.get("reasoning")), ""),
        finish=next((request["finish"] for request in requests if request.get("finish")), None),
        message=next((request["message"] for request in requests if request.get("message")), ""),
        max_tokens=max((request.get("max_tokens", 0) for request in requests), default=0),
        prompt_tokens=sum(request["prompt_tokens"] for request in requests),
        cached_tokens=sum(request["cached_tokens"] for request in requests),
        completion_tokens=sum(request["completion_tokens"] for request in requests),
        seconds={
            "build": 0.0,
            **{
                name: round(sum(request["seconds"][name] for request in requests), 4)
                for name in ("context", "prefill", "decode")
            },
        },
        kv_bytes=max((request["kv_bytes"] for request in requests if request.get("kv_bytes")), default=None),
        # Several requests of one document follow one another: their work adds up, their caches do not.
        cost={name: (max if name.startswith("kv") else sum)(cost[name] for cost in costs) for name in costs[0]}
        if costs
        else None,
        diagnostics=None,
    )


def _score(sample: Mapping[str, Any], better: Mapping[str, bool]) -> float | None:
    """The document's value of its main metric: "score" where there is one, else the first that is a share."""
    for name in sorted(sample["metrics"], key=lambda name: name != "score"):
        value = _json(sample[name])
        if isinstance(value, int | float) and 0 <= value <= 1 and better.get(name, True):
            return float(value)
    return None


def _document(record: Record, tasks: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, Any]:
    rows = {}
    for name, figures in tasks.items():
        lines = [line for line in record.lines if line.params["task"] == name]
        own = summary(record.run, lines)
        rows[name] = {**figures, "questions": own["questions"], "score": own["score"], **_costs(lines)}
    # Documents differ in more than their length, so that no length is the last one that went well.
    return {**summary(record.run, record.lines), "effective_length": None, "tasks": rows, "groups": dict(groups)}


def _costs(lines: Sequence[Line]) -> dict[str, float | None]:
    """A task's row of costs, tokens and seconds: means over its documents that were asked; null where unknown."""
    asked = [line for line in lines if line.completion_tokens]

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    names = ("kv_bytes", "kv_bytes_v32", "flops", "flops_v32", "flops_raw", "flops_raw_v32")
    return {
        **{name: mean(line.cost[name] if line.cost else None for line in asked) for name in names},
        "measured_kv_bytes": mean(line.kv_bytes for line in asked),
        "prompt_tokens": mean(line.prompt_tokens for line in asked),
        "cached_tokens": mean(line.cached_tokens for line in asked),
        "completion_tokens": mean(line.completion_tokens for line in asked),
        "seconds": mean(sum(line.seconds.values()) for line in asked),
    }


def _figures(found: Mapping[str, Any], name: str, chat: bool) -> dict[str, Any]:
    return {
        "metrics": _metrics(found["results"][name]),
        "version": _json(found["versions"].get(name)),
        "num_fewshot": _json(found["n-shot"].get(name)),
        "documents": dict(found["n-samples"][name]),
        "chat": chat,
    }


def _metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's figures by "metric,filter"; what it could not compute is null.

    RULER's tasks give -1 for lengths that were not asked: these are left out.
    """
    figures = {name: _json(value) if value != "N/A" else None for name, value in row.items() if "," in name}
    absent = {name.split(",")[0] for name, value in figures.items() if value == -1 and name.split(",")[0].isdigit()}
    return {name: value for name, value in figures.items() if name.split(",")[0].removesuffix("_stderr") not in absent}


def _json(value: Any) -> Any:
    """A JSON value: numbers of numpy as numbers, numbers that JSON lacks as null, anything else as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
