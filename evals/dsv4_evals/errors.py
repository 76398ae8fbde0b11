"""What can be wrong with an evaluation's input, each with a next step for the person who asked for it."""

from __future__ import annotations


class EvalError(ValueError):
    """Wrong input to an evaluation.  ``hint`` is the next step, or empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class TaskError(EvalError):
    """An unknown task, or options that a task does not take (lengths, depths, counts)."""


class DataError(EvalError):
    """A data file that is missing, or whose records are not in the schema; names file and line."""


class RunError(EvalError):
    """An output folder that holds another run, or is damaged in a way that resuming cannot mend."""


class UnsupportedError(EvalError):
    """The model at hand cannot do what the task needs (log-probabilities over an endpoint that returns none)."""


class ModelError(RuntimeError):
    """The model failed on one sample (an endpoint that is down or answers rubbish): the sample's status is "error".

    ``fatal``: no later sample can do better (refused connection, wrong key), so the run stops, finished samples kept.
    """

    def __init__(self, message: str, hint: str = "", fatal: bool = False) -> None:
        super().__init__(message)
        self.hint, self.fatal = hint, fatal


class TooLongError(ModelError):
    """The model itself found that a prompt does not fit its context: the sample's status is "too_long"."""
