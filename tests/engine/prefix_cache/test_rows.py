"""States as bytes and back: nothing is lost, and bytes of another size are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from dsv4_engine import Engine
from dsv4_engine.accounting import kv_bytes
from dsv4_engine.prefix_cache.rows import PayloadError, StateCodec
from dsv4_engine.state import KV_DTYPES

from .conftest import VOCAB, assert_same_state

IDS = [random.Random(1).randrange(VOCAB) for _ in range(512)]


def joined(parts: list[memoryview]) -> memoryview:
    return memoryview(b"".join(parts))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("tokens", [128, 384, 512])
def test_a_state_comes_back_as_it_was(engines: Callable[[str], Engine], kv_dtype: str, tokens: int) -> None:
    engine = engines(kv_dtype)
    session, codec = engine.session(), StateCodec(engine.model)
    session.extend(IDS[:tokens], logits="none")
    room, state = codec.room(tokens), codec.blank(tokens)
    cuts = [0, 128, tokens] if tokens > 128 else [0, tokens]
    for start, end in pairwise(cuts):
        rows = joined(codec.rows(session.state, start, end))
        assert len(rows) == kv_bytes(engine.config, kv_dtype, end) - kv_bytes(engine.config, kv_dtype, start)
        room.put(rows, start, end)
    codec.fill(state, joined(codec.position(session.state)))
    room.give(state, tokens)
    assert_same_state(state, session.state)


@pytest.mark.parametrize("tokens", [1, 3, 4, 31, 32, 130, 131, 259])
def test_what_is_left_at_any_position_comes_back(engine: Engine, tokens: int) -> None:
    session, codec = engine.session(), StateCodec(engine.model)
    session.extend(IDS[:tokens], logits="none")
    state = codec.blank(tokens)
    codec.fill(state, joined(codec.position(session.state)))
    assert joined(codec.position(state)) == joined(codec.position(session.state))
    for layer, wanted in zip(state.layers, session.state.layers, strict=True):
        assert layer.window.equal(wanted.window)


def test_bytes_of_another_size_are_refused(engine: Engine) -> None:
    session, codec = engine.session(), StateCodec(engine.model)
    session.extend(IDS[:256], logits="none")
    rows, rest = joined(codec.rows(session.state, 0, 256)), joined(codec.position(session.state))
    for payload in (b"", rows[:-1], b"".join([rows, b"x"])):
        with pytest.raises(PayloadError):
            codec.room(256).put(memoryview(payload), 0, 256)
    for payload in (b"", rest[:-1], b"".join([rest, b"x"])):
        with pytest.raises(PayloadError):
            codec.fill(codec.blank(256), memoryview(payload))
    with pytest.raises(PayloadError):
        codec.fill(codec.blank(131), rest)


def test_rows_that_are_known_are_not_computed_again(engine: Engine) -> None:
    """While tokens are run again, what the model makes of them is dropped; then the list grows as ever."""
    session, codec = engine.session(), StateCodec(engine.model)
    session.extend(IDS[:384], logits="none")
    room = codec.room(256)
    room.put(joined(codec.rows(session.state, 0, 256)), 0, 256)
    state = codec.blank(128)
    room.give(state, 256)
    again = engine.session().holding(IDS[:128], state)
    lengths = [len(layer.entries) for layer in again.state.layers if layer.entries is not None]
    assert lengths == [32, 1, 32]
    again.extend(IDS[128:384], logits="none")
    assert_same_state(again.state, session.state)
