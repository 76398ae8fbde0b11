"""Engines, prompts and comparisons for the tests of the prefix cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_engine import Engine, Session
from dsv4_engine.prefix_cache import policy
from dsv4_engine.prefix_cache.cache import PrefixCache
from dsv4_engine.state import SequenceState
from support.random_checkpoint import make_checkpoint

VOCAB = 256
CHUNK, SEGMENT = 128, 256


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window of 32 and four layers, of all kinds: 128 tokens make every window whole again."""
    return make_checkpoint(tmp_path_factory.mktemp("prefix") / "m", quantised=True)


@pytest.fixture(scope="session")
def engines(folder: Path) -> Callable[[str], Engine]:
    """The model by kv_dtype, in chunks so small that a short prompt has many."""
    loaded: dict[str, Engine] = {}

    def engine(kv_dtype: str) -> Engine:
        if kv_dtype not in loaded:
            loaded[kv_dtype] = replace(Engine.load(folder, kv_dtype=kv_dtype), chunk=CHUNK)
        return loaded[kv_dtype]

    return engine


@pytest.fixture
def engine(engines: Callable[[str], Engine]) -> Engine:
    return engines("mixed")


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of two chunks."""
    monkeypatch.setattr(policy, "SEGMENT_TOKENS", SEGMENT)


def feed(session: Session, ids: Sequence[int]) -> Tensor:
    """What `run` does with a prompt: everything but the last token, then the last; returns its logits [V]."""
    if len(ids) - 1 > session.position:
        session.extend(ids[session.position : -1], logits="none")
    return session.extend(ids[-1:])


def tensors_of(state: SequenceState) -> list[Tensor]:
    """Every value that a state holds, rows as the model reads them."""
    found = []
    for layer in state.layers:
        found.append(layer.window)
        for block in (layer.block, layer.index_block):
            if block is not None:
                found += [block.pending, *(block.previous or ())]
        for rows in (layer.entries, layer.index_keys):
            if rows is not None:
                found.append(rows.read(0, len(rows)))
    return found


def assert_same_state(got: SequenceState, wanted: SequenceState) -> None:
    assert got.position == wanted.position
    for a, b in zip(tensors_of(got), tensors_of(wanted), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is not waited for: in tests that kill processes and change bytes, but cut no power."""
    from dsv4_engine.prefix_cache import index_files, objects

    for module in (objects, index_files):
        monkeypatch.setattr(module, "sync", lambda handle: None)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def cached(cache: PrefixCache, ids: Sequence[int]) -> tuple[torch.Tensor, int]:
    """The last token's logits, and how many tokens needed no computing."""
    session, reuse = cache.start(ids)
    logits = feed(session, ids)
    assert session.tokens == list(ids)
    return logits, reuse.tokens


def check(cache: PrefixCache, ids: Sequence[int], rng: random.Random) -> int:
    """Compare everything a caller can see with a session without a cache; returns the tokens reused."""
    session, reuse = cache.start(ids)
    plain = cache.engine.session()
    if rng.random() < 0.5:  # split where nobody expects it
        split = rng.randrange(max(1, session.position), len(ids))
        if split > session.position:
            session.extend(ids[session.position : split], logits="none")
        plain.extend(ids[:split], logits="none")
        assert torch.equal(session.extend(ids[split:]), plain.extend(ids[split:]))
    else:
        assert torch.equal(feed(session, ids), feed(plain, ids))
    assert_same_state(session.state, plain.state)
    assert (session.tokens, session.cuts, session.whole) == (plain.tokens, plain.cuts, plain.whole)
    more = rng.choices(range(VOCAB), k=rng.choice([1, 5, 60]))
    assert torch.equal(session.extend(more, logits="all"), plain.extend(more, logits="all"))
    return reuse.tokens
