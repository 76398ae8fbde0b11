"""The local engine behind the evaluations' Protocol: the template, forks, scores, and what the indexers chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine
from dsv4_engine.config import ModelConfig
from dsv4_engine.encoding import encode_segments
from dsv4_engine.generate import Answer, generate
from dsv4_engine.sampling import Sampling
from dsv4_engine.tokenizer import Tokenizer
from dsv4_evals.errors import TooLongError
from dsv4_evals.model import Prompt, Settings, Turn, Watched
from dsv4cli.evaluation import LocalModel, PromptText, Where, machine, open_model

from .conftest import byte_tokenizer, write_model

PROMPT = PromptText(Tokenizer(byte_tokenizer()), ModelConfig.preset("v4-flash"))
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose indexer chooses 16 of the entries."""
    return write_model(tmp_path_factory.mktemp("model"), index_topk=16)


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalModel:
    opened = open_model(Where(str(folder), no_cache=True))
    assert isinstance(opened, LocalModel)
    return opened


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder)


def ids(text: str) -> list[int]:
    return PROMPT.encode(text)


@pytest.mark.parametrize(("thinking", "effort"), [("none", None), ("high", "high"), ("max", "max")])
def test_the_template_is_the_publishers(thinking: str, effort: str | None) -> None:
    turns = (Turn("system", ids("Be brief.")), Turn("user", ids("Hi <｜User｜>")), Turn("assistant", ids("Hello.")))
    settings = Settings(8, thinking=thinking)  # type: ignore[arg-type]
    before, after = PROMPT.frame(Prompt(ids("Read this: abc"), turns), settings)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <｜User｜>"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Read this: abc and answer?"},
    ]
    segments = encode_segments(messages, "chat" if thinking == "none" else "thinking", effort)  # type: ignore[arg-type]
    assert [*before, *ids(" and answer?"), *after] == PROMPT.tokenizer.encode_segments(segments)
    own = sum(len(turn.ids) for turn in turns) + len(ids("Read this: abc"))
    assert PROMPT.overhead(Prompt(ids("Read this: abc"), turns), settings) == len(before) + len(after) - own


def test_a_plain_prompt_is_a_text_behind_the_first_token() -> None:
    before, after = PROMPT.frame(Prompt(ids("abc"), chat=False), Settings(8))
    assert (before, after) == ([PROMPT.tokenizer.bos_id, *ids("abc")], [])
    assert PROMPT.overhead(Prompt((), chat=False), Settings(8)) == 1


def test_an_answer_is_what_the_engine_says_to_the_whole_prompt(local: LocalModel, engine: Engine) -> None:
    context = local.read(Prompt(ids(TEXT)), Settings(1))
    reply = context.ask(ids("Why?"), Settings(12), opening=ids("Because"))
    before, after = PROMPT.frame(Prompt(ids(TEXT)), Settings(1))
    whole = [*before, *ids("Why?"), *after, *ids("Because")]
    events = list(generate(engine.session(), whole, engine.tokenizer, Sampling(0.0), max_tokens=12))
    assert reply.text == "".join(event.text for event in events if isinstance(event, Answer))
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish) == (len(whole), 12, "length")
    assert context.tokens == len(before)
    assert reply.kv_bytes and context.prefill_s > 0


def test_questions_do_not_see_each_other(local: LocalModel) -> None:
    context = local.read(Prompt(ids(TEXT)), Settings(1))
    first = context.ask(ids("One?"), Settings(8))
    context.ask(ids("Something else entirely?"), Settings(8))
    again = context.ask(ids("One?"), Settings(8))
    assert again.text == first.text
    assert (first.cached_tokens, again.cached_tokens) == (0, context.tokens)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("length", [1, 2, 130, 300])
