"""Where the lines of a chat come from: an editor with history on a terminal, plain lines otherwise.

Both take several lines between lines of three quotation marks.  Raises EOFError at the end of input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4cli.output import is_terminal, note

if TYPE_CHECKING:
    from prompt_toolkit.history import History

Ask = Callable[[str], str]
_QUOTES = '"""'


def state_folder() -> Path:
    """What is kept between one start and the next: $XDG_STATE_HOME/dsv4."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG rules say that a relative path there is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"
    return root / "dsv4"


def history_file() -> Path:
    """The history of questions."""
    return state_folder() / "history"


def reader(commands: list[str]) -> Ask:
    """A function from a prompt to one message; ``commands`` are offered for completion on a terminal."""
    if is_terminal(sys.stdin) and is_terminal(sys.stderr):
        return _joined(_editor(commands))
    return _joined(_plain_line)


def _plain_line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _joined(ask: Ask) -> Ask:
    """Lines between two lines of three quotation marks as one message."""

    def message(prompt: str) -> str:
        text = ask(prompt)
        if not text.startswith(_QUOTES):
            return text
        text = text[len(_QUOTES) :]
        while not text.rstrip().endswith(_QUOTES):
            text += "\n" + ask("... ")
        return text.rstrip()[: -len(_QUOTES)].strip("\n")

    return message


def _history() -> History:
    """The history file, readable by its owner alone; kept in memory where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError as error:
        note(f"note: the history is not kept: {error.strerror}: {path}")
        return InMemoryHistory()
    return FileHistory(path)


def _editor(commands: list[str]) -> Ask:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=_history(),
        multiline=True,  # pasted lines stay one message
        key_bindings=keys,
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,  # no lines kept free below for a menu
        # Standard output is the answer's alone: it may go to a file while questions are typed.
        output=create_output(stdout=sys.stderr),
    )
    return lambda prompt: session.prompt(prompt)
