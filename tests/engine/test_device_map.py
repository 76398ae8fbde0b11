"""Layers over devices: what Accelerate makes of sizes and limits, and maps that go through a file unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_engine.config import ModelConfig
from dsv4_engine.device_map import DeviceMap, Limits, everything_on, read_map, spread, to_json

GIB = 1 << 30
SIZES = [3 * GIB] * 10


def total(devices: tuple[str, ...], device: str, before: int, after: int) -> int:
    held = sum(size for size, d in zip(SIZES, devices, strict=True) if d == device)
    return held + (before if devices[0] == device else 0) + (after if devices[-1] == device else 0)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(
    "rooms", [(40,), (32,), (20, 20), (16, 16), (17, 16), (40, 40), (4, 40), (12, 12, 12), (8, 8, 8, 8, 8)]
)
def test_nothing_is_planned_beyond_its_room(rooms: tuple[int, ...], balanced: bool) -> None:
    room = {f"cuda:{i}": size * GIB for i, size in enumerate(rooms)}
    found = spread(SIZES, GIB, GIB, room, balanced=balanced)
    assert found is not None
    assert list(found) == sorted(found)  # in order: no layer goes back
    for device, size in room.items():
        assert total(found, device, GIB, GIB) <= size


@pytest.mark.parametrize("rooms", [(31,), (15, 15), (2, 30), ()])
def test_what_does_not_fit(rooms: tuple[int, ...]) -> None:
    assert not rooms or spread(SIZES, GIB, GIB, {f"cuda:{i}": size * GIB for i, size in enumerate(rooms)}) is None


def test_auto_fills_and_balanced_shares() -> None:
    room = {"cuda:0": 40 * GIB, "cuda:1": 40 * GIB}
    assert set(spread(SIZES, GIB, GIB, room) or ()) == {"cuda:0"}
    shared = spread(SIZES, GIB, GIB, room, balanced=True)
    assert shared is not None and shared.count("cuda:0") == 5


def test_ranges_and_what_is_apart() -> None:
    found = DeviceMap("cuda:0", ("cuda:0", "cuda:0", "cuda:1"), ("cpu", "cuda:0", "disk"), "cuda:1")
    assert found.devices == ("cuda:0", "cuda:1") and found.ranges == [(0, 2), (2, 3)] and found.apart() == (0, 2)
    assert everything_on("cpu", 3).apart() == ()


def test_limits_repeat_the_last() -> None:
    assert [Limits((5, 7)).of(i) for i in range(4)] == [5, 7, 7, 7] and Limits().of(0) is None


def test_a_map_survives_its_file(tmp_path: Path) -> None:
    config = ModelConfig.preset("v4-flash")
    layers = ("cuda:0",) * 20 + ("cuda:1",) * 23
    homes = tuple("cpu" if i % 2 else "disk" for i in range(40)) + ("cuda:1",) * 3
    given = DeviceMap("cuda:0", layers, homes, "cuda:1")
    (tmp_path / "map.json").write_text(to_json(given))
    assert read_map(tmp_path / "map.json", config, ["cuda:0", "cuda:1"]) == given
