"""Messages to the prompt text of DeepSeek-V4: roles, thinking, tools, tasks and reminders.

Owns the rules by which messages become text; the protocol's fixed strings are protocol.py's.  Knows no tokenizer:
`encode_segments` says which stretches are special tokens and which are text to be read literally, so that a file or
a user that spells a special token cannot act as one.  The opposite direction is parsing.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from .errors import PromptError
from .protocol import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    LATEST_REMINDER,
    REASONING_EFFORT_MAX,
    RESPONSE_FORMAT,
    TASKS,
    THINK,
    TOOLS_SECTION,
    USER,
)

ThinkingMode = Literal["thinking", "chat"]
ReasoningEffort = Literal["high", "max"]
Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
_ROLES_WITH_TOOLS = ("system", "developer")
_ROLES_WITH_TASK = ("user", "developer", "assistant")
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt: exactly one special token, or text without any meaning to the protocol's parser."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class _Call:
    call_id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class _Block:
    """One text of a user turn, or (is_result) one tool's result."""

    text: str
    is_result: bool = False
    call_id: str = ""


@dataclass(frozen=True)
class _Turn:
    """A checked message; a user turn may hold the blocks of several."""

    role: str
    blocks: tuple[_Block, ...] = ()
    reasoning: str = ""
    calls: tuple[_Call, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    task: str | None = None
    wo_eos: bool = False


class _Writer:
    """Collects segments; neighbouring literal texts become one."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._literal: list[str] = []

    def text(self, text: str) -> None:
        if text:
            self._literal.append(text)

    def special(self, token: str) -> None:
        self.end()
        self.segments.append(Segment(token, special=True))

    def template(self, template: str, **values: str) -> None:
        """Fills {name}: the names of tokens with special tokens, the others with literal text from `values`."""
        tokens = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": END_THINK}
        for place, part in enumerate(re.split(r"\{(\w+)\}", template)):
            if place % 2 == 0:
                self.text(part)
            elif part in tokens:
                self.special(tokens[part])
            else:
                self.text(values[part])

    def end(self) -> None:
        if self._literal:
            self.segments.append(Segment("".join(self._literal)))
            self._literal.clear()


def encode_messages(
    messages: Messages,
    thinking_mode: ThinkingMode = "thinking",
    reasoning_effort: ReasoningEffort | None = None,
    *,
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> str:
    """The prompt as one text: the concatenation of `encode_segments` (same arguments and errors).

    Tokenising this text lets user text inject special tokens; give the segments to Tokenizer.encode_segments instead.
    """
    segments = encode_segments(messages, thinking_mode, reasoning_effort, drop_thinking=drop_thinking, add_bos=add_bos)
    return "".join(segment.text for segment in segments)


def encode_segments(
    messages: Messages,
    thinking_mode: ThinkingMode = "thinking",
    reasoning_effort: ReasoningEffort | None = None,
    *,
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> list[Segment]:
    """The prompt in segments: special tokens one by one, everything else as literal text.

    messages: OpenAI shapes (role, content, tool_calls, tool_call_id) with the protocol's own fields
    reasoning_content, tools, response_format, task and wo_eos.  They are not changed.
    thinking_mode: "thinking" or "chat".  reasoning_effort: None or "high" (no text of their own), or "max", which
    works in thinking mode and is meant for contexts of 384K tokens and more.
    drop_thinking=False keeps the reasoning of earlier turns, which otherwise stays only where tools are defined.
    Raises PromptError naming the message and the key of whatever is malformed.
    Source of the format: the publisher's encoding of DeepSeek-V4.
    """
    if thinking_mode not in ("thinking", "chat"):
        raise PromptError(f"thinking_mode is {thinking_mode!r}", 'Use "thinking" or "chat".')
    if reasoning_effort not in (None, "high", "max"):
        raise PromptError(f"reasoning_effort is {reasoning_effort!r}", 'Use None, "high" or "max".')
    turns = _in_call_order(_merged(_read_messages(messages)))
    thinking = thinking_mode == "thinking"
    drop = thinking and drop_thinking and not any(turn.tools for turn in turns)
    if drop:
        turns = _without_past_thinking(turns)
    return _render(turns, thinking, drop, thinking and reasoning_effort == "max", add_bos)


# -- from messages to turns


def _merged(turns: Sequence[_Turn]) -> list[_Turn]:
    """Joins neighbouring user texts and tool results (both are user turns by now) into one turn.

    A turn with a task takes no more; a text that brings a task gives it to the turn it joins.
    """
    merged: list[_Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if turn.role == "user" and last is not None and last.role == "user" and last.task is None:
            merged[-1] = replace(last, blocks=last.blocks + turn.blocks, task=turn.task)
        else:
            merged.append(turn)
    return merged


def _in_call_order(turns: Sequence[_Turn]) -> list[_Turn]:
    """Puts the results within each user turn in the order of the latest calls; texts keep their places.

    A result whose id is none of those calls' counts as the first call's, as the publisher has it.
    """
    order: dict[str, int] = {}
    ordered: list[_Turn] = []
    for turn in turns:
        if turn.calls:
            order = {call.call_id: place for place, call in enumerate(turn.calls) if call.call_id}
        results = sorted((b for b in turn.blocks if b.is_result), key=lambda block: order.get(block.call_id, 0))
        queue = iter(results)
        ordered.append(replace(turn, blocks=tuple(next(queue) if b.is_result else b for b in turn.blocks)))
    return ordered


def _last_question(turns: Sequence[_Turn]) -> int:
    """Index of the last user or developer turn, -1 without one."""
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _without_past_thinking(turns: Sequence[_Turn]) -> list[_Turn]:
    """Before the last question: developer turns go, and assistant turns lose their reasoning."""
    last = _last_question(turns)
    past = [replace(turn, reasoning="") for turn in turns[: max(last, 0)] if turn.role != "developer"]
    return past + list(turns[max(last, 0) :])


# -- from turns to text


def _render(turns: Sequence[_Turn], thinking: bool, drop: bool, max_effort: bool, add_bos: bool) -> list[Segment]:
    out = _Writer()
    if add_bos:
        out.special(BOS)
    if max_effort:
        out.text(REASONING_EFFORT_MAX)
    last = _last_question(turns)
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            answers_task = i > 0 and turns[i - 1].task is not None
            _render_assistant(out, turn, thinking and not answers_task and (not drop or i > last))
        else:
            _render_given(out, turn)
        # The publisher opens the answer also before a reminder that follows the question.
        if i + 1 == len(turns) or turns[i + 1].role in ("assistant", "latest_reminder"):
            _render_opening(out, turn, thinking, thinking and (not drop or i >= last))
    out.end()
    return out.segments


def _render_given(out: _Writer, turn: _Turn) -> None:
    """A turn of system, user, developer or latest_reminder."""
    if turn.role in ("user", "developer"):
        out.special(USER)
    elif turn.role == "latest_reminder":
        out.special(LATEST_REMINDER)
    out.text(_BLANK_LINE.join(f"<tool_result>{b.text}</tool_result>" if b.is_result else b.text for b in turn.blocks))
    if turn.tools:
        out.text(_BLANK_LINE)
        out.template(TOOLS_SECTION, tool_schemas="\n".join(_to_json(tool["function"]) for tool in turn.tools))
    if turn.response_format:
        out.text(_BLANK_LINE)
        out.template(RESPONSE_FORMAT, schema=_to_json(turn.response_format))


def _render_assistant(out: _Writer, turn: _Turn, with_reasoning: bool) -> None:
    if with_reasoning:
        out.text(turn.reasoning)
        out.special(END_THINK)
    for block in turn.blocks:
        out.text(block.text)
    if turn.calls:
        out.template(_BLANK_LINE + "<{dsml_token}tool_calls>\n")
        for call in turn.calls:
            out.template('<{dsml_token}invoke name="{name}">\n', name=call.name)
            for place, (key, value) in enumerate(call.arguments.items()):
                is_text = isinstance(value, str)
                out.template(
                    '{gap}<{dsml_token}parameter name="{key}" string="{is_text}">{value}</{dsml_token}parameter>',
                    gap="\n" if place else "",
                    key=key,
                    is_text="true" if is_text else "false",
                    value=value if is_text else _to_json(value),
                )
            out.template("\n</{dsml_token}invoke>\n")
        out.template("</{dsml_token}tool_calls>")
    if not turn.wo_eos:
        out.special(EOS)


def _render_opening(out: _Writer, turn: _Turn, thinking: bool, think_here: bool) -> None:
    """What follows a turn that is answered next: the task's token, or the start of the assistant's answer."""
    if turn.task is not None and turn.task != "action":
        out.special(TASKS[turn.task])
    elif turn.task is not None:
        out.special(ASSISTANT)
        out.special(THINK if thinking else END_THINK)
        out.special(TASKS[turn.task])
    elif turn.role in ("user", "developer"):
        out.special(ASSISTANT)
        out.special(THINK if think_here else END_THINK)


def _to_json(value: Any) -> str:
    """JSON as the model was trained to read it: one line, ", " and ": " between the parts, non-ASCII kept."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# -- reading messages


def _bad(where: str, what: str, hint: str = "") -> NoReturn:
    raise PromptError(f"{where} {what}", hint or "Messages have the shapes of the OpenAI chat API.")


def _read_messages(messages: Messages) -> list[_Turn]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        _bad("messages", f"is a {type(messages).__name__}, not a list")
    if not messages:
        _bad("messages", "is empty", "Give at least one message.")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> _Turn:
    if not isinstance(message, Mapping):
        _bad(where, f"is a {type(message).__name__}, not an object")
    role = message.get("role")
    if role not in ROLES:
        what = f"is {role!r:.60}" if "role" in message else "is missing"
        _bad(f"{where}.role", what, f"Roles are {', '.join(ROLES)}.")
    tools = _read_tools(message.get("tools"), f"{where}.tools")
    response_format = message.get("response_format")
    for key, value in (("tools", tools), ("response_format", response_format)):
        if value and role not in _ROLES_WITH_TOOLS:
            _bad(f"{where}.{key}", f"is on a message of role {role}", "It goes on a system or developer message.")
    if response_format:
        _check_json(response_format, f"{where}.response_format")
    task = message.get("task")
    if task is not None and not (isinstance(task, str) and task in TASKS):
        _bad(f"{where}.task", f"is {task!r:.60}", f"Tasks are {', '.join(TASKS)}.")
    if task is not None and role not in _ROLES_WITH_TASK:
        _bad(f"{where}.task", f"is on a message of role {role}", "A task goes on a user or developer message.")
    wo_eos = message.get("wo_eos")
    if wo_eos is not None and not isinstance(wo_eos, bool):
        _bad(f"{where}.wo_eos", f"is {wo_eos!r:.60}, not true or false")
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        _bad(f"{where}.reasoning_content", f"is a {type(reasoning).__name__}, not text")
    calls = tuple(_read_calls(message.get("tool_calls"), f"{where}.tool_calls"))
    if calls and role != "assistant":
        _bad(f"{where}.tool_calls", f"is on a message of role {role}", "Only an assistant message makes calls.")
    # An answer may consist of calls or (an unfinished one) of reasoning alone, a system message of its tools.
    optional = bool(calls or tools or response_format) or (role == "assistant" and reasoning is not None)
    texts = _read_content(message, where, optional=optional and role != "developer")
    if role == "developer" and not any(texts):
        _bad(f"{where}.content", "is empty", "A developer message needs text.")
    if role == "tool":
        call_id = message.get("tool_call_id")
        if call_id is not None and not isinstance(call_id, str):
            _bad(f"{where}.tool_call_id", f"is {call_id!r:.60}, not text")
        return _Turn("user", (_Block(_BLANK_LINE.join(texts), is_result=True, call_id=call_id or ""),))
    return _Turn(role, tuple(map(_Block, texts)), reasoning or "", calls, tools, response_format, task, wo_eos is True)


def _read_content(message: Mapping[str, Any], where: str, optional: bool) -> list[str]:
    """`content` as a list of one text, or [] where it may be absent; text parts are joined by a blank line."""
    content = message.get("content")
    if content is None:
        if optional:
            return []
        _bad(f"{where}.content", "is null" if "content" in message else "is missing")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        _bad(f"{where}.content", f"is a {type(content).__name__}, not text")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            _bad(f"{where}.content[{i}]", f"is no text part ({kind!r})", "The model reads text only.")
    return [_BLANK_LINE.join(part["text"] for part in content)]


def _read_tools(tools: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        _bad(where, f"is a {type(tools).__name__}, not a list")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _bad(f"{where}[{i}].function", "is missing or has no name")
        _check_json(function, f"{where}[{i}].function")
    return tuple(tools)


def _read_calls(calls: Any, where: str) -> Iterator[_Call]:
    if calls is None:
        return
    if not isinstance(calls, list | tuple):
        _bad(where, f"is a {type(calls).__name__}, not a list")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            _bad(f"{where}[{i}].function", "is missing or has no name")
        call_id = call.get("id")
        if call_id is not None and not isinstance(call_id, str):
            _bad(f"{where}[{i}].id", f"is {call_id!r:.60}, not text")
        arguments = function.get("arguments")
        at = f"{where}[{i}].function.arguments"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                _bad(at, f"is not JSON: {error}")
        if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
            _bad(at, "is not a JSON object")
        _check_json(arguments, at)
        yield _Call(call_id or "", function["name"], dict(arguments))


def _check_json(value: Any, where: str) -> None:
    try:
        _to_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        _bad(where, f"cannot be written as JSON: {error}")
