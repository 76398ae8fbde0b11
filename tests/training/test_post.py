"""Post-training as a whole: its recipe, questions that can be checked, the comparison, and a run at toy size."""

import shutil
from pathlib import Path
from random import Random

import pytest
import tokenizers
import torch

from dsv4_engine import Engine
from dsv4_engine.encoding import encode_messages
from dsv4_engine.errors import InputError
from dsv4_training import code_tree, corpus, evaluate, packing, post, prompts, specialists
from dsv4_training.export import load_parameters, save_checkpoint
from dsv4_training.parameters import initial_parameters
from dsv4_training.pools import Pool, Pools
from dsv4_training.prompts import Plan, draw_question, reward
from dsv4_training.recipe import RECIPES, Data, RecipeError, Stage
from dsv4_training.run import make_tokenizer
from dsv4_training.specialists import Row, Run, near_enough, scores, table

SHIPPED = RECIPES / "post" / "tiny.toml"
STAGE = Stage("tuning", 1, 1024, 1024, "sparse")
NOTHING = {"needles": 0.0, "many_keys": 0.0, "tracking": 0.0, "code_lookup": 0.0, "told": 0.0, "talk": 0.0, "text": 0.0}


@pytest.fixture(scope="module")
def source() -> packing.Source:
    """The training side with little text to fill documents up."""
    folder = Path(Engine.load("tiny").path)
    definition = (folder / "tokenizer.json").read_text(encoding="utf-8")
    text = corpus.load()
    pool = Pool.of(tokenizers.Tokenizer.from_str(definition), [d.text for d in text.training[:6]])
    return packing.Source(text, code_tree.load("bundled", text), Pools((pool,), (1.0,)), definition)


def test_the_shipped_recipe_is_read() -> None:
    recipe = post.load(SHIPPED)
    assert [s.name for s in recipe.specialists] == ["retrieval", "tracking", "code"]
    assert recipe.rewards.writing.room % 128 == 0
    assert {task for s in recipe.specialists for task in s.grounds} <= set(evaluate.TASKS)
    assert post.TASKS == evaluate.TASKS
    assert recipe.tuned(recipe.specialists[1]).data == recipe.specialists[1].data
    assert recipe.tuned(recipe.specialists[1]).stages == (recipe.tuning,)
    assert [stage.length for stage in recipe.tuned(recipe.specialists[2]).stages] == [512, 512, 2048, 8192]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kl = 0.01", "lk = 0.01", "unknown key rewards.lk"),
        ("seed = 11\n", "", "lacks seed"),
        ("length = 3968\nanswer = 64\npasses = 8", "length = 2000\nanswer = 64\npasses = 8", "2000 is not a multiple"),
        ("passes = 8", "passes = 7", "64 answers a step cannot be learnt from in 7 passes"),
        ("prompts = 48", "prompts = 50", "student-2: 50 answers a step cannot be learnt from in 12 passes"),
        ("passes = 12", "passes = 16", "student-1: 96 prompts in 16 passes cannot be dealt out to 3"),
        ('name = "retrieval"', 'name = "student-1"', 'a specialist is named "student-1"'),
        ('name = "code"', 'name = "tracking"', "two specialists or more, each with a name of its own"),
        ('grounds = ["code"]', 'grounds = ["cod"]', "grounds cod"),
        ('grounds = ["code"]', "grounds = []", "grounds are missing"),
        ("answers = 8", "answers = 1", "none to be compared with"),
        ("needles = 0.60", "needles = 0.70", r"shares in \[data\]"),
        ("updates = 1", "updates = true", "rewards.updates is True"),
        ('start = "code"', 'start = "base"', "merging.start is 'base'"),
    ],
)
def test_a_wrong_recipe_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "post.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        post.load(path)


