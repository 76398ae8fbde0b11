"""Generation over a scripted session: events, limits, stop strings, cancellation, counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from dsv4_engine.errors import InputError, PromptError
from dsv4_engine.generate import (
    Answer,
    Done,
    Event,
    Generation,
    Prefilled,
    StopStrings,
    Thinking,
    ToolCallEvent,
    generate,
)
from dsv4_engine.protocol import END_THINK, EOS, SPECIAL_TOKENS
from dsv4_engine.sampling import LogitsError, Sampling
from dsv4_engine.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="k" string="true">v</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and the special tokens: every character boundary is a token boundary, and more."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=list(SPECIAL_TOKENS),
    )
    built.train_from_iterator([], trainer)
    return Tokenizer(built.to_str())


TOKENIZER = byte_tokenizer()


class Scripted:
    """A session whose model says `script`, token by token, whatever it is fed; then a full stop for ever."""

    def __init__(self, script: str | Sequence[int], ctx: int = 10_000, chunk: int = 4) -> None:
        self.script = TOKENIZER.encode(script) if isinstance(script, str) else list(script)
        self.tokens: list[int] = []
        self.ctx = ctx
        self.chunk = chunk
        self.said = 0
        self.before_step: Callable[[Scripted], None] = lambda session: None

    @property
    def position(self) -> int:
        return len(self.tokens)

    def extend(
        self, token_ids: Sequence[int], logits: Any = "last", progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        assert 0 < len(token_ids) <= self.ctx - self.position, "the caller must not run over the context"
        self.before_step(self)
        for start in range(0, len(token_ids), self.chunk):
            part = token_ids[start : start + self.chunk]
            self.tokens += part
            if progress is not None:
                progress(start + len(part), len(token_ids))
        if logits == "none":
            return torch.empty(0)
        logits_V = torch.zeros(TOKENIZER.vocab_size)
        logits_V[self.script[self.said] if self.said < len(self.script) else TOKENIZER.encode(".")[0]] = 50.0
        self.said += 1
        return logits_V


def start(script: str | Sequence[int] | Scripted, **options: Any) -> tuple[Scripted, Generation]:
    session = script if isinstance(script, Scripted) else Scripted(script)
    arguments: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 2000} | options
    return session, generate(session, [7, 8, 9], TOKENIZER, **arguments)


def run(script: str | Sequence[int] | Scripted, **options: Any) -> tuple[Scripted, list[Event], Done]:
    session, generation = start(script, **options)
    events = list(generation)
    done = events[-1]
    assert isinstance(done, Done)
    assert done == generation.done
    assert not any(isinstance(event, Done) for event in events[:-1])
    return session, events, done


def said(events: Sequence[Event], kind: type[Answer] | type[Thinking] = Answer) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


# -- the ordinary course


def test_an_answer() -> None:
    session, events, done = run(f"Hi, 北京 🦊!{EOS}")
    assert events[0] == Prefilled(3, 0, events[0].seconds)  # type: ignore[union-attr]
    assert said(events) == done.parsed.content == "Hi, 北京 🦊!"
    assert done.reason == "stop"
    assert done.parsed.ended
    assert done.parsed.problems == ()
    assert (done.usage.prompt_tokens, done.usage.cached_tokens) == (3, 0)
    assert done.usage.completion_tokens == len(done.token_ids) == len("Hi, 北京 🦊!".encode()) + 1
    assert session.tokens == [7, 8, 9, *done.token_ids]
    assert done.token_ids == (*TOKENIZER.encode("Hi, 北京 🦊!"), TOKENIZER.eos_id)


def test_characters_are_never_shown_in_part() -> None:
    _, events, _ = run(f"é北🦊{EOS}")
    assert [event for event in events if isinstance(event, Answer)] == [Answer("é"), Answer("北"), Answer("🦊")]


def test_thinking_then_answer() -> None:
    _, events, done = run(f"Hm.{END_THINK}Yes.{EOS}", thinking=True)
    assert (said(events, Thinking), said(events)) == ("Hm.", "Yes.")
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=[Prefilled, Thinking, Answer, Done].index)
    assert (done.reason, done.parsed.reasoning) == ("stop", "Hm.")


def test_tool_calls() -> None:
    _, events, done = run(f"Look.{CALL}{EOS}")
    assert [event for event in events if isinstance(event, ToolCallEvent)] == [ToolCallEvent("f", '{"k": "v"}', 0)]
    assert done.reason == "tool_calls"
    assert said(events) == "Look."


def test_a_malformed_call_is_a_problem_and_no_reason() -> None:
    _, _, done = run(f"{CALL.replace('true', 'false')}{EOS}")
    assert done.reason == "stop"
    assert [problem.kind for problem in done.parsed.problems] == ["malformed_tool_call"]


def test_what_the_session_holds_counts_as_cached() -> None:
    session = Scripted(f"x{EOS}")
    session.tokens = [1, 2, 3, 4, 5]
    _, events, done = run(session)
    assert events[0] == Prefilled(8, 5, events[0].seconds)  # type: ignore[union-attr]
    assert (done.usage.prompt_tokens, done.usage.cached_tokens) == (8, 5)
    assert session.tokens[:8] == [1, 2, 3, 4, 5, 7, 8, 9]


def test_other_tokens_may_end_the_message() -> None:
    ends = {TOKENIZER.encode("!")[0], TOKENIZER.encode("?")[0]}
    _, events, done = run("What? Yes!", eos_ids=ends)
    assert (said(events), done.reason, done.usage.completion_tokens) == ("What", "stop", 5)


def test_progress_is_passed_on() -> None:
    seen: list[tuple[int, int]] = []
    session = Scripted(EOS, chunk=2)
    list(generate(session, [5] * 5, TOKENIZER, GREEDY, 3, progress=lambda done, total: seen.append((done, total))))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_events_come_after_the_session_has_the_token() -> None:
    session, generation = start(f"abc{EOS}")
    for event in generation:
        if isinstance(event, Answer):
            assert TOKENIZER.decode(session.tokens[3:]).endswith(event.text)


def test_seeded_sampling_repeats() -> None:
    flat = Scripted([])
    flat.extend = lambda ids, logits="last", progress=None: flat.tokens.extend(ids) or torch.zeros(200)  # type: ignore
    _, _, first = run(flat, sampling=Sampling(seed=3), max_tokens=30)
    _, _, second = run(flat, sampling=Sampling(seed=3), max_tokens=30)
    _, _, other = run(flat, sampling=Sampling(seed=4), max_tokens=30)
    assert first.token_ids == second.token_ids != other.token_ids
    assert (first.seed, other.seed) == (3, 4)
    _, _, unseeded = run(flat, sampling=Sampling(), max_tokens=30)
    _, _, again = run(flat, sampling=Sampling(seed=unseeded.seed), max_tokens=30)
    assert unseeded.token_ids == again.token_ids


# -- limits


def test_token_limit() -> None:
    session, events, done = run("abcdef", max_tokens=4)
    assert (said(events), done.reason, done.usage.completion_tokens) == ("abcd", "length", 4)
    assert session.position == 3 + 4


def test_the_limit_may_fall_on_the_end() -> None:
    assert run(f"ab{EOS}", max_tokens=3)[2].reason == "stop"
    assert run(f"ab{EOS}", max_tokens=2)[2].reason == "length"


def test_limit_while_thinking_is_a_reason_of_its_own() -> None:
    _, events, done = run(f"Hm, so{END_THINK}Yes", thinking=True, max_tokens=6)
    assert (said(events, Thinking), said(events), done.reason) == ("Hm, so", "", "length_thinking")
    assert [problem.kind for problem in done.parsed.problems] == ["unclosed_thinking"]
    assert run(f"Hm, so{END_THINK}Yes", thinking=True, max_tokens=7)[2].reason == "length"
    assert run(Scripted(f"Hm, so{END_THINK}Yes", ctx=6), thinking=True)[2].reason == "length_thinking"


def test_context_full() -> None:
    session, events, done = run(Scripted("abcdef", ctx=7), max_tokens=None)
    assert (said(events), done.reason, session.position) == ("abcd", "context_full", 7)
    assert run(Scripted("abcdef", ctx=7), max_tokens=4)[2].reason == "context_full"
    assert run(Scripted("abcdef", ctx=3))[2].usage.completion_tokens == 0


def test_the_end_of_the_limit_lets_go_of_what_was_held_back() -> None:
    assert said(run("ab</thi", max_tokens=7)[1]) == "ab</thi"
    assert said(run("ab\n\n", max_tokens=4)[1]) == "ab\n\n"
    assert said(run("abST", max_tokens=4, stop="STOP")[1]) == "abST"
    _, events, done = run("ab🦊", max_tokens=4)
    assert said(events) == done.parsed.content == "ab\ufffd"


# -- stop strings


@pytest.mark.parametrize("stop", ["STOP", ["STOP"], ("never", "STOP")])
def test_stop_string_over_several_tokens(stop: Any) -> None:
    session, events, done = run(f"Say SSTOP now{EOS}", stop=stop)
    assert said(events) == done.parsed.content == "Say S"
    assert (done.reason, done.stop_string) == ("stop_string", "STOP")
    assert session.tokens[3:] == TOKENIZER.encode("Say SSTOP")


def test_a_stop_string_that_does_not_come_true_is_text() -> None:
    _, events, done = run(f"STO STOSTO{EOS}", stop="STOP")
    assert (said(events), done.reason, done.stop_string) == ("STO STOSTO", "stop", None)


def test_stop_strings_in_the_reasoning_do_not_count() -> None:
    _, events, done = run(f"so.\n\nHm{END_THINK}One.\n\nTwo{EOS}", thinking=True, stop="\n\n")
    assert (said(events, Thinking), said(events), done.reason) == ("so.\n\nHm", "One.", "stop_string")


def test_stop_string_over_characters_of_several_tokens() -> None:
    _, events, done = run(f"a北京b{EOS}", stop="北京")
    assert (said(events), done.reason) == ("a", "stop_string")


def test_a_stop_string_at_the_very_beginning() -> None:
    _, events, done = run("STOP", stop="STOP")
    assert (said(events), done.reason) == ("", "stop_string")


pieces = st.text("ab\n</think>", max_size=30)
stop_strings = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(pieces, stop_strings, st.lists(st.integers(0, 30)), st.booleans())
def test_stop_strings_cut_where_the_first_is_complete(
    text: str, strings: list[str], cuts: list[int], thinking: bool
) -> None:
    if thinking:
        text = text + END_THINK + text[::-1]
    begin = text.index(END_THINK) + len(END_THINK) if thinking else 0
    expected, found = text, None
    ends = [(text.index(s, begin) + len(s), text.index(s, begin), s) for s in strings if s in text[begin:]]
    if ends:
        _, place, found = min(ends)
        expected = text[:place]

    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stops = StopStrings(strings, after=END_THINK if thinking else "")
    passed = [stops.push(text[a:b]) for a, b in itertools.pairwise(places)]
    assert "".join(passed) + stops.finish() == expected
    assert stops.found == found
    assert expected.startswith("".join(passed))


def test_without_a_mark_all_of_the_reasoning_passes() -> None:
    stops = StopStrings(["x"], after=END_THINK)
    assert [stops.push(part) for part in ("ax</th", "i", "")] == ["ax</th", "i", ""]
    assert stops.finish() == ""


# -- cancellation


def test_cancel_returns_what_exists() -> None:
    session, generation = start(f"Hm{END_THINK}abcdef{EOS}", thinking=True)
    shown = ""
    for event in generation:
        shown += event.text if isinstance(event, Answer) else ""
        if shown == "abc":
            break
    done = generation.cancel()
    assert (done.reason, done.parsed.reasoning, done.parsed.content) == ("cancelled", "Hm", "abc")
    assert session.tokens == [7, 8, 9, *done.token_ids]
    assert generation.done == done == generation.cancel()
    assert list(generation) == []


def raise_after(steps: int) -> Callable[[Scripted], None]:
    left = itertools.count(steps, -1)

    def step(session: Scripted) -> None:
        if next(left) <= 0:
            raise KeyboardInterrupt

    return step


def test_cancel_keeps_what_was_held_back() -> None:
    for script, stop in (("ab</thxyz", ()), ("ab\n\nxyz", ()), ("abSTxyz", "STOP"), ("ab北", ())):
        session, generation = start(script, stop=stop)
        held = len(script.encode()) - len("xyz") if script.endswith("xyz") else 4  # two of the three bytes of 北
        session.before_step = raise_after(1 + held)
        shown: list[Event] = []
        with pytest.raises(KeyboardInterrupt):
            shown.extend(generation)
        assert said(shown) == "ab"
        assert generation.cancel().parsed.content == (script[:-3] if script.endswith("xyz") else "ab\ufffd")


def test_an_interrupt_in_a_step_leaves_everything_before_it() -> None:
    session, generation = start(f"abcdef{EOS}")
    session.before_step = raise_after(4)  # the prefill and three tokens
    shown = []
    with pytest.raises(KeyboardInterrupt):
        shown.extend(generation)
    done = generation.cancel()
    assert (said(shown), done.parsed.content, done.reason) == ("abc", "abc", "cancelled")
    assert session.tokens == [7, 8, 9, *done.token_ids]
    assert done.usage.completion_tokens == 3


def test_stop_ends_between_two_tokens() -> None:
    session, generation = start("abcdef")
    session.before_step = lambda s: generation.stop() if s.position == 5 else None
    events = list(generation)
    done = events[-1]
    assert isinstance(done, Done)
    assert (done.reason, done.parsed.content, session.position) == ("cancelled", "abc", 6)


def test_stop_ends_a_prefill_between_two_chunks() -> None:
    session = Scripted("abc", chunk=4)
    generation = generate(
        session, [5] * 20, TOKENIZER, GREEDY, 10, progress=lambda done, total: generation.stop() if done == 8 else None
    )
    events = list(generation)
    assert [type(event) for event in events] == [Done]
    assert generation.done is not None
    assert (generation.done.reason, generation.done.token_ids) == ("cancelled", ())
    assert session.position == 8


def test_cancel_before_the_first_event() -> None:
    session, generation = start("abc")
    done = generation.cancel()
    assert (done.reason, done.usage.completion_tokens, done.parsed.content) == ("cancelled", 0, "")
    assert session.position == 0


def test_closing_a_finished_generation_keeps_its_end() -> None:
    _, generation = start(f"a{EOS}")
    list(generation)
    generation.close()
    assert generation.cancel().reason == "stop"


# -- time


def test_time_is_split_and_the_callers_time_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("dsv4_engine.generate.time.perf_counter", lambda: clock[0])

    def step(session: Scripted) -> None:
        clock[0] += 2.0 if session.position == 0 else 0.5

    session, generation = start(f"abc{EOS}")
    session.before_step = step
    for _ in generation:
        clock[0] += 100.0
    assert generation.done is not None
    timing = generation.done.timing
    assert (timing.prefill_s, timing.decode_s) == (2.0, 2.0)
    assert (timing.prefill_tok_s, timing.decode_tok_s) == (1.5, 2.0)


def test_rates_without_any_time_are_zero() -> None:
    _, generation = start("abc")
    timing = generation.cancel().timing
    assert (timing.prefill_tok_s, timing.decode_tok_s) == (0.0, 0.0)


# -- what is refused


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "9"])
def test_max_tokens_out_of_range(limit: Any) -> None:
    with pytest.raises(InputError, match=f"max_tokens is {limit!r}"):
        start("a", max_tokens=limit)


@pytest.mark.parametrize("stop", ["", ["a", ""], [None]])
def test_empty_stop_strings(stop: Any) -> None:
    with pytest.raises(InputError, match="stop string"):
        if stop == "":
            start("a", stop=[stop])
        start("a", stop=stop)


def test_an_empty_prompt() -> None:
    with pytest.raises(PromptError, match="no tokens"):
        generate(Scripted("a"), [], TOKENIZER, GREEDY)


def test_a_prompt_that_does_not_fit_names_both_numbers_and_feeds_nothing() -> None:
    session = Scripted("a", ctx=1100)
    session.tokens = [1] * 100
    with pytest.raises(PromptError, match=r"1,101 tokens and the context holds 1,100"):
        generate(session, [5] * 1001, TOKENIZER, GREEDY)
    assert session.position == 100


def test_a_fault_of_the_model_passes_through() -> None:
    session, generation = start("abc")
    whole = session.extend

    def faulty(ids: Any, logits: Any = "last", progress: Any = None) -> Tensor:
        result = whole(ids, logits, progress)
        return result * math.nan if session.position == 5 else result

    session.extend = faulty  # type: ignore[method-assign]
    with pytest.raises(LogitsError):
        list(generation)
    assert generation.cancel().parsed.content == "ab"
