"""A model of the evaluations' Protocol that answers by a function: tokens are bytes, nothing is computed.

Its template writes "[role]" before each message and "[answer]" before what is drawn, a token each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4_evals.errors import TooLongError
from dsv4_evals.model import Cost, Ids, Progress, Prompt, Reply, Score, Settings


@dataclass
class ScriptedModel:
    """answer: from the whole prompt as text (opening included) and the settings, what is drawn; text before
    "</think>" is reasoning.  likely: from a prompt and a continuation, its log-probability and whether it is greedy."""

    answer: Callable[[str, Settings], str] = lambda prompt, settings: "yes"
    likely: Callable[[str, str], tuple[float, bool]] = lambda prompt, text: (-float(len(text)), False)
    ctx: int = 100_000
    name: str = "scripted"
    fingerprint: str = "0"
    reads: list[Prompt] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # of questions and scores, in their order

    def about(self) -> Mapping[str, Any]:
        return {"device": "none"}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Ids) -> str:
        return bytes(ids).decode(errors="replace")

    def overhead(self, prompt: Prompt, settings: Settings) -> int:
        return len(prompt.turns) + 2 if prompt.chat else 1

    def read(self, prompt: Prompt, settings: Settings, progress: Progress | None = None) -> ScriptedContext:
        tokens = self.overhead(prompt, settings) + len(prompt.ids) + sum(len(turn.ids) for turn in prompt.turns)
        if tokens > self.ctx:
            raise TooLongError(f"{tokens} of {self.ctx}")
        self.reads.append(prompt)
        if progress is not None:
            progress(tokens, tokens)
        return ScriptedContext(self, prompt, tokens)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost | None:
        tokens = float(prompt_tokens + completion_tokens)
        return Cost(tokens, 10 * tokens, 2 * tokens, 20 * tokens, 3 * tokens, 30 * tokens)


@dataclass
class ScriptedContext:
    """A read prompt."""

    model: ScriptedModel
    prompt: Prompt
    tokens: int
    prefill_s: float = 0.5
    cached_tokens: int = 0

    def ask(self, ids: Ids, settings: Settings, opening: Ids = ()) -> Reply:
        text = self._text(ids, opening)
        self.model.prompts.append(text)
        drawn = self.model.answer(text, settings)
        reasoning, closed, answer = drawn.rpartition("</think>")
        finish = "stop"
        unclosed = settings.thinking != "none" and not closed
        if unclosed:
            reasoning, answer, finish = drawn, "", "length_thinking"
        elif settings.thinking == "none" and len(self.model.encode(answer)) > settings.max_tokens:
            answer, finish = self.model.decode(self.model.encode(answer)[: settings.max_tokens]), "length"
        for stop in settings.stop:
            if stop in answer:
                answer, finish = answer[: answer.index(stop)], "stop_string"
        cached, self.cached_tokens = self.cached_tokens, self.tokens
        drawn_tokens = len(self.model.encode(drawn))
        tokens = self.tokens + len(ids) + len(opening)
        return Reply(answer, reasoning, finish, tokens, cached, drawn_tokens, 0.1, 0.2, kv_bytes=tokens)  # type: ignore[arg-type]

    def score(self, ids: Ids, continuation: Ids, opening: Ids = ()) -> Score:
        text = self._text(ids, opening)
        self.model.prompts.append(text)
        logprob, greedy = self.model.likely(text, self.model.decode(continuation))
        return Score(logprob, greedy, len(continuation))

    def _text(self, ids: Ids, opening: Ids) -> str:
        decode = self.model.decode
        if not self.prompt.chat:
            return decode([*self.prompt.ids, *ids, *opening])
        turns = "".join(f"[{turn.role}]{decode(turn.ids)}" for turn in self.prompt.turns)
        return f"{turns}[user]{decode([*self.prompt.ids, *ids])}[answer]{decode(opening)}"
