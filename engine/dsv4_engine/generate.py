"""One answer as a stream of typed events: prefill, thinking, answer, tool calls, and how it ended.

Owns the loop of drawing, decoding, parsing and stopping.  Knows a session only by its `extend`, prints nothing and
installs no signal handler.

A token's events come after the session has taken it in: whatever was emitted is in the session, at any interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from .device_sampling import Draw
from .errors import InputError, PromptError
from .parsing import ParsedMessage, Piece, StreamParser
from .protocol import END_THINK, EOS
from .sampling import Sampler, Sampling

Reason = Literal[
    "stop",  # the model ended its message
    "stop_string",  # one of the given strings came up in the answer
    "length",  # the token limit ran out in the answer
    "length_thinking",  # the token limit or the context ran out while the model was thinking: there is no answer
    "tool_calls",  # the model ended its message with calls
    "cancelled",  # the caller stopped it
    "context_full",  # the context ran out in the answer
]
Progress = Callable[[int, int], None]


class TokenSession(Protocol):
    """What generation needs of a session; dsv4_engine.session.Session is one."""

    @property
    def position(self) -> int: ...  # tokens it holds
    @property
    def ctx(self) -> int: ...  # tokens it can hold
    def extend(
        self, token_ids: Sequence[int], logits: Literal["last", "none", "device"] = ..., progress: Progress | None = ...
    ) -> Tensor: ...
    def ahead(self, draw: Draw) -> None: ...


class TextDecoder(Protocol):
    """What generation needs of an incremental decoder."""

    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


class TextCodec(Protocol):
    """What generation needs of a tokenizer; dsv4_engine.tokenizer.Tokenizer is one."""

    @property
    def eos_id(self) -> int: ...
    def decoder(self) -> TextDecoder: ...


@dataclass(frozen=True)
class Usage:
    """Token counts: the whole prompt, how much of it the session held before, and what was drawn (EOS included)."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds of work (the time the caller takes between events is not counted) and tokens a second (0 for none)."""

    prefill_s: float
    decode_s: float
    prefill_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True)
class Prefilled:
    """The prompt is taken in: `tokens` in all, `cached` of them before this call, `seconds` for the others."""

    tokens: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class Thinking:
    """The next stretch of reasoning."""

    text: str


@dataclass(frozen=True)
class Answer:
    """The next stretch of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallEvent:
    """A complete, well-formed call; `arguments` is the text of a JSON object, `index` counts the calls from 0."""

    name: str
    arguments: str
    index: int = 0


@dataclass(frozen=True)
class Done:
    """The end.  `parsed` is the whole message with its problems; what malformed text there was is kept there.

    token_ids: every token drawn.  seed: repeats this generation.  stop_string: the one that ended it.
    """

    reason: Reason
    usage: Usage
    timing: Timing
    parsed: ParsedMessage
    token_ids: tuple[int, ...]
    seed: int
    stop_string: str | None = None


Event = Prefilled | Thinking | Answer | ToolCallEvent | Done


class _Stopped(Exception):
    """Leaves a prefill between two of its chunks."""


class StopStrings:
    """Cuts a stream of text before the first stop string to be complete.

    Text that may be the beginning of one is held back.  With after=X nothing is looked for until X has passed.
    """

    def __init__(self, strings: Sequence[str], after: str = "") -> None:
        self._strings = tuple(strings)
        self._after = after
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop string; `found` is set when one is complete."""
        if not self._strings or self.found is not None:
            return "" if self.found is not None else text
        passed = ""
        text = self._held + text
        if self._after:
            end = text.find(self._after)
            if end < 0:
                # All of it passes; what is kept serves only to find a mark that two pushes share.
                fresh = text[len(self._held) :]
                self._held = text[max(0, len(text) - len(self._after) + 1) :]
                return fresh
            end += len(self._after)
            passed, text = text[len(self._held) : end], text[end:]
            self._after = self._held = ""
        ends = [(place + len(s), place, s) for s in self._strings if (place := text.find(s)) >= 0]
        if ends:
            _, place, self.found = min(ends)
            self._held = ""
            return passed + text[:place]
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        return passed + text[:certain]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return "" if self._after or self.found is not None else held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._strings)) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._strings)), 0)


