"""The runner: statuses, room for answers, resuming; a run killed again and again ends like one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dsv4_evals.errors import ModelError, TaskError, TooLongError
from dsv4_evals.haystack import Haystack
from dsv4_evals.model import Prompt, Settings
from dsv4_evals.plan import plan
from dsv4_evals.record import Line, Record, read_run
from dsv4_evals.results import results
from dsv4_evals.run import Drawing, Unwatched, run
from dsv4_evals.task import Building, Cell, Question, Sample
from dsv4_evals.tasks.needle import Needle
from dsv4_evals.tasks.needle_batch import NeedleBatch
from support.fake_model import FakeContext, FakeModel, WatchedContext, look_up

TEXT = Haystack.from_texts([f"Sentence {i} is here. It has words. And some more.\n" * 40 for i in range(30)])


def carry_out(
    folder: Path, model: FakeModel, cells: Sequence[Cell], task: Any = None, drawing: Drawing | None = None
) -> list[Line]:
    with Record.open(folder, {"task": "test"}, model.ctx, len(cells), model.about()) as record:
        run(task or Needle(), cells, model, TEXT.filler(model), drawing or Drawing(), record)
        return record.lines


def timeless(lines: Sequence[Line]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(line.cell, line.question): {**asdict(line), "seconds": None} for line in lines}


CELLS = Needle().cells([1024, 2048], 2, 0, {"depths": [0, 50]})


def test_a_perfect_reader_scores_everything(tmp_path: Path) -> None:
    model = FakeModel()
    lines = carry_out(tmp_path, model, CELLS)
    assert [line.score for line in lines] == [1.0] * 16
    assert {line.status for line in lines} == {"ok"}
    assert len(model.reads) == 8  # one a sample, for two questions
    for line in lines:
        assert line.prompt_tokens + 128 <= line.ctx
        assert (line.max_tokens, line.questions, line.kv_bytes) == (128, 2, 100)
        assert line.seconds["context"] == (0.25 if line.question == 0 else 0.0)
        assert line.cost == {
            "kv_bytes": line.prompt_tokens, "kv_bytes_v32": 10.0 * line.prompt_tokens, "flops": line.prompt_tokens,
            "flops_v32": 4.0 * line.prompt_tokens, "flops_raw": 1.0, "flops_raw_v32": 4.0,
        }  # fmt: skip
    assert len({line.prompt for line in lines}) == 16
    present = [line for line in lines if not line.negative]
    assert all(line.diagnostics and line.diagnostics["mod_4"] == (4 + line.facts["needle"][0]) % 4 for line in present)
    assert all(line.diagnostics is None for line in lines if line.negative)


def test_no_prompt_is_recorded(tmp_path: Path) -> None:
    carry_out(tmp_path, FakeModel(), Needle().cells([64 * 1024], 1, 0, {}))
    assert (tmp_path / "samples.jsonl").stat().st_size < 20_000


def test_one_cell_alone_in_another_order_or_again_is_the_same(tmp_path: Path) -> None:
    whole = timeless(carry_out(tmp_path / "all", FakeModel(), CELLS))
    shuffled = timeless(carry_out(tmp_path / "shuffled", FakeModel(), random.Random(1).sample(CELLS, len(CELLS))))
    alone = timeless(carry_out(tmp_path / "alone", FakeModel(), CELLS[5:6]))
    assert shuffled == whole
    assert alone == {key: value for key, value in whole.items() if key[0] == CELLS[5].id}


def test_settled_cells_are_neither_built_nor_read_again(tmp_path: Path) -> None:
    first = carry_out(tmp_path, FakeModel(), CELLS[:3])
    model = FakeModel()
    lines = carry_out(tmp_path, model, CELLS)
    assert len(model.reads) == len(CELLS) - 3
    assert lines[: len(first)] == first


class Unbuildable(Needle):
    def build(self, cell: Cell, building: Building) -> Sample:
        raise AssertionError("built again")


def test_a_finished_run_builds_nothing(tmp_path: Path) -> None:
    lines = carry_out(tmp_path, FakeModel(), CELLS)
    assert carry_out(tmp_path, FakeModel(), CELLS, Unbuildable()) == lines


def test_within_a_batch_only_what_is_left_is_asked(tmp_path: Path) -> None:
    cells = NeedleBatch().cells([4096], 1, 0, {"needles": 10})

    def dies_at_six(text: str, question: str) -> str:
        if len(model.calls) > 6:
            raise KeyboardInterrupt
        return look_up(text, question)

    model = FakeModel(dies_at_six)
    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path, model, cells, NeedleBatch())
    again = FakeModel()
    lines = carry_out(tmp_path, again, cells, NeedleBatch())
    assert (len(again.calls), len(again.reads), len(lines)) == (4, 1, 10)
    assert timeless(lines) == timeless(carry_out(tmp_path / "whole", FakeModel(), cells, NeedleBatch()))


def test_errors_are_recorded_and_tried_again(tmp_path: Path) -> None:
    def flaky(text: str, question: str) -> str:
        if len(model.calls) % 3 == 0:
            raise ModelError("the line was cut")
        return look_up(text, question)

    model = FakeModel(flaky)
    lines = carry_out(tmp_path, model, CELLS)
    failed = [line for line in lines if line.status == "error"]
    assert len(failed) == 5
    assert all(line.score is None and line.message == "the line was cut" for line in failed)
    lines = carry_out(tmp_path, FakeModel(), CELLS)
    assert {line.status for line in lines} == {"ok"}
    assert timeless(lines) == timeless(carry_out(tmp_path / "whole", FakeModel(), CELLS))


def test_a_fatal_error_stops_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    def refused(text: str, question: str) -> str:
        if len(model.calls) > 5:
            raise ModelError("connection refused", "Is the server running?", fatal=True)
        return look_up(text, question)

    model = FakeModel(refused)
    with pytest.raises(ModelError, match="refused"):
        carry_out(tmp_path, model, CELLS)
    assert len(model.calls) == 6
    assert len(read_run(tmp_path)[1]) == 5


class Fixed:
    """A task whose sample has a size of its own, as records of a file do."""

    name, max_tokens = "fixed", 20

    def cells(self, lengths: Any, samples: int, seed: int, options: Any) -> list[Cell]:
        return [Cell("fixed", 4096, 0, {"sample": 0})]

    def build(self, cell: Cell, building: Building) -> Sample:
        return Sample(cell, Prompt([65] * 500), (Question([66] * 30, "yes", [67] * 5),), 20)

    def score(self, question: Question, answer: str) -> float:
        return 0.25 if answer == "yes" else 0.0


@pytest.mark.parametrize(("ctx", "status"), [(562, "ok"), (561, "too_long"), (100, "too_long")])
def test_what_does_not_fit_the_model_is_a_status_and_nothing_is_cut(tmp_path: Path, ctx: int, status: str) -> None:
    model = FakeModel(lambda text, question: "yes", ctx=ctx)  # 7 + 500 + 30 + 5 + 20 = 562
    (line,) = carry_out(tmp_path, model, Fixed().cells((), 1, 0, {}), Fixed())
    assert line.status == status
    assert (line.score, len(model.calls)) == ((0.25, 1) if status == "ok" else (None, 0))
    if status == "too_long":
        assert "562" in line.message


def test_a_model_that_finds_a_prompt_too_long_itself(tmp_path: Path) -> None:
    def refuses(text: str, question: str) -> str:
        raise TooLongError("600 tokens are more than 512")

    (line,) = carry_out(tmp_path, FakeModel(refuses), Fixed().cells((), 1, 0, {}), Fixed())
    assert (line.status, line.score, line.message) == ("too_long", None, "600 tokens are more than 512")


@pytest.mark.parametrize(("text", "finish"), [("", "stop"), (" \n", "stop"), ("", "length_thinking")])
def test_no_answer_scores_nothing_and_is_counted_apart(tmp_path: Path, text: str, finish: str) -> None:
    model = FakeModel(lambda *_: text, finish=finish)
    (line,) = carry_out(tmp_path, model, Fixed().cells((), 1, 0, {}), Fixed())
    assert (line.status, line.score, line.finish) == ("no_answer", 0.0, finish)


def test_thinking_gets_room_on_top_and_no_opening(tmp_path: Path) -> None:
    model = FakeModel(lambda *_: "yes")
    drawing = Drawing(thinking="high", thinking_tokens=1000)
    (line,) = carry_out(tmp_path, model, Fixed().cells((), 1, 0, {}), Fixed(), drawing)
    ((_, settings),) = model.calls
    assert (settings.thinking, settings.max_tokens, line.max_tokens) == ("high", 1020, 1020)
    assert line.prompt_tokens == 7 + 500 + 30

    tight = FakeModel(lambda *_: "yes", ctx=600)
    carry_out(tmp_path / "tight", tight, Fixed().cells((), 1, 0, {}), Fixed(), drawing)
    assert tight.calls[0][1].max_tokens == 600 - 537


def test_a_limit_of_ones_own_is_kept(tmp_path: Path) -> None:
    model = FakeModel(lambda *_: "yes", ctx=545)
    (line,) = carry_out(tmp_path, model, Fixed().cells((), 1, 0, {}), Fixed(), Drawing(max_tokens=3))
    assert (line.status, line.max_tokens) == ("ok", 3)


def test_each_question_draws_with_its_own_fixed_seed(tmp_path: Path) -> None:
    def seeds(folder: Path) -> list[int]:
        model = FakeModel()
        carry_out(folder, model, CELLS, drawing=Drawing(temperature=1.0, top_p=0.9))
        assert {(s.temperature, s.top_p) for _, s in model.calls} == {(1.0, 0.9)}
        return [settings.seed for _, settings in model.calls]

    drawn = seeds(tmp_path / "a")
    assert len(set(drawn)) == 16
    assert seeds(tmp_path / "b") == drawn


def test_samples_are_the_same_with_and_without_thinking(tmp_path: Path) -> None:
    plain = carry_out(tmp_path / "a", FakeModel(), CELLS)
    thought = carry_out(tmp_path / "b", FakeModel(), CELLS, drawing=Drawing(thinking="high", thinking_tokens=500))
    assert [line.prompt for line in plain] == [line.prompt for line in thought]


def test_a_cell_that_cannot_fit_its_length_stops_at_once(tmp_path: Path) -> None:
    model = FakeModel()
    with pytest.raises(TaskError, match="does not fit"):
        carry_out(tmp_path, model, Needle().cells([200, 2048], 1, 0, {}))
    assert not model.calls


@dataclass
class WatchedModel(FakeModel):
    def read(self, prompt: Prompt, settings: Settings, progress: Any = None) -> FakeContext:
        read = super().read(prompt, settings, progress)
        return WatchedContext(self, read.text, read.tokens, chosen=frozenset(range(60)))


def test_what_indexers_chose_is_recorded_by_layer(tmp_path: Path) -> None:
    cells = Needle().cells([2048], 1, 0, {"depths": [0, 100]})
    lines = [line for line in carry_out(tmp_path, WatchedModel(), cells) if not line.negative]
    layers = [line.diagnostics["layers"] for line in lines if line.diagnostics]
    assert [(layer["layer"], layer["value_found"]) for (layer,) in layers] == [(2, True), (2, False)]
    near = [line.diagnostics and line.diagnostics["in_window"] for line in lines]
    assert near == [False, True]


class Told(Unwatched):
    def __init__(self) -> None:
        self.events: list[str] = []

    def begins(self, cell: Cell) -> None:
        self.events.append(f"begins {cell.params['depth']}")

    def reads(self, done: int, total: int) -> None:
        self.events.append("reads")

    def answered(self, line: Line) -> None:
        self.events.append(f"answered {line.question}")

    def ends(self, cell: Cell) -> None:
        self.events.append(f"ends {cell.params['depth']}")


def test_whoever_watches_is_told_everything(tmp_path: Path) -> None:
    cells = Needle().cells([1024], 1, 0, {"depths": [0, 50]})
    carry_out(tmp_path, FakeModel(), cells[:1])
    told, model = Told(), FakeModel()
    with Record.open(tmp_path, {"task": "test"}, model.ctx, 2, {}) as record:
        run(Needle(), cells, model, TEXT.filler(model), Drawing(), record, told)
    assert told.events == ["ends 0", "begins 50", "reads", "answered 0", "answered 1", "ends 50"]


def test_a_plan_counts_and_extrapolates(tmp_path: Path) -> None:
    cells = NeedleBatch().cells([1024, 4096], 3, 0, {"needles": 5})
    model = replace_cost(FakeModel())
    small, large = plan(NeedleBatch(), cells, model, TEXT.filler(model), Drawing())
    assert (small.ctx, small.samples, small.questions) == (1024, 3, 15)
    assert (large.ctx, large.samples, large.questions) == (4096, 3, 15)
    assert 3 * 3000 < large.tokens < 3 * 4096
    answers = 15 * 0.03
    # The reading that was timed took 0.25 s for the first length's tokens; the cost grows with the square of them.
    ratio = (large.tokens / small.tokens) ** 2
    assert small.seconds - answers == pytest.approx(0.75, rel=0.02)
    assert large.seconds - answers == pytest.approx(0.75 * ratio, rel=0.02)
    assert large.kv_bytes_v32 == 10 * large.tokens / 3
    assert not list(tmp_path.iterdir())


def replace_cost(model: FakeModel) -> FakeModel:
    class Squared(FakeModel):
        def cost(self, prompt_tokens: int, completion_tokens: int) -> Any:
            return replace(super().cost(prompt_tokens, completion_tokens), flops_raw=float(prompt_tokens) ** 2)  # type: ignore[type-var]

    return Squared(model.answer)


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from support.fake_model import FakeModel, look_up
from evals.test_run import CELLS, carry_out

def slowly(text, question):
    time.sleep(0.004)
    return look_up(text, question)

carry_out(Path(sys.argv[1]), FakeModel(slowly), CELLS)
"""


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    paths = [str(Path(__file__).parents[1]), *(path for path in sys.path if path)]
    script.write_text(KILLED.format(path=paths), "utf-8")
    folder, rng = tmp_path / "out", random.Random(3)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.PIPE)
        # From the first line on record; before that only imports would be killed.
        size = size_of(folder / "samples.jsonl")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if size_of(folder / "samples.jsonl") > size:
                time.sleep(rng.random() * 0.012)
                break
            time.sleep(0.001)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    assert kills >= 3
    assert timeless(read_run(folder)[1]) == timeless(carry_out(tmp_path / "whole", FakeModel(), CELLS))
    rows = (folder / "samples.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == len({(json.loads(row)["cell"], json.loads(row)["question"]) for row in rows}) == 16
    found = results(*read_run(folder))
    assert found["score"]["mean"] == 1.0
