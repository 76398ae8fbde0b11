"""Which expert leaves a pool: scores, pins, and patterns of use whose best outcome is known."""

from __future__ import annotations

import random

import pytest

from dsv4_engine.offload.policy import Slots


def fetch(slots: Slots, layer: int, experts: list[int], tokens: int = 1) -> int:
    """Use these experts as a store does; returns how many were not there."""
    slots.used(layer, tokens, experts, [1] * len(experts))
    misses, got = 0, []
    for expert in experts:
        slot = int(slots.slot_of[layer, expert])
        if slot < 0:
            misses += 1
            claimed = slots.claim(layer, expert)
            assert claimed is not None
            slot = claimed
        else:
            slots.pin(slot)
        got.append(slot)
    for slot in got:
        slots.unpin(slot)
    check(slots)
    return misses


def check(slots: Slots) -> None:
    """The table and its inverse say the same, and no slot has two experts."""
    there = slots.slot_of[slots.slot_of >= 0].tolist()
    assert len(there) == len(set(there))
    assert sorted(there) == [s for s in range(slots.slots) if slots._held[s] >= 0]
    for layer, expert in zip(*(slots.slot_of >= 0).nonzero(), strict=True):
        assert slots._held[slots.slot_of[layer, expert]] == layer * slots.experts + expert


def test_empty_slots_fill_first() -> None:
    slots = Slots(2, 8, 4)
    assert fetch(slots, 0, [1, 2]) == 2 and fetch(slots, 1, [1, 2]) == 2
    assert fetch(slots, 0, [1, 2]) == 0 and fetch(slots, 1, [1, 2]) == 0


def test_the_frequent_stay() -> None:
    slots = Slots(1, 8, 3)
    for _ in range(5):
        fetch(slots, 0, [0, 1])
    for expert in (2, 3, 4, 5, 6, 7):
        fetch(slots, 0, [expert])
    assert fetch(slots, 0, [0, 1]) == 0


def test_what_was_frequent_long_ago_leaves() -> None:
    slots = Slots(1, 4, 2, half_life=4)
    for _ in range(8):
        fetch(slots, 0, [0, 1])
    for _ in range(40):
        fetch(slots, 0, [2, 3])
    assert fetch(slots, 0, [2, 3]) == 0 and fetch(slots, 0, [0]) == 1


@pytest.mark.parametrize("passes", [3])
def test_passes_over_all_experts_keep_most_of_the_pool(passes: int) -> None:
    """Least recently used would miss every time; the best possible is slots / experts hits a pass."""
    slots = Slots(4, 16, 32)
    for turn in range(passes + 1):
        misses = 0
        for layer in range(4):
            slots.used(layer, 128, range(16), [48] * 16)
            for expert in range(16):
                if slots.slot_of[layer, expert] < 0:
                    misses += 1
                    slot = slots.claim(layer, expert)
                    assert slot is not None
                    slots.unpin(slot)
        check(slots)
        if turn:
            assert misses <= 64 - 32 + 8


def test_layers_that_were_seen_less_are_not_colder() -> None:
    """In the middle of a long chunk the first layers have aged by thousands of tokens, the last ones not yet."""
    slots = Slots(2, 4, 4, half_life=64)
    for _ in range(10):
        fetch(slots, 0, [0, 1]), fetch(slots, 1, [0, 1])
    slots.used(0, 8192, [2], [1])
    slot = slots.claim(0, 2)
    assert slot is not None
    assert (slots.slot_of[1, :2] >= 0).all()


def test_pins_hold() -> None:
    slots = Slots(1, 8, 3)
    first = slots.claim(0, 0)
    assert first is not None
    slots.pin(first)
    for expert in range(1, 8):
        slot = slots.claim(0, expert)
        assert slot is not None and slot != first
        slots.unpin(slot)
    slots.unpin(first)
    assert slots.pinned == 1 and slots.slot_of[0, 0] == first
    others = [slots.claim(0, e) for e in range(1, 8) if slots.slot_of[0, e] < 0][:2]
    assert None not in others and slots.pinned == 3
    absent = next(e for e in range(8) if slots.slot_of[0, e] < 0)
    assert slots.claim(0, absent) is None


def test_dropped_experts_are_fetched_again() -> None:
    slots = Slots(1, 4, 2)
    fetch(slots, 0, [3])
    slots.drop(int(slots.slot_of[0, 3]))
    check(slots)
    assert slots.slot_of[0, 3] == -1 and fetch(slots, 0, [3]) == 1


def test_scores_count_tokens_and_halve() -> None:
    slots = Slots(1, 4, 2, half_life=100)
    slots.used(0, 10, [1], [8])
    assert slots.score(0, 1) == pytest.approx(8) and slots.score(0, 2) == 0
    slots.used(0, 100, [1], [2])
    assert slots.score(0, 1) == pytest.approx(8 / 2 + 2)


def test_long_random_use_stays_whole() -> None:
    """A skewed choice does better than chance; nothing overflows over many half lives."""
    rng = random.Random(0)
    slots, hits = Slots(3, 32, 24, half_life=16), 0
    weights = [1 / (1 + e) for e in range(32)]
    for _ in range(3000):
        for layer in range(3):
            chosen = list(dict.fromkeys(rng.choices(range(32), weights, k=4)))
            hits += len(chosen) - fetch(slots, layer, chosen)
    assert hits / (3000 * 3 * 3.4) > 0.5  # 24 of 96 slots would be 0.25
