"""One table from exceptions to a message, a hint and an exit code.

Exit codes: 0 done; 1 failure; 2 wrong usage or wrong input; 130 stopped with Ctrl-C.
The engine's exceptions are named by module and class and looked up among the modules already loaded: importing
the engine here would load torch to report a missing file, and an exception of a module nobody imported cannot come.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

FAILURE, WRONG_INPUT, INTERRUPTED = 1, 2, 130
DEBUG_ENV = "DSV4_DEBUG"


class InputProblem(ValueError):
    """Something the user gave that the command line itself refuses.  ``hint`` is the next step, or empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Report:
    """What the user is told: one line, the next step (may be empty), and the exit code."""

    message: str
    hint: str
    code: int


def _own(error: BaseException) -> tuple[str, str]:
    return str(error), getattr(error, "hint", "")


def _file(error: BaseException) -> tuple[str, str]:
    assert isinstance(error, OSError)
    what = (error.strerror or str(error)).lower()
    name = f": {error.filename}" if error.filename is not None else ""
    return f"{what}{name}", ""


def _module(error: BaseException) -> tuple[str, str]:
    name = getattr(error, "name", None) or "?"
    return f"the Python package {name!r} is missing", "Install dsv4 again; `dsv4 doctor` lists what it needs."


def _no_memory(error: BaseException) -> tuple[str, str]:
    return "memory ran out while computing", "Choose a smaller --ctx, close other programs, or use --kv-dtype mixed."


def _interrupted(error: BaseException) -> tuple[str, str]:
    return "stopped", getattr(error, "hint", "")


def _bug(error: BaseException) -> tuple[str, str]:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"dsv4 failed: {text}", f"This is a bug; {DEBUG_ENV}=1 in the environment shows where, for a report."


# Read from the top; the first row that matches decides.
_TABLE: tuple[tuple[type[BaseException] | str, Callable[[BaseException], tuple[str, str]], int], ...] = (
    (InputProblem, _own, WRONG_INPUT),
    ("dsv4_engine.errors:DownloadError", _own, FAILURE),
    ("dsv4_engine.errors:InputError", _own, WRONG_INPUT),
    ("dsv4_evals.errors:EvalError", _own, WRONG_INPUT),
    ("dsv4_evals.errors:ModelError", _own, FAILURE),
    ("dsv4_engine.quantize.run:DiskProblem", _own, FAILURE),
    (FileNotFoundError, _file, WRONG_INPUT),
    (PermissionError, _file, WRONG_INPUT),
    (IsADirectoryError, _file, WRONG_INPUT),
    (NotADirectoryError, _file, WRONG_INPUT),
    ("torch:OutOfMemoryError", _no_memory, FAILURE),
    (MemoryError, _no_memory, FAILURE),
    (OSError, _file, FAILURE),
    (ModuleNotFoundError, _module, FAILURE),
    (KeyboardInterrupt, _interrupted, INTERRUPTED),
    (Exception, _bug, FAILURE),
)


def _matches(error: BaseException, kind: type[BaseException] | str) -> bool:
    if isinstance(kind, str):
        module, _, name = kind.partition(":")
        found = getattr(sys.modules.get(module), name, None)
        return isinstance(found, type) and isinstance(error, found)
    return isinstance(error, kind)


def explain(error: BaseException) -> Report:
    """The table's answer for ``error``."""
    for kind, describe, code in _TABLE:
        if _matches(error, kind):
            return Report(*describe(error), code)
    raise error


def show(report: Report) -> None:
    """Print a report on standard error: one line, then the next step."""
    from dsv4cli.output import note

    note(report.message if report.code == INTERRUPTED else f"error: {report.message}", style="red")
    if report.hint:
        note(f"hint: {report.hint}", style="cyan")


@contextmanager
def reported() -> Iterator[None]:
    """Around a whole command: whatever goes wrong inside ends as a message and an exit code, never as a traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BrokenPipeError:
        # The reader of our output left (`| head`).  Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILURE) from None
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG_ENV):
            traceback.print_exc()
        report = explain(error)
        show(report)
        raise typer.Exit(report.code) from None
