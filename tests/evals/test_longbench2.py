"""LongBench v2: the official prompt, rule and breakdown on crafted cases, and its data file's schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsv4_evals.errors import DataError, TaskError
from dsv4_evals.haystack import Haystack
from dsv4_evals.longbench2 import LongBench2, answer_of, breakdown, read_items
from dsv4_evals.model import Prompt, Settings
from dsv4_evals.record import Line, Record
from dsv4_evals.run import Drawing, run
from support.longbench_records import v2_record, v2_records
from support.scripted_model import ScriptedModel

OVERHEAD = 2  # the scripted model's template


def write(folder: Path, records: Sequence[Any], lines: bool = False) -> Path:
    file = folder / "data.json"
    file.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records, indent=2))
    return file


def task_of(file: Path, model: ScriptedModel | None = None) -> LongBench2:
    model = model or ScriptedModel()
    return LongBench2(list(read_items(file)), model, lambda prompt: model.overhead(prompt, Settings(1)))


def evaluate(task: LongBench2, model: ScriptedModel, out: Path, **options: Any) -> list[Line]:
    cells = task.cells((), 0, 0, options)
    with Record.open(out, {"task": task.name}, model.ctx, len(cells), {}) as record:
        run(task, cells, model, Haystack.from_texts(["unused text"]).filler(model), Drawing(), record)
        return record.lines


# -- the prompt


def test_the_prompt_is_the_official_one(tmp_path: Path) -> None:
    record = v2_record(
        context="  The text.\n", question=" Who? ", choice_A="a", choice_B=" b", choice_C="c ", choice_D="d"
    )
    model = ScriptedModel()
    evaluate(task_of(write(tmp_path, [record]), model), model, tmp_path / "out")
    assert model.prompts == [
        "[user]Please read the following text and answer the question below.\n"
        "\n"
        "<text>\n"
        "The text.\n"
        "</text>\n"
        "\n"
        "What is the correct answer to this question: Who?\n"
        "Choices:\n"
        "(A) a\n"
        "(B) b\n"
        "(C) c\n"
        "(D) d\n"
        "\n"
        'Format your response as follows: "The correct answer is (insert answer here)".[answer]'
    ]


def test_placeholders_in_a_record_are_filled_as_by_the_official_script(tmp_path: Path) -> None:
    (item,) = read_items(
        write(tmp_path, [v2_record(context="Let $Q$ and $C_B$ be $DOC$", question="see $C_A$", choice_A="$Q$")])
    )
    document, question = item.prompt()
    assert "Let see $Q$ and Mara Veld be $DOC$\n" in document
    assert "question: see $Q$\nChoices:\n(A) $Q$\n" in question


# -- the rule


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("The correct answer is B", "B"),
        ("  \nThe correct answer is (C).", "C"),
        ("**The correct answer is (D)**", "D"),
        ("The correct answer is **A**", "A"),
        ("The correct answer is (A), not (B). The correct answer is (C)", "A"),
        ("The correct answer is A. Or rather: The correct answer is (D)", "D"),  # with parentheses first
        ("The correct answer is Absolutely (B)", "A"),  # as the rule has it
        ("The correct answer is (insert answer here)", None),
        ("The correct answer is (E)", None),
        ("the correct answer is (B)", None),
        ("The correct answer is: B", None),
        ("The correct answer is b", None),
        ("The correct  answer is B", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_reading_an_answer(response: str, letter: str | None) -> None:
    assert answer_of(response) == letter


# -- a run and its breakdown


def knowing(prompt: str, settings: Settings) -> str:
    """Right on the mill's builder, wrong on the wheel, names no letter for the code, too lazy for the last."""
    if "Who built" in prompt:
        return "The correct answer is (B)."
    if "lose its wheel" in prompt:
        return "The correct answer is (C)"
    return "It returns a product." if "area return" in prompt else " "


