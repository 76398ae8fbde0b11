"""The command: what is wrong is said in a line with exit code 2; a run from recipe to scored checkpoint, in two
goes."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from dsv4_engine.errors import InputError
from dsv4_training import __main__ as command
from dsv4_training import export, recipe, run
from dsv4_training.recipe import RECIPES
from training.common import lively_parameters, small_config

SMOKE = RECIPES / "smoke.toml"


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv4_training", *arguments])
    return command.main()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "none.toml"), ("none.toml cannot be read", "tiny.toml")),
        (("score", "--recipe", str(SMOKE), "--tasks", "sums"), ("no task sums", "multikey")),
        (("score", "--recipe", str(SMOKE), "--lengths", "8K"), ("the length '8K'", "1024,8192")),
        (("plot", "--recipe", str(SMOKE), "--out", "nowhere"), ("metrics.jsonl", "Train first")),
    ],
)
def test_what_is_wrong_is_said_with_a_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: list[str]
) -> None:
    assert called(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words)


def test_a_recipe_for_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a CUDA GPU") as caught:
        run.device_for(recipe.load(RECIPES / "tiny.toml"))
    assert "smoke.toml" in caught.value.hint
    assert run.device_for(recipe.load(SMOKE)).type == "cpu"


def test_the_folder_is_looked_at_first(tmp_path: Path) -> None:
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        run.begin(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="cannot make the folder"):
        run.begin(kept / "letter.txt" / "model")
    assert run.begin(tmp_path / "new").name == "new-run"
    assert run.begin(tmp_path / "new").is_dir()  # going on


def test_half_a_checkpoint_is_never_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    export.save_checkpoint(tmp_path, config, lively_parameters(config), "{}")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        Path(args[1]).write_bytes(b"half")  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        with pytest.raises(InputError, match="no room"):
            export.save_checkpoint(tmp_path, config, lively_parameters(config, 1), "{}")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole

    replace = export.os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(export.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export.save_checkpoint(tmp_path, config, lively_parameters(config, 1), "{}")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_from_recipe_to_scored_checkpoint_in_two_goes(tmp_path: Path) -> None:
    smoke = recipe.load(SMOKE)
    stages = tuple(dataclasses.replace(s, steps=4, length=256, tokens=256, index_rows=32) for s in smoke.stages)
    smoke = dataclasses.replace(smoke, stages=stages)
    out = tmp_path / "model"
    assert not run.train(smoke, SMOKE, out, stop_after=0.0)
    assert "4 of 12 steps" in (out / "README.md").read_text(encoding="utf-8")
    kept = tmp_path / "model-run"
    half = (out / "model.safetensors").read_bytes()
    (out / "config.json").unlink()
    assert run.export(smoke, out) == 4
    assert (out / "model.safetensors").read_bytes() == half
    with pytest.raises(InputError, match="another recipe"):
        run.export(dataclasses.replace(smoke, seed=2), out)
    # Of the recipe what is ahead is edited.
    edited = tmp_path / "edited.toml"
    edited.write_text(SMOKE.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
    smoke = dataclasses.replace(smoke, stages=(*stages[:2], dataclasses.replace(stages[2], steps=5)))
    assert run.train(smoke, edited, out)
    assert (kept / "recipe-until-4.toml").read_bytes() == SMOKE.read_bytes()
    assert (kept / "recipe.toml").read_bytes() == edited.read_bytes()
    steps = [json.loads(line)["step"] for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == smoke.steps
    assert json.loads((kept / "time.json").read_text())["calls"] == 2
    scores = run.score(smoke, out, 1, (512,), ("ruler", "multikey"))
    assert [(s["task"], s["asked"]) for s in scores] == [("ruler", 1), ("multikey", 1)]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| 512 |" in card
    assert "Bits a byte" in card


@pytest.mark.slow
def test_optimisers_are_compared_on_the_same_batches(tmp_path: Path) -> None:
    smoke = recipe.load(SMOKE)
    short = dataclasses.replace(smoke.stages[0], steps=12, length=256, tokens=512, index_rows=32)
    run.compare_optimisers(dataclasses.replace(smoke, stages=(short,)), tmp_path)
    curves = {
        kind: [json.loads(line) for line in (tmp_path / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("muon", "adamw")
    }
    assert [r["step"] for r in curves["muon"]] == [r["step"] for r in curves["adamw"]]
    assert all(rows[-1]["loss"] < rows[0]["loss"] for rows in curves.values())
    assert (tmp_path / "optimisers.png").read_bytes().startswith(b"\x89PNG")
