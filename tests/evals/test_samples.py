"""What holds for the samples of every native task: exact sizes, no dependence on anything but the cell, true facts."""

from __future__ import annotations

from typing import Any

import pytest

from dsv4_evals.errors import TaskError
from dsv4_evals.model import Prompt
from dsv4_evals.task import Building, Sample
from dsv4_evals.tasks import TASKS, task_named
from support.sample_building import Bytes, Words, building, built, span, tokens

NAMES = sorted(name for name in TASKS if not name.startswith("needle"))
# What a haystack of whole lines may leave to the answer: less than a line of the widest kind, in bytes.
WIDEST_LINE = 160


@pytest.fixture(scope="module")
def words() -> Building:
    return building()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ctx", [4096, 4099, 10_007])
def test_prompt_and_answer_have_exactly_the_tokens_of_the_cell(name: str, ctx: int, words: Building) -> None:
    task = task_named(name)
    for sample in built(task, ctx, words):
        assert tokens(sample) == ctx
        assert sample.max_tokens < task.max_tokens + WIDEST_LINE


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_of_bytes_gives_exact_sizes_too(name: str) -> None:
    task = task_named(name)
    for sample in built(task, 12_345, building(Bytes())):
        assert tokens(sample) == 12_345


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_its_cell_alone(name: str) -> None:
    task, text = task_named(name), Words()
    cells = task.cells([4096, 5000], 3, 7, {})
    forward = {cell.id: task.build(cell, building(text)) for cell in cells}
    shared = building(text)
    assert {cell.id: task.build(cell, shared) for cell in reversed(cells)} == forward
    # A run with fewer samples and other lengths has the same ones.
    for cell in task.cells([5000, 6000], 2, 7, {}):
        assert cell.ctx == 6000 or task.build(cell, shared) == forward[cell.id]
    assert len({cell.id for cell in cells}) == len(cells)


@pytest.mark.parametrize("name", NAMES)
def test_samples_and_seeds_differ(name: str, words: Building) -> None:
    task = task_named(name)

    def contents(samples: list[Sample]) -> list[tuple[Any, ...]]:
        return [(s.prompt, tuple(tuple(q.ids) for q in s.questions)) for s in samples]

    first = contents(built(task, 4096, words))
    for other in (built(task, 4096, words, sample=1), built(task, 4096, words, seed=1)):
        assert all(mine != theirs for mine, theirs in zip(first, contents(other), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_spans_of_what_is_asked_for_hold_it(name: str, words: Building) -> None:
    for sample in built(task_named(name), 4096, words):
        for question in sample.questions:
            if "value" not in question.facts:
                continue
            answer = question.expected if isinstance(question.expected, str) else question.expected[0]
            value = span(words, sample, question.facts["value"])
            assert answer in value and len(value) <= len(answer) + 4
            needle = span(words, sample, question.facts["needle"])
            assert value in needle
            assert sum(answer in words.text.decode(turn.ids) for turn in sample.prompt.turns) == 0
            others = sample.prompt.ids[: question.facts["needle"][0]], sample.prompt.ids[question.facts["needle"][1] :]
            assert not any(answer in words.text.decode(ids) for ids in others)


@pytest.mark.parametrize("name", NAMES)
def test_a_length_without_room_is_an_error_that_names_the_cell(name: str, words: Building) -> None:
    task = task_named(name)
    (cell, *_) = task.cells([100], 1, 0, {})
    with pytest.raises(TaskError, match="does not fit") as raised:
        task.build(cell, words)
    assert cell.id in str(raised.value) and raised.value.hint


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("lengths", "samples", "options"),
    [([4096], 1, {"colour": 3}), ([4096], 0, {}), ([], 1, {}), ([0], 1, {}), ([4096.5], 1, {}), ([4096], True, {})],
)
def test_wrong_lengths_samples_and_options_are_errors(name: str, lengths: Any, samples: Any, options: Any) -> None:
    with pytest.raises(TaskError):
        task_named(name).cells(lengths, samples, 0, options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ruler", {"tasks": ["niah_single_9"]}),
        ("ruler", {"tasks": "vt"}),
        ("ruler", {"tasks": []}),
        ("ruler", {"tasks": ["vt", "vt"]}),
        ("graphwalks", {"operations": ["dfs"]}),
        ("graphwalks", {"bfs_depth": 0}),
        ("kv", {"depths": [-1]}),
        ("kv", {"depths": [100.5]}),
        ("passkey", {"depths": []}),
        ("passkey", {"depths": [50, 50]}),
        ("passkey", {"digits": 2}),
        ("variable-tracking", {"chains": "4"}),
        ("variable-tracking", {"hops": 0}),
        ("mrcr-style", {"needles": 1}),
        ("mrcr-style", {"needles": True}),
        ("corpus-agg", {"reports": 9}),
    ],
)
def test_options_out_of_range_are_errors_with_a_next_step(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(TaskError) as raised:
        task_named(name).cells([4096], 1, 0, options)
    assert raised.value.hint


def test_cells_come_shortest_first_and_samples_are_a_beginning_of_more_samples() -> None:
    cells = task_named("passkey").cells([8192, 4096, 4096], 2, 0, {"depths": [100, 0]})
    assert [(c.ctx, c.params["sample"], c.params["depth"]) for c in cells] == [
        (ctx, sample, depth) for ctx in (4096, 8192) for sample in (0, 1) for depth in (0, 100)
    ]


class _Repeated:
    """A filler of one letter."""

    def take(self, tokens: int, rng: Any) -> list[int]:
        return [97] * tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_million_tokens_are_exact_too(name: str) -> None:
    """A token a byte, so that what takes time here is the building and not a tokenizer."""
    text = Bytes()
    with_ = Building(text, _Repeated(), lambda cell: cell.ctx - 9, lambda prompt: 9 + 3 * len(prompt.turns))
    if name == "mrcr-style":  # needs passages that differ
        with_ = building(text)
    for sample in built(task_named(name), 1 << 20, with_):
        assert tokens(sample) == 1 << 20
        assert isinstance(sample.prompt, Prompt)
