"""The parser of completions: what is well formed, what is not, and that neither text nor chunking can upset it."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4_engine.encoding import encode_messages
from dsv4_engine.parsing import ParsedMessage, Piece, StreamParser, ToolCall, parse_completion
from dsv4_engine.protocol import ASSISTANT, BOS, END_THINK, EOS, SPECIAL_TOKENS, THINK, USER

D = "｜DSML｜"


def parameter(key: str, value: str, is_text: bool = True) -> str:
    return f'<{D}parameter name="{key}" string="{str(is_text).lower()}">{value}</{D}parameter>'


def invoke(name: str, *parameters: str) -> str:
    body = "\n".join(parameters)
    return f'<{D}invoke name="{name}">\n{body}\n</{D}invoke>'


def block(*invokes: str) -> str:
    return f"\n\n<{D}tool_calls>\n" + "\n".join(invokes) + f"\n</{D}tool_calls>"


def kinds(message: ParsedMessage) -> list[str]:
    return [problem.kind for problem in message.problems]


def streamed(text: str, cuts: list[int], thinking: bool) -> tuple[list[list[Piece]], ParsedMessage]:
    """What each push (and the flush at the end) returns, and the message."""
    parser = StreamParser(thinking)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [parser.push(text[a:b]) for a, b in itertools.pairwise(places)]
    return [*pieces, parser.flush()], parser.finish()


# -- well-formed completions


def test_answer() -> None:
    assert parse_completion(f"Hello!{EOS}", False) == ParsedMessage("Hello!", "", (), (), f"Hello!{EOS}", True)


def test_an_answer_without_an_end_is_no_problem() -> None:
    assert parse_completion("Hello", False) == ParsedMessage("Hello", "", (), (), "Hello", False)


def test_reasoning_and_answer() -> None:
    message = parse_completion(f"Hm.\n{END_THINK}\nYes.{EOS}", True)
    assert (message.reasoning, message.content, message.problems) == ("Hm.\n", "\nYes.", ())


def test_empty_reasoning() -> None:
    message = parse_completion(f"{END_THINK}Yes.{EOS}", True)
    assert (message.reasoning, message.content, message.problems) == ("", "Yes.", ())


def test_nothing_at_all() -> None:
    assert parse_completion("", False) == ParsedMessage("", "", (), (), "")


def test_tool_calls() -> None:
    first = invoke("weather", parameter("city", "Sao Paulo, 北京"), parameter("days", "3", False))
    second = invoke("search", parameter("query", '{"a": "b"}\n\n<b>'), parameter("deep", '{"k": [1, null]}', False))
    message = parse_completion(f"Why not.{END_THINK}Let me look.{block(first, second)}{EOS}", True)
    assert message.problems == ()
    assert (message.reasoning, message.content) == ("Why not.", "Let me look.")
    assert message.tool_calls == (
        ToolCall("weather", '{"city": "Sao Paulo, 北京", "days": 3}'),
        ToolCall("search", '{"query": "{\\"a\\": \\"b\\"}\\n\\n<b>", "deep": {"k": [1, null]}}'),
    )


def test_a_call_without_parameters() -> None:
    assert parse_completion(block(invoke("now")) + EOS, False).tool_calls == (ToolCall("now", "{}"),)


def test_numbers_keep_every_digit() -> None:
    for number in ("1234567890" * 10, "0.10", "1E+2", "-0"):
        message = parse_completion(block(invoke("f", parameter("n", f" {number}\n", False))), False)
        assert message.tool_calls == (ToolCall("f", '{"n": ' + number + "}"),)


def test_line_ends_before_calls_belong_to_the_block_only_as_a_blank_line() -> None:
    calls = block(invoke("f")).lstrip("\n")
    assert parse_completion(f"a\n\n\n{calls}", False).content == "a\n"
    assert parse_completion(f"a\n{calls}", False).content == "a\n"
    assert parse_completion(f"a{calls}", False).content == "a"
    assert parse_completion("a\n\n\n", False).content == "a\n\n\n"


# -- streaming


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    parser = StreamParser(thinking=True)
    assert parser.push("so </thi") == [Piece("thinking", "so ")]
    assert parser.push("s") == [Piece("thinking", "</this")]
    assert parser.push("</thin") == []
    assert parser.thinking
    assert parser.push("k>Yes <") == [Piece("answer", "Yes ")]
    assert not parser.thinking
    assert parser.push("b>\n\n") == [Piece("answer", "<b>")]
    assert parser.push("and") == [Piece("answer", "\n\nand")]
    assert parser.push(f"\n\n<{D[:3]}") == []
    assert parser.push(f"{D[3:]}tool_calls>\n{invoke('f')[:-1]}") == []
    assert parser.push(">") == [Piece("tool_call", call=ToolCall("f", "{}"))]
    assert parser.push(f"\n</{D}tool_calls>{EOS}") == []
    assert parser.flush() == []
    assert parser.finish() == parser.finish()
    assert parser.finish().problems == ()


@pytest.mark.parametrize("mark", [END_THINK, EOS, USER, D, f"<{D}tool_calls>"])
def test_the_beginning_of_a_mark_is_text_when_nothing_follows(mark: str) -> None:
    for length in range(1, len(mark)):
        pieces, message = streamed(f"a{mark[:length]}", [1], thinking=False)
        if D in mark[:length]:
            continue  # a truncated opening of tool calls: below
        assert pieces == [[Piece("answer", "a")], [], [Piece("answer", mark[:length])]]
        assert message.content == f"a{mark[:length]}"
        assert message.problems == ()


FRAGMENTS = [
    *SPECIAL_TOKENS, "<", "</", "｜", "D", "\n", "\n\n", " ", "a", "é🦊", "think>", "</thi", "<｜DS", "tool_calls>",
    "invoke", '"', ">", "1", "{", f"<{D}tool_calls>", f"</{D}tool_calls>", f'<{D}invoke name="f">', f"<{D}invoke",
    f"</{D}invoke>", f'<{D}parameter name="k" string="true">', f'<{D}parameter name="n" string="false">',
    f"</{D}parameter>", block(invoke("f")), block(invoke("g", parameter("k", "v"), parameter("k", "w"))),
    invoke("h", parameter("n", "x", False)),
]  # fmt: skip
texts = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))


@settings(max_examples=500)
@given(texts, st.lists(st.integers(0, 400), max_size=30), st.booleans())
@example(f"<{D}tool_cal", [9], False)
@example(f"a\n\n<{D}tool_calls>\n\n</{D}", list(range(40)), False)
def test_no_text_raises_and_chunking_changes_nothing(text: str, cuts: list[int], thinking: bool) -> None:
    whole = parse_completion(text, thinking)
    pieces, message = streamed(text, cuts, thinking)
    assert message == whole
    assert message.raw == text
    flat = list(itertools.chain.from_iterable(pieces))
    assert "".join(piece.text for piece in flat if piece.kind == "thinking") == message.reasoning
    assert "".join(piece.text for piece in flat if piece.kind == "answer") == message.content
    assert tuple(piece.call for piece in flat if piece.call) == message.tool_calls
    assert all(piece.text or piece.call for piece in flat)
    for call in message.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


@settings(max_examples=300)
@given(texts, st.booleans())
def test_nothing_of_the_text_is_lost(text: str, thinking: bool) -> None:
    """Every visible character is in the reasoning, the answer, a call or a problem; only marks go."""
    message = parse_completion(text, thinking)
    kept = [message.reasoning, message.content, *(problem.text for problem in message.problems)]
    kept += [call.name + call.arguments for call in message.tool_calls]
    for mark in (EOS, END_THINK, f"<{D}tool_calls>", f"</{D}tool_calls>"):
        text = text.replace(mark, " ")
    for word in text.split():
        if D not in word and '"' not in word and "\\" not in word and word.isprintable() and "<" not in word:
            assert any(word in part for part in kept), word


@given(st.text(), st.booleans())
def test_text_without_marks_is_the_answer_or_the_reasoning(text: str, thinking: bool) -> None:
    if any(token in text for token in SPECIAL_TOKENS):
        return
    message = parse_completion(text, thinking)
    assert (message.reasoning if thinking else message.content) == text


# -- what goes wrong


def test_unclosed_thinking() -> None:
    for text in ("Hm, so", f"Hm, so{EOS}"):
        message = parse_completion(text, True)
        assert (message.reasoning, message.content) == ("Hm, so", "")
        assert kinds(message) == ["unclosed_thinking"]
        assert message.problems[0].text == "Hm, so"


def test_half_a_closing_mark_stays_reasoning() -> None:
    message = parse_completion("Hm</thi", True)
    assert (message.reasoning, kinds(message)) == ("Hm</thi", ["unclosed_thinking"])


def test_every_truncation_of_a_tool_call_is_named_and_kept() -> None:
    good = invoke("first", parameter("a", "1"))
    whole = "Look." + block(good, invoke("second", parameter("b", "2", False)))
    opening = whole.index(f"<{D}")
    for end in range(opening + len(f"<{D}"), len(whole)):
        message = parse_completion(whole[:end], False)
        assert message.content == "Look."
        assert kinds(message) == ["truncated_tool_call"], whole[:end]
        assert whole[:end].endswith(message.problems[0].text)
        first_is_whole = end >= whole.index(good) + len(good)
        assert [call.name for call in message.tool_calls][:1] == (["first"] if first_is_whole else [])
        assert parse_completion(whole[:end] + EOS, False).ended


@pytest.mark.parametrize(
    ("wrong", "kind", "detail"),
    [
        (invoke("f", parameter("k", "v"), parameter("k", "w")), "duplicate_parameter", "f is given parameter k twice"),
        (invoke("f", parameter("n", "celsius", False)), "malformed_tool_call", "parameter n of f is not JSON"),
        (invoke("f", parameter("n", "NaN", False)), "malformed_tool_call", "parameter n of f is not JSON"),
        (invoke("f", parameter("n", "[" * 100_000, False)), "malformed_tool_call", "parameter n of f is not JSON"),
        (invoke("f", parameter("n", "1e999", False)), "malformed_tool_call", "parameter n of f is not JSON"),
        (invoke("f", parameter("n", "9" * 5000, False)), "malformed_tool_call", "parameter n of f is not JSON"),
        (invoke("f", parameter("n", '["\\ud800"]', False)), "malformed_tool_call", "parameter n of f is not JSON"),
        (invoke("f", parameter("n", "", False)), "malformed_tool_call", "parameter n of f is not JSON"),
        (invoke("f", "text"), "malformed_tool_call", "the parameters of f are not well formed"),
        (invoke("f", f'<{D}parameter name="k">v</{D}parameter>'), "malformed_tool_call", "the parameters of f"),
        (invoke("f", f'<{D}parameter name="k" string="true">v'), "malformed_tool_call", "the parameters of f"),
        (
            invoke("f", f'<{D}parameter name="k" string="true">v', parameter("l", "w")),
            "malformed_tool_call",
            "a parameter of f is not closed",
        ),
        (f"<{D}invoke>\n</{D}invoke>", "malformed_tool_call", "the call has no name"),
        (invoke(""), "malformed_tool_call", "the call has no name"),
        (f'<{D}invoke name="f\n</{D}invoke>', "malformed_tool_call", "the call has no name"),
    ],
)
def test_malformed_calls_are_not_calls_and_leave_the_others_alone(wrong: str, kind: str, detail: str) -> None:
    message = parse_completion(f"x{block(invoke('a'), wrong, invoke('z'))}{EOS}", False)
    assert [call.name for call in message.tool_calls] == ["a", "z"]
    assert kinds(message) == [kind]
    assert detail in message.problems[0].detail
    assert message.problems[0].text == wrong
    assert message.content == "x"


def test_a_call_that_is_not_closed_before_the_next() -> None:
    open_call = f'<{D}invoke name="f">\n'
    message = parse_completion(block(open_call + invoke("g")), False)
    assert [call.name for call in message.tool_calls] == ["g"]
    assert [(problem.kind, problem.text) for problem in message.problems] == [("malformed_tool_call", open_call)]
    message = parse_completion(f"\n\n<{D}tool_calls>\n{open_call}</{D}tool_calls>", False)
    assert kinds(message) == ["malformed_tool_call"]


def test_text_between_calls() -> None:
    message = parse_completion(block(invoke("f"), "and then", invoke("g")), False)
    assert [call.name for call in message.tool_calls] == ["f", "g"]
    assert kinds(message) == ["malformed_tool_call"]
    assert message.problems[0].text == "\nand then\n"


def test_an_empty_block() -> None:
    assert kinds(parse_completion(block(), False)) == ["malformed_tool_call"]


def test_text_after_calls_and_after_the_end() -> None:
    message = parse_completion(f"{block(invoke('f'))}\nDone!{EOS}more", False)
    assert [(p.kind, p.text) for p in message.problems] == [
        ("text_after_tool_calls", "\nDone!"),
        ("text_after_end", "more"),
    ]
    assert message.content == ""
    assert kinds(parse_completion(f"{block(invoke('f'))}\n{EOS}", False)) == []


@pytest.mark.parametrize("token", [BOS, USER, ASSISTANT, THINK, END_THINK, D, "<｜title｜>"])
def test_stray_tokens_stay_in_the_text_and_are_named(token: str) -> None:
    message = parse_completion(f"a{token}b{EOS}", False)
    assert message.content == f"a{token}b"
    assert [(problem.kind, problem.text) for problem in message.problems] == [("stray_token", token)]


def test_a_stray_token_in_the_reasoning_and_in_an_argument() -> None:
    message = parse_completion(f"a{THINK}b{END_THINK}{block(invoke('f', parameter('k', f'x{USER}y')))}", True)
    assert message.reasoning == f"a{THINK}b"
    assert message.tool_calls == (ToolCall("f", json.dumps({"k": f"x{USER}y"}, ensure_ascii=False)),)
    assert kinds(message) == ["stray_token", "stray_token"]


def test_long_texts_take_linear_time() -> None:
    def seconds(text: str) -> float:
        def once() -> float:
            started = time.process_time()
            parser = StreamParser(thinking=False)
            for place in range(0, len(text), 4):
                parser.push(text[place : place + 4])
            parser.finish()
            return time.process_time() - started

        return min(once() for _ in range(3))

    for text in ("word <a ", "\n\n\n", USER):
        assert seconds(text * 16_000) < 80 * max(seconds(text * 1_000), 1e-3)
    value = "value < 7 "
    long, short = (block(invoke("f", parameter("k", value * count))) for count in (16_000, 1_000))
    assert seconds(long) < 80 * max(seconds(short), 1e-3)


# -- there and back

plain = st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
words = st.text(st.characters(exclude_characters='"'), min_size=1).filter(
    lambda text: not any(token in text for token in SPECIAL_TOKENS)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(st.tuples(words, st.dictionaries(words, values, max_size=4)), max_size=3)


@settings(max_examples=300)
@given(plain, plain, calls, st.booleans())
def test_what_was_encoded_is_read_back(
    content: str, reasoning: str, made: list[tuple[str, dict[str, Any]]], thinking: bool
) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    message["tool_calls"] = [{"function": {"name": name, "arguments": arguments}} for name, arguments in made]
    mode: Any = "thinking" if thinking else "chat"
    prompt = encode_messages([{"role": "user", "content": "Q"}], mode)
    completion = encode_messages([{"role": "user", "content": "Q"}, message], mode).removeprefix(prompt)

    parsed = parse_completion(completion, thinking)
    assert parsed.problems == ()
    assert parsed.ended
    assert (parsed.content, parsed.reasoning) == (content, reasoning if thinking else "")
    assert [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls] == made

    again = [{"role": "user", "content": "Q"}, parsed.to_message()]
    assert encode_messages(again, mode) == prompt + completion


def test_messages_for_the_conversation_number_their_calls() -> None:
    message = parse_completion(f"R{END_THINK}x{block(invoke('f'), invoke('g', parameter('k', 'v')))}", True)
    assert message.to_message("turn3_") == {
        "role": "assistant",
        "content": "x",
        "reasoning_content": "R",
        "tool_calls": [
            {"id": "turn3_1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "turn3_2", "type": "function", "function": {"name": "g", "arguments": '{"k": "v"}'}},
        ],
    }
    assert parse_completion("x", False).to_message() == {"role": "assistant", "content": "x"}


def test_malformed_output_can_be_put_back_into_a_conversation() -> None:
    rng = random.Random(7)
    for _ in range(300):
        value = "".join(rng.choices(["NaN", "1e999", '"\\ud800"', "[", "]", '"x"', "7" * 2500], k=2))
        text = "".join([*rng.choices(FRAGMENTS, k=12), block(invoke("f", parameter("n", value, False)))])
        message = parse_completion(text, True).to_message()
        encode_messages([{"role": "user", "content": "Q"}, message], "thinking").encode("utf-8")
