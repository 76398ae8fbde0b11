"""A session that starts from what is kept is, bit for bit, the one that read everything itself.

Over random prompts, edits and places where a prompt is split, for every policy and kv_dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine
from dsv4_engine.accounting import kv_bytes
from dsv4_engine.prefix_cache.cache import PrefixCache
from dsv4_engine.prefix_cache.policy import POLICIES, Policy
from dsv4_engine.state import KV_DTYPES
from support.random_checkpoint import make_checkpoint

from .conftest import CHUNK, SEGMENT, VOCAB, cached, check, feed, prompt
from .memory_store import MemoryStore

pytestmark = pytest.mark.usefixtures("short_segments")


def variant(ids: list[int], rng: random.Random) -> list[int]:
    """The same prompt, or one cut short, longer, or with an edit somewhere."""
    at = rng.randrange(1, len(ids))
    kind = rng.choice(["same", "cut", "longer", "changed", "inserted", "removed"])
    return {
        "same": ids,
        "cut": ids[:at],
        "longer": ids + rng.choices(range(VOCAB), k=rng.randrange(1, 300)),
        "changed": [*ids[:at], (ids[at] + 1) % VOCAB, *ids[at + 1 :]],
        "inserted": [*ids[:at], *rng.choices(range(VOCAB), k=3), *ids[at:]],
        "removed": [*ids[:at], *ids[at + 1 :]],
    }[kind]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", POLICIES)
def test_cached_is_uncached(engines: Callable[[str], Engine], name: str, kv_dtype: str) -> None:
    rng = random.Random(f"{name} {kv_dtype}")
    cache = PrefixCache(MemoryStore(), engines(kv_dtype), Policy(name, 512))
    ids = prompt(rng.randrange(530, 700), seed=rng.random())
    assert check(cache, ids, rng) == 0
    for _ in range(3):
        check(cache, variant(ids, rng), rng)
    cached(cache, ids)
    assert check(cache, ids, rng) >= 384


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", POLICIES)
def test_cached_is_uncached_at_length(tmp_path: Path, name: str, kv_dtype: str) -> None:
    rng = random.Random(f"{name} {kv_dtype}")
    folder = make_checkpoint(tmp_path / "m", quantised=rng.random() < 0.5, seed=rng.randrange(100), index_n_heads=16)
    engine = Engine.load(folder, kv_dtype=kv_dtype)
    for chunk in (128, 384, 512):
        cache = PrefixCache(MemoryStore(), replace(engine, chunk=chunk), Policy(name, 512))
        ids = prompt(rng.randrange(1200, 2500), seed=rng.random())
        for _ in range(4):
            check(cache, ids, rng)
            ids = variant(ids, rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_cached_is_uncached_with_the_bundled_model(name: str) -> None:
    rng = random.Random(name)
    engine = Engine.load("tiny")
    cache = PrefixCache(MemoryStore(), engine, Policy(name, 2048))
    ids = rng.choices(range(engine.config.vocab_size), k=9000)
    reused = [check(cache, ids, rng)]
    for _ in range(4):
        reused.append(check(cache, variant(ids, rng), rng))
    assert sum(reused) > 0


# ---- how much is reused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "again"), [("full", 1024), ("periodic", 1024), ("zero", 1024 - 128)])
def test_the_same_prompt_again(engine: Engine, name: str, again: int) -> None:
    cache = PrefixCache(MemoryStore(), engine, Policy(name))
    ids = prompt(1100)
    first, nothing = cached(cache, ids)
    second, reused = cached(cache, ids)
    assert (nothing, reused) == (0, again)
    assert torch.equal(first, second)


def test_another_question_about_the_same_text(engine: Engine) -> None:
    text = prompt(1000)
    cache = PrefixCache(MemoryStore(), engine)
    cached(cache, text + prompt(20, seed=1))
    _, reused = cached(cache, text + prompt(100, seed=2))
    assert reused == 896  # the last chunk that is text alone


def test_an_edit_costs_its_segment_and_a_replay_at_most(engine: Engine) -> None:
    cache = PrefixCache(MemoryStore(), engine)
    ids = prompt(1200)
    cached(cache, ids)
    for at in range(5, 1200, 111):
        edited = [*ids[:at], (ids[at] + 1) % VOCAB, *ids[at + 1 :]]
        _, reuse = PrefixCache(cache.store, engine).start(edited)
        assert reuse.tokens >= at - SEGMENT - cache.grid.reach


def test_the_last_token_is_always_computed(engine: Engine) -> None:
    """Its logits are what the caller wants."""
    cache = PrefixCache(MemoryStore(), engine, Policy("full"))
    ids = prompt(1025)
    cached(cache, ids)
    for length, reused in ((1024, 896), (1025, 1024), (129, 128), (128, 0), (1, 0)):
        assert cached(cache, ids[:length])[1] == reused


def test_a_base_in_memory_is_used_where_it_holds_more(engine: Engine) -> None:
    ids = prompt(1000)
    cache = PrefixCache(MemoryStore(), engine)
    cached(cache, ids[:600])
    base = engine.session()
    base.extend(ids[:128], logits="none")
    assert cache.start(ids, base)[1].tokens == 512
    base.extend(ids[128:768], logits="none")
    session, reuse = cache.start(ids, base)
    assert (session is base, reuse.tokens) == (True, 768)
    feed(session, ids)
    assert cached(cache, ids)[1] == 896  # what only the base had is kept too


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_what_is_kept_where(engine: Engine) -> None:
    stores = {name: MemoryStore() for name in POLICIES}
    for name, store in stores.items():
        cached(PrefixCache(store, engine, Policy(name, 512)), prompt(1200))
        assert store.ends("rows") == [256, 512, 768, 1024]
    assert stores["full"].ends("state") == [CHUNK * n for n in range(1, 10)]
    assert stores["periodic"].ends("state") == [512, 1024, 1152]
    assert stores["zero"].ends("state") == []
    rows = sum(len(payload) for (_, kind), payload in stores["zero"].objects.items() if kind == "rows")
    assert rows == kv_bytes(engine.config, "mixed", 1024)


def test_two_prompts_keep_their_common_part_once(engine: Engine) -> None:
    store = MemoryStore()
    text = prompt(800)
    for seed in (1, 2, 3):
        cached(PrefixCache(store, engine, Policy("zero")), text + prompt(300, seed))
    assert store.ends("rows") == [256, 512, 768, 1024, 1024, 1024]


def test_ends_of_shorter_prompts_make_room(engine: Engine) -> None:
    """A prompt that grows and grows leaves few states, and each time starts where it ended before."""
    store = MemoryStore()
    ids = prompt(2300)
    for length in range(200, 2300, 200):
        _, reused = cached(PrefixCache(store, engine, Policy("periodic", 1024)), ids[:length])
        assert reused >= length - 200 - CHUNK
    ends = store.ends("state")
    assert {1024, 2048} <= set(ends)
    assert len(ends) <= 7
    assert all(end % 1024 == 0 or end > 2200 - 2 * SEGMENT - CHUNK for end in ends)


def test_decoded_tokens_and_what_follows_them_are_not_kept(engine: Engine) -> None:
    store = MemoryStore()
    cache = PrefixCache(store, engine, Policy("full"))
    ids = prompt(300)
    session, _ = cache.start(ids)
    feed(session, ids)
    for token in prompt(150, seed=1):
        session.extend([token])
    session.extend(prompt(300, seed=2))
    assert (store.ends("rows"), store.ends("state")) == ([256], [128, 256])


def test_going_on_with_something_else_is_not_kept_as_the_prompt(engine: Engine) -> None:
    store = MemoryStore()
    cache = PrefixCache(store, engine, Policy("full"))
    ids, other = prompt(600), prompt(600, seed=1)
    session, _ = cache.start(ids)
    session.extend(ids[:256], logits="none")
    session.extend(other[256:], logits="none")
    assert store.ends("rows") == [256]
    check(cache, ids, random.Random(0))
    check(cache, ids[:256] + other[256:], random.Random(0))


def test_forks_keep_nothing(engine: Engine) -> None:
    store = MemoryStore()
    session, _ = PrefixCache(store, engine).start(prompt(600))
    session.fork().extend(prompt(600), logits="none")
    assert not store.objects


def test_a_store_that_cannot_be_written_to_is_read(engine: Engine) -> None:
    store, ids = MemoryStore(), prompt(800)
    cached(PrefixCache(store, engine), ids)
    kept = dict(store.objects)
    store.writable = False
    again, reused = cached(PrefixCache(store, engine), ids + ids)
    assert reused > 0
    assert store.objects == kept
    assert torch.equal(again, feed(engine.session(), ids + ids))


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_nothing_crosses_models_formats_and_chunks(engines: Callable[[str], Engine], tmp_path: Path) -> None:
    store, ids = MemoryStore(), prompt(400)
    mixed = engines("mixed")
    merged = Engine.load(make_checkpoint(tmp_path / "other", quantised=True, seed=1))
    bfloat16 = Engine.load(mixed.path, dtype="bfloat16")
    others = [engines("bf16"), replace(mixed, chunk=256), replace(merged, chunk=128), replace(bfloat16, chunk=128)]
    for engine in (mixed, *others):
        logits, reused = cached(PrefixCache(store, engine), ids)
        assert reused == 0
        assert torch.equal(logits, feed(engine.session(), ids))
    assert cached(PrefixCache(store, Engine.load(mixed.path)), ids)[1] == 0  # 512 a chunk
    assert cached(PrefixCache(store, mixed), ids)[1] > 0


def test_one_changed_weight_is_another_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    from dsv4_engine import weights
    from dsv4_engine.prefix_cache.origin import origin_of

    monkeypatch.setattr(weights, "_FINGERPRINT_BYTES", 1024)  # it looks into small tensors only
    tensors = load_file(folder / "model.safetensors")
    changed = tensors["layers.1.ffn.experts.3.w2.weight"].clone()
    changed.view(-1)[0] ^= 1
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors | {"layers.1.ffn.experts.3.w2.weight": changed}, tmp_path / "model.safetensors")
    here, there = Engine.load(folder), Engine.load(tmp_path)
    assert here.weights.fingerprint == there.weights.fingerprint
    assert origin_of(here) != origin_of(there)


def test_a_large_model_is_known_by_its_files(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from dsv4_engine.prefix_cache import origin

    monkeypatch.setattr(origin, "_READ_WHOLE", 0)
    before = origin.origin_of(engine)
    assert origin.origin_of(engine) == before
    file = engine.path / "model.safetensors"
    about = file.stat()
    try:
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
        assert origin.origin_of(engine) != before
    finally:
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_the_format_can_be_compared_part_by_part(engine: Engine) -> None:
    """The store names what differs from "name=value" parts that hold no spaces."""
    parts = PrefixCache(MemoryStore(), engine).origin.row_format.split(" ")
    assert all(part.count("=") == 1 for part in parts)
