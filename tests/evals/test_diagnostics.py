"""Positions, blocks and choices, worked out by hand."""

from __future__ import annotations

import pytest

from dsv4_evals.diagnostics import blocks, diagnose, entries
from dsv4_evals.model import LayerChoice, Trace


def trace(*steps: frozenset[int] | None, ratio: int = 4, overlap: bool = True) -> Trace:
    return Trace(999, 128, (LayerChoice(2, ratio, overlap, steps),))


def test_blocks_and_the_entries_that_hold_them() -> None:
    assert list(blocks((8, 12), 4)) == [2]
    assert list(blocks((7, 13), 4)) == [1, 2, 3]
    assert entries((8, 12), 4, overlap=False) == {2}
    assert entries((8, 12), 4, overlap=True) == {2, 3}
    assert entries((127, 129), 128, overlap=False) == {0, 1}


@pytest.mark.parametrize(
    ("needle", "value", "expected"),
    [
        ((100, 126), (120, 123), {"mod_4": 0, "mod_128": 100, "value_mod_4": 0, "straddles_4": False}),
        ((100, 126), (120, 123), {"straddles_128": False}),
        ((103, 130), (122, 125), {"mod_4": 3, "mod_128": 103, "value_mod_4": 2, "straddles_4": True}),
        ((103, 130), (122, 125), {"straddles_128": True}),
        ((256, 384), (380, 384), {"mod_4": 0, "mod_128": 0, "straddles_4": False, "straddles_128": False}),
    ],
)  # fmt: skip
def test_offsets_and_straddling(needle: tuple[int, int], value: tuple[int, int], expected: dict[str, int]) -> None:
    found = diagnose(needle, value, 1000, None)
    assert {name: found[name] for name in expected} == expected
    assert (found["position"], found["layers"]) == (needle[0], [])


def test_the_window_holds_the_last_128_positions() -> None:
    # The last of 1,000 tokens is at 999 and sees 872 to 999.
    assert diagnose((870, 880), (872, 875), 1000, None)["in_window"]
    assert not diagnose((870, 880), (871, 875), 1000, None)["in_window"]
    assert diagnose((870, 880), (871, 875), 1000, None)["distance"] == 125


def test_shares_of_chosen_entries_by_step() -> None:
    # The needle's tokens 100..111 are blocks 25..27, held by entries 25..28; the value's are block 26: entries 26, 27.
    steps = (frozenset({1, 2, 25}), frozenset({25, 26}), frozenset({25, 26, 27, 28}))
    (layer,) = diagnose((100, 112), (104, 108), 1000, trace(*steps))["layers"]
    assert (layer["layer"], layer["entries"], layer["all"]) == (2, 4, False)
    assert layer["needle"] == {"prompt": 0.25, "answer_best": 1.0, "answer_mean": 0.75}
    assert layer["value"] == {"prompt": 0.0, "answer_best": 1.0, "answer_mean": 0.75}
    assert layer["value_found"]


def test_a_value_is_found_when_each_of_its_blocks_is_in_a_chosen_entry() -> None:
    def found(*chosen: int, value: tuple[int, int] = (104, 109), overlap: bool = True) -> bool:
        diagnosis = diagnose((100, 112), value, 1000, trace(frozenset(chosen), overlap=overlap))
        return bool(diagnosis["layers"][0]["value_found"])

    assert found(26, 28)  # blocks 26 and 27; entry 28 holds block 27 as well
    assert found(27)  # entry 27 holds both
    assert not found(26)
    assert not found(28)
    assert not found(25, 29)
    assert not found(27, overlap=False)
    assert found(26, 27, overlap=False)


def test_a_layer_that_need_not_choose_sees_everything() -> None:
    (layer,) = diagnose((100, 112), (104, 108), 200, trace(None, None))["layers"]
    assert layer["all"] and layer["value_found"]
    assert layer["value"] == {"prompt": 1.0, "answer_best": 1.0, "answer_mean": 1.0}


def test_without_answer_tokens_there_is_no_share_of_them() -> None:
    (layer,) = diagnose((100, 112), (104, 108), 1000, trace(frozenset({26})))["layers"]
    assert layer["value"] == {"prompt": 0.5, "answer_best": None, "answer_mean": None}
