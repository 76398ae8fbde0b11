"""needle and needle-batch: where things lie, exact sizes, one answer each, and what counts as right."""

from __future__ import annotations

import random

import pytest

from dsv4_evals.errors import TaskError
from dsv4_evals.haystack import Haystack
from dsv4_evals.run import Drawing, building_of
from dsv4_evals.task import Building, Cell, Question, Sample, Task
from dsv4_evals.tasks import TASKS, task_named
from dsv4_evals.tasks.needle import Needle, says_absent
from dsv4_evals.tasks.needle_batch import NeedleBatch
from support.fake_model import TEMPLATE, FakeModel, look_up

BYTES = FakeModel()


@pytest.fixture(scope="module")
def building() -> Building:
    return building_of(BYTES, Haystack.bundled().filler(BYTES), Drawing())


def size(sample: Sample) -> int:
    longest = max(len(q.ids) + len(q.opening) for q in sample.questions)
    return TEMPLATE + len(sample.prompt.ids) + longest + sample.max_tokens


def test_cells_are_all_lengths_depths_and_samples_shortest_first() -> None:
    cells = Needle().cells([8192, 4096], 2, 7, {"depths": [100, 0, 12.5]})
    assert [cell.ctx for cell in cells] == [4096] * 6 + [8192] * 6
    assert {(cell.params["depth"], cell.params["sample"]) for cell in cells} == {
        (d, s) for d in (0, 12.5, 100) for s in (0, 1)
    }
    assert len({cell.id for cell in cells}) == 12
    assert all(cell.seed == 7 for cell in cells)


@pytest.mark.parametrize("depth", [0, 3, 50, 100])
@pytest.mark.parametrize("ctx", [1024, 4096])
def test_a_sample_fills_its_length_and_hides_the_needle_at_its_depth(building: Building, ctx: int, depth: int) -> None:
    sample = Needle().build(Cell("needle", ctx, 0, {"depth": depth, "sample": 0}), building)
    assert size(sample) == ctx
    there, absent = sample.questions
    (start, end), (first, last) = there.facts["needle"], there.facts["value"]
    text = BYTES.decode(sample.prompt.ids)
    needle = f"One of the special magic numbers for {there.facts['key']} is: {there.expected}."
    assert BYTES.decode(sample.prompt.ids[start:end]).strip() == needle
    assert BYTES.decode(sample.prompt.ids[first:last]) == there.expected
    assert text.count(there.expected) == text.count(there.facts["key"]) == 1
    assert absent.facts["key"] not in text
    assert start / len(sample.prompt.ids) == pytest.approx(depth / 100, abs=0.05 if ctx == 4096 else 0.2)
    assert look_up(text, BYTES.decode(there.ids)).endswith(f"{there.expected}.")


def test_a_cell_is_the_same_whatever_was_built_before(building: Building) -> None:
    cell = Cell("needle", 2048, 3, {"depth": 50, "sample": 1})
    alone = Needle().build(cell, building_of(BYTES, Haystack.bundled().filler(BYTES), Drawing()))
    for other in Needle().cells([1024, 4096], 2, 3, {}):
        Needle().build(other, building)
    assert Needle().build(cell, building) == alone


def test_depths_share_their_haystack_and_samples_do_not(building: Building) -> None:
    def beginning(depth: int, sample: int) -> list[int]:
        built = Needle().build(Cell("needle", 4096, 0, {"depth": depth, "sample": sample}), building)
        return list(built.prompt.ids[:1500])

    assert beginning(50, 0) == beginning(100, 0)
    assert beginning(50, 0) != beginning(50, 1)


def test_a_batch_hides_each_needle_once_and_asks_for_all(building: Building) -> None:
    (cell,) = NeedleBatch().cells([16_384], 1, 0, {"needles": 40})
    sample = NeedleBatch().build(cell, building)
    text = BYTES.decode(sample.prompt.ids)
    assert size(sample) == 16_384
    assert len({q.facts["key"] for q in sample.questions}) == len({q.expected for q in sample.questions}) == 40
    starts = [q.facts["needle"][0] for q in sample.questions]
    assert starts == sorted(starts)
    for question in sample.questions:
        assert text.count(question.expected) == 1
        assert BYTES.decode(sample.prompt.ids[slice(*question.facts["value"])]) == question.expected
        assert question.facts["needle"][0] / len(sample.prompt.ids) == pytest.approx(
            question.facts["depth"] / 100, abs=0.03
        )
        assert BYTES.decode(question.opening).endswith(f"{question.facts['key']} mentioned in the provided text is")


@pytest.mark.parametrize("name", ["needle", "needle-batch"])
def test_a_length_that_is_too_short_says_how_much_it_takes(building: Building, name: str) -> None:
    task = task_named(name)
    (cell, *_) = task.cells([256], 1, 0, {})
    with pytest.raises(TaskError, match="does not fit") as caught:
        task.build(cell, building)
    assert "Give at least" in caught.value.hint


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Needle(), {"depths": [101]}),
        (Needle(), {"depths": [-1]}),
        (Needle(), {"depths": []}),
        (Needle(), {"depths": [50, 50]}),
        (Needle(), {"depths": ["5"]}),
        (Needle(), {"needles": 3}),
        (NeedleBatch(), {"needles": 0}),
        (NeedleBatch(), {"needles": 2.5}),
        (NeedleBatch(), {"depths": [1]}),
    ],
)
def test_options_out_of_range_are_refused(task: Task, options: dict[str, object]) -> None:
    with pytest.raises(TaskError) as caught:
        task.cells([4096], 1, 0, options)
    assert caught.value.hint


def test_an_unknown_task_is_refused_and_all_known_ones_are_there() -> None:
    with pytest.raises(TaskError, match="'neddle'") as caught:
        task_named("neddle")
    assert "needle-batch" in caught.value.hint
    assert all(task_named(name).name == name for name in TASKS)


def asked(value: str) -> Question:
    return Question([], value, facts={"key": "calm-river"})


@pytest.mark.parametrize(
    ("answer", "score"),
    [("It is 1234567.", 1.0), ("1234567", 1.0), ("It is 1234568.", 0.0), ("1 234 567", 0.0), ("not there", 0.0)],
)
def test_a_needle_is_right_when_its_number_is_in_the_answer(answer: str, score: float) -> None:
    assert Needle().score(asked("1234567"), answer) == score


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The text does not mention the special magic number for wild-fox.", True),
        ("There is no such number.", True),
        ("It isn’t mentioned.", True),
        ("UNANSWERABLE", True),
        ("wild-fox is not mentioned. The text gives 1234567 for calm-river only.", True),
        ("The special magic number for wild-fox is 1234567.", False),
        ("The special magic number for wild-fox is not stated, but I would say 1234567.", False),
        ("It is not easy to find. The number is 1,234,567.", False),
        ("The number is blue.", False),
        ("I know.", False),
    ],
)
def test_saying_that_something_is_not_there(answer: str, right: bool) -> None:
    question = Question([], {"absent": "wild-fox", "present": "calm-river"}, facts={"negative": True})
    assert says_absent(answer, "calm-river") is right
    assert Needle().score(question, answer) == float(right)


def test_million_token_samples_hold_what_is_asked(building: Building) -> None:
    (cell,) = NeedleBatch().cells([1 << 20], 1, 0, {"needles": 1000})
    sample = NeedleBatch().build(cell, building)
    assert size(sample) == 1 << 20
    for question in random.Random(0).sample(sample.questions, 20):
        assert BYTES.decode(sample.prompt.ids[slice(*question.facts["value"])]) == question.expected
