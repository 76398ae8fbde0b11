"""`dsv4 quantize`: tables and JSON, exit codes, messages with a next step, and going on after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv4cli.commands.quantize import Scheme
from support.random_checkpoint import random_tensors, write_tensors

from .conftest import Cli, environment, write_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("packed"), quantised=True, mtp=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The lamp in the north tower is lit at seven.\n")
    return file


def test_the_schemes_are_the_engines() -> None:
    from dsv4_engine.quantize import SCHEMES

    assert [scheme.value for scheme in Scheme] == list(SCHEMES)


def test_a_report_by_part(cli: Cli, model: Path, tmp_path: Path) -> None:
    done = cli("quantize", model, tmp_path / "out")
    assert done.code == 0, done.err
    for words in ("F32 -> FP4", "F32 -> FP8", "F32 -> BF16", "experts", "saturated", "worst tensor", "became"):
        assert words in done.out
    assert "peak memory" in done.err
    answer = cli("run", "Hello", "--model", tmp_path / "out", "--max-tokens", "2", "--no-cache")
    assert answer.code == 0, answer.err


def test_json_and_check(cli: Cli, model: Path, tmp_path: Path, text: Path) -> None:
    found = cli("quantize", model, tmp_path / "out", "--workers", 2, "--check", text, "--json").json
    assert found["scheme"] == "published" and found["lossless"] is None and found["inexact"] == []
    kinds = {(kind["part"], kind["from"], kind["to"]): kind for kind in found["kinds"]}
    experts = kinds["experts", "F32", "FP4"]
    assert experts["bytes_before"] == 4 * experts["values"] and experts["saturated"] == 0
    assert 0.05 < experts["relative_error"] < 0.2
    assert found["bytes_after"] < found["bytes_before"] / 2
    check = found["check"]
    assert check["tokens"] == len(text.read_text())  # a token a byte
    assert check["loss_change"] == pytest.approx(check["loss_after"] - check["loss_before"])
    assert 0 < check["kl_mean"] < 5 and 0 <= check["same_top"] <= 1
    assert found["peak_memory_bytes"] > 0 and found["seconds"] > 0


def test_fp8_is_lossless_and_can_be_checked_later(cli: Cli, packed: Path, tmp_path: Path, text: Path) -> None:
    done = cli("quantize", packed, tmp_path / "out", "--scheme", "fp8")
    assert done.code == 0 and "every FP4 value is the same in FP8" in done.out
    again = cli("quantize", packed, tmp_path / "out", "--scheme", "fp8")
    assert again.code == 2 and "finished result of this very job" in again.err and "--check" in again.err
    later = cli("quantize", packed, tmp_path / "out", "--scheme", "fp8", "--check", text)
    assert later.code == 0 and "nothing was written" in later.err
    assert "+0.0000" in later.out and "100.00%" in later.out


def test_what_is_not_lossless_is_a_failure_that_names_blocks(cli: Cli, tmp_path: Path) -> None:
    from dsv4_engine.config import ModelConfig

    folder = write_model(tmp_path / "model", quantised=True, mtp=False)
    tensors = random_tensors(ModelConfig.from_folder(folder), quantised=True, mtp=False)
    name = "layers.1.ffn.experts.3.w1"
    tensors[f"{name}.scale"].view(torch.uint8)[9, 0] -= 20
    tensors[f"{name}.weight"][9, :16] = 0x33
    write_tensors(folder, tensors)
    done = cli("quantize", folder, tmp_path / "out", "--scheme", "fp8")
    assert done.code == 1
    assert f"not lossless: {name}.weight, 1 of its blocks, 32 values" in done.out
    assert "block at row 0, column 0: scales span 2^2" in done.out
    assert "every FP4 value" not in done.out
    json = cli("quantize", folder, tmp_path / "json", "--scheme", "fp8", "--json")
    assert (json.code, json.json["lossless"], json.json["inexact"][0]["blocks"]) == (1, False, 1)


def test_wrong_use(cli: Cli, model: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, said in (
        ((model, out, "--scheme", "int3"), "int3"),
        ((model, out, "--workers", 0), "workers"),
        ((model, model), "is the source itself"),
        ((model, tmp_path), "is not empty"),
        ((tmp_path / "nowhere", out), "nowhere"),
        ((model, out, "--scheme", "fp8"), "rewrites FP4 experts"),
        (("tiny", out), "nothing that the scheme published would change"),
        ((model, out, "--check", tmp_path / "missing.txt"), "no such file"),
        ((model, out, "--check", binary), "not a text in UTF-8"),
    ):
        done = cli("quantize", *arguments)
        assert done.code == 2, (arguments, done)
        assert said in done.err
        assert done.out == "" and not out.exists()
    text.write_text("")
    assert cli("quantize", model, out, "--check", text).code == 2 and not out.exists()


def test_no_space(cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    done = cli("quantize", model, tmp_path / "out")
    assert done.code == 2 and "9.8 KiB free" in done.err and "hint: Free " in done.err


def test_a_full_disk_is_a_failure_with_a_next_step(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        done = cli("quantize", model, tmp_path / "out")
    assert done.code == 1 and "no space left on device" in done.err and "same command" in done.err
    assert cli("quantize", model, tmp_path / "out").code == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_goes_on(model: Path, tmp_path: Path, number: signal.Signals, cli: Cli) -> None:
    """The command itself, in a process of its own, whose writes are slowed down so that it can be caught."""
    script = (
        "import os, sys, time\n"
        "from dsv4_engine.quantize import rows\n"
        "real = os.pwrite\n"
        "def slow(*arguments):\n    time.sleep(0.02)\n    return real(*arguments)\n"
        "os.pwrite = slow\n"
        "from dsv4cli.main import main\nmain()\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "quantize", str(model), str(out)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(out.glob("*.part")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "goes on where" in err and "Traceback" not in err
    assert not (out / "config.json").exists()
    assert cli("run", "Hello", "--model", out).code == 2
    done = cli("quantize", model, out)
    assert done.code == 0
    assert cli("quantize", model, tmp_path / "direct").code == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "direct").iterdir()
    }
