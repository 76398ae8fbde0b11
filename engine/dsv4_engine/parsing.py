"""Completions to messages: reasoning, answer, tool calls, and whatever went wrong, as the text streams in.

Owns the reading of the protocol that encoding.py writes.  A model may write anything, so nothing in here raises on
its text: what does not follow the protocol becomes a typed Problem that keeps the text, and all of the text stays in
`raw`.  How the text is cut into pushes never changes the result.  Knows no tokens, tokenizers or sessions.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from .protocol import DSML, END_THINK, EOS, SPECIAL_TOKENS

PieceKind = Literal["thinking", "answer", "tool_call"]
ProblemKind = Literal[
    "unclosed_thinking",  # the text ended before </think>; it is all reasoning
    "truncated_tool_call",  # the text ended inside a tool-call block
    "malformed_tool_call",  # a call, or text between calls, that does not follow the protocol
    "duplicate_parameter",  # a call that gives one parameter twice
    "stray_token",  # a special token where none belongs; it stays in the text as well
    "text_after_tool_calls",  # the block is the end of a message
    "text_after_end",  # the text went on after the end-of-sentence token
]

_CALLS = f"<{DSML}tool_calls>"
_END_CALLS = f"</{DSML}tool_calls>"
_INVOKE = f"<{DSML}invoke"
_END_INVOKE = f"</{DSML}invoke>"
_PARAMETER = f"<{DSML}parameter"
_END_PARAMETER = f"</{DSML}parameter>"
_MARKS = (_CALLS, _END_CALLS, _INVOKE, _END_INVOKE, _PARAMETER, _END_PARAMETER, *SPECIAL_TOKENS)
_ANY_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_LONGEST_MARK = max(map(len, _MARKS))
_PARTIAL_MARKS = frozenset(mark[:length] for mark in _MARKS for length in range(1, len(mark)))
assert not _PARTIAL_MARKS & set(_MARKS), "a mark that begins another one could not be recognised as it streams in"


@dataclass(frozen=True)
class ToolCall:
    """A well-formed call.  `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Problem:
    """Something the model wrote against the protocol.  `text`: the stretch of raw text; `detail`: one sentence."""

    kind: ProblemKind
    text: str
    detail: str


@dataclass(frozen=True)
class Piece:
    """The next stretch of one kind of output; `call` is set, and `text` is "", for kind "tool_call"."""

    kind: PieceKind
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True)
class ParsedMessage:
    """A completion, read.  `raw` is all of its text; `ended` says that it held the end-of-sentence token."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    problems: tuple[Problem, ...]
    raw: str
    ended: bool = False

    def to_message(self, call_id_prefix: str = "call_") -> dict[str, Any]:
        """The message to append to a conversation (OpenAI shape).  Calls are numbered from 1 behind the prefix."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"{call_id_prefix}{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(self.tool_calls, start=1)
            ]
        return message


class StreamParser:
    """Reads one completion piece by piece, in time linear in its length.

    thinking: the prompt ended with <think>, so that the text begins with reasoning.  Text that may be the beginning
    of a mark ("</thi") or the blank line before tool calls is held back until that is decided.
    """

    def __init__(self, thinking: bool) -> None:
        self._state: Literal["thinking", "answer", "block", "invoke", "after_block", "ended"]
        self._state = "thinking" if thinking else "answer"
        self._held = ""  # unread text: less than a mark
        self._newlines = ""  # at most two at the end of the answer so far, which tool calls would swallow
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._problems: list[Problem] = []
        self._raw: list[str] = []
        self._aside: list[str] = []  # raw text of the present block, invoke or trailing text
        self._block_calls = 0  # invokes seen in the present block, well-formed or not
        self._after_end: list[str] = []
        self._pieces: list[Piece] = []
        self._ended = False
        self._flushed = False

    @property
    def thinking(self) -> bool:
        """Whether the text is still inside the reasoning."""
        return self._state == "thinking"

    def push(self, text: str) -> list[Piece]:
        """Reads on and returns what became certain.  Not allowed after flush or finish (assert)."""
        assert not self._flushed, "push after the end"
        self._raw.append(text)
        text = self._held + text
        place = 0
        while True:
            mark = _ANY_MARK.search(text, place)
            undecided = _undecided_from(text, place)
            if mark is None or undecided < mark.start():  # "｜DSML｜" within what may become "<｜DSML｜invoke"
                self._text(text[place:undecided])
                self._held = text[undecided:]
                return self._take()
            self._text(text[place : mark.start()])
            self._mark(mark.group())
            place = mark.end()

    def flush(self) -> list[Piece]:
        """Ends the text and returns the last pieces: what was held back.  Further calls return []."""
        if self._flushed:
            return []
        self._flushed = True
        held, self._held = self._held, ""
        if self._state == "answer" and held.startswith(f"<{DSML}"):  # an opening that broke off
            self._problem("truncated_tool_call", self._newlines + held, "the text ended as tool calls began")
            self._newlines = ""
        else:
            # What was held as the beginning of a longer mark may hold a shorter one: "<｜DSML｜x" has "｜DSML｜".
            place = 0
            for mark in _ANY_MARK.finditer(held):
                self._text(held[place : mark.start()])
                self._mark(mark.group())
                place = mark.end()
            self._text(held[place:])
        self._close()
        return self._take()

    def finish(self) -> ParsedMessage:
        """Ends the text (see flush) and returns the whole message.  May be called again."""
        self.flush()
        return ParsedMessage(
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(self._calls),
            problems=tuple(self._problems),
            raw="".join(self._raw),
            ended=self._ended,
        )

    # -- what each stretch of text and each mark does, by state

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._state == "thinking":
            self._think(text)
        elif self._state == "answer":
            text = self._newlines + text
            kept = len(text)
            while kept and len(text) - kept < 2 and text[kept - 1] == "\n":
                kept -= 1
            self._newlines = text[kept:]
            self._answer(text[:kept])
        elif self._state == "ended":
            self._after_end.append(text)
        else:
            self._aside.append(text)

    def _mark(self, mark: str) -> None:
        if self._state == "ended":
            self._after_end.append(mark)
        elif mark == EOS:
            self._ended = True
            self._close()
        elif self._state == "thinking":
            if mark == END_THINK:
                self._state = "answer"
            else:
                self._stray(mark, "inside the reasoning")
                self._think(mark)
        elif self._state == "answer":
            self._mark_in_answer(mark)
        elif self._state == "block":
            self._mark_in_block(mark)
        elif self._state == "invoke":
            self._mark_in_invoke(mark)
        else:
            self._aside.append(mark)

    def _mark_in_answer(self, mark: str) -> None:
        if mark == _CALLS:
            if self._newlines != "\n\n":  # the blank line belongs to the block, a lone line end to the answer
                self._answer(self._newlines)
            self._newlines = ""
            self._state, self._block_calls = "block", 0
            return
        self._answer(self._newlines + mark)
        self._newlines = ""
        self._stray(mark, "inside the answer")

    def _mark_in_block(self, mark: str) -> None:
        if mark == _INVOKE:
            self._end_gap()
            self._aside.append(mark)
            self._state = "invoke"
            self._block_calls += 1
        elif mark == _END_CALLS:
            self._end_gap()
            if not self._block_calls:
                self._problem("malformed_tool_call", _CALLS + mark, "the block of tool calls is empty")
            self._state = "after_block"
        else:
            self._aside.append(mark)

    def _mark_in_invoke(self, mark: str) -> None:
        if mark in (_INVOKE, _END_CALLS):  # the invoke before was never closed
            self._problem("malformed_tool_call", self._take_aside(), f"the call is not closed by {_END_INVOKE}")
            self._state = "block"
            self._mark_in_block(mark)
            return
        self._aside.append(mark)
        if mark == _END_INVOKE:
            self._read_invoke(self._take_aside())
            self._state = "block"
        elif mark in SPECIAL_TOKENS and mark != DSML:
            self._stray(mark, "inside a tool call")

    def _close(self) -> None:
        """The message ends here: settles what is open."""
        if self._state == "thinking":
            text = "".join(self._reasoning)
            self._problem("unclosed_thinking", text, f"the text ended inside the reasoning, before {END_THINK}")
        elif self._state == "answer":
            self._answer(self._newlines)
            self._newlines = ""
        elif self._state == "invoke":
            self._problem("truncated_tool_call", self._take_aside(), "the text ended inside a tool call")
        elif self._state == "block":
            self._problem("truncated_tool_call", self._take_aside(), f"the text ended before {_END_CALLS}")
        elif self._state == "after_block":
            text = self._take_aside()
            if text.strip():
                self._problem("text_after_tool_calls", text, "text follows the tool calls")
        elif self._after_end:
            text = "".join(self._after_end)
            self._problem("text_after_end", text, "text follows the end-of-sentence token")
        self._state = "ended"

    def _read_invoke(self, raw: str) -> None:
        call = read_invoke(raw)
        if isinstance(call, Problem):
            self._problems.append(call)
        else:
            self._calls.append(call)
            self._pieces.append(Piece("tool_call", call=call))

    def _end_gap(self) -> None:
        """Text between calls is only ever white space."""
        gap = self._take_aside()
        if gap.strip():
            self._problem("malformed_tool_call", gap, "text stands between the tool calls")

    def _think(self, text: str) -> None:
        self._reasoning.append(text)
        self._pieces.append(Piece("thinking", text))

    def _answer(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._pieces.append(Piece("answer", text))

    def _stray(self, mark: str, where: str) -> None:
        self._problem("stray_token", mark, f"{mark} stands {where}")

    def _problem(self, kind: ProblemKind, text: str, detail: str) -> None:
        self._problems.append(Problem(kind, text, detail))

    def _take_aside(self) -> str:
        text = "".join(self._aside)
        self._aside.clear()
        return text

    def _take(self) -> list[Piece]:
        """The pieces since the last call, neighbours of one kind joined."""
        joined: list[Piece] = []
        for piece in self._pieces:
            if joined and piece.call is None and joined[-1].kind == piece.kind:
                joined[-1] = Piece(piece.kind, joined[-1].text + piece.text)
            else:
                joined.append(piece)
        self._pieces.clear()
        return joined


def parse_completion(text: str, thinking: bool) -> ParsedMessage:
    """Reads a whole completion at once; `thinking` as in StreamParser.  Never raises on any text."""
    parser = StreamParser(thinking)
    parser.push(text)
    return parser.finish()


def read_invoke(raw: str) -> ToolCall | Problem:
    """Reads one `<｜DSML｜invoke name="...">...</｜DSML｜invoke>`: a call, or the Problem with it.

    Names end at the quote that closes the attribute.  A string parameter is taken verbatim; any other must be JSON
    and is kept as the model wrote it, so that no digit of a number changes.
    """

    def malformed(detail: str) -> Problem:
        return Problem("malformed_tool_call", raw, detail)

    body_end = len(raw) - len(_END_INVOKE)
    opening = f'{_INVOKE} name="'
    name_end = raw.find('">', len(opening))
    if not raw.startswith(opening) or not len(opening) < name_end < body_end:
        return malformed("the call has no name")
    name = raw[len(opening) : name_end]
    if DSML in name:
        return malformed("the call has no name")
    arguments: dict[str, str] = {}
    place = _skip_space(raw, name_end + 2)
    while place < body_end:
        head = _PARAMETER_HEAD.match(raw, place)
        end = raw.find(_END_PARAMETER, head.end()) if head else -1
        if head is None or end < 0:
            return malformed(f"the parameters of {name} are not well formed")
        key, value = head["key"], raw[head.end() : end]
        if DSML in key or DSML in value:
            return malformed(f"a parameter of {name} is not closed")
        if head["is_text"] == "true":
            written = json.dumps(value, ensure_ascii=False)
        elif _is_json(value):
            written = value.strip(_JSON_SPACE)
        else:
            return malformed(f"parameter {key} of {name} is not JSON")
        if key in arguments:
            return Problem("duplicate_parameter", raw, f"{name} is given parameter {key} twice")
        arguments[key] = written
        place = _skip_space(raw, end + len(_END_PARAMETER))
    members = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in arguments.items())
    return ToolCall(name, "{" + ", ".join(members) + "}")


_PARAMETER_HEAD = re.compile(rf'{_PARAMETER} name="(?P<key>.*?)" string="(?P<is_text>true|false)">', re.DOTALL)
_JSON_SPACE = " \t\r\n"


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _is_json(text: str) -> bool:
    """Whether `text` is JSON that can also be written again, as a later turn of the conversation has to."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
        # Fails for what JSON can spell but nothing can hold: 1e999, half a surrogate pair, integers of 5,000 digits.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):
        return False
    return True


def _undecided_from(text: str, start: int) -> int:
    """Where the longest suffix of text[start:] that may begin a mark starts; len(text) if none does."""
    for place in range(max(start, len(text) - _LONGEST_MARK + 1), len(text)):
        if text[place:] in _PARTIAL_MARKS:
            return place
    return len(text)
