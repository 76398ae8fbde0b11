"""Whole runs of local lm-eval tasks, and their records, without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the eval extra)")

from dsv4_evals import lm_eval_run
from dsv4_evals.errors import DataError, EvalError, RunError, TaskError
from dsv4_evals.lm_eval_model import LmDrawing
from dsv4_evals.lm_eval_run import Plan
from dsv4_evals.model import Settings
from support.lm_eval_case import DOCUMENT
from support.scripted_model import ScriptedModel

pytestmark = pytest.mark.usefixtures("no_network")


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **config: Any) -> None:
    """A task of lm-eval over a file of ours."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **config,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(definition))


SUMS = [{"question": f"What is {a}+{b}?", "answer": str(a + b)} for a, b in [(1, 2), (2, 3), (5, 4), (8, 1)]]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(
        folder,
        "sums",
        SUMS,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 5},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    write_task(
        folder,
        "colours",
        [{"question": DOCUMENT + "The sky is", "choices": ["blue", "green"], "label": 0} for _ in range(2)],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    (folder / "both.yaml").write_text(
        json.dumps({"group": "both", "task": ["sums", "colours"], "aggregate_metric_list": [{"metric": "acc"}]})
    )
    return folder


def adding(prompt: str, settings: Settings) -> str:
    """Adds rightly, but for sums with an 8."""
    text = prompt.rpartition("[user]")[2].removesuffix("[answer]")
    a, b = text.removeprefix("What is ").removesuffix("?").split("+")
    return f"{int(a) + int(b) + (a == '8')}\nand so on"


def run(
    folder: Path, out: Path, model: ScriptedModel, *names: str, drawing: LmDrawing | None = None, **plan: Any
) -> Any:
    made = Plan(names or ("sums",), include=(folder,), defaults=False, **plan)
    return lm_eval_run.run(made, lm_eval_run.load(made), model, drawing or LmDrawing(), out)


def test_a_run_and_its_record(sums: Path, tmp_path: Path) -> None:
    model = ScriptedModel(adding)
    found = run(sums, tmp_path / "out", model)
    task = found["tasks"]["sums"]
    assert task["metrics"]["exact_match,none"] == 0.75
    assert task["score"]["mean"] == 0.75 and task["score"]["count"] == 4
    assert 0 < task["score"]["low"] < 0.75 < task["score"]["high"] < 1
    assert task["questions"] == {"done": 4, "ok": 4, "no_answer": 0, "too_long": 0, "error": 0}
    assert task["kv_bytes_v32"] == 10 * task["kv_bytes"] > 0
    assert found["finished"] and found["questions"]["done"] == 4
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(line["expected"], line["answer"], line["score"]) for line in lines] == [
        ("3", "3", 1.0), ("5", "5", 1.0), ("9", "9", 1.0), ("9", "10", 0.0),
    ]  # fmt: skip
    assert all("What is" not in json.dumps(line) for line in lines)  # a recipe, not the prompt
    assert lines[0]["prompt_tokens"] == len("What is 1+2?") + 2 and lines[0]["max_tokens"] == 5
    assert model.prompts[0].startswith("[user]What is ")


def test_a_run_goes_on_and_gives_the_same(sums: Path, tmp_path: Path) -> None:
    calls = []

    def dying(prompt: str, settings: Settings) -> str:
        calls.append(prompt)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return adding(prompt, settings)

    with pytest.raises(KeyboardInterrupt):
        run(sums, tmp_path / "out", ScriptedModel(dying))
    again = ScriptedModel(adding)
    found = run(sums, tmp_path / "out", again)
    assert len(again.prompts) == 2
    whole = run(sums, tmp_path / "whole", ScriptedModel(adding))
    assert found["tasks"] == whole["tasks"]
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    assert run(sums, tmp_path / "out", ScriptedModel())["tasks"] == whole["tasks"]
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before


def test_another_run_is_refused(sums: Path, tmp_path: Path) -> None:
    run(sums, tmp_path / "out", ScriptedModel(adding))
    with pytest.raises(RunError, match="temperature"):
        run(sums, tmp_path / "out", ScriptedModel(adding), drawing=LmDrawing(temperature=0.5))
    with pytest.raises(RunError, match="chat"):
        run(sums, tmp_path / "out", ScriptedModel(adding), chat=False)


