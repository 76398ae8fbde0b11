"""The Protocol between tasks and models: encode, read a context once, ask or score any number of times behind it.

The local engine and OpenAI-compatible endpoints implement it (both outside or beside this room); tasks know nothing
else of a model.  Contents are token ids, so that a task places its needles to the token and a million-token sample
is built in seconds; an endpoint turns them into text with the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Ids = Sequence[int]
Progress = Callable[[int, int], None]
Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "stop_string", "length", "length_thinking", "context_full", "tool_calls"]


@dataclass(frozen=True)
class Turn:
    """A whole message of a conversation."""

    role: Role
    ids: Ids


@dataclass(frozen=True)
class Prompt:
    """What many questions share: earlier turns, and the beginning of the user message that each question ends.

    chat False: plain text without a template; then there are no turns, and what is asked simply follows ``ids``.
    """

    ids: Ids
    turns: tuple[Turn, ...] = ()
    chat: bool = True


@dataclass(frozen=True)
class Settings:
    """How answers are drawn.  Greedy unless a temperature is given; thinking opens a <think> block."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    thinking: Literal["none", "high", "max"] = "none"
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """One answer.  text: what follows the last </think>; with finish "length_thinking" there is none.

    Tokens count the whole prompt; cached: those of them not computed for this answer, because an earlier question or
    the disk cache left them.  Seconds are this answer's own (a context's prefill is told by `Context.prefill_s`).
    kv_bytes: measured bytes of the sequence's state, None where the model cannot tell.
    """

    text: str
    reasoning: str
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    kv_bytes: int | None = None


@dataclass(frozen=True)
class Score:
    """Log-probability (natural) of a continuation and whether greedy decoding would have produced it."""

    logprob: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Cost:
    """What a prompt and its answer cost by the model's configuration, beside the V3.2 baseline at the same length.

    FLOPs are "equivalent FP8" (weighted) and raw; bytes are those of the KV cache at the end.
    """

    kv_bytes: float
    kv_bytes_v32: float
    flops: float
    flops_v32: float
    flops_raw: float
    flops_raw_v32: float


@dataclass(frozen=True)
class LayerChoice:
    """What one layer's indexer chose, at the last token of the prompt and at each answer token after it.

    ratio: tokens of one compressed entry; entry i summarises tokens ratio * i on, and the block before it too where
    ``overlap``.  steps: the chosen entries at each traced position; None where all there were could be attended to.
    """

    layer: int
    ratio: int
    overlap: bool
    steps: tuple[frozenset[int] | None, ...]


@dataclass(frozen=True)
class Trace:
    """Where attention could look while an answer was drawn.

    first: position of the first traced token (the prompt's last); window: tokens that every layer sees uncompressed.
    """

    first: int
    window: int
    layers: tuple[LayerChoice, ...]


class Context(Protocol):
    """A prompt that has been read.  Every question runs on a fork of it: questions do not see each other."""

    @property
    def tokens(self) -> int: ...  # tokens of the shared part, the template's included
    @property
    def prefill_s(self) -> float: ...  # seconds it took to read
    @property
    def cached_tokens(self) -> int: ...  # tokens of it that a cache supplied

    def ask(self, ids: Ids, settings: Settings, opening: Ids = ()) -> Reply:
        """End the user message with ``ids``, open the answer with ``opening``, and draw the rest of it.

        Where settings.thinking is on, there is no opening: the model thinks first.
        """
        ...

    def score(self, ids: Ids, continuation: Ids, opening: Ids = ()) -> Score:
        """Log-probability of ``continuation`` (not empty) behind ``ids`` and ``opening``, which stand as in `ask`.

        Never holds the logits of a long continuation at once.  Raises UnsupportedError where unknown.
        """
        ...


@runtime_checkable
class Watched(Protocol):
    """A Context that can also tell what its indexers chose; a local model's can."""

    def ask_watched(self, ids: Ids, settings: Settings, opening: Ids = (), steps: int = 64) -> tuple[Reply, Trace]:
        """`Context.ask`, with a trace of the prompt's last token and at most ``steps`` answer tokens."""
        ...


class Model(Protocol):
    """A model as evaluations see it."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...  # of weights and configuration; an endpoint's is of its address and model name
    @property
    def ctx(self) -> int: ...  # the most tokens a prompt and its answer may have together

    def about(self) -> Mapping[str, Any]:
        """Machine, device, precisions and versions, for the record of a run (JSON values)."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text; text never becomes a special token."""
        ...

    def decode(self, ids: Ids) -> str: ...

    def overhead(self, prompt: Prompt, settings: Settings) -> int:
        """Tokens that the template adds around a prompt's own ids, the opening of the answer included."""
        ...

    def read(self, prompt: Prompt, settings: Settings, progress: Progress | None = None) -> Context:
        """Take a prompt in.  settings.thinking matters, because a template may put its mode first."""
        ...

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Cost | None:
        """Analytic cost; None where the model's configuration is unknown."""
        ...
