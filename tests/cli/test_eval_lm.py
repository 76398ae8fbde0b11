"""`dsv4 eval lm-eval`, `longbench` and `longbench2` as commands, with a small random model and local files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.longbench_records import v1_record, v2_record, v2_records, write_v1

from .conftest import environment

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the eval extra)")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task; lm-eval's own 14,000 are left out, because listing them takes seconds."""
    from dsv4_evals import lm_eval_run

    real = lm_eval_run.TaskManager
    monkeypatch.setattr(lm_eval_run, "TaskManager", lambda **named: real(**{**named, "include_defaults": False}))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"q": "1+1", "a": "2"}\n{"q": "2+2", "a": "4"}\n')
    definition = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "What is {{q}}?",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "sums.yaml").write_text(json.dumps(definition))
    return folder


def test_a_task_of_ones_own(cli: Any, tasks: Path, model: Path, tmp_path: Path) -> None:
    command = ("eval", "lm-eval", "sums", "--include", tasks, "--model", model, "--no-chat", "--out", tmp_path / "out")
    first = cli(*command, "--json")
    assert first.code == 0, first.err
    assert first.json["tasks"]["sums"]["metrics"]["exact_match,none"] == 0.0
    assert first.json["out"] == str(tmp_path / "out") and first.json["finished"]
    assert first.json["tasks"]["sums"]["chat"] is False
    requests = (tmp_path / "out" / "requests.jsonl").read_bytes()
    again = cli(*command)
    assert again.code == 0 and "going on with" in again.err
    assert "sums" in again.out and "exact_match" in again.out and "FLOPs of V3.2" in again.out
    assert (tmp_path / "out" / "requests.jsonl").read_bytes() == requests
    other = cli(*command, "--temperature", "0.5")
    assert other.code == 2 and "another run: settings.temperature" in other.err


