"""What `run` and `chat` share: loading with a bar, checking that a prompt fits, streaming one answer to the terminal.

Imports the engine only when called.  Knows no flags: it takes values.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TextIO

from dsv4cli.errors import InputProblem
from dsv4cli.interrupt import Stop, Stopped, stop_on_ctrl_c
from dsv4cli.keeping import Keeping, Recorder, tell_miss
from dsv4cli.options import ANYWHERE, Placed, Think
from dsv4cli.output import count, file_size, note, per_second, progress_bar, write

if TYPE_CHECKING:
    from dsv4_engine import Engine, Session
    from dsv4_engine.generate import Done
    from dsv4_engine.prefix_cache.cache import PrefixCache
    from dsv4_engine.sampling import Sampling

Message = Mapping[str, Any]
_EFFORTS: dict[Think, Literal["high", "max"] | None] = {Think.none: None, Think.high: "high", Think.max: "max"}
# The published recommendation for the longest thinking; with less room it tends to end before the answer.
MAX_THINKING_NEEDS = 384 * 1024


@dataclass(frozen=True)
class How:
    """How an answer is drawn: everything but the conversation itself."""

    sampling: Sampling
    think: Think = Think.none
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Outcome:
    """One answer and what it cost.  Tokens are counted over the whole prompt; seconds are the model's work.

    session: holds the prompt and the answer; None where nothing was read, or a step was interrupted half-way.
    read: of the prompt's tokens, how many were held when reading was stopped; None where all of it was read.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    session: Session | None = None
    text: str = ""
    reasoning: str = ""
    finish_reason: str = "cancelled"
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_bytes: int = 0
    read: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def prefill_rate(self) -> float:
        read = self.prompt_tokens if self.read is None else self.read
        return per_second(read - self.cached_tokens, self.prefill_s)

    @property
    def decode_rate(self) -> float:
        return per_second(self.completion_tokens, self.decode_s)


def load(
    model: str, *, device: str, dtype: str, kv_dtype: str, ctx: int | None, placed: Placed = ANYWHERE
) -> tuple[Engine, float]:
    """The engine for ``model`` and the seconds it took, which include importing torch."""
    started = time.monotonic()
    with progress_bar(f"loading {model}", "bytes") as progress:
        from dsv4_engine import Engine
        from dsv4_engine.device_map import Limits

        engine = Engine.load(
            model,
            device=device,
            dtype=dtype,
            kv_dtype=kv_dtype,
            ctx=ctx,
            progress=progress,
            limits=Limits(placed.gpu, placed.cpu),
            device_map=placed.device_map,
        )
    if placed.gpu and device == "cpu":
        note("note: --gpu-mem changes nothing on the CPU; --device cuda computes on a GPU", style="dim")
    if engine.backend.why:
        note(f"note: the GPU runs torch's own operations and not the Triton kernels: {engine.backend.why}", style="dim")
    return engine, time.monotonic() - started


def sampling(
    engine: Engine, temperature: float | None, top_p: float | None, min_p: float | None, seed: int | None
) -> Sampling:
    """The flags that were given, over what the model's generation_config.json recommends."""
    from dsv4_engine.sampling import Sampling

    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "seed": seed}
    return replace(Sampling.recommended(engine.path), **{k: v for k, v in given.items() if v is not None})


def prompt_ids(engine: Engine, messages: Sequence[Message], think: Think) -> list[int]:
    """The conversation as token ids; text in messages can never become a special token."""
    from dsv4_engine.encoding import encode_segments

    segments = encode_segments(
        list(messages),
        thinking_mode="chat" if think is Think.none else "thinking",
        reasoning_effort=_EFFORTS[think],
    )
    return engine.tokenizer.encode_segments(segments)


def check_fits(engine: Engine, tokens: int) -> None:
    """Raise InputProblem, with both numbers, when a prompt leaves the context no room for an answer."""
    limit, most = engine.ctx, engine.config.max_position_embeddings
    if tokens < limit:
        return
    message = f"the prompt has {count(tokens)} tokens and the context holds {count(limit)}, the answer included"
    if tokens < most:
        raise InputProblem(message, f"Give a larger --ctx (this model goes up to {count(most)}), or fewer files.")
    raise InputProblem(message, "Give fewer or smaller files; dsv4 never cuts a prompt.")


def thinking_advice(think: Think, ctx: int) -> str:
    """A warning for --think max where there is too little room for it, or an empty string."""
    if think is not Think.max or ctx >= MAX_THINKING_NEEDS:
        return ""
    return f"note: --think max is meant for contexts of 384K tokens and more; this one holds {count(ctx)}"


def stream_answer(
    engine: Engine,
    ids: Sequence[int],
    how: How,
    *,
    screen: Screen,
    base: Session | None = None,
    keeping: Keeping | None = None,
    recorder: Recorder | None = None,
    before_answer: Callable[[Session], None] | None = None,
) -> Outcome:
    """Feed the prompt ``ids``, draw an answer, and show it as it comes.

    base: a session that holds a beginning of the prompt and goes on from there; where it has no cuts, the cache may
    know more.  recorder: keeps the tokens, and knows those that were drawn before an interruption.  ``before_answer``
    sees the session when only the last id is still to be fed, which is the place to fork it.
    Ctrl-C ends between two tokens with finish_reason "cancelled" and everything drawn so far.
    """
    outcome = Outcome(len(ids))
    try:
        with stop_on_ctrl_c() as stop:
            session = _read_prompt(engine, ids, base, keeping.cache if keeping else None, outcome, stop)
            if before_answer is not None:
                before_answer(session)
            _draw(engine, session, ids[-1:], how, outcome, stop, screen, recorder or Recorder())
    except Stopped:
        pass
    except KeyboardInterrupt:
        outcome.session = None
    finally:
        screen.close()
        if keeping is not None:
            keeping.tell()
    outcome.kv_bytes = outcome.session.kv_bytes if outcome.session is not None else 0
    return outcome


