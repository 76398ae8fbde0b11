"""Training text: answers stand in their documents, evaluation is kept apart, and seeds decide everything."""

import dataclasses
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tokenizers

from dsv4_engine.encoding import encode_messages
from dsv4_engine.errors import InputError
from dsv4_engine.protocol import EOS, SPECIAL_TOKENS
from dsv4_engine.tokenizer import Tokenizer
from dsv4_training import code_tree, corpus, episodes, evaluate, facts, leaks, membership, names, packing, tasks
from dsv4_training.code_tree import CodeTree, SourceFile
from dsv4_training.corpus import Corpus, Document, is_held_out
from dsv4_training.episodes import Seam, Special
from dsv4_training.facts import ANSWER, MEMBER, NOISE, PART, PROMPT, SAID, TEXT, VALUE
from dsv4_training.packing import Batch, Source
from dsv4_training.pools import Pools
from dsv4_training.recipe import BLOCK, Recipe, Stage
from dsv4_training.vocabulary import number_tokens, train_tokenizer

STAGE = Stage("a", 4, 1024, 2048, "sparse", shortest=256, jumps=0.7, farthest=131072, index_rows=64)


@pytest.fixture(scope="module")
def text() -> Corpus:
    """A part of the corpus, enough of each kind and side."""
    whole = corpus.load()
    return dataclasses.replace(whole, training=whole.training[::6], evaluation=whole.evaluation[::3])


@pytest.fixture(scope="module")
def tree() -> CodeTree:
    return code_tree.load("bundled", corpus.load())


@pytest.fixture(scope="module")
def definition(text: Corpus) -> str:
    return train_tokenizer([d.text[:9000] for d in text.training], 2500)


