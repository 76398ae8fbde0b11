"""The model that ships with the package: its size and form, and that it does what its card says (a few samples)."""

from pathlib import Path

import pytest
import tokenizers

from dsv4_engine import Engine
from dsv4_engine.encoding import encode_segments
from dsv4_engine.generate import Answer, generate
from dsv4_engine.sampling import Sampling
from dsv4_training import card, code_tree, corpus, evaluate, post, recipe
from dsv4_training.export import load_parameters

LARGEST = 24_000_000


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("tiny")


def say(engine: Engine, *turns: str) -> str:
    """The model's greedy answer to the last of the user's turns, after its own answers to the others."""
    messages: list[dict[str, str]] = []
    answer = ""
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = engine.tokenizer.encode_segments(encode_segments(messages, thinking_mode="chat"))
        events = generate(engine.session(), ids, engine.tokenizer, Sampling(temperature=0), max_tokens=60)
        answer = "".join(event.text for event in events if isinstance(event, Answer))
        messages.append({"role": "assistant", "content": answer})
    return answer


def test_it_is_small_and_complete(engine: Engine) -> None:
    folder = Path(engine.path)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LARGEST
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {f.name for f in folder.iterdir()}
    assert {engine.config.layer_kind(i) for i in range(engine.config.num_hidden_layers)} == {"window", "csa", "hca"}
    assert (engine.config.hc_mult, engine.config.num_nextn_predict_layers) == (4, 1)
    assert engine.config.num_hash_layers >= 1
    assert "# dsv4-tiny" in (folder / "README.md").read_text(encoding="utf-8")


def test_its_parameters_load_for_more_training(engine: Engine) -> None:
    config, parameters = load_parameters(Path(engine.path))
    assert config == engine.config
    assert all(p.requires_grad != name.endswith("tid2eid") for name, p in parameters.items())


def test_it_talks(engine: Engine) -> None:
    assert "What would you like to know?" in say(engine, "Hello!")
    assert "dsv4-tiny" in say(engine, "Hello!", "Who are you?")
    assert "facts in a text" in say(engine, "Hi", "Who are you?", "What can you do?")
    assert "Paris" in say(engine, "What is the capital of France?")
    assert "Emil" in say(engine, "My name is Emil.", "What is my name?")


@pytest.mark.parametrize("task", ["ruler", "file"])
def test_it_finds_needles(engine: Engine, task: str) -> None:
    text = corpus.load()
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(engine.path) / "tokenizer.json"))
    ground = evaluate.Ground.of(text, code_tree.load("bundled", text), tokenizer)
    samples = list(evaluate.draw_samples(ground, 4, 99, (task,), (1024,)))
    assert evaluate.run(engine, samples)[0]["right"] >= 3


def test_it_packs_held_out_text_better_than_xz(engine: Engine) -> None:
    documents = [d for d in corpus.load().evaluation if d.kind == "kjv"][:1]
    bits = evaluate.bits_per_byte(engine, documents)
    assert bits["bytes"] == len(documents[0].text.encode("utf-8"))
    assert 0.5 < bits["model"] < bits["xz"]


def test_the_card_states_what_was_made_and_measured(engine: Engine) -> None:
    made = recipe.load(recipe.RECIPES / "tiny.toml")
    account = {"seconds": 90.0, "calls": 2, "device": "GPU"}
    last = {"step": made.steps, "tokens": 1e6, "mass": 0.987, "length": 131072, "accepted": 0.5}
    text = card.model_card(made, made.model.config(), account, last, "the library", 16_000_000)
    assert "Not yet" in text
    assert "in 2 goes" in text
    assert "98.7% of the attention over sequences of 131,072 tokens" in " ".join(text.split())
    for stage in made.stages:
        assert f"| {stage.name} | {stage.steps:,} |" in text
    assert "{" not in text
    scores = [{"task": "ruler", "length": 1024, "right": 9, "asked": 10}]
    scored = card.with_measured(text, scores, {"bytes": 1000, "model": 1.7, "xz": 2.0})
    assert "| 1024 | 9 of 10 | 90.0% | 59.6% to 98.2% |" in scored
    assert "1.70 (`xz -9`: 2.00)" in scored
    assert "Not yet" not in scored
    assert card.with_measured(scored, [], None) == text


def test_the_students_card_is_the_bases_with_how_it_was_merged(engine: Engine) -> None:
    base = (Path(engine.path) / card.FILE).read_text(encoding="utf-8")
    assert card.is_card(base)
    assert not card.is_card(base.replace("## Measured", "## Scores"))
    made = post.load(recipe.RECIPES / "post" / "tiny.toml")
    text = card.student_card(base, made, {"code": {"seconds": 90.0, "device": "GPU"}})
    steps = sum(stage.steps for stage in made.specialists[2].tuning)
    assert f"| code | {steps:,} | " in text
    assert " | 1.5, GPU |" in text
    assert " | not kept |" in text
    assert "began as the specialist of code" in " ".join(text.split())
    assert card.is_card(text)
    assert "Not yet" in text
    for part in (base[: base.index("## Measured")], base[base.index("## Shape") :]):
        assert part in text
