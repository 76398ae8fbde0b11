"""`dsv4 eval` over an endpoint: the bundled model behind HTTP scores as the same model at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4_evals.model import Model
from dsv4cli.evaluation import Where, open_model
from support.http_server import Request, Response, Running, Served, error, models, serving

TASK = ("eval", "needle", "--ctx", "384,512", "--depths", "50")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("DSV4_API_KEY", raising=False)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return open_model(Where("tiny"))


@pytest.fixture(scope="module")
def served(tiny: Model) -> Iterator[Running]:
    with serving(Served(tiny, key="sesame")) as server:
        yield server


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]


def test_the_same_outputs_score_the_same(cli: Any, served: Running, tmp_path: Path, monkeypatch: Any) -> None:
    here = cli(*TASK, "--out", tmp_path / "here", "--json")
    monkeypatch.setenv("DSV4_API_KEY", "sesame")
    there = cli(*TASK, "--out", tmp_path / "there", "--json", "--endpoint", served.url)
    assert (here.code, there.code) == (0, 0)
    for mine, theirs in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        assert mine["cell"] == theirs["cell"] and mine["prompt"] == theirs["prompt"]
        assert mine["answer"] == theirs["answer"] and mine["finish"] == theirs["finish"]
        assert mine["score"] == theirs["score"] and mine["status"] == theirs["status"] == "ok"
        assert mine["completion_tokens"] == theirs["completion_tokens"]
        # Needles are planted between tokens; the server reads the text, which can join two of them.
        assert abs(mine["prompt_tokens"] - theirs["prompt_tokens"]) <= 2
    for name in ("score", "negatives", "questions", "effective_length"):
        assert here.json[name] == there.json[name]
    assert (
        here.json["score"]["mean"] > 0
    )  # the bundled model finds needles at these lengths: there is something to score
    record = (tmp_path / "there" / "run.json").read_text()
    assert served.url in record and "sesame" not in record


def test_a_wrong_key_ends_the_run(cli: Any, served: Running, tmp_path: Path) -> None:
    result = cli(*TASK, "--out", tmp_path / "out", "--endpoint", served.url)
    assert result.code == 1
    assert "answers 401" in result.err and "DSV4_API_KEY" in result.err


def test_an_endpoint_that_fails_midway_keeps_what_was_answered(cli: Any, tiny: Model, tmp_path: Path) -> None:
    model = Served(tiny)
    asked = 0

    def dying(request: Request) -> Response:
        nonlocal asked
        asked += request.method == "POST"
        return error(403, "the key has expired") if asked > 1 else model(request)

    with serving(dying) as server:
        first = cli(*TASK, "--out", tmp_path / "out", "--endpoint", server.url)
        assert first.code == 1 and "the key has expired" in first.err
        assert len(lines(tmp_path / "out")) == 1
        asked = -100
        second = cli(*TASK, "--out", tmp_path / "out", "--endpoint", server.url, "--json")
        assert second.code == 0 and second.json["finished"]


def test_rubbish_is_an_error_of_its_sample(cli: Any, tmp_path: Path) -> None:
    def rubbish(request: Request) -> Response:
        return models({"id": "m", "max_model_len": 4096}) if request.method == "GET" else Response(b"<html>")

    with serving(rubbish) as server:
        result = cli(*TASK, "--out", tmp_path / "out", "--endpoint", server.url, "--json")
    assert result.code == 1
    assert result.json["questions"]["error"] == result.json["questions"]["done"] > 0
    assert result.json["score"]["mean"] is None
    assert "no JSON object" in lines(tmp_path / "out")[0]["message"]


def test_lengths_beyond_the_endpoints(cli: Any, tmp_path: Path) -> None:
    with serving(lambda request: models({"id": "m", "max_model_len": 500})) as server:
        result = cli(*TASK, "--out", tmp_path / "out", "--endpoint", server.url)
    assert result.code == 2 and "500" in result.err and not (tmp_path / "out").exists()


def test_fields_of_the_body(cli: Any, tiny: Model, tmp_path: Path) -> None:
    with serving(Served(tiny)) as server:
        body = '{"chat_template_kwargs": null, "top_k": 1}'
        result = cli(
            "eval",
            "needle",
            "--ctx",
            "384",
            "--depths",
            "50",
            "--out",
            tmp_path / "out",
            "--endpoint",
            server.url,
            "--endpoint-body",
            body,
        )
        assert result.code == 0
        assert all("chat_template_kwargs" not in sent and sent["top_k"] == 1 for sent in server.bodies)
    refused = cli("eval", "needle", "--endpoint-body", "[1]")
    assert refused.code == 2