@pytest.fixture(scope="module")
def tokenizer(definition: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(definition)


@pytest.fixture(scope="module")
def source(text: Corpus, tree: CodeTree, definition: str, tokenizer: tokenizers.Tokenizer) -> Source:
    few = dataclasses.replace(text, training=text.training[::4])
    return Source(text, tree, Pools.build(tokenizer, few, None, 1), definition)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    later = dataclasses.replace(STAGE, name="b", length=2048)
    return Recipe(name="x", seed=3, gpu=False, stages=(STAGE, later))


def test_corpus_and_code_are_split_by_name(tree: CodeTree) -> None:
    whole = corpus.load()
    kinds = {"kjv", "python-docs", "python-lib"}
    assert {d.kind for d in whole.training} == {d.kind for d in whole.evaluation} == kinds
    assert all(is_held_out(d.name) for d in whole.evaluation)
    assert not any(is_held_out(d.name) for d in whole.training)
    assert not {f.path for f in tree.training} & {f.path for f in tree.evaluation}
    assert all(file.functions() for file in (*tree.training, *tree.evaluation))


def test_a_missing_corpus_says_where_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkout"):
        corpus.load(tmp_path / "none.xz")


def test_too_little_code_is_refused(text: Corpus, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def one():\n" + "    pass\n" * 100, encoding="utf-8")
    with pytest.raises(InputError, match="too little code"):
        code_tree.load("stdlib", text, tmp_path)


def test_nothing_leaks_and_a_leak_is_found(text: Corpus, tree: CodeTree) -> None:
    assert max(leaks.check(text, tree).values()) <= leaks.MOST_SHARED
    held = tree.evaluation[0]
    copied = dataclasses.replace(tree, training=(*tree.training, SourceFile("copy_of_it.py", held.text)))
    with pytest.raises(leaks.LeakError, match=held.path):
        leaks.check(text, copied)
    moved = dataclasses.replace(text, training=(*text.training, Document(text.evaluation[0].name, "x")))
    with pytest.raises(leaks.LeakError, match="training side"):
        leaks.check(moved, tree)


@pytest.mark.parametrize("evaluation", [False, True])
def test_keys_and_variables_belong_to_their_side(text: Corpus, evaluation: bool) -> None:
    rng = Random(1)
    stated = [f for _ in range(40) for f in facts.draw_facts(rng, text, 5, evaluation)]
    assert all(is_held_out(f.key) == evaluation for f in stated if f.key)
    assert all(is_held_out(key) == evaluation for key in tasks.similar_keys(rng, text, 9, evaluation))
    for chain in tasks.draw_chains(rng, 3, 4, 5, evaluation):
        assert len(chain.names) == 5
        assert all(is_held_out(name) == evaluation for name in chain.names)


def test_held_out_wordings_are_never_trained_on(text: Corpus) -> None:
    rng = Random(2)
    seen, new = set(), set()
    for _ in range(300):
        seen |= {f.statement for f in facts.draw_facts(rng, text, 3)}
        new |= {f.statement for f in facts.draw_facts(rng, text, 3, evaluation=True, ruler=0.0)}
    assert new == set(facts.STATEMENTS[-facts.HELD_OUT_STATEMENTS :])
    assert not any(statement in other for statement in new for other in seen)


def pieces_of(episode: episodes.Episode, kind: int) -> list[str]:
    return [p[0] for p in episode.parts if not isinstance(p, Special | Seam) and p[1] == kind]


def test_answers_stand_in_their_documents(text: Corpus) -> None:
    rng = Random(3)
    for i in range(90):
        length = rng.choice((200, 600, 2000))
        if i % 3 == 2:
            episode = tasks.many_keys(rng, text, length)
        else:
            episode = episodes.retrieval(rng, text, length, (1.0, 0.0)[i % 2])
        whole, wanted = episode.text(), pieces_of(episode, VALUE)
        assert wanted
        for fact in episode.asked:
            stated = "".join(piece for piece, _ in fact.stated())
            assert stated in whole
            assert fact.value in stated
        assert set(wanted) <= {fact.value for fact in episode.asked}


def test_chains_can_be_followed_through_the_text(text: Corpus) -> None:
    rng = Random(4)
    for _ in range(40):
        episode = tasks.tracking(rng, text, rng.choice((300, 1500)))
        whole = episode.text().rpartition(tasks.RULER_TRACKING)[2]  # behind the worked example, if there is one
        found = dict(line.split(" = ") for line in _assignments(whole))
        order = list(found)
        names_asked = pieces_of(episode, VALUE)
        assert names_asked
        values = {_value(found, name) for name in names_asked}
        assert len(values) <= 4  # questions
        assert {name for name in found if _value(found, name) in values} == set(names_asked)
        for name in names_asked:
            if found[name].startswith("VAR "):
                assert order.index(found[name][4:]) < order.index(name)


def _assignments(text: str) -> list[str]:
    return re.findall(r"(?<=VAR )[A-Z]{3,6} = (?:VAR [A-Z]{3,6}|\d{5})", text)


def _value(found: dict[str, str], name: str) -> str:
    said = found[name]
    return _value(found, said[4:]) if said.startswith("VAR ") else said


def test_the_file_named_defines_the_function(text: Corpus, tree: CodeTree) -> None:
    rng = Random(5)
    for i in range(30):
        episode = tasks.code_lookup(rng, text, tree, rng.choice((500, 2000)), evaluation=i % 2 == 0)
        blocks = episode.text().split("[file name]: ")[1:]
        files = {block.split("\n", 1)[0]: block for block in blocks}
        asked = [p for p in episode.parts if not isinstance(p, Special | Seam)]
        answers = [(asked[n - 1][0], p[0]) for n, p in enumerate(asked) if p[1] == VALUE]
        assert answers
        for said, path in answers:
            signature, rest = said.rsplit(" is in ", 1)
            assert rest == "" and "(" in signature
            assert f"def {signature}" in files[path]


def test_things_belong_to_the_last_part_named_before_them(text: Corpus, tree: CodeTree) -> None:
    near = set()
    for seed in range(60):
        rng = Random(seed)
        episode = membership.grouped(rng, text, tree, rng.choice((250, 460, 2000)))
        pieces = [part for part in episode.parts if not isinstance(part, Special | Seam)]
        end = next(i for i, (_, kind) in enumerate(pieces) if kind in SAID) - 1  # its question
        document = "".join(written for written, _ in pieces[:end])
        starts = np.cumsum([0, *(len(written) for written, _ in pieces[:end])])
        members = [n for n in range(end) if pieces[n][1] == MEMBER]  # a thing, what follows it, a thing, ...
        things = {pieces[n][0]: int(starts[n]) for n in members[::2]}
        turns = "".join("\0" if isinstance(p, Special) else "" if isinstance(p, Seam) else p[0] for p in episode.parts)
        names = [written for written, kind in pieces if kind == VALUE]
        said = [line for line in turns[turns.index(document) + len(document) :].split("\0") if line.strip()]
        assert len(said) == 2 * len(names)
        for question, name in zip(said[::2], names, strict=True):
            thing = max((t for t in things if t in question), key=len)
            last = max(n for n in range(end) if pieces[n][1] == PART and starts[n] < things[thing])
            assert pieces[last][0] == name
            near.add(things[thing] - starts[last] < 80)
    assert near == {True, False}


def test_values_have_the_lengths_asked_for() -> None:
    rng = Random(4)
    assert {len(names.digits(rng, 7)) for _ in range(50)} == {7}
    with pytest.raises(ValueError, match="unknown kind"):
        names.draw_value(rng, "colour", ("a",))


@pytest.mark.parametrize("thinking", [False, True])
def test_conversations_follow_the_published_encoding(thinking: bool) -> None:
    turns = [
        episodes.Turn([("Hi ", PROMPT), ("there", PROMPT)], (("Hello.", ANSWER),)),
        episodes.Turn([("Why?", PROMPT)], (("So.", ANSWER),), (("Let me think.", ANSWER),)),
    ]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "Let me think."},
    ]
    parts = episodes.chat(turns, thinking, "Be kind.")
    expected = encode_messages(messages, thinking_mode="thinking" if thinking else "chat")
    assert episodes.Episode(parts).text() == expected