def _read_prompt(
    engine: Engine, ids: Sequence[int], base: Session | None, cache: PrefixCache | None, outcome: Outcome, stop: Stop
) -> Session:
    """The session that holds everything but the last token.  Raises Stopped between two chunks."""
    started = time.perf_counter()
    session = engine.session() if base is None else base
    try:
        with progress_bar("reading the prompt", "tokens") as progress:

            def advance(done: int, total: int) -> None:
                progress(done, total)
                stop.check()

            outcome.cached_tokens = session.position
            if cache is not None and not session.cuts:
                session, reuse = cache.start(ids, session, advance)
                outcome.cached_tokens = reuse.tokens
                tell_miss(reuse)
            outcome.session = session
            if len(ids) - 1 > session.position:
                session.extend(ids[session.position : -1], logits="none", progress=advance)
    except KeyboardInterrupt:
        outcome.read = session.position
        raise
    finally:
        outcome.prefill_s = time.perf_counter() - started
    return session


def _draw(
    engine: Engine,
    session: Session,
    last: Sequence[int],
    how: How,
    outcome: Outcome,
    stop: Stop,
    screen: Screen,
    recorder: Recorder,
) -> None:
    from dsv4_engine.generate import Answer, Thinking, generate

    generation = generate(
        session,
        last,
        engine.tokenizer,
        how.sampling,
        max_tokens=how.max_tokens,
        stop=how.stop,
        thinking=how.think is not Think.none,
        drawn=recorder.drawn,
        record=recorder.record,
    )
    stop.then = generation.stop
    try:
        for event in generation:
            if isinstance(event, Thinking):
                screen.think(event.text)
            elif isinstance(event, Answer):
                screen.answer(event.text)
    finally:
        _record(generation.done or generation.cancel(), outcome)


def _record(done: Done, outcome: Outcome) -> None:
    outcome.text, outcome.reasoning = done.parsed.content, done.parsed.reasoning
    outcome.finish_reason = done.reason
    outcome.completion_tokens = done.usage.completion_tokens
    outcome.prefill_s += done.timing.prefill_s
    outcome.decode_s = done.timing.decode_s
    # Unclosed thinking is what finish_reason says already.
    outcome.problems = [problem.detail for problem in done.parsed.problems if problem.kind != "unclosed_thinking"]


class Screen:
    """Shows thinking on standard error, dimmed on a terminal, and the answer on ``out`` (None shows neither)."""

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        self._open: tuple[TextIO, str] | None = None  # where a line is unfinished, and in which style

    def think(self, text: str) -> None:
        self._show(text, sys.stderr, "dim")

    def answer(self, text: str) -> None:
        self._show(text, self._out, "")

    def _show(self, text: str, stream: TextIO | None, style: str) -> None:
        if self._out is None or stream is None or not text:
            return
        if self._open != (stream, style):
            self.close()
        write(text, stream, style)
        self._open = None if text.endswith("\n") else (stream, style)

    def close(self) -> None:
        """End the line that is open."""
        if self._open is not None:
            write("\n", self._open[0])
            self._open = None


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # kilobytes everywhere but on macOS


def peak_gpu_memory() -> int:
    """The most that tensors have taken on one GPU in this process, in bytes; 0 where none is in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


def closing_lines(outcome: Outcome, how: How) -> Iterator[str]:
    """For the person, after an answer: what it cost, and why it ended if not by itself."""
    kept = f" ({count(outcome.cached_tokens)} kept)" if outcome.cached_tokens else ""
    read = "" if outcome.read is None else f"{count(outcome.read)} of "
    on_gpu = f" and {file_size(gpu)} on the GPU" if (gpu := peak_gpu_memory()) else ""
    yield (
        f"{read}{count(outcome.prompt_tokens)} tokens in{kept}, {count(outcome.prefill_rate)}/s"
        f" · {count(outcome.completion_tokens)} out, {outcome.decode_rate:,.1f}/s"
        f" · cache {file_size(outcome.kv_bytes)} · peak memory {file_size(peak_memory())}{on_gpu}"
    )
    used_up = how.max_tokens is not None and outcome.completion_tokens >= how.max_tokens
    limit = f"the limit of {count(how.max_tokens or 0)} tokens" if used_up else "the context"
    more = "--max-tokens" if used_up else "--ctx"
    endings = {
        "length": f"{limit} ran out in the middle of the answer; raise {more}",
        "context_full": f"{limit} ran out in the middle of the answer; raise {more}",
        "length_thinking": f"{limit} ran out while the model was still thinking, so there is no answer; "
        f"raise {more}, or give --think none",
        "cancelled": "stopped; this is what there was",
        "tool_calls": "the model called a tool, and none is offered here",
    }
    if outcome.finish_reason in endings:
        yield f"note: {endings[outcome.finish_reason]}"
    yield from (f"note: {problem}" for problem in outcome.problems)


def show_closing(outcome: Outcome, how: How) -> None:
    """Print the closing lines on standard error."""
    for line in closing_lines(outcome, how):
        note(line, style="dim")