@pytest.mark.parametrize("kind", ["needles", "many_keys", "tracking", "code_lookup", "told", "grouped"])
def test_the_given_answers_earn_everything(kind: str, source: packing.Source) -> None:
    """Cut where the answer begins; the episode's own answer is worth 1, another question's nothing."""
    tokenizer = tokenizers.Tokenizer.from_str(source.definition)
    data = Data(code="bundled", **{**NOTHING, kind: 1.0})
    other: prompts.Question | None = None
    for seed in range(8):
        rng, kept = Random(seed), list[tuple[list[int], list[slice]]]()
        drawn = packing.lengthened

        def noted(*given: object, kept: list[object] = kept, drawn: object = drawn) -> object:  # the whole document
            kept.append(drawn(*given))  # type: ignore[operator]
            return kept[-1]

        packing.lengthened = noted  # type: ignore[assignment]
        try:
            question = draw_question(rng, source, tokenizer, data, STAGE, 1024)
        finally:
            packing.lengthened = drawn
        assert 0 < len(question.ids) <= 1024
        assert question.wanted
        if kept:
            ids = kept[-1][0]
            start = len(question.ids)
            assert ids[:start].tolist() == question.ids.tolist()  # type: ignore[attr-defined]
            given = ids[start : start + question.allowed - prompts.SPARE].tolist()  # type: ignore[attr-defined]
            assert given[-1] == prompts.END
            text = tokenizer.decode(given[:-1], skip_special_tokens=False)
            assert reward(question, text, len(given)) == 1.0
            if other is not None and not any(wanted in text for wanted in other.wanted):
                assert reward(other, text, len(given)) == 0.0
            other = question


def test_questions_are_a_function_of_their_step(source: packing.Source) -> None:
    data = tuple(Data(code="bundled", **{**NOTHING, kind: 1.0}) for kind in ("needles", "tracking"))
    plan = Plan("1/x", source, data, STAGE, 4, 512)
    here, there = list(plan.drawn(3, 0)), list(plan.drawn(3, 2))
    for one, other in zip(here, there, strict=True):
        assert [q.ids.tolist() for q in one] == [q.ids.tolist() for q in other]
    assert here[0][0].ids.tolist() != here[1][0].ids.tolist()
    tokenizer = tokenizers.Tokenizer.from_str(source.definition)
    assert all("VAR " in tokenizer.decode(q.ids.tolist()) for step in here for q in step[2:])


def test_data_without_answers_are_refused(source: packing.Source) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(source.definition)
    with pytest.raises(RecipeError, match="no question of at most 512 tokens"):
        draw_question(Random(0), source, tokenizer, Data(code="bundled", **{**NOTHING, "text": 1.0}), STAGE, 512)


def test_compared_answers_are_scored_as_the_engines() -> None:
    """The same questions through the engine, one at a time, and through many answers at once."""
    engine = Engine.load("tiny")
    config, parameters = load_parameters(Path(engine.path))
    asked = [("The code for otter is 7319.", "the code for otter", "7319"), ("Vera is 12.", "Vera", "4407")]
    samples = []
    for fact, what, wanted in asked:
        text = encode_messages([{"role": "user", "content": f"{fact} What is {what}?"}], "chat")
        ids = engine.tokenizer.encode(text)
        if wanted == "4407":  # no room is left in the prompt's last block
            ids = ids[:1] + engine.tokenizer.encode(" Grass is green.")[:1] * (128 - len(ids)) + ids[1:]
        samples.append(evaluate.Sample("file", len(ids), 0.5, (wanted,), ids, 20))
    assert len(samples[1].prompt_ids) == 128
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(engine.path) / "tokenizer.json"))
    got = list(scores(config, parameters, samples, tokenizer, torch.device("cpu")))
    assert got == [evaluate.score(engine, sample) for sample in samples] == [1.0, 0.0]


def test_the_table_says_who_is_too_far_behind() -> None:
    rows = [Row("a", "ruler", 1024, 50, 80.0, 99.0, 97.5), Row("a", "all", 0, 50, 80.0, 99.0, 97.5)]
    assert near_enough(rows, 2.0)
    assert "1.5  within 2 points" in table(rows, 2.0)
    worse = [*rows, Row("b", "all", 0, 50, 80.0, 99.0, 96.5)]
    assert not near_enough(worse, 2.0)
    assert "2.5  TOO FAR 2 points" in table(worse, 2.0)