def test_prefilled_answers_leave_the_last_space_to_the_model() -> None:
    turn = episodes.Turn([("Q", PROMPT)], (("It is ", ANSWER), ("42", VALUE), (".", ANSWER)))
    parts = episodes.chat([turn], prefilled=1)
    pieces = [part for part in parts if not isinstance(part, Special)]
    assert pieces == [("Q", PROMPT), ("It is", PROMPT), (" ", ANSWER), ("42", VALUE), (".", ANSWER)]


def test_tokens_take_the_class_of_their_text(text: Corpus, tokenizer: tokenizers.Tokenizer) -> None:
    rng = Random(5)
    for _ in range(20):
        episode = episodes.retrieval(rng, text, 400, 0.5)
        ids, classes, seams = packing.classified(tokenizer, episode)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == episode.text()
        got = tokenizer.decode(ids[classes == VALUE].tolist())
        assert got.replace(" ", "") == "".join(pieces_of(episode, VALUE)).replace(" ", "")
        ends = ids == tokenizer.token_to_id(EOS)
        assert (classes[ends] == ANSWER).all()
        assert len(seams) == sum(isinstance(part, Seam) for part in episode.parts)


def test_documents_grow_at_their_seams(source: Source, tokenizer: tokenizers.Tokenizer) -> None:
    rng = Random(6)
    episode = episodes.retrieval(rng, source.corpus, 800, 1.0)
    ids, classes, seams = packing.classified(tokenizer, episode)
    longer, kinds = packing.lengthened(rng, source.pools, ids, classes, seams, 4096)
    assert len(longer) == len(kinds) == 4096
    written = tokenizer.decode(longer.tolist(), skip_special_tokens=False)
    for fact in episode.asked:
        assert "".join(piece for piece, _ in fact.stated()) in written
    assert (kinds == VALUE).sum() == (classes == VALUE).sum()
    assert (kinds == TEXT).sum() == (classes == TEXT).sum() + 4096 - len(ids)


