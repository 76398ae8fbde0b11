"""RULER's eleven tasks: upstream's words, one true answer, and parameters recounted from the text itself."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsv4_evals.task import Building, Question, Sample
from dsv4_evals.tasks.ruler import Ruler
from dsv4_evals.tasks.ruler_needles import KINDS
from support.sample_building import asked, building, built, span, spelt

NO_LM_EVAL = "needs lm-eval (pip install 'dsv4[eval]')"
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.(?=\s|$)")
RULER = Ruler()


@pytest.fixture(scope="module")
def words() -> Building:
    return building()


def one(task: str, with_: Building, ctx: int = 4096, **which: Any) -> tuple[Sample, Question, str]:
    (sample,) = built(RULER, ctx, with_, tasks=[task], **which)
    (question,) = sample.questions
    return sample, question, spelt(with_, sample)


def constants(module: str) -> dict[str, Any]:
    """The literal assignments at the top of a module of lm-eval, read without importing it (and its packages)."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip(NO_LM_EVAL)
    path = Path(found.submodule_search_locations[0]) / "tasks" / "ruler" / f"{module}.py"
    values = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return values


def test_all_eleven_tasks_are_cells_of_a_run() -> None:
    cells = RULER.cells([4096], 2, 0, {})
    assert sorted({cell.params["task"] for cell in cells}) == sorted([*KINDS, "vt", "cwe", "fwe"])
    assert len(cells) == 22


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("sample", [0, 1, 2])
def test_needles_have_one_true_answer(task: str, sample: int, words: Building) -> None:
    kind = KINDS[task]
    made, question, text = one(task, words, sample=sample)
    stated = NEEDLE.findall(text)
    keys, values = [key for _, key, _ in stated], [value for *_, value in stated]
    assert len(set(values)) == len(values)
    assert len(set(keys)) == len(keys) if kind.values == 1 else len(set(keys)) == 1
    planted = kind.keys * kind.values
    assert len(stated) == planted if kind.haystack != "needle" else len(stated) > 20

    said = re.search(r"the special magic (\w+) for (.+) mentioned in the provided text\?$", asked(words, question))
    assert said is not None
    names = re.split(r", and |, ", said[2])
    assert len(names) == kind.queries
    assert sorted(question.expected) == sorted(value for _, key, value in stated if key in names)
    assert len(question.expected) == kind.queries * kind.values
    # No key stands within another one, so that no other needle answers the question.
    assert not any(name in key for name in names for key in keys if key != name)
    for place in question.facts["needles"]:
        found = NEEDLE.search(span(words, made, place["needle"]))
        assert found is not None and found[2] == place["key"] and (found[3] in question.expected) == place["expected"]
        assert 0 <= place["depth"] <= 100
    assert RULER.score(question, "They are: " + " / ".join(reversed(question.expected)).upper()) == 1
    assert RULER.score(question, question.expected[0]) == 1 / len(question.expected)
    others = [value for value in values if value not in question.expected]
    assert RULER.score(question, " ".join(others)) == 0


@pytest.mark.parametrize("task", KINDS)
def test_needles_use_upstreams_words(task: str, words: Building) -> None:
    kind = KINDS[task]
    template: str = constants("niah_utils")["TEMPLATE"]
    things = kind.value
    if kind.queries * kind.values == 1:
        things = things[:-1]
        for old, new in [("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")]:
            template = template.replace(old, new)
    sample, question, text = one(task, words)
    query = re.search(r" for (.+) mentioned", asked(words, question))[1]  # type: ignore[index]
    context = re.match(r"[^\n]+\n(.*)\n$", text, re.DOTALL)[1]  # type: ignore[index]
    assert text + asked(words, question) == template.format(type_needle_v=things, context=context, query=query)
    verb = "is" if kind.one else "are"
    opening = f"The special magic {things} for {query} mentioned in the provided text {verb}"
    assert words.text.decode(question.opening) == opening
    assert sample.max_tokens >= 128
    if kind.haystack == "repeat":
        noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
        lines = [line for line in context.split("\n") if not NEEDLE.fullmatch(line)]
        assert noise.endswith(lines[0]) and set(lines[1:]) == {noise}


def test_depths_of_needles_in_text_are_upstreams_forty() -> None:
    with_ = building()
    seen = set()
    for sample in range(40):
        _, question, _ = one("niah_multikey_1", with_, ctx=2048, sample=sample)
        depths = [place["depth"] for place in question.facts["needles"]]
        assert len(set(depths)) == 4 and depths == sorted(depths)
        seen.update(depths)
    assert seen <= {round(i * 100 / 39) for i in range(40)} and len(seen) > 30


def test_tasks_with_text_share_their_haystack(words: Building) -> None:
    first = {task: one(task, words)[2] for task in ("niah_single_2", "niah_multivalue", "niah_multiquery")}
    plain = [re.sub(r"\s+", " ", NEEDLE.sub("", text.split("\n", 1)[1]))[:200] for text in first.values()]
    assert len(set(plain)) == 1


def traced(text: str, value: str) -> list[str]:
    """The variables of ``text`` that come to have a value."""
    held: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", text):
        held[name] = held.get(source, source)
    return [name for name, number in held.items() if number == value]


