"""Official MRCR files: read in their schema, dealt to bins of length, asked as they are.  Records are the tests'."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_evals.errors import DataError, TaskError
from dsv4_evals.model import Prompt
from dsv4_evals.tasks.mrcr import Mrcr
from support.sample_building import TEMPLATE, TURN, Bytes, building


def overhead(prompt: Prompt) -> int:
    return TEMPLATE + TURN * len(prompt.turns)


def record(number: int, characters: int, needles: int = 2, **other: Any) -> dict[str, Any]:
    """A conversation of about so many characters, in which the second poem about tapirs is asked for."""
    reply = f"Poem {number}, the second: tapirs in the rain."
    messages = [
        {"role": "user", "content": "write a poem about tapirs"},
        {"role": "assistant", "content": f"Poem {number}, the first: tapirs in the sun."},
        {"role": "user", "content": "write a blog post about rocks"},
        {"role": "assistant", "content": "Rocks. " * (characters // 7)},
        {"role": "user", "content": "write a poem about tapirs"},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "Prepend aYooSG8CQg to the 2nd (1 indexed) poem about tapirs."},
    ]
    prompt = json.dumps(messages)
    return {
        "prompt": prompt,
        "answer": "aYooSG8CQg" + reply,
        "random_string_to_prepend": "aYooSG8CQg",
        "n_needles": needles,
        "desired_msg_index": 4,
        "total_messages": 7,
        "n_chars": len(prompt),
        **other,
    }


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def opened(data: Path) -> Mrcr:
    return Mrcr(data, Bytes(), overhead)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Six records of 2 needles between 4K and 8K tokens, three of 4 between 8K and 16K, one of 2 below 4K."""
    records = [record(i, 5000 + i) for i in range(6)] + [record(6 + i, 12_000, needles=4) for i in range(3)]
    return written(tmp_path / "mrcr.jsonl", [*records, record(9, 1000)])


def test_records_are_dealt_to_bins_by_needles(file: Path) -> None:
    task = opened(file)
    cells = task.cells([8192], 4, 0, {"needles": [2]}) + task.cells([16_384], 10, 0, {"needles": [4]})
    assert [(cell.ctx, cell.params["needles"], cell.params["sample"]) for cell in cells] == [
        *((8192, 2, i) for i in range(4)),
        *((16_384, 4, i) for i in range(3)),  # no more than there are
    ]
    made = [task.build(cell, building(Bytes())) for cell in cells]
    facts = [sample.questions[0].facts for sample in made]
    assert len({fact["record"] for fact in facts}) == 7 and facts[0]["depth"] == round(400 / 7, 2)
    for sample in made:
        content = sum(len(turn.ids) for turn in sample.prompt.turns) + len(sample.questions[0].ids)
        assert sample.cell.ctx / 2 < content + overhead(sample.prompt) + sample.max_tokens <= sample.cell.ctx


def test_tokens_are_counted_once_and_only_as_far_as_needed(file: Path) -> None:
    task, seen = opened(file), []
    task.cells([8192], 1, 0, {"needles": [2]}, lambda done, total: seen.append((done, total)))
    assert 1 <= len(seen) < 7 and seen == [(i, 10) for i in range(1, len(seen) + 1)]
    task.cells([8192], 9, 0, {"needles": [2]}, lambda done, total: seen.append((done, total)))
    # All seven with two needles, none of them twice; those with four were not looked at.
    assert seen == [(i, 10) for i in range(1, 8)]


def test_the_conversation_is_asked_as_it_is_and_scored_officially(file: Path) -> None:
    task, with_ = opened(file), building(Bytes())
    sample = task.build(task.cells([8192], 1, 0, {"needles": [2]})[0], with_)
    (question,) = sample.questions
    number = int(question.facts["record"].split(":")[1]) - 1
    messages = json.loads(record(number, 5000 + number)["prompt"])
    said = [{"role": turn.role, "content": with_.text.decode(turn.ids)} for turn in sample.prompt.turns]
    assert [*said, {"role": "user", "content": with_.text.decode(question.ids)}] == messages
    assert sample.prompt.ids == () and question.opening == ()
    answer = question.expected["answer"]
    assert sample.max_tokens == 2 * len(answer)
    assert task.score(question, answer) == 1
    assert task.score(question, answer.removeprefix("aYooSG8CQg")) == 0
    assert 0.5 < task.score(question, answer.replace("second", "first")) < 1


