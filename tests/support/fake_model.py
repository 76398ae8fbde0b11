"""A model for evaluations without weights: byte tokens, and answers found by looking into the prompt.

It answers RULER's questions by searching the text it was given, so that scores say whether samples are well made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4_evals.model import Cost, Ids, LayerChoice, Progress, Prompt, Reply, Score, Settings, Trace

TEMPLATE = 7  # tokens that the pretended template puts around a prompt: 4 before, 3 behind a question
_ASKED = re.compile(r"What is the special magic number for (\S+) mentioned in the provided text\?")


def look_up(text: str, question: str) -> str:
    """What a perfect reader answers."""
    asked = _ASKED.search(question)
    if asked is None:
        return "I do not understand."
    found = re.search(rf"One of the special magic numbers for {re.escape(asked[1])} is: (\d+)\.", text)
    if found is None:
        return f"The text does not mention the special magic number for {asked[1]}."
    return f"The special magic number for {asked[1]} mentioned in the provided text is {found[1]}."


@dataclass
class FakeModel:
    """A `dsv4_evals.model.Model`.  answer(text, question) may raise ModelError; calls: what was asked, in order."""

    answer: Callable[[str, str], str] = look_up
    ctx: int = 1 << 20
    name: str = "fake"
    fingerprint: str = "fake weights"
    finish: str = "stop"
    reads: list[int] = field(default_factory=list)
    calls: list[tuple[str, Settings]] = field(default_factory=list)

    def about(self) -> Mapping[str, Any]:
        return {"device": "none"}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Ids) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def overhead(self, prompt: Prompt, settings: Settings) -> int:
        return TEMPLATE if prompt.chat else 1

    def read(self, prompt: Prompt, settings: Settings, progress: Progress | None = None) -> FakeContext:
        tokens = 4 + len(prompt.ids)
        self.reads.append(tokens)
        if progress is not None:
            progress(tokens, tokens)
        return FakeContext(self, self.decode(prompt.ids), tokens)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost | None:
        return Cost(prompt_tokens, 10.0 * prompt_tokens, prompt_tokens, 4.0 * prompt_tokens, 1.0, 4.0)


@dataclass
class FakeContext:
    """A `Context` that is not `Watched`."""

    model: FakeModel
    text: str
    tokens: int
    prefill_s: float = 0.25
    cached_tokens: int = 0

    def ask(self, ids: Ids, settings: Settings, opening: Ids = ()) -> Reply:
        question = self.model.decode(ids)
        self.model.calls.append((question, settings))
        text = self.model.answer(self.text, question)
        return Reply(
            text=text,
            reasoning="",
            finish=self.model.finish,  # type: ignore[arg-type]
            prompt_tokens=self.tokens + len(ids) + 3 + len(opening),
            cached_tokens=0,
            completion_tokens=len(text) + 1,
            prefill_s=0.01,
            decode_s=0.02,
            kv_bytes=100,
        )

    def score(self, ids: Ids, continuation: Ids, opening: Ids = ()) -> Score:
        raise NotImplementedError


@dataclass
class WatchedContext(FakeContext):
    """A context whose one indexer, in layer 2, chooses the entries ``chosen`` at every step."""

    chosen: frozenset[int] = frozenset()

    def ask_watched(self, ids: Ids, settings: Settings, opening: Ids = (), steps: int = 64) -> tuple[Reply, Trace]:
        reply = self.ask(ids, settings, opening)
        return reply, Trace(reply.prompt_tokens - 1, 128, (LayerChoice(2, 4, True, (self.chosen,) * 3),))
