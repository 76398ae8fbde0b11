"""Recipes: what ships can be read, and what is wrong is refused with its name and a next step."""

from pathlib import Path

import pytest

from dsv4_training import recipe
from dsv4_training.recipe import RECIPES, RecipeError

SMALL = """
name = "x"
seed = 1
gpu = false
[[stages]]
name = "a"
steps = 3
length = 256
tokens = 512
attention = "dense"
index_rows = 64
[[stages]]
name = "b"
steps = 2
length = 512
tokens = 512
attention = "sparse"
index_rows = 64
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_what_ships_can_be_followed(path: Path) -> None:
    loaded = recipe.load(path)
    assert loaded.steps == sum(stage.steps for stage in loaded.stages)


def test_the_published_models_recipe_follows_the_report() -> None:
    tiny = recipe.load(RECIPES / "tiny.toml")
    assert tiny.gpu
    assert tiny.optimiser.kind == "muon"
    order = [stage.attention for stage in tiny.stages]
    assert order == sorted(order, key=recipe.ATTENTION.index)
    assert set(order) == set(recipe.ATTENTION)
    lengths = [stage.length for stage in tiny.stages]
    assert lengths == sorted(lengths)
    assert lengths[-1] >= 65536
    assert (tiny.stages[0].mtp, tiny.stages[-1].mtp) == (0.3, 0.1)
    assert (tiny.routing.bias_rate, tiny.routing.balance) == (0.001, 1e-4)
    assert tiny.stages[-1].quantised


def test_stages_follow_each_other(tmp_path: Path) -> None:
    loaded = recipe.load(written(tmp_path, SMALL))
    assert [loaded.stage(step).name for step in range(5)] == ["a", "a", "a", "b", "b"]
    with pytest.raises(IndexError):
        loaded.stage(5)


@pytest.mark.parametrize(
    ("old", "new", "same_until"),
    [
        ("seed = 1", "seed = 2", -1),
        ('name = "b"\nsteps = 2', 'name = "b"\nsteps = 9', 5),
        ('attention = "sparse"', 'attention = "warmup"', 3),
        ('"sparse"', '"sparse"\nrate = 0.5\ndata = {text = 1.0, needles = 0.0, many_keys = 0.0, tracking = 0.0, '
         "code_lookup = 0.0, told = 0.0, talk = 0.0}", 3),
        ("steps = 3", "steps = 2", 2),
        ("steps = 3", "steps = 4", 3),
    ],
)  # fmt: skip
def test_what_is_ahead_of_a_run_may_be_edited(tmp_path: Path, old: str, new: str, same_until: int) -> None:
    before = recipe.load(written(tmp_path, SMALL))
    after = recipe.load(written(tmp_path, SMALL.replace(old, new, 1)))
    same = [step for step in range(before.steps + 1) if before.digest(step) == after.digest(step)]
    assert same == list(range(same_until + 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 1", "sead = 1", "unknown key sead"),
        ("steps = 3", "steps = 3\nlenght = 4", r"unknown key stages\[0\]\.lenght"),
        ("gpu = false", "", "lacks gpu"),
        ("length = 256", "length = 300", "length 300 is not a multiple of 128"),
        ("tokens = 512", "tokens = 384", "not whole sequences"),
        ('"dense"', '"full"', "attention 'full'"),
        ("seed = 1", 'seed = "one"', "seed is 'one'"),
        ("steps = 3", "steps = true", "steps is True"),
        ("index_rows = 64", "index_rows = 63", "index_rows"),
        ('name = "b"', 'name = "a"', "same name"),
        ("gpu = false", "gpu = false\n[model]\ncompress_ratios = [0, 3]", "describes no model"),
        ("gpu = false", "gpu = false\n[data]\ntext = 0.9", "add up to"),
        ("gpu = false", "gpu = false\n[optimiser]\nkind = 'sgd'", "optimiser.kind"),
        ("steps = 3", "steps = 3\nrate = 0.0", "rate 0"),
        ("steps = 3", "steps = 3\ndata = {text = 0.9}", "shares in stage 'a' add up to"),
        ("steps = 3", "steps = 3\ndata = {code = 'bundled'}", "other code"),
        ("steps = 3", "steps = 3\ndata = 4", r"stages\[0\]\.data is 4"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.load(written(tmp_path, SMALL.replace(old, new, 1)))
    assert caught.value.hint


def test_near_misses_are_suggested(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(written(tmp_path, SMALL.replace("seed = 1", "sead = 1")))
    assert caught.value.hint == "Did you mean seed?"


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="not TOML"):
        recipe.load(written(tmp_path, "name = "))
