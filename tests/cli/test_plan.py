"""`dsv4 inspect --plan` and the flags that limit memory: what fits where, and what is said where it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from dsv4_kernels.backend import Backend
from dsv4cli.options import parse_bytes

from .conftest import Cli

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24g", 24 * GIB), ("1.5 gib", 3 * GIB // 2), ("24GB", 24 * 10**9), ("512MiB", GIB // 2),
     ("1000", 1000), ("2kb", 2000), ("1T", 1 << 40)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "24 parsecs", "1e9", "0", "12i", "24GiBB", "nan"])
@pytest.mark.parametrize("flag", ["--gpu-mem", "--cpu-mem"])
def test_malformed_sizes(cli: Cli, flag: str, text: str) -> None:
    done = cli("inspect", "v4-flash", "--plan", f"{flag}={text}")
    assert done.code == 2
    assert "is not a size in bytes" in " ".join(done.err.replace("│", "").split())


def plan(cli: Cli, *flags: str) -> dict:
    return cli("inspect", "v4-flash", "--plan", "--json", *flags).json["plan"]


@pytest.fixture(autouse=True)
def nothing_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_one_gpu_and_memory(cli: Cli) -> None:
    found = plan(cli, "--gpu-mem", "24GiB", "--cpu-mem", "192GiB", "--ctx", "1M")
    assert found["fits"] and found["device"] == "cuda:0" and found["ctx"] == 1 << 20
    rows = [row for row in found["rows"] if row["part"] != "program"]  # here that is the whole test run
    sizes = {place: sum(r["bytes"] for r in rows if r["place"] == place) for place in ("cuda:0", "cpu")}
    assert sizes["cuda:0"] <= 24 * GIB < sizes["cuda:0"] + found["expert_bytes"]
    assert 137 * GIB < sizes["cpu"] < 138 * GIB
    assert found["slots"] == found["experts"] == 43 * 256 and found["gpu_slots"][0] >= 256
    assert found["device_map"]["layers.7.ffn.experts"] == "cpu" and found["device_map"]["layers.7"] == "cuda:0"
    assert 0 < found["expected"]["decode_tok_s"] < 100 and found["expected"]["decode_bound"] == "the link"
    assert found["expected"]["expert_copy_s"] < found["expected"]["expert_cpu_s"]
    assert all(left >= 0 for left in found["left"].values())


def test_less_memory_than_experts_leaves_them_on_disk(cli: Cli) -> None:
    found = plan(cli, "--gpu-mem", "24GiB", "--cpu-mem", "64GiB")
    assert found["slots"] < found["experts"] and found["device_map"]["layers.0.ffn.experts"] == "disk"
    assert found["expected"]["decode_bound"] == "the disk"
    assert sum(r["bytes"] for r in found["rows"] if r["place"] == "cpu") <= 64 * GIB


def test_more_gpus_hold_everything(cli: Cli) -> None:
    found = plan(cli, "--gpu-mem", "141GiB,141GiB")
    assert found["gpu_slots"] == [] and {r["place"] for r in found["rows"]} == {"cuda:0", "cuda:1", "cpu"}
    even = plan(cli, "--gpu-mem", "141GiB,141GiB", "--device-map", "balanced")
    first = [sum(device == "cuda:0" for name, device in p["device_map"].items() if name.count(".") == 1)
             for p in (found, even)]  # fmt: skip
    assert first[1] in (21, 22) and first[0] > 30


def test_the_cpu_alone(cli: Cli) -> None:
    found = plan(cli, "--cpu-mem", "16GiB", "--ctx", "4K")
    assert found["device"] == "cpu" and 0 < found["slots"] < found["experts"]
    assert sum(r["bytes"] for r in found["rows"] if r["place"] == "cpu") <= 16 * GIB
    shown = cli("inspect", "v4-flash", "--plan", "--cpu-mem", "16GiB", "--ctx", "4K").out
    assert "experts held" in shown and "tokens/s" in shown and "--cpu-mem" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--gpu-mem", "8GiB"], "one layer's 256 experts 3.2 GiB"),
     (["--cpu-mem", "4GiB"], "with its routed experts on disk"),
     (["--gpu-mem", "24GiB", "--cpu-mem", "1GiB"], "one layer's 256 experts need")],
)  # fmt: skip
def test_limits_that_are_too_small(cli: Cli, flags: list[str], words: str) -> None:
    found = plan(cli, *flags)
    assert not found["fits"] and words in found["message"] and found["hint"]
    assert words[:20] in cli("inspect", "v4-flash", "--plan", *flags).out


@pytest.mark.parametrize(
    ("flags", "flag"),
    [(["--gpu-mem", "8GiB", "--cpu-mem", "200GiB"], "--gpu-mem"),
     (["--gpu-mem", "13GiB", "--cpu-mem", "200GiB", "--ctx", "1M"], "--gpu-mem"),
     (["--cpu-mem", "1MiB"], "--cpu-mem"), (["--cpu-mem", "4GiB"], "--cpu-mem"),
     (["--gpu-mem", "24GiB", "--cpu-mem", "1GiB"], "--cpu-mem")],
)  # fmt: skip
def test_the_size_that_is_named_suffices(cli: Cli, flags: list[str], flag: str) -> None:
    found = plan(cli, *flags)
    (size,) = re.findall(r"\d[\d.]*[GM]iB", found["hint"])
    flags[flags.index(flag) + 1] = size
    assert plan(cli, *flags)["fits"]


def test_no_plan_for_gpus_that_the_kernels_do_not_run_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Backend("torch", torch.device("cuda:0"))
    monkeypatch.setattr("dsv4_engine.engine.choose_backend", lambda device: old)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "RTX 4090")
    done = cli("inspect", "v4-flash", "--plan", "--device", "cuda")
    assert done.code == 2 and "compute capability 8.9, below 9.0" in done.err


def test_a_limit_for_gpus_is_not_ignored_silently(cli: Cli, model: Path) -> None:
    done = cli("run", "Hello", "-m", model, "--gpu-mem", "8GiB", "--max-tokens", "2", "--no-cache")
    assert done.code == 0 and "--gpu-mem changes nothing on the CPU" in done.err


def test_a_map_from_a_file(cli: Cli, tmp_path: Path) -> None:
    where = tmp_path / "map.json"
    where.write_text(json.dumps({"": 0, "layers.1": 0, "layers.*.ffn.experts": "cpu", "layers.1.ffn.experts": 0}))
    found = plan(cli, "--gpu-mem", "40GiB", "--device-map", str(where), "--cpu-mem", "1TiB")
    assert found["device_map"]["layers.2.ffn.experts"] == "cpu"
    assert "layers.1.ffn.experts" not in found["device_map"]  # with its layer
    where.write_text('{"": 0, "layers.99": "cpu"}')
    done = cli("inspect", "v4-flash", "--plan", "--gpu-mem", "40GiB", "--device-map", where)
    assert done.code == 2 and "layers.99" in done.err


def test_a_run_keeps_to_its_limit_or_refuses(cli: Cli, model: Path) -> None:
    done = cli("run", "Hello", "-m", model, "--cpu-mem", "1MiB", "--max-tokens", "2", "--no-cache")
    assert done.code == 2 and "needs" in done.err and "1.0 MiB" not in done.out
    done = cli("run", "Hello", "-m", model, "--cpu-mem", "2GiB", "--max-tokens", "2", "--no-cache")
    assert done.code == 0, done.err
