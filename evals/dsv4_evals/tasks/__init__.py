"""The native tasks by name.  A class is imported when its task is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ..errors import TaskError
from ..task import Task

# Name -> module in this folder and class.
TASKS = {
    "needle": ("needle", "Needle"),
    "needle-batch": ("needle_batch", "NeedleBatch"),
    "ruler": ("ruler", "Ruler"),
    "graphwalks": ("graphwalks", "GraphWalks"),
    "kv": ("kv", "KeyValue"),
    "passkey": ("passkey", "Passkey"),
    "variable-tracking": ("variable_tracking", "VariableTracking"),
    "mrcr-style": ("mrcr_style", "MrcrStyle"),
    "corpus-agg": ("corpus_agg", "CorpusAggregation"),
}


def task_named(name: str) -> Task:
    """Raises TaskError for a name that no task has."""
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}", f"Tasks are {', '.join(TASKS)}.")
    module, kind = TASKS[name]
    make: Callable[[], Task] = getattr(import_module(f".{module}", __name__), kind)
    return make()
