"""Everything wrong that a person can hand to dsv4 ends with one clear message, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Cli, Result, write_model


def refused(done: Result, *words: str) -> None:
    """One error line, perhaps a hint, no traceback, no output."""
    assert done.code == 2, done.err
    assert done.out == ""
    lines = done.err.strip().splitlines()
    assert lines[0].startswith("error: "), done.err
    assert len(lines) <= 2, done.err
    assert all(line.startswith("hint: ") for line in lines[1:])
    for word in words:
        assert word in done.err, done.err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may break."""
    return Path(shutil.copytree(model, tmp_path / "model"))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file or folder"),
        (b"\x00\x01\x02", "binary file"),
        (b"", "empty file"),
        (b"\xff\xfe\xfd", "UTF-8"),
    ],
)
def test_files(cli: Cli, tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "thing.txt"
    if content is not None:
        file.write_bytes(content)
    refused(cli("run", "What?", "--file", file), words, "thing.txt")


def test_unreadable_folder(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("dsv4cli.files.os.listdir", refuse)
    refused(cli("run", "What?", "--file", tmp_path), "permission denied", str(tmp_path))


def test_nothing_to_ask(cli: Cli) -> None:
    refused(cli("run", ""), "nothing to ask")
    refused(cli("run", "--file", "-", input=""), "empty file: stdin")


# ---- models ----------------------------------------------------------------------------------------------------------


def test_unknown_model(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("run", "What?", "--model", "v5-huge"), "unknown model 'v5-huge'", "v4-flash")
    refused(cli("run", "What?", "--model", "nobody/nothing"), "nobody/nothing")
    refused(cli("inspect", "v5-huge"), "unknown model")


def test_folder_without_config(cli: Cli, tmp_path: Path) -> None:
    refused(cli("run", "What?", "--model", tmp_path), "config.json", str(tmp_path))


def test_a_file_is_no_model(cli: Cli, note: Path) -> None:
    refused(cli("run", "What?", "--model", note), "not a model")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "deepseek_v41"}, ["deepseek_v41"]),
        ({"model_type": "llama"}, ["llama"]),
        ({"compress_ratios": [0, 4]}, ["compress_ratios"]),
        ({"made_up_key": 7}, ["made_up_key", "7"]),
        ({"o_groups": 3}, ["o_groups", "3"]),
        ({"hidden_size": "64"}, ["hidden_size"]),
    ],
)
def test_config(cli: Cli, own: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(own, **changes)
    refused(cli("run", "What?", "--model", own), *words)


def test_config_that_is_no_json(cli: Cli, own: Path) -> None:
    (own / "config.json").write_text("{")
    refused(cli("inspect", own), "config.json")


# ---- weights ---------------------------------------------------------------------------------------------------------


def weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def truncate(folder: Path) -> None:
    file = weights_file(folder)
    file.write_bytes(file.read_bytes()[:-100])


def no_header(folder: Path) -> None:
    weights_file(folder).write_bytes(b"\x08")


def huge_header(folder: Path) -> None:
    file = weights_file(folder)
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def broken_header(folder: Path) -> None:
    file = weights_file(folder)
    data = bytearray(file.read_bytes())
    data[8] = ord("[")
    file.write_bytes(data)


def no_weights(folder: Path) -> None:
    weights_file(folder).unlink()


@pytest.mark.parametrize("damage", [truncate, no_header, huge_header, broken_header, no_weights])
def test_damaged_files(cli: Cli, own: Path, damage: Callable[[Path], None]) -> None:
    damage(own)
    before = snapshot(own)
    refused(cli("run", "What?", "--model", own))
    refused(cli("inspect", own))
    assert snapshot(own) == before


def test_missing_shard(cli: Cli, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "sharded", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(cli("run", "What?", "--model", folder), "model-00002-of-00003.safetensors")


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights_file(folder))
    edit(tensors)
    save_file(tensors, weights_file(folder), metadata={"format": "pt"})


def test_wrong_shape_dtype_missing_and_unknown_tensor(cli: Cli, model: Path, tmp_path: Path) -> None:
    name = "layers.0.attn.wq_a.weight"

    def shorten(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][1:].contiguous()

    def retype(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].long()

    def drop(tensors: dict[str, Any]) -> None:
        del tensors[name]

    def add(tensors: dict[str, Any]) -> None:
        tensors["layers.0.attn.surplus.weight"] = tensors[name].clone()

    for number, (edit, word) in enumerate([(shorten, name), (retype, name), (drop, name), (add, "surplus")]):
        folder = Path(shutil.copytree(model, tmp_path / str(number)))
        edit_tensors(folder, edit)
        refused(cli("run", "What?", "--model", folder), word)


def test_missing_scale_and_nan_in_a_scale(cli: Cli, tmp_path: Path) -> None:
    import torch

    scale = "layers.0.attn.wq_a.scale"

    def drop(tensors: dict[str, Any]) -> None:
        del tensors[scale]

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[scale].view(torch.uint8)[0, 0] = 255  # e8m0 has one NaN

    for number, edit in enumerate([drop, spoil]):
        folder = write_model(tmp_path / str(number), quantised=True)
        edit_tensors(folder, edit)
        refused(cli("run", "What?", "--model", folder), scale)


def test_no_memory_says_how_much_is_needed(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_engine.placement.available_memory", lambda device="cpu": 1 << 20)
    refused(cli("run", "What?", "--model", model), "the model", "needs", "MiB", "0 B are available")
    found = cli("inspect", model, "--json")
    assert found.code == 0
    assert found.json["memory"]["fits"] is False


# ---- tokenizers and token ids ----------------------------------------------------------------------------------------


def test_tokenizer_missing_or_unreadable(cli: Cli, own: Path) -> None:
    (own / "tokenizer.json").unlink()
    refused(cli("run", "What?", "--model", own), "tokenizer.json")
    refused(cli("chat", "--model", own, input="Why?\n"), "tokenizer.json")
    (own / "tokenizer.json").write_text("{}")
    refused(cli("run", "What?", "--model", own), "tokenizer.json")


def test_tokenizer_of_another_vocabulary(cli: Cli, own: Path) -> None:
    file = own / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    data["model"]["vocab"]["one too many"] = len(data["model"]["vocab"])
    file.write_text(json.dumps(data))
    refused(cli("run", "What?", "--model", own), "tokenizer.json", "263", "262")


def test_token_id_out_of_range(model: Path) -> None:
    """The command line makes its ids from text; callers of the session may give any."""
    from dsv4_engine import Engine
    from dsv4_engine.errors import InputError

    session = Engine.load(model).session()
    for wrong in (-1, 262):
        with pytest.raises(InputError, match=str(wrong)):
            session.extend([5, wrong])
    assert session.position == 0


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--ctx", "0"), ("--ctx", "-5"), ("--ctx", "many"), ("--ctx", "1.5"), ("--ctx", "2G"),
        ("--max-tokens", "0"), ("--max-tokens", "-1"), ("--max-tokens", "1e3"),
        ("--temperature", "-0.1"), ("--temperature", "2.5"), ("--temperature", "nan"), ("--temperature", "hot"),
        ("--top-p", "0"), ("--top-p", "1.1"), ("--min-p", "-1"), ("--min-p", "inf"),
        ("--seed", "-1"), ("--seed", "1.5"), ("--seed", str(2**63)),
        ("--think", "some"), ("--dtype", "float16"), ("--kv-dtype", "fp4"), ("--nonsense", "1"),
    ],
)  # fmt: skip
def test_options_out_of_range(cli: Cli, option: str, value: str) -> None:
    for command in (["run", "What?"], ["chat"]):
        done = cli(*command, option, value)
        assert done.code == 2
        assert done.out == ""
        assert option in done.err
        assert "Traceback" not in done.err


def test_options_that_only_the_model_can_refuse(cli: Cli, model: Path) -> None:
    refused(cli("run", "What?", "--model", model, "--ctx", "1M"), "1,048,576", "4,096")
    refused(cli("inspect", model, "--ctx", "1M"), "1,048,576", "4,096")
    refused(cli("run", "What?", "--model", model, "--device", "abacus"), "abacus")
    refused(cli("run", "What?", "--model", model, "--stop", ""), "stop string")


def test_nothing_is_written_by_a_refused_command(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    refused(cli("run", "What?", "--file", "nowhere.txt"))
    refused(cli("chat", "--file", "nowhere.txt"))
    refused(cli("chat", "--load", "nowhere.json"))
    assert list(tmp_path.iterdir()) == []
