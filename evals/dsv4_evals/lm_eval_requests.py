"""Requests of lm-eval as prompts: reads the contexts it hands over, and finds what several of them begin with.

Owns the text form of a conversation (lm-eval passes contexts about as strings) and the grouping by common beginnings,
so that a document under four choices or ten questions is read once.  Knows neither lm-eval nor models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from .errors import TaskError
from .model import Prompt, Role, Turn

_MARK = "dsv4-messages:"
# Characters that a common beginning must have to be worth reading apart from what follows.
_WORTH_SHARING = 1024


@dataclass(frozen=True)
class Asked:
    """One context: whole messages before it, the last user message (or the plain text), the opening of the answer."""

    text: str
    turns: tuple[tuple[Role, str], ...] = ()
    opening: str = ""
    chat: bool = False

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts contexts with the same beginning next to each other."""
        return self.chat, self.turns, self.text


def write_messages(history: Sequence[Mapping[str, str]], open_answer: bool) -> str:
    """A conversation as the text that `read_context` understands.

    open_answer: the model answers the last message; else the last message, the assistant's, is the beginning of the
    answer.  Raises TaskError for a conversation that does neither.
    """
    messages = [(message["role"], message["content"]) for message in history]
    last = messages[-1][0] if messages else "nothing"
    if (last == "assistant") == open_answer or any(role not in ("system", "user", "assistant") for role, _ in messages):
        roles = ", ".join(role for role, _ in messages) or "no message"
        raise TaskError(f"the task makes a conversation that cannot be asked: {roles}", "Try it with --no-chat.")
    return _MARK + json.dumps(messages, ensure_ascii=False)


def read_context(context: str, chat: bool) -> Asked:
    """What a context asks.  chat: conversations occur; without, a text that looks like one stays a text.

    Text that a task put behind a conversation belongs to the opening of the answer.
    """
    if not chat or not context.startswith(_MARK):
        return Asked(context)
    messages, end = json.JSONDecoder().raw_decode(context, len(_MARK))
    turns = [(cast(Role, role), content) for role, content in messages]
    opening = ""
    if turns[-1][0] == "assistant":
        opening = turns.pop()[1]
    text = turns.pop()[1] if turns and turns[-1][0] == "user" else ""
    return Asked(text, tuple(turns), opening + context[end:], chat=True)


@dataclass(frozen=True)
class Group:
    """Requests, by their place, whose prompts begin alike.  prompt: that beginning; rests: the ids that follow it."""

    prompt: Prompt
    places: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...]


def grouped(asked: Sequence[Asked]) -> list[list[int]]:
    """Places of contexts that begin alike, together; every place once.  The same list gives the same groups."""
    if not asked:
        return []
    order = sorted(range(len(asked)), key=lambda place: asked[place].order)
    groups = [[order[0]]]
    shared: int | None = None  # characters that the present group begins with; None while it has one member
    for before, place in pairwise(order):
        common = _common_characters(asked[before], asked[place])
        equal = common == _characters(asked[place]) == _characters(asked[before]) and shared in (None, common)
        # A member that halves what the others share costs more than it saves.
        if equal or common >= max(_WORTH_SHARING, (shared or 0) // 2):
            groups[-1].append(place)
            shared = common if shared is None else min(shared, common)
        else:
            groups.append([place])
            shared = None
    return groups


def build(asked: Sequence[Asked], places: Sequence[int], encode: Callable[[str], list[int]]) -> Group:
    """Token ids of one of `grouped`'s groups."""
    known: dict[str, tuple[int, ...]] = {}

    def ids_of(text: str) -> tuple[int, ...]:
        if text not in known:
            known[text] = tuple(encode(text))
        return known[text]

    texts = [ids_of(asked[place].text) for place in places]
    first = asked[places[0]]
    shared = min((common_length(texts[0], ids) for ids in texts[1:]), default=len(texts[0]))
    turns = tuple(Turn(role, ids_of(text)) for role, text in first.turns)
    prompt = Prompt(texts[0][:shared], turns, first.chat)
    return Group(prompt, tuple(places), tuple(ids[shared:] for ids in texts))


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading elements are equal; slices are compared, because a loop over megabytes takes seconds."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _characters(asked: Asked) -> int:
    return sum(len(text) for _, text in asked.turns) + len(asked.text)


def _common_characters(one: Asked, other: Asked) -> int:
    if one.chat != other.chat or one.turns != other.turns:
        return 0
    return _characters(one) - len(one.text) + common_length(one.text, other.text)
