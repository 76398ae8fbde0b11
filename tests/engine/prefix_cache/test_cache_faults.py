"""Whatever goes wrong with what is kept, the answer stays the same; and what is kept can be computed again."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine
from dsv4_engine.prefix_cache import Miss, PrefixStore, Segment, segments
from dsv4_engine.prefix_cache.cache import PrefixCache, replay
from dsv4_engine.prefix_cache.policy import POLICIES, Policy

from .conftest import cached, check, feed, prompt
from .memory_store import MemoryStore

pytestmark = pytest.mark.usefixtures("short_segments")


@pytest.mark.parametrize("name", POLICIES)
def test_objects_that_cannot_be_read_are_done_without(engine: Engine, name: str) -> None:
    """Whichever of them it is, each is asked for once at most in a start, and nothing is computed wrongly."""
    ids = prompt(700)
    store = MemoryStore()
    wanted, _ = cached(PrefixCache(store, engine, Policy(name, 512)), ids)
    for missing in [*store.objects]:
        store.unreadable, store.reads = {missing}, []
        session, _ = PrefixCache(store, engine, Policy(name, 512)).start(ids)
        assert store.reads.count(missing) <= 1
        session.on_chunk = None
        assert torch.equal(feed(session, ids), wanted)
    store.unreadable = set(store.objects)
    session, reuse = PrefixCache(store, engine, Policy(name, 512)).start(ids)
    assert (session.position, reuse.tokens) == (0, 0)


@pytest.mark.parametrize("kind", ["rows", "state"])
def test_objects_of_another_size_are_done_without(engine: Engine, kind: str) -> None:
    """A checksum says that bytes are what was written, not that they are what is expected."""
    ids = prompt(700)
    store = MemoryStore()
    wanted, _ = cached(PrefixCache(store, engine), ids)
    for key in [key for key in store.objects if key[1] == kind]:
        whole = store.objects[key]
        for wrong in (b"", whole[:-8], whole + bytes(8)):
            store.objects[key] = wrong
            session, _ = PrefixCache(store, engine).start(ids)
            session.on_chunk = None
            assert torch.equal(feed(session, ids), wanted)
        store.objects[key] = whole


@pytest.mark.parametrize("kind", ["rows", "state"])
def test_a_store_that_refuses_ends_the_keeping(engine: Engine, kind: str) -> None:
    store = MemoryStore()
    store.refuses = {kind}
    ids = prompt(1100)
    logits, _ = cached(PrefixCache(store, engine, Policy("full")), ids)
    assert torch.equal(logits, feed(engine.session(), ids))
    assert store.ends("rows") == ([] if kind == "rows" else [256, 512, 768, 1024])


def test_ctrl_c_while_windows_are_found_again(engine: Engine) -> None:
    ids, store = prompt(1100), MemoryStore()
    cache = PrefixCache(store, engine, Policy("zero"))
    wanted, _ = cached(cache, ids)
    kept = dict(store.objects)

    def interrupted(done: int, total: int) -> None:
        assert (done, total) == (128, 128)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.start(ids, progress=interrupted)
    assert store.objects == kept
    assert torch.equal(cached(cache, ids)[0], wanted)


def test_ctrl_c_within_a_chunk_keeps_nothing_of_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, store = prompt(900), MemoryStore()
    cache = PrefixCache(store, engine, Policy("full"))
    last, calls = engine.model.blocks[-1].ffn, 0
    forward = last.forward

    def interrupted(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return forward(*arguments)

    session, _ = cache.start(ids)
    monkeypatch.setattr(last, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.extend(ids[:-1], logits="none")
    monkeypatch.undo()
    assert (store.ends("rows"), store.ends("state")) == ([256], [128, 256, 384])
    assert torch.equal(feed(session, ids), feed(engine.session(), ids))
    check(cache, ids, random.Random(0))


def test_no_replay_where_rows_depend_on_their_neighbours(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, store = prompt(1100), MemoryStore()
    cached(PrefixCache(store, engine, Policy("zero")), ids)
    layer = engine.model.blocks[-1].ffn
    forward = layer.forward

    def leaky(u: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return forward(u, token_ids) + 1e-7 * u.mean()

    monkeypatch.setattr(layer, "forward", leaky)
    cache = PrefixCache(store, engine, Policy("zero"))
    assert not cache.replays
    session, reuse = cache.start(ids)
    assert (session.position, reuse.tokens, reuse.replayed) == (0, 0, 0)
    assert reuse.miss is not None and reuse.miss.reason == "policy"
    monkeypatch.undo()
    assert PrefixCache(store, engine).replays


def test_a_miss_says_why(engine: Engine) -> None:
    class Forgetful(MemoryStore):
        def miss(self, segment: Segment) -> Miss:
            return Miss("evicted", f"it ended at {segment.end}")

    store, ids = Forgetful(), prompt(1100)
    cache = PrefixCache(store, engine)
    assert cache.start(ids)[1].miss == Miss("evicted", "it ended at 256")
    cached(cache, ids)
    assert cache.start(ids)[1].miss is None
    assert cache.start(ids[:700] + ids)[1].miss == Miss("evicted", "it ended at 768")
    assert cache.start(ids[:200])[1].miss is None  # no whole segment


# ---- computed again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_replay_finds_what_was_not_computed_here(engine: Engine, tmp_path: Path, name: str) -> None:
    with PrefixStore.open(tmp_path) as store:
        cached(PrefixCache(store, engine, Policy(name, 512)), prompt(1100))
        cached(PrefixCache(store, replace(engine, chunk=256)), prompt(600))
        seen: list[tuple[int, int]] = []
        found = replay(store, engine, 100, lambda done, total: seen.append((done, total)))
        assert (found.checked, found.different, found.skipped) == (4, [], 2)
        assert seen == [(n, 4) for n in range(5)]
        # Rows of the right size and checksum that the model would not compute.
        cache = PrefixCache(store, engine)
        ids = prompt(1100)
        link = next(entry for entry in store.entries() if entry.origin == cache.origin and entry.end == 512)
        wrong = segments(cache.origin, ids[:256] + prompt(256, seed=9), 256)[1]
        payload = store.read(link.key, "rows")
        assert payload is not None and store.write(wrong, "rows", payload)
        found = replay(store, engine, 100)
        assert (found.checked, found.different) == (5, [wrong.key])
