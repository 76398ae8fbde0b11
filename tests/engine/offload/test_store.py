"""Experts read from files into few slots: the same bytes, the same results, never more memory, errors that arrive."""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import CheckpointError
from dsv4_engine.offload import policy as policy_module
from dsv4_engine.offload import store as store_module
from dsv4_engine.offload.disk import ExpertFiles, expert_layout
from dsv4_engine.offload.layout import ExpertLayout
from dsv4_engine.offload.store import MIN_SLOTS, WINDOW, ExpertStore
from dsv4_engine.weights import Weights
from dsv4_kernels.linear import Weight
from dsv4_kernels.moe import Expert, mixture
from support.random_checkpoint import make_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "fp4": {"quantised": True},
    "fp8": {"quantised": True, "expert_dtype": "fp8"},
    "plain": {"dtype": "BF16"},
}


def opened(folder: Path) -> Weights:
    return Weights.open(Checkpoint.open(folder), ModelConfig.from_folder(folder))


@pytest.fixture(scope="module", params=CASES)
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return opened(
        make_checkpoint(tmp_path_factory.mktemp(request.param) / "m", n_routed_experts=24, **CASES[request.param])
    )


@pytest.fixture(scope="module")
def fp4(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return opened(make_checkpoint(tmp_path_factory.mktemp("only") / "m", n_routed_experts=24, quantised=True))


def store_of(weights: Weights, slots: int) -> ExpertStore:
    return ExpertStore(ExpertFiles(weights), weights.config, slots)


def mapped(weights: Weights, layer: int, expert: int) -> Expert:
    """The expert over the mapped file."""
    w1, w3, w2 = (weights.weight(f"layers.{layer}.ffn.experts.{expert}.{m}") for m in ("w1", "w3", "w2"))
    return Expert((w1, w3), w2)


def same(a: Weight, b: Weight) -> bool:
    scales = (a.scale is None) == (b.scale is None)
    if a.scale is not None and b.scale is not None:
        scales = torch.equal(a.scale.view(torch.uint8), b.scale.view(torch.uint8))
    data = torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    return data and scales and a.fmt == b.fmt and a.round_activations == b.round_activations


def check_idle(store: ExpertStore) -> None:
    """Nothing is pinned and no thread reads once the last layer was left."""
    end = time.monotonic() + 10
    while (store._readers or store._reading) and time.monotonic() < end:
        time.sleep(0.001)
    assert store.slots.pinned == len(store._held) and not store._wanted and not store._reading


def test_slots_hold_what_the_files_hold(weights: Weights) -> None:
    files, pool = ExpertFiles(weights), expert_layout(weights).pool(2)
    for slot, (layer, expert) in enumerate([(0, 5), (3, 23)]):
        size = files.read(layer, expert, pool, slot)
        assert size == pool.layout.nbytes == pool.nbytes // 2
        got, want = pool.expert(slot), mapped(weights, layer, expert)
        assert all(same(a, b) for a, b in zip((*got.w13, got.w2), (*want.w13, want.w2), strict=True))


def test_the_published_layout_is_the_files(weights: Weights) -> None:
    assert ExpertLayout.published(weights.config) == expert_layout(weights)


@pytest.mark.parametrize("slots", [MIN_SLOTS, 7, 30, 200])
@pytest.mark.parametrize("tokens", [1, 40])
def test_streamed_mixtures_equal_resident_ones(weights: Weights, slots: int, tokens: int) -> None:
    store = store_of(weights, slots)
    with torch.inference_mode():
        for turn in range(3):
            for layer in range(4):
                generator = torch.Generator().manual_seed(turn * 4 + layer)
                u = torch.randn(tokens, 64, generator=generator)
                chosen = torch.rand(tokens, 24, generator=generator).topk(2).indices
                share = torch.rand(tokens, 2, generator=generator)
                got = store.layer(f"layers.{layer}.ffn.").mixture(u, chosen, share, 4.0)
                want = mixture(u, [mapped(weights, layer, e) for e in range(24)], chosen, share, 4.0)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    check_idle(store)
    assert store.usage.hits + store.usage.misses >= 3 * 4 * 2
    if slots == 200:
        assert store.usage.fetched <= 5 * 24  # each once


def test_results_do_not_depend_on_what_was_there(fp4: Weights) -> None:
    """Equal bits from an empty pool, a full one and one that had read ahead."""
    u, share = torch.randn(40, 64), torch.rand(40, 2)
    chosen = torch.rand(40, 24).topk(2).indices
    with torch.inference_mode():
        cold = store_of(fp4, 200).layer("layers.1.ffn.")
        first, second = (cold.mixture(u, chosen, share, 4.0) for _ in range(2))
        ahead = store_of(fp4, 12).layer("layers.1.ffn.")
        ahead.expect(chosen)
        third = ahead.mixture(u, chosen, share, 4.0)
    assert torch.equal(first, second) and torch.equal(first, third)


def test_what_is_expected_is_read_before_it_is_asked_for(fp4: Weights) -> None:
    store = store_of(fp4, 30)
    layer = store.layer("layers.0.ffn.")
    layer.expect(torch.tensor([[3, 4, 5]]))
    end = time.monotonic() + 10
    while store._readers and time.monotonic() < end:
        time.sleep(0.001)
    assert sorted(e for e in range(24) if store.slots.slot_of[0, e] >= 0) == [3, 4, 5]
    assert store.slots.pinned == 3
    assert [e for e, _ in store.use(0, 1, {3: 1, 4: 1})] and store.usage.misses == 0 and store.usage.hits == 2
    check_idle(store)
    assert store.slots.pinned == 0  # 5 was read in vain: it may leave


def test_reading_ahead_is_bounded(fp4: Weights) -> None:
    store = store_of(fp4, 60)
    store.expect(2, range(24))
    end = time.monotonic() + 10
    while store._readers and time.monotonic() < end:
        time.sleep(0.001)
    assert len(store._held) == WINDOW
    assert [e for e, _ in store.use(1, 1, {7: 1, 8: 1})]  # another layer is not kept waiting
    assert len([e for e, _ in store.use(2, 24, dict.fromkeys(range(24), 1))]) == 24
    check_idle(store)


def test_an_interrupted_layer_leaves_nothing_behind(fp4: Weights) -> None:
    store = store_of(fp4, 9)
    for _ in range(20):
        using = store.use(0, 24, dict.fromkeys(range(24), 1))
        for _ in range(3):
            next(using)
        using.close()
    using = store.use(3, 24, dict.fromkeys(range(24), 1))
    assert len(list(using)) == 24
    check_idle(store)


def interrupted_at(number: int, run: Callable[[], object]) -> bool:
    """Ctrl-C before the line of that number which ``run`` comes to in the store; whether it came to so many."""
    left = number

    def traced(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (store_module.__file__, policy_module.__file__):
            return None
        # No signal is taken between a lock's being got or given back and the lines within.
        if event == "line" and "with self._lock" not in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_at_any_moment_leaves_nothing_behind(fp4: Weights) -> None:
    """In one store with few slots, one interruption after the other: nothing stays pinned, nobody waits for ever."""
    store, wanted = store_of(fp4, 9), dict.fromkeys(range(0, 24, 4), 1)

    def passes() -> None:
        store.expect(1, range(3))
        for layer in (0, 1):
            for _ in store.use(layer, 4, wanted):
                pass

    number = 0
    while interrupted_at(number, passes):
        number += 1
        if number % 4 == 0:
            for layer in (0, 1):
                for expert, got in store.use(layer, 4, wanted):
                    want = mapped(fp4, layer, expert)
                    assert all(same(a, b) for a, b in zip((*got.w13, got.w2), (*want.w13, want.w2), strict=True))
            store.passed(0)
            store.passed(1)
            check_idle(store)
            assert store.slots.pinned == 0
    assert number > 150


def test_a_wrong_guess_keeps_nobody_waiting(fp4: Weights) -> None:
    store = store_of(fp4, 60)
    for turn in range(4):
        store.expect(2, range(turn, 12 + turn))
        end = time.monotonic() + 10
        while store._readers and time.monotonic() < end:
            time.sleep(0.001)
        assert sorted(e for e, _ in store.use(2, 8, dict.fromkeys(range(14, 24), 1))) == list(range(14, 24))
    check_idle(store)
    assert store.slots.pinned == 0


def test_what_was_given_up_while_it_was_read_can_be_asked_for_again(
    fp4: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(fp4, 9)
    read = store.files.read
    monkeypatch.setattr(store.files, "read", lambda *a: (time.sleep(0.05), read(*a))[1])
    for _ in range(3):
        using = store.use(0, 1, {1: 1, 2: 1, 3: 1})
        next(using)
        using.close()
        assert len(list(store.use(0, 1, {2: 1, 3: 1}))) == 2
        list(store.use(1, 24, dict.fromkeys(range(9), 1)))
    check_idle(store)


def test_experts_stay_while_they_are_used(fp4: Weights) -> None:
    store = store_of(fp4, MIN_SLOTS)
    for expert, weights in store.use(0, 24, dict.fromkeys(range(24), 1)):
        before = weights.w2.data.clone()
        time.sleep(0.002)  # readers go on
        assert torch.equal(weights.w2.data, before) and same(weights.w2, mapped(fp4, 0, expert).w2)


def test_the_file_is_asked_with_no_lock_held(fp4: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts are read at once, and the model computes meanwhile."""
    store, both = store_of(fp4, 30), threading.Barrier(2, timeout=10)
    read = store.files.read
    monkeypatch.setattr(store.files, "read", lambda *a: (both.wait(), read(*a))[1])
    assert len(list(store.use(0, 1, {1: 1, 2: 1}))) == 2


@pytest.mark.parametrize("damage", ["cut", "nan", "gone"])
def test_damage_arrives_where_it_is_waited_for(damage: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", quantised=True)
    weights = opened(folder)
    info, scale = weights.places("layers.2.ffn.experts.3.w1.weight")
    assert scale is not None
    if damage == "cut":
        with info.file.open("r+b") as file:
            file.truncate(info.start + 5)
    elif damage == "nan":
        with scale.file.open("r+b") as file:
            file.seek(scale.start)
            file.write(b"\xff")
    else:
        info.file.unlink()
    store = store_of(weights, 6)
    with pytest.raises(CheckpointError, match=r"shorter|layers\.2\.ffn\.experts\.3\.w1|cannot be read"):
        list(store.use(2, 8, dict.fromkeys(range(8), 1)))
    check_idle(store)
    if damage == "nan":
        assert len(list(store.use(1, 8, dict.fromkeys(range(8), 1)))) == 8


def test_experts_in_several_forms_are_refused(tmp_path: Path) -> None:
    weights = opened(make_checkpoint(tmp_path / "m", quantised=True))
    forms = {**weights.forms, "layers.0.ffn.experts.0.w1.weight": "plain"}
    object.__setattr__(weights, "forms", forms)
    with pytest.raises(CheckpointError, match="one form"):
        expert_layout(weights)


def test_a_store_with_room_for_all_is_filled_once(fp4: Weights) -> None:
    """All are read when the model is loaded; what is seen adds up to the files' bytes, those of the MTP block aside."""
    config = fp4.config
    number = config.num_hidden_layers * config.n_routed_experts
    layers = range(config.num_hidden_layers)
    store = ExpertStore(ExpertFiles(fp4, mtp=False), config, number, layers)
    assert store.complete
    found: list[int] = []
    store.fill(found.append)
    fp4.check_values(found.append, layers, read=True)
    twice = 2 * fp4.total_bytes - sum(fp4.nbytes(n) for n in fp4.specs if n.startswith("mtp.0.ffn.experts."))
    assert sum(found) == twice - sum(fp4.nbytes(n) for n in fp4.specs if ".experts." not in n)  # not yet in place
    check_idle(store)
    assert store.usage.fetched == 0
    for layer in layers:
        for expert, slot in enumerate(store.where(layer, range(config.n_routed_experts))):
            held = store.pool.expert(slot)
            assert same(held.w2, mapped(fp4, layer, expert).w2)


def test_a_process_reads_no_experts_but_its_own(fp4: Weights) -> None:
    own = range(12, 24)
    store = ExpertStore(ExpertFiles(fp4), fp4.config, 20, own=own)
    chosen = torch.arange(24, dtype=torch.int32).repeat(4)[:, None]
    experts = store.layer("layers.1.ffn.")
    assert experts is not None
    experts.expect(chosen)
    u, weights = torch.randn(96, fp4.config.hidden_size), torch.ones(96, 1)
    got = experts.mixture(u, chosen, weights, 4.0)
    assert not got[chosen[:, 0] < 12].any() and got[chosen[:, 0] >= 12].any(1).all()
    check_idle(store)
    assert (store.slots.slot_of[1] >= 0).any() and not (store.slots.slot_of[:, : own.start] >= 0).any()