def test_the_folder_follows_from_the_run(cli: Any, tasks: Path, model: Path, tmp_path: Path) -> None:
    command = ("eval", "lm-eval", "sums", "--include", tasks, "--model", model, "--json")
    first, second, other = cli(*command), cli(*command), cli(*command, "--limit", "1")
    assert first.json["out"] == second.json["out"] != other.json["out"]
    assert Path(first.json["out"]).parent == Path("dsv4-eval")
    assert other.json["questions"]["done"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summs"], "Close to it: sums"),
        (["sums", "--think", "high", "--no-chat"], "thinking needs the chat template"),
        (["sums", "--limit", "0"], "--limit"),
        (["sums", "--metadata", "[1]"], "JSON object"),
        (["sums", "--ctx", "1M"], "1,048,576"),
        (["sums", "--include", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, cli: Any, tasks: Path, model: Path, tmp_path: Path) -> None:
    include = [] if "--include" in arguments else ["--include", tasks]
    result = cli("eval", "lm-eval", *arguments, *include, "--model", model, "--out", tmp_path / "out")
    assert result.code == 2 and message in result.err.replace("\n", " "), result.err
    assert not (tmp_path / "out").exists()


def test_without_lm_eval(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4cli.eval_lm_run.find_spec", lambda name: None)
    for name in ("lm-eval", "longbench"):
        result = cli("eval", name, "qasper")
        assert result.code == 2 and "pip install 'dsv4[eval]'" in result.err


def test_longbench(cli: Any, model: Path, tmp_path: Path) -> None:
    data = write_v1(tmp_path / "data")
    command = ("eval", "longbench", "qasper", "lcc", "--data", data, "--model", model, "--out", tmp_path / "out")
    result = cli(*command, "--json")
    assert result.code == 0, result.err
    assert set(result.json["tasks"]) == {"longbench_qasper", "longbench_lcc"}
    assert set(result.json["categories"]) == {"single-document QA", "code completion", "all"}
    shown = cli(*command)
    assert shown.code == 0 and "code completion" in shown.out and "qa_f1_score" in shown.out
    (data / "lcc.jsonl").write_text(json.dumps({**v1_record("lcc", 0), "answers": ["other"]}) + "\n")
    changed = cli(*command)
    assert changed.code == 2 and "another run: options.data.lcc" in changed.err


def test_longbench_without_its_data(cli: Any, model: Path, tmp_path: Path) -> None:
    hub = cli("eval", "longbench", "qasper", "--model", model)
    assert hub.code == 2 and "--data" in hub.err
    empty = cli("eval", "longbench", "--data", tmp_path, "--model", model)
    assert empty.code == 2 and "narrativeqa.jsonl" in empty.err
    unknown = cli("eval", "longbench", "poetry", "--model", model)
    assert unknown.code == 2 and "narrativeqa" in unknown.err
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "qasper.jsonl").write_text('{"input": "x"}\n')
    schema = cli("eval", "longbench", "qasper", "--data", wrong, "--model", model)
    assert schema.code == 2 and "qasper.jsonl, line 1" in schema.err


def test_longbench2(cli: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(v2_records()))
    command = ("eval", "longbench2", "--data", file, "--model", model, "--max-tokens", "8", "--out", tmp_path / "out")
    result = cli(*command, "--json")
    assert result.code == 0, result.err
    assert result.json["questions"]["done"] == 4 and result.json["breakdown"]["overall"]["count"] == 4
    assert result.json["run"]["haystack"] is None and "data" in result.json["run"]["options"]
    shown = cli(*command)
    assert "Single-Document QA" in shown.out and "95% interval" in shown.out
    file.write_text(json.dumps(v2_records()[:3]))
    assert cli(*command).code == 2
    some = cli(*command[:-2], "--difficulty", "hard", "--limit", "1", "--json")
    assert some.code == 0 and some.json["questions"]["done"] == 1
    plan = cli(*command, "--dry-run")
    assert plan.code == 0 and "planned" in plan.out


def test_longbench2_with_wrong_data(cli: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([v2_record(), v2_record(answer="F")], indent=0))
    result = cli("eval", "longbench2", "--data", file, "--model", model)
    assert result.code == 2 and "data.json, line 16: 'answer' is 'F'" in result.err
    missing = cli("eval", "longbench2", "--data", tmp_path / "none.json", "--model", model)
    assert missing.code == 2
    file.write_text(json.dumps([v2_record()]))
    wrong = cli("eval", "longbench2", "--data", file, "--model", model, "--length", "huge")
    assert wrong.code == 2 and "'huge' is no length" in wrong.err


def test_log_probabilities_are_the_engines(model: Path) -> None:
    import torch
    from lm_eval.api.instance import Instance

    from dsv4_evals.lm_eval_model import LmDrawing, ProtocolLM
    from dsv4cli.evaluation import Where, open_model

    opened: Any = open_model(Where(str(model)))
    lm = ProtocolLM(opened, LmDrawing(), chat=False)
    text, continuation = "The mill at the bay " * 4, "ground barley."

    def expected(before: str, scored: str) -> tuple[float, bool]:
        ids = opened.encode(scored)
        fed = [opened.engine.tokenizer.bos_id, *opened.encode(before), *ids[:-1]]
        logits = opened.engine.session().extend(fed, logits="all")[-len(ids) :]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        return float(chosen.double().sum()), bool((logits.argmax(-1) == torch.tensor(ids)).all())

    requests = [Instance("loglikelihood", {}, (text, end), i, ("t", 0, 1)) for i, end in enumerate([continuation, "g"])]
    for found, end in zip(lm.loglikelihood(requests), [continuation, "g"], strict=True):
        logprob, greedy = expected(text.rstrip(), " " + end)
        assert found == (pytest.approx(logprob, abs=1e-3), greedy)
    rolling = Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))
    assert lm.loglikelihood_rolling([rolling]) == [pytest.approx(expected("", text)[0], abs=1e-3)]


@pytest.mark.slow
def test_a_task_that_lm_eval_makes_itself(tmp_path: Path) -> None:
    """RULER's variable tracking, sized with the bundled model's tokenizer: no data is needed, nor a network."""
    command = [sys.executable, "-m", "dsv4cli", "eval", "lm-eval", "ruler_vt", "--limit", "1", "--json"]
    options = ["--metadata", '{"max_seq_lengths": [1024]}', "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["tasks"]["ruler_vt"]["metrics"]) == {"1024,none", "1024_stderr,none"}
    assert "%|" not in done.stderr and "WARNING" not in done.stderr  # nothing of lm-eval's own
