"""The runner: builds each cell's sample, reads its context once, asks what is not settled yet, and records.

Owns statuses, seeds of answers and the room they get.  Knows tasks and models by their Protocols only, prints
nothing; whoever watches is told what happens.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Protocol

from .diagnostics import diagnose
from .errors import ModelError, TooLongError
from .model import Context, Ids, Model, Prompt, Reply, Settings, Trace, Watched
from .record import Line, Record, Status
from .task import Building, Cell, Filler, Question, Sample, Task


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn.  max_tokens: the most for an answer, thinking included; by default what the task needs
    and, for thinking, ``thinking_tokens`` more."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    thinking: Literal["none", "high", "max"] = "none"
    thinking_tokens: int = 0

    def settings(self, needed: int, left: int, seed: int) -> Settings:
        """For one answer that needs ``needed`` tokens where the context has ``left`` of them."""
        wanted = self.max_tokens or needed + (self.thinking_tokens if self.thinking != "none" else 0)
        return Settings(min(wanted, left), self.temperature, self.top_p, seed, self.thinking)


class Watch(Protocol):
    """What a run tells whoever watches it."""

    def begins(self, cell: Cell) -> None: ...  # a cell is being built and read
    def reads(self, done: int, total: int) -> None: ...  # tokens of its context
    def answered(self, line: Line) -> None: ...
    def ends(self, cell: Cell) -> None: ...  # also for a cell that was settled before


class Unwatched:
    """Nobody watches."""

    def begins(self, cell: Cell) -> None:
        pass

    def reads(self, done: int, total: int) -> None:
        pass

    def answered(self, line: Line) -> None:
        pass

    def ends(self, cell: Cell) -> None:
        pass


def building_of(model: Model, filler: Filler, drawing: Drawing) -> Building:
    """What tasks build with, for this model and these settings."""
    settings = Settings(1, thinking=drawing.thinking)
    usual = model.overhead(Prompt(()), settings)
    return Building(
        model,
        filler,
        room=lambda cell: cell.ctx - usual,
        overhead=lambda prompt: model.overhead(prompt, settings),
    )


def run(
    task: Task,
    cells: Sequence[Cell],
    model: Model,
    filler: Filler,
    drawing: Drawing,
    record: Record,
    watch: Watch | None = None,
) -> None:
    """Ask every question of ``cells`` that the record has not settled; each line is recorded as it comes.

    A question that fails gets status "error" and the run goes on, but for a ModelError that says it is fatal.
    Raises that, and what a task or a model refuses; what is recorded by then stays.
    """
    watch = watch or Unwatched()
    building = building_of(model, filler, drawing)
    for cell in cells:
        if not record.cell_settled(cell.id):
            watch.begins(cell)
            started = time.perf_counter()
            sample = task.build(cell, building)
            _Asking(task, sample, model, drawing, record, watch, time.perf_counter() - started).all()
        watch.ends(cell)


@dataclass
class _Asking:
    """The questions of one sample."""

    task: Task
    sample: Sample
    model: Model
    drawing: Drawing
    record: Record
    watch: Watch
    build_s: float
    context: Context | None = None
    context_s: float = 0.0

    def all(self) -> None:
        cell = self.sample.cell
        shared = _hash(*(turn.ids for turn in self.sample.prompt.turns), self.sample.prompt.ids)
        for number, question in enumerate(self.sample.questions):
            if not self.record.settled(cell.id, number):
                digest = shared.copy()
                for ids in (question.ids, self._opening(question)):
                    digest.update(array("i", ids))
                line = self._line(number, question, digest.hexdigest())
                self.build_s = self.context_s = 0.0
                self.record.add(line)
                self.watch.answered(line)

    def _opening(self, question: Question) -> Ids:
        return question.opening if self.drawing.thinking == "none" else ()

    def _line(self, number: int, question: Question, prompt: str) -> Line:
        sample, opening = self.sample, self._opening(question)
        seed = sample.cell.rng(f"answer {number}").getrandbits(53)
        least = Settings(1, thinking=self.drawing.thinking)
        own = len(sample.prompt.ids) + sum(len(turn.ids) for turn in sample.prompt.turns)
        tokens = self.model.overhead(sample.prompt, least) + own + len(question.ids) + len(opening)
        settings = self.drawing.settings(sample.max_tokens, self.model.ctx - tokens, seed)
        made = partial(self._made, question, number, prompt, tokens)
        if self.model.ctx - tokens < min(sample.max_tokens, self.drawing.max_tokens or sample.max_tokens):
            message = f"the prompt and its answer take {tokens + sample.max_tokens:,} tokens of {self.model.ctx:,}"
            return made(status="too_long", message=message)
        try:
            if self.context is None:
                self.context = self.model.read(sample.prompt, settings, self.watch.reads)
                self.context_s = self.context.prefill_s
            reply, diagnostics = _ask(self.context, question, settings, opening, len(sample.prompt.ids))
        except TooLongError as error:
            return made(status="too_long", message=str(error))
        except ModelError as error:
            if error.fatal:
                raise
            return made(status="error", message=str(error))
        made = partial(made, reply=reply, max_tokens=settings.max_tokens, diagnostics=diagnostics)
        if reply.finish == "length_thinking" or not reply.text.strip():
            return made(status="no_answer", score=0.0)
        return made(status="ok", score=self.task.score(question, reply.text))

    def _made(
        self,
        question: Question,
        number: int,
        prompt: str,
        prompt_tokens: int,
        status: Status,
        score: float | None = None,
        reply: Reply | None = None,
        message: str = "",
        max_tokens: int = 0,
        diagnostics: Mapping[str, Any] | None = None,
    ) -> Line:
        cell = self.sample.cell
        cost = self.model.cost(reply.prompt_tokens, reply.completion_tokens) if reply else None
        return Line(
            cell=cell.id,
            question=number,
            questions=len(self.sample.questions),
            task=cell.task,
            ctx=cell.ctx,
            seed=cell.seed,
            params=dict(cell.params),
            facts=dict(question.facts),
            expected=question.expected,
            prompt=prompt,
            status=status,
            score=score,
            answer=reply.text if reply else "",
            reasoning=reply.reasoning if reply else "",
            finish=reply.finish if reply else None,
            message=message,
            max_tokens=max_tokens,
            prompt_tokens=reply.prompt_tokens if reply else prompt_tokens,
            cached_tokens=reply.cached_tokens if reply else 0,
            completion_tokens=reply.completion_tokens if reply else 0,
            seconds={
                "build": round(self.build_s, 4),
                "context": round(self.context_s, 4),
                "prefill": round(reply.prefill_s, 4) if reply else 0.0,
                "decode": round(reply.decode_s, 4) if reply else 0.0,
            },
            kv_bytes=reply.kv_bytes if reply else None,
            cost=asdict(cost) if cost else None,
            diagnostics=diagnostics,
        )


def _hash(*parts: Ids) -> Any:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(array("i", part))
    return digest


def _ask(
    context: Context, question: Question, settings: Settings, opening: Ids, own: int
) -> tuple[Reply, Mapping[str, Any] | None]:
    """The reply, and for a question about a needle what there is to say of its place.

    ``own``: tokens of the prompt's own ids, which end the shared part.
    """
    facts = question.facts
    if "needle" not in facts or "value" not in facts:
        return context.ask(question.ids, settings, opening), None
    trace: Trace | None = None
    if isinstance(context, Watched):
        reply, trace = context.ask_watched(question.ids, settings, opening)
    else:
        reply = context.ask(question.ids, settings, opening)
    first = context.tokens - own
    needle, value = ((first + facts[name][0], first + facts[name][1]) for name in ("needle", "value"))
    return reply, diagnose(needle, value, reply.prompt_tokens, trace)