def check_batch(batch: Batch, stage: Stage) -> None:
    blocks = stage.length // BLOCK
    assert batch.ids.shape == batch.classes.shape == (stage.batch, stage.length)
    assert batch.start.shape == batch.place.shape == (stage.batch, blocks)
    assert batch.rows.shape == (stage.batch, stage.index_rows // stage.batch)
    for start, place in zip(batch.start, batch.place, strict=True):
        for block in range(blocks):
            if start[block] == block:
                assert place[block] == 0
            else:
                assert start[block] == start[block - 1]
                assert place[block] > place[block - 1]
    assert batch.place.max() < stage.farthest // BLOCK


def test_batches_are_whole_documents_and_depend_on_seed_and_step_alone(recipe: Recipe, source: Source) -> None:
    drawn = [batch for batch, _ in zip(packing.Stream(recipe, source, 2, 0), range(4), strict=False)]
    spread = packing.Stream(recipe, source, 2, workers=2)
    for number, (batch, again) in enumerate(zip(drawn, spread, strict=False)):
        check_batch(batch, recipe.stage(number + 2))
        for field in dataclasses.fields(Batch):
            assert np.array_equal(getattr(batch, field.name), getattr(again, field.name))
    spread.close()
    assert not np.array_equal(drawn[0].ids, drawn[1].ids)
    assert any((np.diff(batch.place) > 1).any() for batch in drawn)  # positions jump
    assert any((batch.start > 0).any() for batch in drawn)  # several documents a sequence


def test_every_document_begins_a_block_and_opens_with_bos(recipe: Recipe, source: Source) -> None:
    batch = packing.draw_batch(recipe, 0, source, tokenizers.Tokenizer.from_str(source.definition))
    for row, start in enumerate(batch.start):
        for block in np.flatnonzero(start == np.arange(len(start))):
            first = batch.classes[row, block * BLOCK]
            assert batch.ids[row, block * BLOCK] == 0 or first == TEXT
            assert first in (NOISE, TEXT)


def test_samples_ask_for_what_their_prompts_hold(text: Corpus, tree: CodeTree, tokenizer: tokenizers.Tokenizer) -> None:
    few = dataclasses.replace(text, evaluation=text.evaluation[::4])
    ground = evaluate.Ground.of(few, tree, tokenizer)
    samples = list(evaluate.draw_samples(ground, 2, 1, lengths=(1500,)))
    assert [s.task for s in samples[::2]] == list(evaluate.TASKS)
    for sample in samples:
        prompt = tokenizer.decode(sample.prompt_ids, skip_special_tokens=False)
        assert all(wanted in prompt for wanted in sample.wanted)
        if sample.task == "code":
            assert 1200 < len(sample.prompt_ids) <= 1500
        else:
            assert len(sample.prompt_ids) == 1500
        if sample.task == "ruler":
            assert prompt.endswith("mentioned in the provided text is")
            assert facts.RULER_INTRODUCTION in prompt
        if sample.task == "multikey":
            assert prompt.count("One of the special magic numbers for") == 1 + evaluate.DISTRACTORS
        if sample.task == "tracking":
            assert len(sample.wanted) == 1 + evaluate.HOPS
    again = list(evaluate.draw_samples(ground, 2, 1, lengths=(1500,)))
    assert samples == again
    with pytest.raises(ValueError, match="more than the 64"):
        evaluate.draw_sample(Random(1), ground, "ruler", 64, 0.5)


def test_tokenizer_is_lossless_and_splits_numbers_by_three(definition: str) -> None:
    model = Tokenizer(definition, 2500)
    for piece in ("1234567", "a\tb\r\n  c", "naïve ☕ 漢字 \U0001f600", "x=12;  y = 3\n\n", " One", "\x00\x7f", "١٢٣"):
        assert model.decode(model.encode(piece)) == piece
    assert [model.decode([i]) for i in model.encode("n 1234567.")] == ["n", " ", "123", "456", "7", "."]
    digits = number_tokens(definition)
    assert len(digits) == 1110
    assert all(model.encode(value) == [i] for i, value in digits.items())
    assert [model.special_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(["a b c"], 1000)
    with pytest.raises(ValueError, match="more text"):
        train_tokenizer(["a b c"], 3000)


def test_wilson_interval() -> None:
    low, high = evaluate.interval(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert evaluate.interval(0, 0) == (0.0, 1.0)
    assert evaluate.interval(64, 64)[1] == 1.0