TOY = """
name = "toy"
seed = 3
gpu = false
[model]
vocabulary = 2560
hidden_size = 128
heads = 2
compress_ratios = [0, 4, 128]
index_topk = 16
experts = 4
hash_layers = 1
[tuning]
name = "tuning"
steps = 2
length = 512
tokens = 512
attention = "sparse"
index_rows = 64
[tuning_optimiser]
warmup_steps = 1
[rewards.writing]
steps = 2
prompts = 2
answers = 2
length = 512
answer = 8
passes = 2
[rewards.optimiser]
warmup_steps = 1
[merging]
start = "tracking"
[[merging.students]]
[merging.students.writing]
steps = 2
prompts = 2
answers = 1
length = 512
answer = 8
passes = 2
[merging.students.optimiser]
warmup_steps = 1
[[merging.students]]
[merging.students.writing]
steps = 1
prompts = 2
answers = 1
length = 512
answer = 8
passes = 2
[merging.students.optimiser]
warmup_steps = 1
[comparison]
questions = 2
lengths = [512]
[[specialists]]
name = "retrieval"
grounds = ["ruler"]
data = { code = "bundled", needles = 1.0, many_keys = 0.0, tracking = 0.0, code_lookup = 0.0, told = 0.0, talk = 0.0, text = 0.0 }
[[specialists]]
name = "tracking"
grounds = ["tracking"]
data = { code = "bundled", needles = 0.0, many_keys = 0.0, tracking = 1.0, code_lookup = 0.0, told = 0.0, talk = 0.0, text = 0.0 }
"""  # noqa: E501


@pytest.mark.slow
def test_a_run_makes_specialists_and_a_student(tmp_path: Path, source: packing.Source) -> None:
    """Two specialists and the student from a fresh model; what is there is not made again; the table has all rows."""
    path = tmp_path / "toy.toml"
    path.write_text(TOY, encoding="utf-8")
    recipe = post.load(path)
    definition = make_tokenizer(source.corpus, source.tree, 2560, 1)
    config = recipe.model.config()
    # As a run's unrounded parameters may be handed on.
    save_checkpoint(tmp_path / "base", config, initial_parameters(config, 1, {}), definition, quantised=False)
    shutil.copyfile(Path(Engine.load("tiny").path) / "README.md", tmp_path / "base" / "README.md")
    run = Run(recipe, tmp_path / "base", tmp_path / "out", torch.device("cpu"), 0)
    with pytest.raises(InputError, match="no specialist sums"):
        run.train("sums")
    for student in ("student", "student-1"):
        with pytest.raises(InputError, match="retrieval yet"):
            run.train(student)
    run.train("tracking")
    assert not (tmp_path / "out" / "retrieval").exists()
    alone = (tmp_path / "out" / "tracking" / "model.safetensors").read_bytes()
    run.train("retrieval")
    run.train("student-2")
    assert not (tmp_path / "out" / "student-1").exists() and not (tmp_path / "out" / "student").exists()
    run.train()
    assert (tmp_path / "out" / "tracking" / "model.safetensors").read_bytes() == alone
    made = {name: (tmp_path / "out" / name / "model.safetensors") for name in ("retrieval", "tracking", "student")}
    bytes_of = {name: file.read_bytes() for name, file in made.items()}
    assert len(set(bytes_of.values())) == 3
    assert bytes_of["student"] != (tmp_path / "base" / "model.safetensors").read_bytes()
    written = (made["student"].parent / "README.md").read_text(encoding="utf-8")
    assert "the mean of 2 students' weights" in written and "| student-2 |  |  | 1 | 0" in written
    each = [load_parameters(tmp_path / "out" / f"student-{number}")[1] for number in (1, 2)]
    mean = load_parameters(made["student"].parent)[1]["layers.1.attn.wo_b.weight"]  # rounded to FP8
    wanted = (each[0]["layers.1.attn.wo_b.weight"] + each[1]["layers.1.attn.wo_b.weight"]) / 2
    assert (mean - wanted).norm() < 0.05 * wanted.norm()
    for name in ("student", "student-1"):
        (tmp_path / "out" / name / "config.json").unlink()
    run.train()
    assert made["student"].read_bytes() == bytes_of["student"]  # the same seed, the same student
    rows = run.compare()
    assert [(row.specialist, row.ground, row.asked) for row in rows] == [
        ("retrieval", "ruler", 2), ("retrieval", "all", 2), ("tracking", "tracking", 2), ("tracking", "all", 2)
    ]  # fmt: skip
    assert (tmp_path / "out" / "comparison.json").is_file()
    assert run.compare("tracking") == rows[2:]
    assert (tmp_path / "out" / "comparison-tracking.json").is_file()
    assert specialists.near_enough(rows, 100.0)