def test_a_run_and_its_breakdown(tmp_path: Path) -> None:
    model = ScriptedModel(knowing)
    lines = evaluate(task_of(write(tmp_path, v2_records()), model), model, tmp_path / "out")
    assert {line.facts["id"]: (line.score, line.status) for line in lines} == {
        "66f0": (1.0, "ok"),
        "66f1": (0.0, "ok"),
        "66f2": (0.0, "ok"),
        "66f3": (0.0, "no_answer"),
    }
    found = breakdown(lines)
    assert found["overall"]["mean"] == 0.25 and found["overall"]["count"] == 4
    assert found["overall"]["low"] < 0.25 < found["overall"]["high"]
    assert found["unread"] == 2 and found["compensated"] == (1 + 2 * 0.25) / 4
    assert {name: row["mean"] for name, row in found["difficulty"].items()} == {"easy": 0.5, "hard": 0.0}
    assert {name: row["mean"] for name, row in found["length"].items()} == {"short": 0.5, "medium": 0.0, "long": 0.0}
    assert {name: (row["mean"], row["count"]) for name, row in found["domain"].items()} == {
        "Code Repository Understanding": (0.0, 1),
        "Single-Document QA": (pytest.approx(1 / 3), 3),
    }
    assert set(found["sub_domain"]) == {
        "Code Repository Understanding / Code repo QA",
        "Single-Document QA / Literary",
        "Single-Document QA / Detective",
    }


def test_nothing_answered_has_no_mean() -> None:
    found = breakdown([])
    assert found["overall"]["mean"] is None and found["compensated"] is None
    assert found["difficulty"]["easy"]["count"] == 0 and found["domain"] == {}


def test_what_does_not_fit_is_in_no_mean(tmp_path: Path) -> None:
    long = v2_record(_id="long", context="x" * 5000, length="long")
    model = ScriptedModel(knowing, ctx=2000)
    lines = evaluate(task_of(write(tmp_path, [long, v2_record()]), model), model, tmp_path / "out")
    assert [line.status for line in lines] == ["ok", "too_long"]
    assert breakdown(lines)["overall"]["count"] == 1 and breakdown(lines)["length"]["long"]["count"] == 0


def test_cells_are_as_long_as_their_questions(tmp_path: Path) -> None:
    records = [v2_record(_id=str(size), context="x" * size) for size in (9000, 100, 3000)]
    task = task_of(write(tmp_path, records))
    cells = task.cells((), 0, 0, {})
    assert [cell.ctx for cell in cells] == [1024, 4096, 16384]
    assert [cell.params["sample"] for cell in cells] == [1, 2, 0]
    document, question = task.items[1].prompt()
    exact = len(document) + len(question) + OVERHEAD + task.max_tokens
    assert cells[0].ctx // 2 < exact <= cells[0].ctx
    assert [cell.id for cell in task.cells((), 2, 0, {})] == [cell.id for cell in cells[:2]]
    assert len({cell.id for cell in cells}) == 3


def test_counting_tokens_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    task = task_of(write(tmp_path, v2_records()))
    task.cells((), 3, 0, {}, lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4)]


def test_longer_questions_can_be_left_out(tmp_path: Path) -> None:
    records = [v2_record(_id=str(size), context="x" * size) for size in (9000, 100, 3000)]
    task = task_of(write(tmp_path, records))
    document, question = task.items[2].prompt()
    exact = len(document) + len(question) + OVERHEAD + task.max_tokens
    assert [cell.params["sample"] for cell in task.cells((exact,), 0, 0, {})] == [1, 2]
    assert [cell.params["sample"] for cell in task.cells((exact - 1,), 0, 0, {})] == [1]
    assert [cell.params["sample"] for cell in task.cells((exact,), 1, 0, {})] == [1]
    with pytest.raises(TaskError, match="no record fits 100 tokens"):
        task.cells((100,), 0, 0, {})


