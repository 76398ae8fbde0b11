"""LongBench v1 for lm-eval: which of its 21 tasks there are, and files in the official schema as tasks it can run.

Owns the reading and checking of `data/<task>.jsonl` and the small task files that point lm-eval's own definitions
(prompts, scores) at them.  Nothing is shortened.  Does not import lm-eval.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError, EvalError, TaskError

# Source of categories and of what goes without a chat template: the LongBench repository (README, pred.py).
CATEGORIES = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic tasks": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code completion": ("lcc", "repobench-p"),
}
TASKS = tuple(task for tasks in CATEGORIES.values() for task in tasks)
PLAIN = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
_WITH_CLASSES = frozenset({"trec", "lsht"})


@dataclass(frozen=True)
class Prepared:
    """Task files for lm-eval.  names: in lm-eval's terms; folder: where they are; digests: of the data, by task."""

    names: tuple[str, ...]
    plain: frozenset[str]
    folder: Path
    digests: Mapping[str, str]


def chosen(tasks: Sequence[str]) -> tuple[str, ...]:
    """All 21 tasks where none is named.  Raises TaskError for one that LongBench does not have."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise TaskError(f"LongBench has no task {unknown[0]!r}", f"Its tasks are {', '.join(TASKS)}.")
    return tuple(dict.fromkeys(tasks)) or TASKS


def from_hub(tasks: Sequence[str]) -> Prepared:
    """lm-eval's own task files, whose data comes from the hub (or its cache)."""
    names = tuple(f"longbench_{task}" for task in tasks)
    return Prepared(names, _plain(tasks), _definitions(), {})


def from_folder(tasks: Sequence[str], data: Path, work: Path) -> Prepared:
    """Task files over ``data``/<task>.jsonl (or ``data``/data/<task>.jsonl, as the official archive unpacks).

    Writes them, and the data as lm-eval wants it, into ``work``, which must stay while they are used.
    Raises DataError for a missing file or a record that is not in the schema, with file and line.
    """
    digests = {}
    for task in tasks:
        source = _file(data, task)
        target, digest = work / f"longbench_{task}.jsonl", hashlib.blake2b(digest_size=16)
        with target.open("w", encoding="utf-8") as out:
            for record in _records(source, with_classes=task in _WITH_CLASSES):
                # lm-eval's copy of the data set calls the input a question.
                row = json.dumps(
                    {"question": record["input"], **{k: record[k] for k in ("context", "answers", "all_classes")}}
                )
                digest.update(row.encode() + b"\n")
                out.write(row + "\n")
        digests[task] = digest.hexdigest()
        definition = {
            "include": str(_definitions() / f"{task}.yaml"),
            "task": f"longbench_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(target)}, "cache_dir": str(work / "cache")},
        }
        (work / f"longbench_{task}.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return Prepared(tuple(f"longbench_{task}" for task in tasks), _plain(tasks), work, digests)


def categories(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Means of task scores by category, and "all": over the run's tasks (the official average), each counted once.

    ``results``: what lm_eval_run.run returned.  Scores as lm-eval has them: what did not fit counts as empty.
    """
    scores = {
        name.removeprefix("longbench_"): row["metrics"].get("score,none") for name, row in results["tasks"].items()
    }

    def mean(tasks: Sequence[str]) -> float | None:
        known = [scores[task] for task in tasks if scores.get(task) is not None]
        return sum(known) / len(known) if known else None

    means = {category: mean(tasks) for category, tasks in CATEGORIES.items()}
    return {**{name: value for name, value in means.items() if value is not None}, "all": mean(TASKS)}


def _plain(tasks: Sequence[str]) -> frozenset[str]:
    return frozenset(f"longbench_{task}" for task in tasks if task in PLAIN)


def _definitions() -> Path:
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise EvalError("LongBench v1 runs through lm-eval, which is not installed", "pip install 'dsv4[eval]'")
    return Path(found.submodule_search_locations[0]) / "tasks" / "longbench"


def _file(data: Path, task: str) -> Path:
    for file in (data / f"{task}.jsonl", data / "data" / f"{task}.jsonl"):
        if file.is_file():
            return file
    there = sorted(path.stem for path in [*data.glob("*.jsonl"), *data.glob("data/*.jsonl")] if path.stem in TASKS)
    hint = f"It has {', '.join(there)}: name these." if there else "Unpack the official data.zip there."
    raise DataError(f"{data} has no {task}.jsonl", hint)


def _records(file: Path, with_classes: bool) -> Iterator[Mapping[str, Any]]:
    """Records of the official schema, checked: input, context, answers, all_classes (the rest is not used)."""
    number = 0
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            record = _object(raw, file, number)
            for key in ("input", "context"):
                if not isinstance(record.get(key), str):
                    raise _wrong(file, number, f"{key!r} is {_kind(record, key)}, not text")
            if not _texts(record.get("answers")) or not record["answers"]:
                raise _wrong(file, number, f"'answers' is {_kind(record, 'answers')}, not a list of texts")
            classes = record.get("all_classes")
            if not (_texts(classes) if with_classes else classes is None or _texts(classes)):
                raise _wrong(file, number, f"'all_classes' is {_kind(record, 'all_classes')}, not a list of texts")
            yield {**record, "all_classes": classes}
    if number == 0:
        raise DataError(f"{file} is empty", "Copy the official file again.")


def _object(raw: bytes, file: Path, number: int) -> Mapping[str, Any]:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _wrong(file, number, f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _wrong(file, number, f"a {type(record).__name__}, not an object")
    return record


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _kind(record: Mapping[str, Any], key: str) -> str:
    return f"{json.dumps(record[key])[:40]}" if key in record else "missing"


def _wrong(file: Path, number: int, what: str) -> DataError:
    return DataError(
        f"{file}, line {number}: {what}", "One line is one record of LongBench: input, context, answers ..."
    )
