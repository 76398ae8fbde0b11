"""LongBench v1 through lm-eval over files in the official schema; records and answers are this project's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the eval extra)")

from dsv4_evals import lm_eval_run, longbench
from dsv4_evals.errors import DataError, EvalError, TaskError
from dsv4_evals.lm_eval_model import LmDrawing
from dsv4_evals.lm_eval_run import Plan
from dsv4_evals.model import Settings
from support.longbench_records import V1, v1_record, write_v1
from support.scripted_model import ScriptedModel

pytestmark = pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def run(prepared: longbench.Prepared, out: Path, model: ScriptedModel, drawing: LmDrawing | None = None) -> Any:
    plan = Plan(
        prepared.names,
        plain=prepared.plain,
        include=(prepared.folder,),
        defaults=False,
        task="longbench",
        about_data=prepared.digests,
    )
    return lm_eval_run.run(plan, lm_eval_run.load(plan), model, drawing or LmDrawing(), out)


def knowing(prompt: str, settings: Settings) -> str:
    """The first reference of the record that the prompt is tagged with."""
    (tag,) = re.findall(r"<(\S+) (\d)>", prompt)
    return V1[tag[0]][int(tag[1])][2][0]


def test_all_tasks_run_on_local_files(tmp_path: Path) -> None:
    data = write_v1(tmp_path / "data")
    for task in V1:
        rows = [v1_record(task, place) for place in range(len(V1[task]))]
        tagged = [{**row, "context": f"<{task} {place}>\n{row['context']}"} for place, row in enumerate(rows)]
        (data / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    (tmp_path / "work").mkdir()
    prepared = longbench.from_folder(longbench.chosen([]), data, tmp_path / "work")
    model = ScriptedModel(knowing)
    found = run(prepared, tmp_path / "out", model)
    assert set(found["tasks"]) == {f"longbench_{task}" for task in V1} and len(V1) == 21
    scores = {name: row["metrics"]["score,none"] for name, row in found["tasks"].items()}
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0), abs=1e-6)  # ROUGE's F1 is not quite 1 even then
    assert longbench.categories(found) == pytest.approx(dict.fromkeys([*longbench.CATEGORIES, "all"], 1.0), abs=1e-6)
    for name, row in found["tasks"].items():
        assert row["chat"] is (name.removeprefix("longbench_") not in longbench.PLAIN)
    assert found["questions"]["ok"] == sum(map(len, V1.values()))
    plain = [prompt for prompt in model.prompts if not prompt.startswith("[user]")]
    assert len(plain) == sum(len(V1[task]) for task in longbench.PLAIN)


@pytest.mark.parametrize(
    ("task", "answer", "score"),
    [
        ("hotpotqa", "the Joiner!", 1.0),  # articles, case and punctuation do not count
        ("hotpotqa", "a joiner and more", 0.5),  # F1 of one word of three ("a" is an article)
        ("trec", "Number of years", 1.0),  # the class within another one ("Number") does not halve it
        ("passage_count", "2 or 3", 0.5),
        ("passage_retrieval_en", "Paragraph 2 or paragraph 1", 0.5),
        ("lcc", "```\n    return 2 * (width + height)\n```", 1.0),
    ],
)
def test_scores_are_lm_evals(task: str, answer: str, score: float, tmp_path: Path) -> None:
    place = 1 if task == "trec" else 0
    record = json.dumps(v1_record(task, place))
    (tmp_path / f"{task}.jsonl").write_text(record + "\n")
    (tmp_path / "work").mkdir()
    prepared = longbench.from_folder([task], tmp_path, tmp_path / "work")
    found = run(prepared, tmp_path / "out", ScriptedModel(lambda prompt, settings: answer))
    assert found["tasks"][f"longbench_{task}"]["metrics"]["score,none"] == pytest.approx(score)


def test_thinking_is_for_the_tasks_with_a_template(tmp_path: Path) -> None:
    seen: dict[str, str] = {}

    def answer(prompt: str, settings: Settings) -> str:
        seen["chat" if prompt.startswith("[user]") else "plain"] = settings.thinking
        return "</think>1783" if settings.thinking != "none" else "1783"

    write_v1(tmp_path, ["multifieldqa_en", "lcc"])
    (tmp_path / "work").mkdir()
    prepared = longbench.from_folder(["multifieldqa_en", "lcc"], tmp_path, tmp_path / "work")
    found = run(prepared, tmp_path / "out", ScriptedModel(answer), LmDrawing(thinking="high", thinking_tokens=100))
    assert seen == {"chat": "high", "plain": "none"}
    assert found["tasks"]["longbench_multifieldqa_en"]["metrics"]["score,none"] == 1.0


def test_questions_on_one_document_read_it_once(tmp_path: Path) -> None:
    story = "The keeper wrote a diary. " * 100
    rows = [{**v1_record("narrativeqa", 0), "context": story, "input": f"What of {i}?"} for i in range(5)]
    (tmp_path / "narrativeqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "work").mkdir()
    model = ScriptedModel()
    run(longbench.from_folder(["narrativeqa"], tmp_path, tmp_path / "work"), tmp_path / "out", model)
    assert len(model.reads) == 1 and len(model.prompts) == 5
    assert len(model.reads[0].ids) > len(story)


def test_the_official_archive_has_a_folder_more(tmp_path: Path) -> None:
    write_v1(tmp_path / "LongBench" / "data", ["qasper"])
    (tmp_path / "work").mkdir()
    assert longbench.from_folder(["qasper"], tmp_path / "LongBench", tmp_path / "work").names == ("longbench_qasper",)


def test_other_data_is_another_run(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    one = longbench.from_folder(["qasper"], write_v1(tmp_path / "a", ["qasper"]), tmp_path / "work")
    (tmp_path / "a" / "qasper.jsonl").write_text(json.dumps(v1_record("qasper", 1)) + "\n")
    other = longbench.from_folder(["qasper"], tmp_path / "a", tmp_path / "work")
    assert one.digests != other.digests


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "a list, not an object"),
        (json.dumps({"context": "x", "answers": ["y"]}), "'input' is missing"),
        (json.dumps({**v1_record("trec", 0), "context": None}), "'context' is null, not text"),
        (json.dumps({**v1_record("trec", 0), "answers": "Place"}), "'answers' is \"Place\", not a list"),
        (json.dumps({**v1_record("trec", 0), "answers": []}), "'answers' is \\[\\]"),
        (json.dumps({**v1_record("trec", 0), "all_classes": None}), "'all_classes' is null"),
        ("\x00", "not JSON"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "trec.jsonl"
    file.write_text(json.dumps(v1_record("trec", 0)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"trec\.jsonl, line 2: {message}") as caught:
        longbench.from_folder(["trec"], tmp_path, tmp_path)
    assert caught.value.hint


def test_missing_and_empty_files(tmp_path: Path) -> None:
    write_v1(tmp_path, ["qasper"])
    with pytest.raises(DataError, match=r"has no trec\.jsonl") as caught:
        longbench.from_folder(["qasper", "trec"], tmp_path, tmp_path)
    assert "qasper" in caught.value.hint
    (tmp_path / "trec.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        longbench.from_folder(["trec"], tmp_path, tmp_path)


def test_unknown_tasks() -> None:
    with pytest.raises(TaskError, match="no task 'hotpot'") as caught:
        longbench.chosen(["qasper", "hotpot"])
    assert "hotpotqa" in caught.value.hint
    assert longbench.chosen(["lcc", "lcc"]) == ("lcc",)


def test_without_the_hub_the_message_names_the_way_out() -> None:
    prepared = longbench.from_hub(["qasper"])
    plan = Plan(prepared.names, plain=prepared.plain, include=(prepared.folder,), defaults=False)
    with pytest.raises(DataError, match="hub") as caught:
        lm_eval_run.load(plan)
    assert "--data" in caught.value.hint


def test_without_lm_eval_the_message_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvalError, match="lm-eval"):
        longbench.from_hub(["qasper"])
