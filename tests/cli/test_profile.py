"""`dsv4 profile`: the contract of its JSON, the published figures, tables for people, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4_engine.roofline import DEVICES

from .conftest import Cli, write_model

MILLION = 1_048_576


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_engine.ceilings._CPU_BYTES", 1 << 20)
    monkeypatch.setattr("dsv4_engine.ceilings._CPU_SIZE", 256)


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def published(cli: Cli, no_downloads: None) -> Any:
    done = cli("profile", "--ctx", "1M", "--json")
    assert (done.code, done.err) == (0, "")
    return done.json


def test_the_document_keeps_its_contract(published: Any) -> None:
    assert {"ctx", "baseline", "weighting", "models"} <= published.keys()
    assert (published["ctx"], published["baseline"]) == (MILLION, "v3.2")
    assert published["weighting"].startswith("equivalent FP8")
    assert list(published["models"]) == ["v3.2", "v4-pro", "v4-flash"]
    for model in published["models"].values():
        assert {"active_params", "total_params", "kv_bytes", "kv_ratio", "flops_raw", "flops_weighted",
                "flops_ratio_raw", "flops_ratio", "by_part"} <= model.keys()  # fmt: skip
        for key in ("by_part", "by_kind", "by_group", "by_operation"):
            assert sum(row["flops"] for row in model[key].values()) == model["flops_raw"]
            weighted = sum(row["flops_weighted"] for row in model[key].values())
            assert weighted == pytest.approx(model["flops_weighted"])
            read = sum(row["weight_bytes"] + row["cache_bytes"] for row in model[key].values())
            assert read == pytest.approx(model["bytes_read"]["total"])
    flash = published["models"]["v4-flash"]
    assert list(flash["by_part"]) == ["linears", "experts", "indexer", "window", "csa", "hca", "mHC", "head"]
    assert list(flash["by_kind"]) == ["window", "csa", "hca", "outside layers"]


def test_the_published_figures(published: Any) -> None:
    pro, flash = published["models"]["v4-pro"], published["models"]["v4-flash"]
    assert [f"{100 * m['flops_ratio']:.0f}%" for m in (pro, flash)] == ["27%", "10%"]
    assert [f"{100 * m['kv_ratio']:.0f}%" for m in (pro, flash)] == ["10%", "7%"]
    assert [f"{100 * m['gqa8_ratio']:.0f}%" for m in (pro, flash)] == ["2%", "2%"]
    assert [1 / m["kv_ratio"] for m in (pro, flash)] == pytest.approx([9.55, 13.68], abs=0.01)
    active = [f"{m['active_params'] / 1e9:.0f}" for m in published["models"].values()]
    assert active == ["37", "49", "13"]
    base = published["models"]["v3.2"]
    assert [base[key] for key in ("kv_ratio", "flops_ratio", "flops_ratio_raw")] == [1, 1, 1]
    assert base["prefill"]["flops_raw"] > 100_000 * base["flops_raw"]


def test_the_roofline_of_every_named_device(published: Any) -> None:
    found = {row["device"]: row for row in published["roofline"]}
    assert len(found) == len(DEVICES)
    for row in found.values():
        assert "data sheet" in row["source"] or "architecture paper" in row["source"]
        for model in row["models"].values():
            assert model["devices_needed"] * row["memory_bytes"] >= model["needed_bytes"]
            for phase in ("decode", "prefill"):
                assert model[phase]["bound"] in ("memory", "compute")
                assert sum(model[phase]["seconds_by_part"].values()) == pytest.approx(model[phase]["seconds"])
    flash = found["H200"]["models"]["v4-flash"]
    assert flash["devices_needed"] == 2
    assert flash["decode"]["tok_s"] == pytest.approx(410, rel=0.02)


def test_the_tables_for_people(cli: Cli, no_downloads: None) -> None:
    done = cli("profile")
    assert (done.code, done.err) == (0, "")
    for words in (
        "One sequence of 1,048,576 tokens",
        "27.4%",
        "10.3%",
        "10.5%",
        "7.3%",
        "2.0%",
        "1,158 G",
        "303.2 G",
        "140.3 G",
        "equivalent FP8",
        "index scores",
        "RTX 4090",
        "data sheet",
        "GQA8",
    ):
        assert words in done.out, words
    one = cli("profile", "v4-flash", "--ctx", "128K", "--device", "h200")
    assert "v4-flash: GFLOP and bytes read of one decoded token, TFLOP of the prefill" in one.out
    assert "by layer kind" in one.out
    assert "A100" not in one.out and "v4-pro" not in one.out


def test_a_checkpoint_of_ones_own(cli: Cli, model: Path) -> None:
    found = cli("profile", model, "--json").json
    assert found["ctx"] == 4096  # as far as this model goes
    mine = found["models"][str(model)]
    assert mine["path"] == str(model)
    assert mine["kv_bytes"] < found["models"]["v3.2"]["kv_bytes"]
    assert list(found["roofline"][0]["models"]) == [str(model)]
    assert "MFLOP" in cli("profile", model).out


def test_other_cache_formats(cli: Cli) -> None:
    mixed, bf16 = (cli("profile", "tiny", "--kv-dtype", kind, "--json").json["models"] for kind in ("mixed", "bf16"))
    assert bf16["tiny"]["kv_bytes"] > 1.6 * mixed["tiny"]["kv_bytes"]
    assert bf16["v3.2"]["kv_bytes"] > 1.6 * mixed["v3.2"]["kv_bytes"]


def test_a_sweep_is_figure_one(cli: Cli, no_downloads: None, tmp_path: Path) -> None:
    done = cli("profile", "--sweep", "--plot", tmp_path / "figure.png", "--json")
    found = done.json["sweep"]
    assert found["lengths"] == [4096 << i for i in range(9)]
    for name, model in found["models"].items():
        assert model["flops_weighted"][-1] == done.json["models"][name]["flops_weighted"]
        assert model["kv_bytes"][-1] == done.json["models"][name]["kv_bytes"]
        assert model["flops_weighted"] == sorted(model["flops_weighted"])
        assert model["kv_bytes"] == sorted(model["kv_bytes"])
    # Shares fall as the context grows: what is saved grows with it.
    assert found["models"]["v4-flash"]["flops_ratio"] == sorted(found["models"]["v4-flash"]["flops_ratio"])[::-1]
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "wrote" in done.err


def test_a_sweep_in_the_terminal(cli: Cli, no_downloads: None, tmp_path: Path) -> None:
    done = cli("profile", "--sweep", "--ctx", "96K")
    assert "FLOPs of one decoded token" in done.out and "KV cache, GiB" in done.out
    assert "96K" in done.out and "64K" in done.out
    assert "# v3.2" in done.out
    only_image = cli("profile", "v4-flash", "--plot", tmp_path / "f.svg")
    assert "KV cache, GiB" not in only_image.out
    assert (tmp_path / "f.svg").exists()


def test_measured_beside_the_analytic(cli: Cli, model: Path) -> None:
    done = cli("profile", model, "--measure", "--ctx", "1K", "--json")
    assert done.code == 0, done.err
    found = done.json["measured"]
    assert (found["weights"], found["scaled"], found["layers_timed"], found["layers"]) == ("loaded", False, 4, 4)
    assert abs(found["cache"]["difference"]) < 0.02
    assert found["cache"]["analytic_slope"] == done.json["models"][str(model)]["kv_bytes_per_token"]
    for phase in ("prefill", "decode"):
        assert found[phase]["tok_s"] > 0
        assert found[phase]["share_of_roofline"] > 0
        assert sum(part["share_of_time"] for part in found[phase]["parts"]) == pytest.approx(1)
    assert "measured on" in found["ceilings"]["source"]
    assert "measured on" in done.json["roofline"][0]["source"]


def test_random_weights_are_labelled_so(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    settings = json.loads((model / "config.json").read_text())
    (tmp_path / "config" / "config.json").write_text(json.dumps(settings))
    arguments = ["profile", tmp_path / "config", "--measure", "--ctx", "1K"]
    refused = cli(*arguments)
    assert refused.code == 2 and "safetensors" in refused.err
    done = cli(*arguments, "--random-weights")
    assert done.code == 0, done.err
    assert "RANDOM WEIGHTS, 3 layers timed for 4" in done.out
    assert "multiplied by the number of such layers" in done.out


def test_a_document_of_random_weights_says_so(cli: Cli, model: Path) -> None:
    found = cli("profile", model, "--measure", "--random-weights", "--ctx", "1K", "--json").json["measured"]
    assert (found["weights"], found["scaled"], found["layers_timed"], found["layers"]) == ("random", True, 3, 4)


def test_the_default_model_is_measured(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_MODEL", str(model))
    done = cli("profile", "--measure", "--ctx", "1K")
    assert done.code == 0, done.err
    for words in (f"Measured: {model} on cpu", "slope, bytes a token", "slope differs by", "core attention", "hca"):
        assert words in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "unknown model 'nowhere'"),
        (["--ctx", "2M"], "--ctx is 2,097,152, and v4-pro goes up to 1,048,576 tokens"),
        (["--ctx", "0"], "at least 1"),
        (["--device", "tpu"], "there is no device 'tpu'"),
        (["--device", "cuda:99"], "there is no device 'cuda:99'"),
        (["--random-weights"], "--random-weights is for --measure"),
        (["v4-flash", "--measure"], "v4-flash is not downloaded"),
        (["v3.2", "--measure"], "--measure times one V4 model"),
        (["tiny", "v4-flash", "--measure"], "--measure times one V4 model"),
        (["tiny", "--measure", "--device", "h200"], "--measure runs on this machine"),
        (["tiny", "--measure", "--ctx", "512"], "512 tokens are too few to measure"),
        (["--plot", "figure.gif"], "an image ends in .png, .svg, .pdf"),
        (["--plot", "/nowhere/figure.png"], "there is no folder /nowhere"),
        (["--sweep", "--ctx", "4K"], "has no lengths"),
    ],
)
def test_wrong_input(cli: Cli, no_downloads: None, arguments: list[str], words: str) -> None:
    done = cli("profile", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_room_is_left_to_decode(cli: Cli, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", max_position_embeddings=1280)
    assert "leaves no room to decode" in cli("profile", small, "--measure", "--ctx", "1270").err
    found = cli("profile", small, "--measure", "--json").json["measured"]
    assert found["prefill"]["ctx"] == 1152
    assert found["decode"]["ctx"] <= 1280