def test_choices_in_a_run(sums: Path, tmp_path: Path) -> None:
    likely = {"blue": (-1.0, True), "green": (-2.0, False), " blue": (-1.0, True), " green": (-2.0, False)}
    for chatting in (True, False):
        model = ScriptedModel(likely=lambda prompt, text: likely[text])
        found = run(sums, tmp_path / f"out-{chatting}", model, "colours", chat=chatting)
        assert found["tasks"]["colours"]["metrics"]["acc,none"] == 1.0
        assert found["tasks"]["colours"]["score"]["mean"] == 1.0
        # Two equal documents with two choices each: read once.
        assert len(model.reads) == 1 and len(model.prompts) == 4
        assert found["tasks"]["colours"]["chat"] is chatting
        lines = (tmp_path / f"out-{chatting}" / "samples.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["facts"]["logprobs"] == [-1.0, -2.0]


def test_groups(sums: Path, tmp_path: Path) -> None:
    found = run(sums, tmp_path / "out", ScriptedModel(adding), "both")
    assert set(found["tasks"]) == {"sums", "colours"}
    assert found["groups"]["both"]["acc,none"] == 1.0


def test_few_shot_examples_and_limits(sums: Path, tmp_path: Path) -> None:
    model = ScriptedModel(adding)
    found = run(sums, tmp_path / "out", model, num_fewshot=2, limit=3)
    assert found["tasks"]["sums"]["num_fewshot"] == 2 and found["questions"]["done"] == 3
    assert all(prompt.count("[assistant]") == 2 for prompt in model.prompts)
    same = ScriptedModel(adding)
    run(sums, tmp_path / "same", same, num_fewshot=2, limit=3)
    assert same.prompts == model.prompts
    other = ScriptedModel(adding)
    run(sums, tmp_path / "other", other, num_fewshot=2, limit=3, seed=7)
    assert other.prompts != model.prompts


def test_what_did_not_fit_is_counted_apart(sums: Path, tmp_path: Path) -> None:
    found = run(sums, tmp_path / "out", ScriptedModel(adding), ctx=len("What is 1+2?") + 2 + 5 - 1)
    task = found["tasks"]["sums"]
    assert task["questions"]["too_long"] == 4 and task["metrics"]["exact_match,none"] == 0.0
    assert task["score"] == {"mean": None, "low": None, "high": None, "count": 0, "method": None}


def test_unknown_names_say_what_is_close(sums: Path) -> None:
    with pytest.raises(TaskError, match="no task 'sum'") as caught:
        lm_eval_run.load(Plan(("sum",), include=(sums,), defaults=False))
    assert "sums" in caught.value.hint


def test_patterns(sums: Path) -> None:
    loaded = lm_eval_run.load(Plan(("s*", "sums", "colo*"), include=(sums,), defaults=False))
    assert [one.name for one in loaded] == ["sums", "colours"]
    assert lm_eval_run.documents(loaded, None) == 6 and lm_eval_run.documents(loaded, 3) == 5


def test_a_task_by_two_names_counts_once(sums: Path, tmp_path: Path) -> None:
    found = run(sums, tmp_path / "out", ScriptedModel(adding), "sums", "both")
    assert found["finished"] and found["questions"]["done"] == 6


@pytest.mark.parametrize(("text", "message"), [("", "no documents|cannot be read"), ("{broken\n", "cannot be read")])
def test_data_that_cannot_be_used(sums: Path, text: str, message: str) -> None:
    (sums / "sums.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        lm_eval_run.load(Plan(("sums",), include=(sums,), defaults=False))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"dataset_path": "nobody/nothing-of-this-name", "dataset_kwargs": None}, DataError, "hub"),
        ({"unsafe_code": True}, TaskError, "runs code"),
        ({"doc_to_image": "{{question}}"}, TaskError, "images"),
    ],
)
def test_tasks_that_cannot_be_run(sums: Path, config: Any, error: type[Exception], message: str) -> None:
    definition = json.loads((sums / "sums.yaml").read_text())
    (sums / "sums.yaml").write_text(json.dumps({**definition, **config}))
    with pytest.raises(error, match=message):
        lm_eval_run.load(Plan(("sums",), include=(sums,), defaults=False))


def test_a_task_that_needs_a_missing_package(sums: Path) -> None:
    (sums / "needy.py").write_text("import no_such_package_of_anybody\n\ndef f(doc):\n    return doc\n")
    (sums / "needy.yaml").write_text(
        (sums / "sums.yaml").read_text().replace('"sums"', '"needy"').replace("{", '{"process_docs": 0, ', 1)
    )
    text = (sums / "needy.yaml").read_text().replace('"process_docs": 0', '"process_docs": !function needy.f')
    (sums / "needy.yaml").write_text(text)
    with pytest.raises(TaskError, match="no_such_package_of_anybody"):
        lm_eval_run.load(Plan(("needy",), include=(sums,), defaults=False))


def test_thinking_needs_the_template(sums: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="template"):
        run(sums, tmp_path / "out", ScriptedModel(), chat=False, drawing=LmDrawing(thinking="high"))


def test_figures_are_json() -> None:
    numpy = pytest.importorskip("numpy")
    row = {
        "alias": "x",
        "4096,none": -1,
        "4096_stderr,none": "N/A",
        "8192,none": numpy.float64(0.5),
        "p,none": math.nan,
    }
    assert lm_eval_run._metrics(row) == {"8192,none": 0.5, "p,none": None}


@pytest.fixture(scope="module", autouse=True)
def _no_bars() -> Iterator[None]:
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    yield
    enable_progress_bar()
