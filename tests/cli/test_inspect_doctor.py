"""`dsv4 inspect` and `dsv4 doctor`: the numbers of the published models, tables for people, JSON for programs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4cli import machine
from dsv4cli.anatomy import spans

from .conftest import Cli


def test_inspect_shows_layers_parts_and_memory(cli: Cli, model: Path) -> None:
    done = cli("inspect", model)
    assert done.code == 0
    assert done.err == ""
    for words in (str(model), "window", "csa", "hca", "experts", "MTP block", "working set", "up to 4,096 tokens"):
        assert words in done.out


def test_inspect_json_agrees_with_the_files(cli: Cli, model: Path) -> None:
    found = cli("inspect", model, "--json", "--ctx", "1K").json
    assert [(layer["kind"], layer["indices"]) for layer in found["layers"]] == [
        ("window", [0]), ("csa", [1, 3]), ("hca", [2]),
    ]  # fmt: skip
    tensors = found["disk"]["total"]
    size = (model / "model.safetensors").stat().st_size
    assert size - 100_000 < tensors < size
    assert sum(found["disk"]["by_part"].values()) == tensors
    assert sum(part["total"] for part in found["parameters"]["by_part"].values()) == found["parameters"]["total"]
    assert found["parameters"]["active"] < found["parameters"]["total"]
    layers = sum(layer["kv_bytes_per_token"] for layer in found["layers"])
    assert layers == pytest.approx(found["kv"]["bytes_per_token"])
    assert (found["memory"]["fits"], found["memory"]["ctx"]) == (True, 1024)


@pytest.mark.parametrize(
    ("name", "kinds", "active", "bytes_per_token"),
    [("v4-flash", {"window": 2, "csa": 21, "hca": 20}, 13.3e9, 3514), ("v4-pro", None, 48.9e9, 5031)],
)
def test_published_models_that_are_not_downloaded(
    cli: Cli,
    name: str,
    kinds: dict[str, int] | None,
    active: float,
    bytes_per_token: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = cli("inspect", name, "--json").json
    if kinds:
        assert {layer["kind"]: layer["count"] for layer in found["layers"]} == kinds
    assert found["parameters"]["active"] == pytest.approx(active, rel=0.005)
    assert found["kv"]["bytes_per_token"] == pytest.approx(bytes_per_token, abs=1)
    assert (found["path"], found["disk"], found["memory"]) == (None, None, None)
    assert "not downloaded" in cli("inspect", name).out


def test_spans() -> None:
    assert spans([]) == ""
    assert spans([4]) == "4"
    assert spans([0, 1, 2, 5]) == "0-2, 5"
    assert spans([0, 1, 3, 5, 7]) == "0-1, 3-7 every 2"
    assert spans([2, 4, 6, 7]) == "2-6 every 2, 7"


def test_doctor_computes_with_the_bundled_model(cli: Cli) -> None:
    done = cli("doctor")
    assert done.code == 0, done.err
    for words in ("python", "torch", "backend", "cpu", "self-check"):
        assert words in done.out
    found = cli("doctor", "--json").json
    assert found["ok"] is True
    assert found["packages"]["torch"]
    assert found["backends"]["cpu"] == "torch"
    assert found["self_check"]["finite"] is True


def test_doctor_says_what_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_version", lambda name: None if name in ("tokenizers", "triton") else "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    card = SimpleNamespace(name="A card", total_memory=2**34, major=9, minor=0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    done = cli("doctor", "--json")
    assert done.code == 1
    assert "error: the package tokenizers is not installed" in done.err
    # This build of torch has no CUDA, or the card is not real: it is said why nothing computes on it.
    assert [item["what"] for item in done.json["missing"]] == ["triton", "cuda:0"]
    assert done.json["backends"]["cuda:0"] is None
    assert done.json["ok"] is False
    assert done.json["gpus"][0]["name"] == "A card"
    assert "cuda:0" in cli("doctor").out
