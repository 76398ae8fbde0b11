"""Writes docs/cli.md from the app itself: `python -m dsv4cli.reference > docs/cli.md`.  A test holds the file to it."""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any, get_args, get_type_hints

import typer

from dsv4cli.main import app

_HEAD = """\
# The command line

<!-- Written by `python -m dsv4cli.reference > docs/cli.md`; a test compares. -->

Every command: the answer goes to standard output and everything else to standard error; `--json` prints exactly one
JSON document on standard output; colours and bars appear on a terminal only.

Exit codes: 0 done, 1 failure, 2 wrong usage or wrong input (nothing was computed or written), 130 stopped with Ctrl-C.
A message is one line, followed by `hint:` with the next step. `DSV4_DEBUG=1` in the environment adds the traceback.

Numbers of tokens may be written `4096`, `128K` (131,072) or `1M` (1,048,576).
"""

_TAIL = """\
## JSON of `dsv4 run`

```
{"text", "reasoning", "finish_reason",
 "usage": {"prompt_tokens", "cached_tokens", "completion_tokens"},
 "timing": {"load_s", "prefill_s", "decode_s", "prefill_tok_s", "decode_tok_s"},
 "model", "device", "seed"}
```

`finish_reason` is one of

| reason | meaning |
|---|---|
| `stop` | the model ended its answer |
| `stop_string` | a text given with `--stop` came up |
| `length` | `--max-tokens` ran out in the answer |
| `length_thinking` | the limit ran out while the model was still thinking: there is no answer |
| `context_full` | the context is full |
| `tool_calls` | the model asked for a tool |
| `cancelled` | Ctrl-C; what there was is in `text` |

`seed` repeats the answer when it is given back with `--seed`, on the same machine and version.

## JSON of `dsv4 profile`

See [profile.md](profile.md), which also says what is counted and how it is weighted.

## In `dsv4 chat`

| typed | what it does |
|---|---|
| `/help` | lists the commands |
| `/file PATH ...` | puts files, folders or globs before the next question |
| `/think none\\|high\\|max` | how long to think before answering |
| `/system [TEXT]` | shows or sets the system message |
| `/save PATH`, `/load PATH` | keeps the conversation as JSON, goes on with a kept one |
| `/stats` | tokens, rates and memory so far |
| `/reset` | forgets the conversation |
| `/exit` | leaves, like Ctrl-D |

Enter sends, Alt-Enter begins a new line, and so do lines of `\"\"\"` before and after. Ctrl-C stops the answer, not the
program. The history of questions is kept in `$XDG_STATE_HOME/dsv4/history`, readable by its owner alone.
"""


def reference() -> str:
    """The whole page."""
    pages = [_command(str(command.name), command.callback) for command in app.registered_commands if command.callback]
    groups = [_group(str(group.name), group.typer_instance) for group in app.registered_groups if group.typer_instance]
    return "\n".join([_HEAD, *pages, *groups, _TAIL])


def _group(name: str, group: typer.Typer) -> str:
    """A command of commands.  Options that three of them or more share are explained once, at the end."""
    commands = {str(command.name): command.callback for command in group.registered_commands if command.callback}
    rows = {each: _rows(function) for each, function in commands.items()}
    times = Counter(row for some in rows.values() for row in some)
    shared = [row for row, number in times.items() if number >= 3]
    lines = [f"## dsv4 {name}", "", str(group.info.help), ""]
    for each, function in commands.items():
        own = [row for row in rows[each] if row not in shared]
        lines += [f"### dsv4 {name} {each}", "", *_about(function), *(_table(own) if own else [])]
        also = [row.split("`")[1] for row in rows[each] if row in shared]
        if also:
            lines += ["Also takes, as explained below: " + ", ".join(f"`{option}`" for option in also) + ".", ""]
    if shared:
        lines += [f"### Options of several commands of dsv4 {name}", "", *_table(shared)]
    return "\n".join(lines)


def _command(name: str, function: Callable[..., Any]) -> str:
    """One command, read from its function's signature: Typer's own objects differ between its versions."""
    return "\n".join([f"## dsv4 {name}", "", *_about(function), *_table(_rows(function))])


def _about(function: Callable[..., Any]) -> list[str]:
    """What help says of a command, and its examples."""
    about, _, examples = inspect.cleandoc(function.__doc__ or "").partition("Examples:")
    shown = re.findall(r"\[bold\](.*?)\[/bold\]", examples)
    return [about.strip(), "", *(["```", *shown, "```", ""] if shown else [])]


def _table(rows: list[str]) -> list[str]:
    return ["| option | meaning | default |", "|---|---|---|", *rows, ""]


def _rows(function: Callable[..., Any]) -> list[str]:
    """One row of a table for each option and argument."""
    hints = get_type_hints(function, include_extras=True)
    rows = []
    for parameter in inspect.signature(function).parameters.values():
        if hints[parameter.name] is typer.Context:  # no option
            continue
        kind, info = get_args(hints[parameter.name])[:2]
        rows.append(_row(parameter.name, kind, info, parameter.default))
    return rows


def _row(name: str, kind: Any, info: Any, default: object) -> str:
    """One option or argument as a row of the table."""
    if isinstance(info, typer.models.ArgumentInfo):
        written = str(info.metavar)
    else:
        # Inside Annotated the first name stands where a default would.
        names = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
        names = names or ["--" + name.replace("_", "-")]
        value = "|".join(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else info.metavar
        written = ", ".join(f"`{option}`" for option in names) + (f" {value}" if value else "")
    needed = default is inspect.Parameter.empty
    shown = ["required"] if needed else [] if default is None or default is False else [f"`{default}`"]
    if info.envvar:
        shown.append(f"`${info.envvar}`")
    cells = (written, info.help, " or ".join(shown))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(reference())
