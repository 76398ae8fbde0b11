"""A conversation over one session: its messages, what the session already holds of them, keeping and restoring.

Every turn encodes the whole conversation again and feeds only what is new.  Where the encoding does not go on from
the session's tokens (earlier thinking is dropped from the history, or an answer encodes differently than it was
drawn), the turn starts from a fork taken just before the last answer, or from what the prefix cache has.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4cli import answering
from dsv4cli.answering import How, Outcome, Screen
from dsv4cli.errors import InputProblem
from dsv4cli.keeping import Keeping, Recorder, Request
from dsv4cli.options import Think
from dsv4cli.output import progress_bar

if TYPE_CHECKING:
    from dsv4_engine import Engine, Session

FORMAT, VERSION = "dsv4-chat", 1
# A turn that brings so many times what going back to whole chunks repeats goes back: whole chunks can be kept on disk.
WORTH_GOING_BACK = 4
_ROLES = ("user", "assistant")
_KEYS = {"role", "content"}


@dataclass
class Conversation:
    """The messages so far and the sessions that hold their tokens."""

    engine: Engine
    keeping: Keeping = field(default_factory=lambda: Keeping("chat"))
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    session: Session | None = None
    _safe: Session | None = None  # as it was just before the last answer
    _recorder: Recorder = field(default_factory=Recorder)  # of the last answer
    totals: dict[str, float] = field(default_factory=dict)

    def ask(self, text: str, how: How, screen: Screen) -> Outcome:
        """Put ``text`` to the model and show the answer.

        A question that does not fit, or that was stopped before any answer, leaves the conversation as it was.
        """
        asked = [*self._opening(), *self.messages, {"role": "user", "content": text}]
        ids = answering.prompt_ids(self.engine, asked, how.think)
        answering.check_fits(self.engine, len(ids))
        told = {"system": self.system, "messages": self.messages, "question": text, "seed": how.sampling.seed}
        if how.sampling.seed is None:  # the journal must know it
            how = replace(how, sampling=replace(how.sampling, seed=secrets.randbits(53)))
        base = self._starting_from(ids)
        recorder = self.keeping.begin(ids, how, base, told)
        self._recorder.remove()  # from here on the new one is what there is to go on with
        return self._answer(text, ids, how, screen, base, recorder)

    def take_up(self, request: Request, recorder: Recorder, screen: Screen) -> Outcome:
        """Go on with a conversation that was interrupted: its messages, and its last answer to the end."""
        self.reset()
        self.system = request.chat["system"]
        self.messages = [dict(message) for message in request.chat["messages"]]
        cache, base = self.keeping.cache, None
        if request.cuts:  # what this session held came as it is held now, piece by piece
            whole = request.ids[: request.cuts[0]]
            base = cache.start(whole)[0] if cache else self.engine.session()
            with progress_bar("reading what was said", "tokens") as progress:
                base.retrace(request.ids[: request.held], request.cuts, progress)
        return self._answer(request.chat["question"], request.ids, request.settings(), screen, base, recorder)

    def _answer(
        self, text: str, ids: Sequence[int], how: How, screen: Screen, base: Session | None, recorder: Recorder
    ) -> Outcome:
        self._recorder = recorder
        self.session = None  # until this turn is through: an error half-way may leave it between two states
        outcome = answering.stream_answer(
            self.engine,
            ids,
            how,
            screen=screen,
            base=base,
            keeping=self.keeping,
            recorder=recorder,
            before_answer=self._keep,
        )
        self.session = outcome.session
        self._count(outcome)
        if outcome.text:
            answer = {"role": "assistant", "content": outcome.text}
            if outcome.reasoning:
                answer["reasoning_content"] = outcome.reasoning
            self.messages += [{"role": "user", "content": text}, answer]
        return outcome

    def close(self) -> None:
        """The conversation ends here; there is nothing to go on with."""
        self._recorder.remove()

    @property
    def limit(self) -> int:
        """How many tokens the conversation may have."""
        return self.engine.ctx

    def reset(self) -> None:
        """Forget the messages; the system message stays."""
        self.messages, self.session, self._safe = [], None, None
        self._recorder.remove()

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _keep(self, session: Session) -> None:
        self._safe = session.fork()

    def _starting_from(self, ids: Sequence[int]) -> Session | None:
        """The session that holds the longest beginning of ``ids``; at least the last id is left to be fed.

        What is on disk has no say in where a turn with a past starts, so that the cache never changes an answer.
        """
        held = [session for session in (self.session, self._safe) if session and _begins(ids, session.tokens)]
        if not held:
            return None
        best = max(held, key=lambda session: session.position)
        new, repeated = len(ids) - best.position, best.position - best.whole
        if new >= self.engine.chunk and new >= WORTH_GOING_BACK * repeated:
            return best.fork_whole()
        # The safe fork stays untouched, so that an interrupted turn can start from it again.
        return best.fork() if best is self._safe else best

    def _count(self, outcome: Outcome) -> None:
        for key in ("prompt_tokens", "cached_tokens", "completion_tokens", "prefill_s", "decode_s"):
            self.totals[key] = self.totals.get(key, 0) + getattr(outcome, key)

    def document(self, think: Think) -> dict[str, Any]:
        """The conversation as kept on disk."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.engine.name,
            "think": think.value,
            "system": self.system,
            "messages": self.messages,
        }

    def restore(self, document: Mapping[str, Any]) -> Think:
        """Take over a conversation that ``read`` has checked; returns its thinking mode."""
        self.reset()
        self.system = document["system"]
        self.messages = [dict(message) for message in document["messages"]]
        return Think(document["think"])


def _begins(ids: Sequence[int], tokens: Sequence[int]) -> bool:
    return 0 < len(tokens) < len(ids) and list(ids[: len(tokens)]) == list(tokens)


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Write a conversation, whole or not at all.  Replaces only a file that is a conversation already."""
    if path.exists():
        try:
            read(path)
        except InputProblem as problem:
            raise InputProblem(f"{path} exists and is no conversation of dsv4", "Choose another name.") from problem
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # readable by its owner alone
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> dict[str, Any]:
    """A conversation kept by ``save``.  Raises InputProblem for anything else."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputProblem(f"{path} is not a JSON file", "Conversations are kept by /save.") from error
    wrong = _complaint(document)
    if wrong:
        raise InputProblem(f"{path} is no conversation of dsv4: {wrong}", "Conversations are kept by /save.")
    return dict(document)


def _complaint(document: object) -> str:
    """What is wrong with the shape of a kept conversation, or an empty string."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f'it has no "format": "{FORMAT}"'
    if document.get("version") != VERSION:
        return f"version {document.get('version')!r}, and this program reads version {VERSION}"
    expected = {"format", "version", "model", "think", "system", "messages"}
    if set(document) != expected:
        return f"unknown or missing keys: {', '.join(sorted(set(document) ^ expected))}"
    if not isinstance(document["model"], str) or not isinstance(document["system"], str):
        return '"model" and "system" must be texts'
    if document["think"] not in list(Think):
        return f'"think" is {document["think"]!r}'
    messages = document["messages"]
    if not isinstance(messages, list):
        return '"messages" must be a list'
    for number, message in enumerate(messages):
        known = isinstance(message, dict) and _KEYS <= set(message) <= {*_KEYS, "reasoning_content"}
        if not known or message["role"] not in _ROLES or not all(isinstance(value, str) for value in message.values()):
            return f"message {number} is not a role and a text"
    return ""