class Generation(Iterator[Event]):
    """One answer under way; made by `generate`.  Iterate it for events; the last one is Done.

    To end it early, from the thread that iterates: `cancel()`, which returns the Done of what exists, also after a
    KeyboardInterrupt out of the iteration.  From a signal handler or another thread: `stop()`, after which the
    iteration ends by itself, between two tokens or two chunks of the prompt, with reason "cancelled".
    """

    def __init__(
        self,
        session: TokenSession,
        prompt_ids: Sequence[int],
        codec: TextCodec,
        sampler: Sampler,
        max_tokens: int | None,
        stops: StopStrings,
        thinking: bool,
        eos_ids: Collection[int],
        progress: Progress | None,
        drawn: Sequence[int],
        record: Callable[[int], None] | None,
    ) -> None:
        self._session, self._prompt_ids = session, prompt_ids
        self._drawn, self._record = drawn, record
        self._sampler, self._max_tokens, self._stops = sampler, max_tokens, stops
        self._eos_ids, self._progress = frozenset(eos_ids), progress
        self._decoder, self._parser = codec.decoder(), StreamParser(thinking)
        self._cached = session.position
        self._ids: list[int] = []
        self._calls = 0
        self._prefill_s = self._decode_s = 0.0
        self._prefilled = 0
        self._stop_requested = self._text_ended = False
        self._done: Done | None = None
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    @property
    def done(self) -> Done | None:
        """The Done event, once it exists."""
        return self._done

    def stop(self) -> None:
        """Asks the iteration to end soon.  Only sets a flag: safe in signal handlers and from other threads."""
        self._stop_requested = True

    def close(self) -> None:
        """Ends the generation at once; `done` then holds what exists (reason "cancelled", unless it had ended)."""
        self._events.close()
        if self._done is None:
            self._end_text()
            self._finish("cancelled")

    def cancel(self) -> Done:
        """`close`, and the Done event."""
        self.close()
        assert self._done is not None
        return self._done

    def _run(self) -> Generator[Event, None, None]:
        try:
            logits_V = self._prefill()
        except _Stopped:
            yield self._finish("cancelled")
            return
        yield Prefilled(self._cached + self._prefilled, self._cached, self._prefill_s)
        while (reason := self._limit_reached()) is None:
            started = time.perf_counter()
            token_id = self._next(logits_V)
            ended = token_id in self._eos_ids
            # Left where they are, the logits are waited for in the next draw: a GPU works beside what follows here.
            last = ended or self._limit_reached(ahead=1) is not None
            logits_V = self._session.extend([token_id], logits="none" if last else "device")
            self._ids.append(token_id)
            text = EOS if ended else self._decoder.push(token_id)
            pieces = self._end_text(EOS) if ended else self._parser.push(self._stops.push(text))
            self._decode_s += time.perf_counter() - started
            yield from self._as_events(pieces)
            if ended or self._stops.found is not None:
                reason = "stop"
                break
        yield from self._as_events(self._end_text())
        if self._stops.found is not None:
            reason = "stop_string"
        elif reason == "stop" and self._calls:
            reason = "tool_calls"
        yield self._finish(reason)

    def _prefill(self) -> Tensor:
        def advanced(done: int, total: int) -> None:
            self._prefilled, self._prefill_s = done, time.perf_counter() - started
            if self._progress is not None:
                self._progress(done, total)
            if self._stop_requested and done < total:
                raise _Stopped

        if self._stop_requested:
            raise _Stopped
        started = time.perf_counter()
        logits_V = self._session.extend(self._prompt_ids, logits="last", progress=advanced)
        self._prefilled, self._prefill_s = len(self._prompt_ids), time.perf_counter() - started
        return logits_V

    def _next(self, logits_V: Tensor) -> int:
        if len(self._ids) < len(self._drawn):
            return self._drawn[len(self._ids)]
        begun = self._sampler.begin(logits_V)
        if begun is not None:  # the GPU goes on with its token before the host knows it
            self._session.ahead(begun)
        token_id = self._sampler.end(logits_V, begun)
        if self._record is not None:
            self._record(token_id)
        return token_id

    def _limit_reached(self, ahead: int = 0) -> Reason | None:
        """Why no token is drawn any more; ahead: once so many more are there."""
        if self._stop_requested:
            return "cancelled"
        reason: Reason | None = None
        if self._session.position + ahead >= self._session.ctx:
            reason = "context_full"
        elif self._max_tokens is not None and len(self._ids) + ahead >= self._max_tokens:
            reason = "length"
        return "length_thinking" if reason is not None and self._parser.thinking else reason

    def _end_text(self, last: str = "") -> list[Piece]:
        """Lets go of everything that was held back: half a character, half a stop string, half a mark.  Once."""
        if self._text_ended:
            return []
        self._text_ended = True
        text = self._stops.push(self._decoder.finish()) + self._stops.finish()
        found = self._stops.found is not None
        pieces = self._parser.push(text if found else text + last)
        return pieces + self._parser.flush()

    def _as_events(self, pieces: Sequence[Piece]) -> Iterator[Event]:
        for piece in pieces:
            if piece.call is not None:
                yield ToolCallEvent(piece.call.name, piece.call.arguments, self._calls)
                self._calls += 1
            elif piece.kind == "thinking":
                yield Thinking(piece.text)
            else:
                yield Answer(piece.text)

    def _finish(self, reason: Reason) -> Done:
        drawn = len(self._ids)
        self._done = Done(
            reason=reason,
            usage=Usage(self._cached + len(self._prompt_ids), self._cached, drawn),
            timing=Timing(
                prefill_s=self._prefill_s,
                decode_s=self._decode_s,
                prefill_tok_s=self._prefilled / self._prefill_s if self._prefill_s > 0 else 0.0,
                decode_tok_s=drawn / self._decode_s if self._decode_s > 0 else 0.0,
            ),
            parsed=self._parser.finish(),
            token_ids=tuple(self._ids),
            seed=self._sampler.seed,
            stop_string=self._stops.found,
        )
        return self._done


