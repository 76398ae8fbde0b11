"""The same promise on a GPU: a cached session is, bit for bit, an uncached one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine
from dsv4_engine.prefix_cache.cache import PrefixCache
from dsv4_engine.prefix_cache.policy import POLICIES, Policy
from dsv4_engine.state import KV_DTYPES

from .conftest import CHUNK, VOCAB, assert_same_state, feed
from .memory_store import MemoryStore

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("short_segments")]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", POLICIES)
def test_cached_is_uncached_on_a_gpu(folder: Path, name: str, kv_dtype: str) -> None:
    rng = random.Random(f"{name} {kv_dtype}")
    engine = replace(Engine.load(folder, device="cuda", kv_dtype=kv_dtype), chunk=CHUNK)
    store = MemoryStore()
    ids = rng.choices(range(VOCAB), k=900)
    for edit in (None, None, 850, 500, 130):
        if edit is not None:
            ids = [*ids[:edit], (ids[edit] + 1) % VOCAB, *ids[edit + 1 :]]
        plain, cache = engine.session(), PrefixCache(store, engine, Policy(name, 512))
        session, _ = cache.start(ids)
        assert torch.equal(feed(session, ids), feed(plain, ids))
        assert_same_state(session.state, plain.state)
        more = rng.choices(range(VOCAB), k=150)
        assert torch.equal(session.extend(more, logits="all"), plain.extend(more, logits="all"))
    assert cache.replays, "no replay on this device: `zero` reuses nothing"
    assert cache.start(ids)[1].tokens >= 512


@pytest.mark.parametrize("name", POLICIES)
def test_cached_is_uncached_on_the_triton_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In segments of two chunks of 512, over the bundled model, whose windows take 768 tokens to find again."""
    monkeypatch.setattr("dsv4_engine.prefix_cache.policy.SEGMENT_TOKENS", 1024)
    rng = random.Random(name)
    engine = replace(Engine.load("tiny", device="cuda", dtype="bfloat16"), chunk=512)
    assert engine.backend.name == "triton", engine.backend.why
    store, ids = MemoryStore(), rng.choices(range(engine.config.vocab_size), k=5000)
    for edit in (None, None, 4700, 3000, 600):
        if edit is not None:
            ids = [*ids[:edit], (ids[edit] + 1) % engine.config.vocab_size, *ids[edit + 1 :]]
        plain, cache = engine.session(), PrefixCache(store, engine, Policy(name, 2048))
        session, _ = cache.start(ids)
        assert torch.equal(feed(session, ids), feed(plain, ids))
        assert_same_state(session.state, plain.state)
        for token in rng.choices(range(engine.config.vocab_size), k=20):
            assert torch.equal(session.extend([token]), plain.extend([token]))
    assert cache.replays
    assert cache.start(ids)[1].tokens >= 2048
