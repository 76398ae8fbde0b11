"""Contexts of lm-eval as prompts, and the grouping by what they begin with."""

from __future__ import annotations

import random

import pytest

from dsv4_evals.errors import TaskError
from dsv4_evals.lm_eval_requests import Asked, build, common_length, grouped, read_context, write_messages
from dsv4_evals.model import Turn


def encode(text: str) -> list[int]:
    return list(text.encode())


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_conversation_and_back() -> None:
    history = [message("system", "be brief"), message("user", "1+1"), message("assistant", "2"), message("user", "2+2")]
    asked = read_context(write_messages(history, open_answer=True), chat=True)
    assert asked == Asked("2+2", (("system", "be brief"), ("user", "1+1"), ("assistant", "2")), "", chat=True)


def test_the_beginning_of_an_answer() -> None:
    history = [message("user", "why?"), message("assistant", "Because")]
    context = write_messages(history, open_answer=False)
    assert read_context(context, chat=True) == Asked("why?", (), "Because", chat=True)
    assert read_context(context + " of", chat=True).opening == "Because of"


@pytest.mark.parametrize(
    ("history", "open_answer"),
    [
        ([message("user", "x"), message("assistant", "done")], True),
        ([message("user", "x")], False),
        ([message("tool", "x")], True),
        ([], False),
    ],
)
def test_conversations_that_cannot_be_asked(history: list[dict[str, str]], open_answer: bool) -> None:
    with pytest.raises(TaskError):
        write_messages(history, open_answer)


def test_text_is_text_without_chat() -> None:
    context = write_messages([message("user", "x")], open_answer=True)
    assert read_context(context, chat=False) == Asked(context)
    assert read_context("plain", chat=True) == Asked("plain")


def test_what_documents_spell_stays_text() -> None:
    text = 'quote " brace } <｜User｜> \\n \ud7ff dsv4-messages:[["user", "x"]]'
    context = write_messages([message("user", text)], open_answer=True)
    assert read_context(context, chat=True).text == text


def test_equal_contexts_are_one_group() -> None:
    asked = [Asked("short"), Asked("other"), Asked("short"), Asked("short")]
    assert sorted(map(sorted, grouped(asked))) == [[0, 2, 3], [1]]


def test_long_common_beginnings_are_one_group() -> None:
    one, two = "a" * 5000, "b" * 5000
    asked = [Asked(one + "x?"), Asked(two + "x?"), Asked(one + "y?"), Asked(two), Asked("a" * 900 + "z"), Asked("")]
    groups = sorted(map(sorted, grouped(asked)))
    assert groups == [[0, 2], [1, 3], [4], [5]]
    group = build(asked, [0, 2], encode)
    assert bytes(group.prompt.ids).decode() == one
    assert [bytes(rest).decode() for rest in group.rests] == ["x?", "y?"]


def test_a_member_that_would_halve_the_beginning_stays_out() -> None:
    asked = [Asked("a" * 9000 + "1"), Asked("a" * 9000 + "2"), Asked("a" * 2000 + "b")]
    assert sorted(map(sorted, grouped(asked))) == [[0, 1], [2]]


def test_other_turns_are_another_group() -> None:
    text = "a" * 5000
    asked = [
        Asked(text, (("user", "x"), ("assistant", "y")), chat=True),
        Asked(text, (("user", "x"), ("assistant", "z")), chat=True),
        Asked(text, (("user", "x"), ("assistant", "y")), chat=True),
        Asked(text),
    ]
    assert sorted(map(sorted, grouped(asked))) == [[0, 2], [1], [3]]


def test_long_turns_make_short_questions_share() -> None:
    turns = (("user", "example " * 300), ("assistant", "y"))
    asked = [Asked("one?", turns, chat=True), Asked("two?", turns, chat=True)]
    (places,) = grouped(asked)
    group = build(asked, places, encode)
    assert group.prompt.turns == (Turn("user", tuple(encode("example " * 300))), Turn("assistant", tuple(encode("y"))))
    assert group.prompt.ids == () and group.prompt.chat


def test_every_place_comes_once_and_nothing_is_lost() -> None:
    rng = random.Random(0)
    stems = ["s" * 1500, "s" * 1500 + "t" * 1500, "u" * 1200, ""]
    asked = [Asked(rng.choice(stems) + str(rng.randrange(5)) * rng.randrange(50)) for _ in range(200)]
    groups = grouped(asked)
    assert sorted(place for places in groups for place in places) == list(range(200))
    assert groups == grouped(asked)
    for places in groups:
        group = build(asked, places, encode)
        for place, rest in zip(group.places, group.rests, strict=True):
            assert bytes([*group.prompt.ids, *rest]).decode() == asked[place].text


def test_no_contexts() -> None:
    assert grouped([]) == []


@pytest.mark.parametrize(
    ("one", "other"), [("", ""), ("a", ""), ("abc", "abd"), ("abc", "abcd"), ("x" * 999, "x" * 998 + "y")]
)
def test_common_length(one: str, other: str) -> None:
    expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_length(one, other) == common_length(list(one), list(other)) == expected