def test_log_probabilities_are_those_of_the_whole_sequence(
    local: LocalModel, engine: Engine, chat: bool, length: int
) -> None:
    prompt, continuation = Prompt(ids(TEXT), chat=chat), ids(("and then " * 40)[:length])
    found = local.read(prompt, Settings(1)).score(ids("So"), continuation, opening=ids("It"))
    before, after = PROMPT.frame(prompt, Settings(1))
    given = [*before, *ids("So"), *after, *ids("It")]
    logits = engine.session().extend([*given, *continuation], logits="all")[len(given) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    assert found.logprob == pytest.approx(float(logprobs.double().sum()), rel=1e-5)
    assert found.tokens == length
    assert found.greedy == bool((logits.argmax(-1) == torch.tensor(continuation)).all())


def test_what_greedy_decoding_writes_is_greedy(local: LocalModel) -> None:
    context = local.read(Prompt(ids(TEXT), chat=False), Settings(1))
    session = local.engine.session()
    before, _ = PROMPT.frame(Prompt(ids(TEXT), chat=False), Settings(1))
    drawn, logits = [], session.extend(before)
    for _ in range(5):
        drawn.append(int(logits.argmax()))
        logits = session.extend(drawn[-1:])
    assert context.score((), drawn).greedy
    assert not context.score((), [*drawn[:-1], (drawn[-1] + 1) % 200]).greedy


def test_an_empty_plain_prompt_can_be_asked_and_scored(local: LocalModel) -> None:
    context = local.read(Prompt((), chat=False), Settings(1))
    assert context.tokens == 1
    assert context.ask((), Settings(3)).completion_tokens <= 3
    assert context.score((), ids("abc")).logprob < 0


def test_the_trace_holds_what_each_indexer_chose(local: LocalModel) -> None:
    context = local.read(Prompt(ids(TEXT)), Settings(1))
    assert isinstance(context, Watched)
    reply, trace = context.ask_watched(ids("Why?"), Settings(12), steps=5)
    assert reply.text == context.ask(ids("Why?"), Settings(12)).text
    config = local.engine.config
    assert [layer.layer for layer in trace.layers] == [i for i, r in enumerate(config.compress_ratios) if r == 4]
    assert (trace.first, trace.window) == (reply.prompt_tokens - 1, config.sliding_window)
    for layer in trace.layers:
        assert (layer.ratio, layer.overlap, len(layer.steps)) == (4, True, 6)
        for step, chosen in enumerate(layer.steps):
            assert chosen is not None and len(chosen) == config.index_topk
            assert max(chosen) < (trace.first + step + 1) // 4
    assert not any("select" in vars(indexer) for indexer in local.indexers.values())


def test_a_short_context_leaves_the_indexers_nothing_to_choose(local: LocalModel) -> None:
    context = local.read(Prompt(ids("Short.")), Settings(1))
    _, trace = context.ask_watched(ids("Why?"), Settings(2))
    assert all(layer.steps == (None,) * 3 for layer in trace.layers)


def test_what_was_read_once_is_not_read_again_and_answers_are_the_same(
    local: LocalModel, folder: Path, tmp_path: Path
) -> None:
    """Also across processes and after an interruption: the store is on disk."""
    prompt, where = Prompt(ids(TEXT * 5)), Where(str(folder), cache_dir=tmp_path / "cache")
    plain = local.read(prompt, Settings(1)).ask_watched(ids("Why?"), Settings(12))

    def interrupted(done: int, total: int) -> None:
        if done >= 2048:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_model(where).read(prompt, Settings(1), interrupted)
    for least in (2048, 2560):
        context = open_model(where).read(prompt, Settings(1))
        assert context.cached_tokens >= least
        assert isinstance(context, Watched)
        reply, trace = context.ask_watched(ids("Why?"), Settings(12))
        assert (reply.text, reply.finish, trace) == (plain[0].text, plain[0].finish, plain[1])
        assert reply.cached_tokens == context.cached_tokens


def test_a_prompt_that_leaves_no_room_is_too_long(local: LocalModel) -> None:
    with pytest.raises(TooLongError, match="no room"):
        local.read(Prompt([5] * local.ctx), Settings(1))


def test_costs_fingerprint_and_machine(local: LocalModel, folder: Path) -> None:
    cost = local.cost(1000, 10)
    assert cost and 0 < cost.kv_bytes < cost.kv_bytes_v32 and 0 < cost.flops < cost.flops_v32
    other = open_model(Where(str(folder), kv_dtype="fp32"))
    assert other.fingerprint != local.fingerprint
    assert open_model(Where(str(folder))).fingerprint == local.fingerprint
    assert {"device", "chunk", "memory", "versions", "cpu"} <= local.about().keys()
    assert machine()["cpus"] >= 1