def test_a_cell_is_the_same_record_in_any_run_of_the_seed(file: Path) -> None:
    first = opened(file)
    cells = first.cells([8192], 5, 3, {"needles": [2]})
    made = {cell.id: first.build(cell, building(Bytes())) for cell in cells}
    again = opened(file)  # whose cells nobody has asked for
    assert {cell.id: again.build(cell, building(Bytes())) for cell in reversed(cells)} == made
    orders = {
        tuple(first.build(cell, building(Bytes())).questions[0].facts["record"] for cell in cells_)
        for seed in range(6)
        for cells_ in [first.cells([8192], 5, seed, {"needles": [2]})]
    }
    assert len(orders) > 1


def test_parquet_and_a_folder_give_the_same_records(file: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow (pip install 'dsv4[eval]')")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    folder = tmp_path / "folder" / "2needle"
    folder.mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(records), folder / "mrcr.parquet", row_group_size=4)
    with_ = building(Bytes())
    lines, columns = opened(file), opened(tmp_path / "folder")
    cells = lines.cells([8192], 6, 0, {"needles": [2]})
    assert columns.cells([8192], 6, 0, {"needles": [2]}) == cells
    for cell in cells:
        mine, theirs = lines.build(cell, with_), columns.build(cell, with_)
        assert mine.prompt == theirs.prompt and mine.questions[0].expected == theirs.questions[0].expected


def test_lengths_and_needles_that_are_not_there_are_errors(file: Path) -> None:
    task = opened(file)
    for lengths, options, said in [
        ([5000], {}, "no bin"),
        ([8192], {"needles": [4]}, "no record with 4 needles"),
        ([16_384], {"needles": [2]}, "no record with 2 needles"),
        ([8192], {"needles": [8]}, "no record with 8 needles"),
        ([8192], {"shots": 2}, "does not take shots"),
        ([], {}, "needs lengths"),
    ]:
        with pytest.raises(TaskError, match=said):
            task.cells(lengths, 1, 0, options)
    (cell, *_) = task.cells([8192], 6, 0, {"needles": [2]})
    gone = opened(written(file.with_name("fewer.jsonl"), [record(0, 12_000)]))
    with pytest.raises(TaskError, match="data has no record"):
        gone.build(cell, building(Bytes()))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: no record"),
        ("{}", "line 2 has no prompt"),
        (record(0, 5000, prompt=["x"]), "line 2: prompt is .*, not a str"),
        (record(0, 5000, n_needles="2"), "line 2: n_needles is '2', not a int"),
        (record(0, 5000, n_needles=True), "line 2: n_needles is True"),
        (record(0, 5000, prompt="write a poem"), "line 2: the prompt is no JSON"),
        (record(0, 5000, prompt="[]"), "line 2: the prompt is no list of messages"),
        (record(0, 5000, prompt='[{"role": "user"}]'), "line 2: the prompt is no list of messages"),
        (record(0, 5000, prompt='[{"role": "tool", "content": "x"}]'), "line 2: the prompt is no list of messages"),
        (record(0, 5000, prompt='[{"role": "assistant", "content": "x"}]'), "line 2: the last message is not"),
    ],
)
def test_a_record_in_another_schema_is_named(line: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    broken = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(record(0, 5000)) + "\n" + broken + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=said) as raised:
        opened(path)
    assert str(path) in str(raised.value) and "openai/mrcr" in raised.value.hint


def test_files_that_are_missing_or_empty_are_errors(tmp_path: Path) -> None:
    for data in (tmp_path / "no.jsonl", tmp_path, written(tmp_path / "empty.jsonl", [])):
        with pytest.raises(DataError):
            opened(data)


def test_parquet_without_its_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(DataError, match="needs the package pyarrow"):
        opened(tmp_path)


def test_parquet_that_is_none_or_lacks_a_column_is_an_error(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow (pip install 'dsv4[eval]')")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="cannot be read"):
        opened(path)
    parquet.write_table(arrow.Table.from_pylist([{"prompt": "[]", "answer": "x"}]), path)
    with pytest.raises(DataError, match="has no column random_string_to_prepend"):
        opened(path)