def test_equal_documents_stand_together(tmp_path: Path) -> None:
    one, two = "x" * 500, "y" * 500
    records = [v2_record(_id=str(i), context=text, question="Who?") for i, text in enumerate([one, two, one, two])]
    task = task_of(write(tmp_path, records))
    assert [cell.params["sample"] for cell in task.cells((), 0, 0, {})] == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({"difficulty": ["hard"]}, {"66f1", "66f2"}),
        ({"difficulty": ["hard"], "length": ["short"]}, {"66f2"}),
        ({"domain": ["Single-Document QA"], "length": []}, {"66f0", "66f1", "66f3"}),
        ({"data": "digest"}, {"66f0", "66f1", "66f2", "66f3"}),
    ],
)
def test_conditions(options: Any, ids: set[str], tmp_path: Path) -> None:
    task = task_of(write(tmp_path, v2_records()))
    assert {task.items[cell.params["sample"]].id for cell in task.cells((), 0, 0, options)} == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": ["medium"]}, "'medium' is no difficulty"),
        ({"length": ["short", "huge"]}, "'huge' is no length"),
        ({"domain": ["Poetry"]}, "no record"),
        ({"depth": [1]}, "no option 'depth'"),
    ],
)
def test_wrong_conditions(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        task_of(write(tmp_path, v2_records())).cells((), 0, 0, options)


# -- the data file


def test_a_list_and_lines_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    listed = task_of(write(tmp_path, v2_records()))
    lines = task_of(write(tmp_path / "lines", v2_records(), lines=True))
    assert listed.items == lines.items and listed.digest == lines.digest
    other = task_of(write(tmp_path, [*v2_records()[:3], v2_record(_id="66f3")]))
    assert other.digest != listed.digest


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in v2_record(_id="bad").items() if name != key}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "a str, not an object"),
        (without("choice_D"), "'choice_D' is missing, not text"),
        (without("context"), "'context' is missing"),
        (v2_record(_id=7), "'_id' is 7, not text"),
        (v2_record(_id="bad", answer="E"), "'answer' is 'E', not one of A, B, C, D"),
        (v2_record(_id="bad", difficulty="medium"), "'difficulty' is 'medium'"),
        (v2_record(_id="bad", length="huge"), "'length' is 'huge'"),
        (v2_record(), "_id '66f0' was on line"),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_a_wrong_record_is_named_by_its_line(record: Any, message: str, lines: bool, tmp_path: Path) -> None:
    file = write(tmp_path, [v2_record(), record], lines)
    line = 2 if lines else json.dumps([v2_record()], indent=2).count("\n") + 1
    with pytest.raises(DataError, match=rf"data\.json, line {line}: {message}") as caught:
        list(read_items(file))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no records"),
        ("[]", "has no records"),
        ("[\n{},\n", "line 2: '_id' is missing"),
        ("[\n1 2]", "line 2: a int"),
        ('{"_id": ', "line 1: not JSON"),
        ("[\n\n{,}]", "line 3: not JSON"),
    ],
)
def test_damaged_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_items(file))


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    file = write(tmp_path, v2_records())
    text = file.read_text()
    file.write_text(text[: text.rindex("}") + 1])
    with pytest.raises(DataError, match="no end"):
        list(read_items(file))
    file.write_text(text.replace("},", "}", 1))
    with pytest.raises(DataError, match=r"line 16: a comma is missing"):
        list(read_items(file))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no") as caught:
        list(read_items(tmp_path / "none.json"))
    assert "--data" in caught.value.hint
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_items(tmp_path / "binary.json"))


def test_documents_are_read_apart_from_their_questions(tmp_path: Path) -> None:
    model = ScriptedModel()
    evaluate(task_of(write(tmp_path, [v2_record()]), model), model, tmp_path / "out")
    assert model.reads == [Prompt(tuple(model.encode(next(iter(read_items(tmp_path / "data.json"))).prompt()[0])))]
