"""Chunks side by side: the bits of chunks one by one, whatever interrupts them, and really side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dsv4_engine import Engine, placement
from dsv4_engine.attention import Attention
from dsv4_engine.device_map import Limits
from dsv4_engine.lanes import Lanes
from dsv4_engine.measure import Stopwatch
from dsv4_engine.placement import MAX_LANES, memory_plan
from dsv4_engine.session import Session
from dsv4_engine.state import SequenceState
from support.random_checkpoint import make_checkpoint

CHUNK = 128
IDS = torch.randint(0, 256, (7 * CHUNK + 50,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module", params=["fp32", "mixed"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    quantised = request.param == "mixed"
    folder = make_checkpoint(tmp_path_factory.mktemp("lanes") / "m", index_n_heads=16, quantised=quantised)
    return Engine.load(folder, kv_dtype=request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def begun(engine: Engine, lanes: int | None = 2) -> Session:
    model = engine.model
    return Session(model, model.new_state(), [], 4096, CHUNK, engine._step, Lanes(model, lanes) if lanes else None)


def one_by_one(session: Session, ids: list[int], logits: Literal["last", "all"] = "last") -> Tensor:
    """`extend`, with every chunk in a call of its own."""
    found = []
    while ids:
        count = CHUNK - session.position % CHUNK
        found.append(session.extend(ids[:count], logits))
        ids = ids[count:]
    return torch.cat(found) if logits == "all" else found[-1]


def held(state: SequenceState) -> list[Tensor]:
    """Every tensor of a state."""
    found = []
    for layer in state.layers:
        found.append(layer.window)
        for rows in (layer.entries, layer.index_keys):
            found += [] if rows is None else rows.stored(0, len(rows))
        for block in (layer.block, layer.index_block):
            found += [] if block is None else [block.pending, *(block.previous or ())]
    return [tensor.clone() for tensor in found]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("lanes", [2, 3])
def test_bits_are_those_of_one_chunk_after_the_other(engine: Engine, lanes: int) -> None:
    apart, beside = begun(engine, lanes), begun(engine, lanes)
    for start, end in ((0, 40), (40, 5 * CHUNK + 3), (5 * CHUNK + 3, 6 * CHUNK), (6 * CHUNK, len(IDS))):
        want = one_by_one(apart, IDS[start:end], "all")
        assert torch.equal(beside.extend(IDS[start:end], logits="all"), want)
        assert (beside.tokens, beside.cuts, beside.position) == (apart.tokens, apart.cuts, apart.position)
        assert same(held(beside.state), held(apart.state))
    assert torch.equal(beside.extend([5]), apart.extend([5]))


@pytest.mark.parametrize("engine", ["fp32"], indirect=True)  # with "mixed" a rounding may fall either way
def test_logits_are_those_of_all_threads_for_one_chunk(engine: Engine) -> None:
    got, want = begun(engine).extend(IDS, logits="all"), begun(engine, None).extend(IDS, logits="all")
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_forks_taken_on_the_way_stay_what_they_are(engine: Engine) -> None:
    """Also while chunks behind them are under way, and when they go on themselves."""
    session, seen, forks = begun(engine), [], []

    def note(one: Session) -> None:
        assert one.position == one.state.position
        seen.append((one.position, held(one.state)))
        forks.append(one.fork())
        if one.position == 2 * CHUNK:
            forks[-1].extend(IDS[2 * CHUNK : 3 * CHUNK + 9], logits="none")

    session.on_chunk = note
    session.extend(IDS)
    assert [position for position, _ in seen] == [CHUNK * number for number in range(1, 8)]
    plain = begun(engine)
    for (position, then), fork in zip(seen, forks, strict=True):
        one_by_one(plain, IDS[plain.position : position])
        assert same(then, held(plain.state))
        if position != 2 * CHUNK:
            assert same(held(fork.state), then)
    assert torch.equal(forks[0].extend(IDS[CHUNK:]), session.fork_whole().extend(IDS[7 * CHUNK :]))
    assert torch.equal(forks[1].extend(IDS[3 * CHUNK + 9 :]), begun_with_cut(engine))


def begun_with_cut(engine: Engine) -> Tensor:
    session = begun(engine)
    one_by_one(session, IDS[: 3 * CHUNK + 9])
    return one_by_one(session, IDS[3 * CHUNK + 9 :])


@pytest.mark.parametrize(("chunk", "layer"), [(0, 0), (0, 3), (1, 1), (4, 2), (6, 3)])
def test_an_error_in_any_layer_leaves_the_chunks_before(
    engine: Engine, chunk: int, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error itself comes out, not what it did to the chunks behind."""
    forward, failing = Attention.forward, engine.model.blocks[layer].attn

    def fails(self: Attention, *arguments: Any) -> Tensor:
        if self is failing and arguments[1].position == chunk * CHUNK:
            raise MemoryError("here")
        return forward(self, *arguments)

    session = begun(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", fails)
        with pytest.raises(MemoryError, match="here"):
            session.extend(IDS)
    assert session.position == session.state.position == chunk * CHUNK
    assert torch.equal(session.extend(IDS[session.position :]), one_by_one(begun(engine), IDS))


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_ctrl_c_leaves_whole_chunks(engine: Engine, chunks: int) -> None:
    def stop(done: int, total: int) -> None:
        assert total == len(IDS)
        if done == chunks * CHUNK:
            raise KeyboardInterrupt

    session = begun(engine)
    with pytest.raises(KeyboardInterrupt):
        session.extend(IDS, progress=stop)
    assert session.tokens == IDS[: chunks * CHUNK] and session.whole == chunks * CHUNK
    other = session.fork()
    want = one_by_one(begun(engine), IDS)
    assert torch.equal(session.extend(IDS[chunks * CHUNK :]), want)
    assert torch.equal(other.extend(IDS[chunks * CHUNK :]), want)


def test_chunks_are_under_way_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one's first layer waits here until the first one is in its third: one by one this would not end."""
    forward, entered = Attention.forward, {place: threading.Event() for place in ((0, 2), (1, 0))}
    places = {id(block.attn): number for number, block in enumerate(engine.model.blocks)}

    def meeting(self: Attention, *arguments: Any) -> Tensor:
        place = (arguments[1].position // CHUNK, places[id(self)])
        if place in entered:
            entered[place].set()
            other = (1, 0) if place == (0, 2) else (0, 2)
            assert entered[other].wait(60)
        return forward(self, *arguments)

    monkeypatch.setattr(Attention, "forward", meeting)
    session = begun(engine)
    session.extend(IDS[: 2 * CHUNK])
    assert session.position == 2 * CHUNK


def test_a_layer_is_left_to_the_next_chunk_before_it_attends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk attends in its first layer only when the second has brought that layer behind its own tokens."""
    compress, attend, behind = Attention._compress, Attention._attend, threading.Event()
    first = engine.model.blocks[0].attn

    def compressing(self: Attention, u: Tensor, chunk: Any, state: Any) -> None:
        compress(self, u, chunk, state)
        if self is first and chunk.position == CHUNK:
            behind.set()

    def attending(self: Attention, *arguments: Any) -> Tensor:
        assert behind.wait(60)
        return attend(self, *arguments)

    monkeypatch.setattr(Attention, "_compress", compressing)
    monkeypatch.setattr(Attention, "_attend", attending)
    session = begun(engine)
    session.extend(IDS[: 2 * CHUNK])
    monkeypatch.undo()
    assert same(held(session.state), held(apart(engine, 2 * CHUNK).state))


def apart(engine: Engine, tokens: int) -> Session:
    session = begun(engine)
    one_by_one(session, IDS[:tokens])
    return session


def test_watched_forks_stay_in_the_watching_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, threads = Attention.forward, set()

    def noting(self: Attention, *arguments: Any) -> Tensor:
        threads.add(threading.current_thread())
        return forward(self, *arguments)

    monkeypatch.setattr(Attention, "forward", noting)
    begun(engine).fork_to_watch().extend(IDS[: 3 * CHUNK])
    assert threads == {threading.main_thread()}
    begun(engine).extend(IDS[: 3 * CHUNK])
    assert len(threads) == 3


def test_a_stopwatch_takes_the_share_of_chunks_side_by_side(engine: Engine) -> None:
    begun(engine).extend(IDS)  # warm
    clock, session = Stopwatch("cpu", 2), begun(engine)
    with clock.watching():
        before = threading.active_count()
        session.extend(IDS)
    assert threading.active_count() == before
    kinds = {kind for _, kind in clock.seconds}
    assert kinds == {"window", "csa", "hca", "outside layers"}
    assert all(seconds > 0 for seconds in clock.seconds.values())


def test_the_plan_counts_their_memory(engine: Engine) -> None:
    plans = []
    for threads in (1, 2, 64):
        torch.set_num_threads(threads)
        plans.append(memory_plan(engine.config, engine.weights))
    torch.set_num_threads(2)
    one, two, many = plans
    assert (one.lanes, two.lanes, many.lanes) == (1, 2, MAX_LANES)
    assert two.working_set == 2 * one.working_set and many.working_set == MAX_LANES * one.working_set
    assert memory_plan(engine.config, engine.weights, alone=False).lanes == 1


def test_what_fits_one_after_the_other_is_not_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights, room = engine.config, engine.weights, 2 << 30
    torch.set_num_threads(1)
    one = memory_plan(config, weights, ctx=4096)
    torch.set_num_threads(2)
    monkeypatch.setattr(placement, "program_bytes", lambda: 0)
    limits = Limits(cpu=room)
    assert memory_plan(config, weights, ctx=4096, limits=limits).lanes == 2
    assert one.kv < one.working_set
    monkeypatch.setattr(placement, "kv_bytes", lambda *_: room - one.needed)  # a long context, in place of the real one
    full = memory_plan(config, weights, ctx=4096, limits=limits)
    assert (full.lanes, full.slots, full.working_set) == (1, 0, one.working_set)