@pytest.mark.parametrize("sample", range(5))
def test_variable_tracking_has_one_chain_behind_a_solved_example(sample: int, words: Building) -> None:
    made, question, text = one("vt", words, sample=sample)
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    nothing, example, task = text.split(head)
    assert nothing == ""
    value = re.search(r"assigned the value (\d+) in", asked(words, question))[1]  # type: ignore[index]
    assert traced(task, value) == question.expected and len(question.expected) == 5
    assert len(re.findall("VAR [A-Z]{5} =", task)) == 5 and 10_000 <= int(value) < 99_999
    assert [p["variable"] for p in question.facts["needles"]] == question.expected
    for place in question.facts["needles"]:
        assert f"VAR {place['variable']} =" in span(words, made, place["needle"])

    of_example = re.search(r"assigned the value (\d+) in", example)[1]  # type: ignore[index]
    names = traced(example.split("\nQuestion")[0], of_example)
    assert of_example != value and example.endswith(f"they are:  {' '.join(names)}\n\n\n\n")
    assert len(words.text.encode(head + example)) <= 500
    assert RULER.score(question, " ".join(question.expected)) == 1
    assert RULER.score(question, " ".join(question.expected[:2])) == 0.4


def test_variable_tracking_uses_upstreams_words(words: Building) -> None:
    theirs = constants("vt_utils")["CONFIG"]["variable_tracking"]
    _, question, text = one("vt", words)
    value = re.search(r"assigned the value (\d+) in", asked(words, question))[1]  # type: ignore[index]
    context = text.split("text.\n\n")[2]
    whole = theirs["template"].format(context=context, query=value)
    assert text[text.rindex("Memorize") :] + asked(words, question) == whole
    prefix = theirs["answer_prefix"].format(num_v=5, query=value)
    assert words.text.decode(question.opening) == prefix.strip()


@pytest.mark.parametrize(("ctx", "often", "rarely"), [(2048, 6, 1), (4096, 30, 3), (20_000, 30, 3), (60_000, 30, 3)])
def test_common_words_are_ten_that_come_more_often(ctx: int, often: int, rarely: int, words: Building) -> None:
    made, question, text = one("cwe", words, ctx=ctx)
    head = "Below is a numbered list of words."
    example, task = text.split(head)[1:]
    listed = re.findall(r"(\d+)\. ([a-z-]+)", task)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counted = Counter(word for _, word in listed)
    assert [number for _, number in counted.most_common(10)] == [often] * 10
    assert sorted(word for word, _ in counted.most_common(10)) == sorted(question.expected)
    assert set(counted.values()) == {often, rarely}
    # A common word within another word would be found in an answer that names the other one.
    assert not any(common in word for common in question.expected for word in counted if word != common)
    assert question.facts == {"words": len(listed), "different": len(counted), "repeats": [often, rarely]}
    assert made.max_tokens < 120 + 60  # less than three entries are left over

    shown, answer = example.split("Answer: The top 10 words that appear most often in the list are:")
    of_example = Counter(word for _, word in re.findall(r"(\d+)\. ([a-z-]+)", shown))
    assert set(of_example.values()) == ({3, 1} if ctx < 4096 else {10, 3})
    best = [word for word, _ in of_example.most_common(10)]
    assert sorted(best) == sorted(word for _, word in re.findall(r"(\d+)\. ([a-z-]+)", answer))
    assert RULER.score(question, ", ".join(question.expected)) == 1
    assert RULER.score(question, ", ".join(question.expected[:7])) == pytest.approx(0.7)


def test_common_words_use_upstreams_words() -> None:
    with_ = building()
    theirs = constants("cwe_utils")["CONFIG"]
    _, question, text = one("cwe", with_)
    context = text[text.rindex("1. ", 0, text.rindex(" 2. ") + 1) :]
    whole = theirs["template"].format(context=context)
    assert text[text.rindex("Below is") :] + asked(with_, question) == whole
    assert with_.text.decode(question.opening) == theirs["answer_prefix"].strip()


@pytest.mark.parametrize("ctx", [1024, 4096, 50_000])
def test_frequent_words_follow_the_zeta_distribution(ctx: int, words: Building) -> None:
    made, question, text = one("fwe", words, ctx=ctx)
    counted = Counter(text.split("coded words. ")[1].split())
    dots = counted.pop("...")
    best = counted.most_common()
    assert [word for word, _ in best[:3]] == question.expected
    assert best[2][1] > best[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word in counted)
    # Rank k of n words comes int(n / (k^2 * zeta(2))) times, with zeta(2) = 1.6449; the dots are the first rank.
    times = [number for _, number in best]
    n = times[0] * 4 * 1.6449
    for rank, number in enumerate(times[:5], 2):
        assert abs(number - n / (rank * rank * 1.6449)) <= 1 + times[0] / 20
    assert dots >= 3 * times[0] and made.max_tokens == 50
    assert RULER.score(question, "1. " + " 2. ".join(question.expected)) == 1


def test_frequent_words_use_upstreams_words(words: Building) -> None:
    theirs = constants("fwe_utils")["CONFIG"]
    _, question, text = one("fwe", words)
    context = text.split("coded words. ")[1]
    assert text + asked(words, question) == theirs["template"].format(context=context)
    assert words.text.decode(question.opening) == theirs["answer_prefix"].strip()
