"""kv, passkey, variable-tracking, mrcr-style, corpus-agg: answers are found anew in the text."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from dsv4_evals.errors import TaskError
from dsv4_evals.task import Building, Cell
from dsv4_evals.tasks import task_named
from dsv4_evals.tasks.layout import Layout, plant, seam
from dsv4_evals.tasks.mrcr_style import _ordinal
from dsv4_evals.tasks.words import adjectives, distinct_words, nouns, single_words, unique
from support.sample_building import TEMPLATE, TURN, Words, asked, building, built, span, spelt


@pytest.fixture(scope="module")
def words() -> Building:
    return building()


def test_kv_is_a_json_object_with_the_expected_values(words: Building) -> None:
    task = task_named("kv")
    (made,) = built(task, 8000, words, depths=[0, 10, 50, 100])
    text = spelt(words, made)
    entries: dict[str, str] = json.loads(text[text.index("{") :])
    assert len(set(entries) | set(entries.values())) == 2 * len(entries) > 100
    for question, depth in zip(made.questions, [0, 10, 50, 100], strict=True):
        key = re.fullmatch(r'\n\nKey: "(\S+)"', asked(words, question))[1]  # type: ignore[index]
        assert entries[key] == question.expected
        assert list(entries).index(key) == round(depth / 100 * (len(entries) - 1)) and question.facts["depth"] == depth
        assert f'"{key}": "{question.expected}"' in span(words, made, question.facts["needle"])
        assert words.text.decode(question.opening) == "Corresponding value:"
        assert task.score(question, f' "{question.expected}"') == 1
        assert task.score(question, f" {key}") == 0


def test_kv_asks_one_entry_twice_where_depths_are_close(words: Building) -> None:
    (made,) = built(task_named("kv"), 2000, words, depths=[50, 50.5])
    first, second = made.questions
    assert first.expected == second.expected and [q.facts["depth"] for q in made.questions] == [50, 50.5]


@pytest.mark.parametrize("depth", [0, 1, 33.3, 50, 100])
def test_passkey_lies_at_its_depth(depth: float, words: Building) -> None:
    task = task_named("passkey")
    (made,) = built(task, 5000, words, depths=[depth], digits=7)
    (question,) = made.questions
    text = spelt(words, made)
    assert re.findall(r"The pass key is (\d{7})\. Remember it\. \1 is the pass key\.", text) == [question.expected]
    start, end = question.facts["needle"]
    introduction = len(words.text.encode(text[: text.index("there.\n\n") + 8]))
    filler = len(made.prompt.ids) - introduction - (end - start)
    assert abs(100 * (start - introduction) / filler - depth) < 1.5
    assert task.score(question, f" {question.expected}.") == 1 and task.score(question, "1234567") == 0


def test_depths_share_their_haystack(words: Building) -> None:
    made = built(task_named("passkey"), 3000, words, depths=[0, 100])
    plain = [re.sub("The pass key is .* is the pass key\\.", "", spelt(words, each)) for each in made]
    first, second = ("".join(text.split()) for text in plain)
    shorter = min(len(first), len(second)) - 10
    assert first[:shorter] == second[:shorter] and abs(len(first) - len(second)) < 10


@pytest.mark.parametrize(("chains", "hops"), [(1, 1), (4, 4), (3, 10)])
def test_variables_are_those_of_one_chain(chains: int, hops: int, words: Building) -> None:
    task = task_named("variable-tracking")
    (made,) = built(task, 8000, words, chains=chains, hops=hops)
    (question,) = made.questions
    held: dict[str, str] = {}
    for name, source in re.findall(r" VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", spelt(words, made)):
        assert name not in held
        held[name] = held.get(source, source)  # assignments come in the order of their chain
    assert len(held) == chains * (hops + 1) and Counter(Counter(held.values()).values()) == {hops + 1: chains}
    value = re.search(r"have the value (\d+),", asked(words, question))[1]  # type: ignore[index]
    assert {name for name, number in held.items() if number == value} == set(question.expected)
    for place in question.facts["needles"]:
        assert span(words, made, place["needle"]).strip().startswith(f"VAR {place['variable']} =")
    assert task.score(question, "Some thoughts.\nAnswer: " + ", ".join(question.expected)) == 1
    if chains > 1:
        assert task.score(question, "Answer: " + ", ".join(held)) == pytest.approx(2 / (chains + 1))


@pytest.mark.parametrize("needles", [2, 8])
def test_a_conversation_has_so_many_equal_requests_with_different_replies(needles: int, words: Building) -> None:
    task = task_named("mrcr-style")
    (made,) = built(task, 12_000, words, needles=needles)
    turns = [(turn.role, words.text.decode(turn.ids)) for turn in made.prompt.turns]
    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert len(made.questions) == needles
    for i, question in enumerate(made.questions, 1):
        wanted = re.fullmatch(
            r"Prepend (\w{10}) to the (\w+) \(1 indexed\) (.+ about \w+)\. "
            r"Do not include any other text in your response\.",
            asked(words, question),
        )
        assert wanted is not None and wanted[2] == _ordinal(i)
        replies = [turns[t + 1][1] for t, (_, said) in enumerate(turns) if re.fullmatch(f"write an? {wanted[3]}", said)]
        assert len(set(replies)) == len(replies) == needles
        assert question.expected == {"answer": wanted[1] + replies[i - 1], "prefix": wanted[1]}
        assert turns[question.facts["turn"]][1] == replies[i - 1]
        assert task.score(question, wanted[1] + replies[i - 1]) == 1
        assert task.score(question, replies[i - 1]) == 0
        assert task.score(question, wanted[1] + replies[i - 2]) < 0.9
    # Nothing else of the conversation is asked for in the same words, and much is asked for in similar ones.
    form, topic = wanted[3].split(" about ")
    requests = [said for role, said in turns if role == "user"]
    similar = [said for said in requests if (form in said) != (topic in said)]
    assert len(similar) > len(requests) / 5 and len(requests) >= 2 * needles


def test_replies_fill_the_room_of_any_template() -> None:
    text = Words()
    plain = building(text)
    wide = Building(text, plain.filler, plain.room, lambda prompt: TEMPLATE + 7 * (TURN + 10) * bool(prompt.turns))
    (made,) = built(task_named("mrcr-style"), 6000, wide)
    content = sum(len(turn.ids) for turn in made.prompt.turns) + max(len(q.ids) for q in made.questions)
    assert content + wide.overhead(made.prompt) + made.max_tokens == 6000


def test_a_haystack_too_short_for_different_replies_is_an_error() -> None:
    text = Words()

    class Short:
        def take(self, tokens: int, rng: random.Random) -> list[int]:
            return (text.encode("It rains today, and all the streets are wet. ") * tokens)[:tokens]

    plain = building(text)
    with pytest.raises(TaskError, match="came twice"):
        built(task_named("mrcr-style"), 8000, Building(text, Short(), plain.room, plain.overhead))


@pytest.mark.parametrize("number", [*range(1, 5), 11, 12, 13, 21, 22, 23, 101, 111, 113])
def test_ordinals(number: int) -> None:
    irregular = {1: "1st", 2: "2nd", 3: "3rd", 21: "21st", 22: "22nd", 23: "23rd", 101: "101st"}
    assert _ordinal(number) == irregular.get(number, f"{number}th")


@pytest.mark.parametrize("reports", [10, 24, 60])
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_reports_add_up_to_the_expected_answers(reports: int, sample: int, words: Building) -> None:
    task = task_named("corpus-agg")
    (made,) = built(task, 12_000, words, sample=sample, reports=reports)
    stated = []
    for number, said in re.findall(r" Depot report (\d+): (.*?)\.", spelt(words, made)):
        depot = re.search(r"depot at ([A-Z][A-Za-z]+(?: [A-Z][a-z]+)?)", said)[1]  # type: ignore[index]
        crates = re.search(r"(\d+) crates", said)[1]  # type: ignore[index]
        stated.append((int(number), depot, int(crates)))
    assert [number for number, *_ in stated] == list(range(1, reports + 1))
    totals: Counter[str] = Counter()
    for _, depot, crates in stated:
        totals[depot] += crates
    counts = Counter(depot for _, depot, _ in stated)
    assert len(counts) == 5 and min(counts.values()) >= 2
    found: dict[str, Any] = {}
    for question in made.questions:
        kind, said = question.facts["kind"], asked(words, question)
        about = re.search(r"depot at ([A-Z][A-Za-z]+(?: [A-Z][a-z]+)?)", said)
        if kind == "count":
            found[kind] = counts[about[1]]  # type: ignore[index]
        elif kind == "sum":
            found[kind] = totals[about[1]]  # type: ignore[index]
        elif kind == "largest":
            found[kind] = max(stated, key=lambda each: each[2])[1]
        else:
            found[kind] = totals.most_common(1)[0][0]
        assert question.expected == found[kind]
        assert task.score(question, f"I add them up.\nAnswer: {found[kind]}") == 1
        assert task.score(question, "Answer: none, nowhere") == 0
        for place in question.facts["needles"]:
            assert span(words, made, place["needle"]).strip().startswith("Depot report")
    assert list(found) == ["count", "sum", "largest", "most"]
    assert totals.most_common(2)[0][1] > totals.most_common(2)[1][1]


def test_a_haystack_about_depots_is_refused() -> None:
    text = Words()

    class About:
        def take(self, tokens: int, rng: random.Random) -> list[int]:
            return (text.encode("Depot report 1 says nothing. ") * tokens)[:tokens]

    plain = building(text)
    with pytest.raises(TaskError, match="speaks of depots"):
        built(task_named("corpus-agg"), 8000, Building(text, About(), plain.room, plain.overhead))


def test_pieces_go_between_sentences_and_keep_their_order() -> None:
    text = Words()
    filler = text.encode("One two three. Four five six. Seven eight nine. Ten eleven twelve.")
    places = [i for i in range(1, len(filler)) if text.decode(filler[:i]).endswith(".") and i < len(filler)]
    assert [seam(text, filler, at) for at in places] == places
    assert seam(text, filler, places[0] + 1) == places[0]
    assert (seam(text, filler, 0), seam(text, filler, len(filler)), seam(text, filler, -3)) == (0, len(filler), 0)
    layout = Layout(text)
    layout.add("Begin: ")
    starts = plant(layout, text, filler, [(100, text.encode(" C.")), (0, text.encode("A. ")), (0, text.encode("B. "))])
    assert text.decode(layout.ids) == f"Begin: A. B. {text.decode(filler)} C."
    assert [text.decode(layout.ids[start : start + 2]) for start in starts] == [" C.", "A.", "B."]


def test_without_sentences_a_piece_goes_between_words_and_without_words_anywhere() -> None:
    text = Words()
    spaced = text.encode("abcdefgh ijklmnop qrstuvwx")
    assert text.decode(spaced[: seam(text, spaced, 3)]) in ("abcdefgh", "abcdefgh ijklmnop")
    dense = text.encode("abcdefgh" * 20)
    assert seam(text, dense, 17) == 17


def test_words_are_many_plain_and_different() -> None:
    for listed, least in ((adjectives(), 500), (nouns(), 800), (single_words(), 1900)):
        assert len(set(listed)) == len(listed) >= least and all(re.fullmatch("[a-z]+", word) for word in listed)
    drawn = distinct_words(random.Random(0), 20_000)
    assert len(set(drawn)) == 20_000 and set(single_words()) <= set(drawn)
    assert set(distinct_words(random.Random(0), 50)) <= set(single_words())


def test_what_is_drawn_is_new_and_running_out_is_an_error() -> None:
    drawn: Sequence[str] = unique(lambda: random.Random(len(taken)).choice("abc"), 0, taken := set())
    assert drawn == []
    rng = Cell("x", 1, 0).rng()
    assert sorted(unique(lambda: rng.choice("abcdef"), 3, {"a"}, plain="xbx c")) == ["d", "e", "f"]
    with pytest.raises(TaskError, match="different names"):
        unique(lambda: rng.choice("abc"), 4)