def generate(
    session: TokenSession,
    prompt_ids: Sequence[int],
    tokenizer: TextCodec,
    sampling: Sampling,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    thinking: bool = False,
    eos_ids: Collection[int] | None = None,
    progress: Progress | None = None,
    drawn: Sequence[int] = (),
    record: Callable[[int], None] | None = None,
) -> Generation:
    """Feeds `prompt_ids` behind what the session holds, then draws an answer; the events come by iterating.

    max_tokens: the most tokens to draw, None for as many as the context holds.  stop: strings that end the answer;
    they are looked for in what follows the reasoning, and are not part of it.  thinking: the prompt ended with
    <think>.  eos_ids: tokens that end a message, by default the tokenizer's one.  progress(done, total) is called
    during the prefill.  Every token drawn, the last included, is in the session before its events come.

    record(token_id) is called with every token when it is drawn (journal.py).  drawn: what was recorded of this very
    generation, which was interrupted then.  These tokens are fed and told of as they were, one by one, and the drawing
    goes on behind them: the same seed gives the same tokens as without the interruption.

    Raises InputError or PromptError for arguments out of range, at once; the iteration raises what the session
    raises, and LogitsError when the model's logits are not finite.
    """
    whole = isinstance(max_tokens, int) and not isinstance(max_tokens, bool)
    if max_tokens is not None and not (whole and max_tokens > 0):
        raise InputError(f"max_tokens is {max_tokens!r:.60}", "Give a whole number from 1 on.")
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise InputError("a stop string is empty", "Leave it out: an empty one would stop before the first token.")
    if not prompt_ids:
        raise PromptError("the prompt has no tokens", "Give at least one message.")
    needed = session.position + len(prompt_ids)
    if needed > session.ctx:
        raise PromptError(
            f"the prompt has {needed:,} tokens and the context holds {session.ctx:,}",
            "Shorten the prompt, or raise the context if the model allows it.",
        )
    return Generation(
        session=session,
        prompt_ids=prompt_ids,
        codec=tokenizer,
        sampler=Sampler(sampling, position=len(drawn)),
        max_tokens=max_tokens,
        stops=StopStrings(stops, after=END_THINK if thinking else ""),
        thinking=thinking,
        eos_ids=(tokenizer.eos_id,) if eos_ids is None else eos_ids,
        progress=progress,
        drawn=drawn,
        record=record,
    )
