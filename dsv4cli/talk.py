"""The loop of `dsv4 chat`: reads a line, obeys a slash command or asks the model, and survives both going wrong."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from dsv4cli import answering, files, line_input
from dsv4cli.answering import How, Screen
from dsv4cli.conversation import Conversation, read, save
from dsv4cli.errors import INTERRUPTED, InputProblem, explain, show
from dsv4cli.files import Document, Reading
from dsv4cli.keeping import Recorder, Request
from dsv4cli.options import Think
from dsv4cli.output import count, file_size, note


class Talk:
    """One person, one conversation."""

    def __init__(self, conversation: Conversation, how: How, out: TextIO) -> None:
        self.conversation = conversation
        self.how = how
        self._out = out
        self._attached: list[Document] = []
        # Name -> (what follows it, help, what it does).
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "show this", self._help),
            "/file": ("PATH ...", "put files, folders or globs before the next question", self._file),
            "/think": ("none|high|max", "how long to think before answering", self._think),
            "/system": ("[TEXT]", "show or set the system message", self._system),
            "/save": ("PATH", "keep the conversation as JSON", self._save),
            "/load": ("PATH", "go on with a kept conversation", self._load),
            "/stats": ("", "tokens, rates and memory so far", self._stats),
            "/reset": ("", "forget the conversation", self._reset),
            "/exit": ("", "leave, like Ctrl-D", self._exit),
        }

    def loop(self) -> None:
        """Until the input ends."""
        engine = self.conversation.engine
        about = f"{engine.name} on {engine.device}, thinking: {self.how.think}"
        note(f"{about}. /help lists the commands, Ctrl-D leaves.", style="dim")
        ask = line_input.reader(sorted(self._commands))
        while True:
            try:
                text = ask("> ")
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt: drop the line, stay
                continue
            if not text.strip():
                continue
            try:
                self._obey(text)
            except EOFError:
                return
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (Exception, KeyboardInterrupt) as error:
                # One bad question must not cost the conversation: it is told, and the loop goes on.
                report = explain(error)
                if report.code != INTERRUPTED:
                    show(report)

    def _obey(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        word = word.rstrip()
        if not word.startswith("/") or "/" in word[1:]:  # a path such as /etc/hosts may begin a question
            self._question(text)
        elif word in self._commands:
            self._commands[word][2](rest.strip())
        else:
            raise InputProblem(
                f"unknown command {word}", "/help lists the commands; begin with a space to ask it as a question."
            )

    def _question(self, text: str) -> None:
        message = files.message_of(text, self._attached)
        outcome = self.conversation.ask(message, self.how, Screen(self._out))
        answering.show_closing(outcome, self.how)
        if outcome.text:
            self._attached = []
        else:
            note("note: nothing was answered, so the question is not kept", style="dim")

    def take_up(self, request: Request, recorder: Recorder) -> None:
        """Go on with a conversation that was interrupted; its last answer is shown whole."""
        outcome = self.conversation.take_up(request, recorder, Screen(self._out))
        answering.show_closing(outcome, self.how)

    def attach(self, reading: Reading) -> None:
        """Put what was read before the next question."""
        for line in files.skipped_lines(reading.skipped):
            note(line, style="dim")
        self._attached += reading.documents
        if reading.documents:
            characters = sum(len(document.text) for document in reading.documents)
            number = len(reading.documents)
            note(
                f"{number} file{'s' * (number != 1)}, {count(characters)} characters, for the next question",
                style="dim",
            )

    def restore(self, document: Mapping[str, Any]) -> None:
        """Go on with a conversation that was read from a file."""
        think = self.conversation.restore(document)
        self.how = dataclasses.replace(self.how, think=think)
        note(f"{len(self.conversation.messages)} messages restored, thinking: {think}", style="dim")
        if document["model"] != self.conversation.engine.name:
            note(f"note: it was held with {document['model']}", style="dim")

    def _help(self, rest: str) -> None:
        for name, (argument, what, _) in self._commands.items():
            note(f"  {f'{name} {argument}':<24} {what}")
        note('  Enter sends; Alt-Enter begins a new line; so do lines of """ before and after.')

    def _file(self, rest: str) -> None:
        try:
            paths = shlex.split(rest)
        except ValueError as error:
            raise InputProblem(f"cannot read the paths: {error}", "Close the quotation marks.") from None
        if not paths or "-" in paths:
            raise InputProblem("/file needs a path", "For example: /file notes.txt src 'docs/*.md'")
        self.attach(files.read_paths([str(Path(path).expanduser()) for path in paths]))

    def _think(self, rest: str) -> None:
        if rest not in list(Think):
            raise InputProblem(f"/think takes {', '.join(Think)}, not {rest!r}", f"It is {self.how.think} now.")
        self.how = dataclasses.replace(self.how, think=Think(rest))
        limit = self.conversation.limit
        note(answering.thinking_advice(Think(rest), limit) or f"thinking: {rest}", style="dim")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = rest
        note(f"system message: {self.conversation.system or 'none'}", style="dim")

    def _save(self, rest: str) -> None:
        path = self._path(rest, "/save")
        save(path, self.conversation.document(self.how.think))
        note(f"{len(self.conversation.messages)} messages kept in {path}", style="dim")

    def _load(self, rest: str) -> None:
        self.restore(read(self._path(rest, "/load")))

    def _path(self, rest: str, command: str) -> Path:
        if not rest:
            raise InputProblem(f"{command} needs a path", f"For example: {command} talk.json")
        return Path(rest).expanduser()

    def _stats(self, rest: str) -> None:
        totals = self.conversation.totals
        session = self.conversation.session
        fed = totals.get("prompt_tokens", 0) - totals.get("cached_tokens", 0)
        drawn = totals.get("completion_tokens", 0)
        held = session.position if session else 0
        limit = self.conversation.limit
        note(f"  context       {count(held)} of {count(limit)} tokens")
        note(f"  read          {count(fed)} tokens in {totals.get('prefill_s', 0):.1f} s")
        note(f"  reused        {count(totals.get('cached_tokens', 0))} tokens of earlier turns")
        note(f"  written       {count(drawn)} tokens in {totals.get('decode_s', 0):.1f} s")
        note(f"  cache         {file_size(session.kv_bytes if session else 0)}")
        note(f"  peak memory   {file_size(answering.peak_memory())}")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._attached = []
        note("the conversation is forgotten; the system message stays", style="dim")

    def _exit(self, rest: str) -> None:
        raise EOFError
