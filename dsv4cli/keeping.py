"""What `run` and `chat` keep on disk: the prefixes they read (the cache) and the answer under way (the journal).

Imports the engine only when called.  Whatever goes wrong with either is told once and costs no answer.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsv4cli.errors import InputProblem
from dsv4cli.line_input import state_folder
from dsv4cli.options import ANYWHERE, Placed, Think
from dsv4cli.output import count, note

if TYPE_CHECKING:
    from dsv4_engine import Engine, Session
    from dsv4_engine.journal import Journal
    from dsv4_engine.prefix_cache.cache import PrefixCache, Reuse
    from dsv4cli.answering import How


@dataclass(frozen=True)
class Keeping:
    """What one command keeps.  ctx: as it was given; cache: None where nothing is to be kept, no journal either."""

    command: str
    ctx: int | None = None
    cache: PrefixCache | None = None

    @classmethod
    @contextmanager
    def of(
        cls, command: str, engine: Engine, ctx: int | None, folder: Path | None, policy: str, *, nothing: bool
    ) -> Iterator[Keeping]:
        """For a command over ``engine``; folder: of the cache, None for the default one."""
        if nothing:
            yield cls(command, ctx)
            return
        from dsv4_engine.prefix_cache import PrefixStore
        from dsv4_engine.prefix_cache.cache import PrefixCache
        from dsv4_engine.prefix_cache.policy import Policy

        name, _, interval = policy.partition(":")
        states = Policy(name, int(interval)) if interval else Policy(name)
        with PrefixStore.open(folder) as store:
            yield cls(command, ctx, PrefixCache(store, engine, states))

    def begin(
        self, ids: Sequence[int], how: How, base: Session | None = None, chat: Mapping[str, Any] | None = None
    ) -> Recorder:
        """The journal of the answer to the prompt ``ids``, which goes on from ``base``; the seed must be known."""
        assert how.sampling.seed is not None
        if self.cache is None:
            return Recorder()
        engine, origin = self.cache.engine, self.cache.origin
        request = Request(
            command=self.command,
            model=os.path.abspath(engine.name) if os.path.isdir(engine.name) else engine.name,
            device=engine.device,
            dtype=engine.dtype,
            kv_dtype=engine.kv_dtype,
            ctx=self.ctx,
            origin=[origin.model, origin.row_format],
            ids=list(ids),
            held=base.position if base else 0,
            cuts=list(base.cuts) if base else [],
            how=dataclasses.asdict(how),
            chat=dict(chat or {}),
        )
        return Recorder.begin(request)

    def tell(self) -> None:
        """What went wrong in the store, each thing once."""
        while self.cache is not None and self.cache.store.notices:
            note(f"note: {self.cache.store.notices.pop(0)}", style="dim")


def tell_miss(reuse: Reuse) -> None:
    """Why less was found than is known; tokens that were never seen are no news."""
    if reuse.miss is not None and reuse.miss.reason != "new":
        more = " more" if reuse.tokens else ""
        note(f"note: nothing{more} of the prompt came from the cache, because {reuse.miss.text}", style="dim")


# ---- the journal -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What it takes to go on with an answer in another process.

    command: run or chat.  model, device, dtype, kv_dtype, ctx: what the engine was loaded with.  origin: what decides
    the bits of the answer (prefix_cache/origin.py).  ids: the prompt; of them the session held the first `held`, cut at
    `cuts` (see Session).  how: the fields of How.  chat: the conversation and the question.
    """

    command: str
    model: str
    device: str
    dtype: str
    kv_dtype: str
    ctx: int | None
    origin: list[str]
    ids: list[int]
    held: int
    cuts: list[int]
    how: dict[str, Any]
    chat: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Request:
        """Raises InputProblem for the request of another version of dsv4."""
        try:
            request = cls(**document)
            request.settings()
            return request
        except (TypeError, ValueError, KeyError) as error:
            raise InputProblem("the journal is of another version of dsv4", "Ask again.") from error

    def settings(self) -> How:
        """How the answer is drawn."""
        from dsv4_engine.sampling import Sampling
        from dsv4cli.answering import How

        given = dict(self.how)
        sampling, think, stop = Sampling(**given.pop("sampling")), Think(given.pop("think")), tuple(given.pop("stop"))
        return How(sampling, think, stop=stop, **given)

    def load(self, placed: Placed = ANYWHERE) -> tuple[Engine, float]:
        """The engine it was begun with, and the seconds that took.  Says so when the answer may differ from here on."""
        from dsv4_engine.prefix_cache.origin import origin_of
        from dsv4cli.answering import load

        how = {"device": self.device, "dtype": self.dtype, "kv_dtype": self.kv_dtype}
        loaded = load(self.model, **how, ctx=self.ctx, placed=placed)
        origin = origin_of(loaded[0])
        if origin.model != self.origin[0]:
            raise InputProblem(f"{self.model} is no longer the model that began this answer", "Ask again.")
        if origin.row_format != self.origin[1]:
            note("note: this machine computes otherwise than when the answer was begun; it may go on differently")
        return loaded


class Recorder:
    """The journal of one answer; without one, nothing happens.  An error while writing is told and ends the writing.

    drawn: the tokens that were drawn before the answer was interrupted.
    """

    def __init__(self, journal: Journal | None = None, drawn: Sequence[int] = ()) -> None:
        self._journal, self.drawn = journal, drawn

    @classmethod
    def begin(cls, request: Request) -> Recorder:
        from dsv4_engine.journal import SUFFIX, Journal

        path = journal_folder() / f"{request.command}-{time.time_ns()}-{os.getpid()}{SUFFIX}"
        try:
            return cls(Journal.begin(path, dataclasses.asdict(request)))
        except OSError as error:
            _tell_unwritten(error)
            return cls()

    @property
    def written(self) -> bool:
        return self._journal is not None

    def record(self, token_id: int) -> None:
        """Called with every token that is drawn."""
        if self._journal is not None:
            try:
                self._journal.append(token_id)
            except OSError as error:
                _tell_unwritten(error)
                self.leave()

    def leave(self) -> None:
        """Let go of it, for somebody to take up."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def remove(self) -> None:
        """Nothing is left to take up."""
        if self._journal is not None:
            self._journal.remove()
            self._journal = None


def _tell_unwritten(error: OSError) -> None:
    why = (error.strerror or str(error)).lower()
    note(f"note: no journal is written, so --resume cannot go on with this answer: {why}", style="dim")


def journal_folder() -> Path:
    return state_folder() / "journal"


def take_up(command: str) -> tuple[Request, Recorder]:
    """The newest answer of ``command`` that was interrupted.  Raises InputProblem when there is none."""
    from dsv4_engine.journal import Journal, unfinished

    for path in unfinished(journal_folder()):
        if path.name.startswith(f"{command}-"):
            journal, recorded = Journal.take_up(path)
            request = Request.read(recorded.request)
            note(f"going on with an answer of {count(len(recorded.token_ids))} tokens", style="dim")
            return request, Recorder(journal, recorded.token_ids)
    raise InputProblem(f"there is no interrupted answer of `dsv4 {command}`", "An answer can be resumed until it ends.")


def refuse_beside_resume(context: typer.Context, allowed: Sequence[str]) -> None:
    """Raise InputProblem for what the interrupted answer has decided already."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name) if parameter.name else None
        if given is not None and given.name == "COMMANDLINE" and parameter.name not in ("resume", *allowed):
            name = parameter.opts[0] if parameter.opts else parameter.name
            raise InputProblem(
                f"--resume goes on with what was asked, and cannot be combined with {name}",
                "Give --resume alone, or ask again.",
            )
