"""Plots: what is drawn where, read back from the image, the vector file or the terminal's characters."""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from dsv4cli.errors import InputProblem
from dsv4cli.plots import (
    MAX_SERIES,
    HeatMap,
    Panel,
    Series,
    check_image_path,
    save_heat_map,
    save_panels,
    terminal_heat_map,
    terminal_panel,
)

PANEL = Panel(
    "Growth",
    "context",
    "GiB",
    [Series("slow", [0, 1, 2], [1, 2, 3]), Series("fast", [0, 1, 2], [1, 20, 40], note="13x")],
    ticks=[(0, "none"), (2, "1M")],
)
MAP = HeatMap("needle", "length", "depth", ["4K", "8K"], ["0%", "100%"], [[1.0, 0.25], [0.5, None]])


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_panels_stand_side_by_side(tmp_path: Path) -> None:
    save_panels(tmp_path / "one.png", [PANEL])
    save_panels(tmp_path / "two.png", [PANEL, PANEL], "Title", "a note")
    one, two = png_size(tmp_path / "one.png"), png_size(tmp_path / "two.png")
    assert one[0] > 600 and one[1] > 400
    assert two == (2 * one[0], one[1])


def test_an_image_names_its_lines_axes_and_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    save_panels(tmp_path / "p.svg", [PANEL], "A title", "A note")
    text = (tmp_path / "p.svg").read_text()
    for words in ("A title", "A note", "Growth", "context", "GiB", "slow", "fast  13x", "none", "1M"):
        assert f">{words}<" in text
    save_heat_map(tmp_path / "m.svg", MAP, "20 samples")
    text = (tmp_path / "m.svg").read_text()
    for words in ("needle", "length", "depth", "4K", "100%", "1.00", "0.25", "–", "20 samples"):
        assert f">{words}<" in text


def test_names_of_lines_that_end_together_do_not_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    lines = [Series(f"line {i}", [0, 1], [0, 10 + i / 100]) for i in range(MAX_SERIES)]
    save_panels(tmp_path / "p.svg", [Panel("t", "x", "y", lines)])
    text = (tmp_path / "p.svg").read_text()
    places = sorted(float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)[^>]*>line \d<", text))
    if not places:  # how matplotlib writes places differs between its versions
        places = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>line \d<', text))
    assert len(places) == MAX_SERIES
    assert all(b - a > 9 for a, b in pairwise(places))


def test_logarithmic_panels(tmp_path: Path) -> None:
    panel = Panel("t", "x", "y", [Series("a", [1, 1000], [1, 1e6], "end")], log=True)
    save_panels(tmp_path / "p.png", [panel])
    assert png_size(tmp_path / "p.png")[0] > 0
    assert "a end" in terminal_panel(panel, colour=False)


def test_a_terminal_panel_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    text = terminal_panel(PANEL, width=60, height=15)
    assert "\x1b" not in text  # standard output is no terminal here
    lines = text.splitlines()
    assert all(len(line) <= 60 for line in lines[:-1])
    assert "Growth, GiB" in lines[0]
    assert "none" in text and "1M" in text
    assert lines[-1].split() == ["#", "slow", "o", "fast", "13x"]
    top = next(i for i, line in enumerate(lines) if "o" in line.split("┤")[-1])
    assert top < 4  # the fast line ends at the top
    assert capsys.readouterr().out == ""


def test_a_terminal_panel_in_colour() -> None:
    text = terminal_panel(PANEL, colour=True)
    assert "\x1b[38;2;86;180;233m" in text
    assert any("\u2800" <= char <= "\u28ff" for char in text)  # Braille dots


def test_two_panels_do_not_mix() -> None:
    terminal_panel(PANEL, colour=False)
    assert terminal_panel(PANEL, width=60, colour=False) == terminal_panel(PANEL, width=60, colour=False)


def test_heat_map_image(tmp_path: Path) -> None:
    save_heat_map(tmp_path / "m.png", MAP)
    assert png_size(tmp_path / "m.png")[0] > 400
    save_heat_map(tmp_path / "one.png", HeatMap("", "x", "y", ["a"], ["b"], [[None]], low=1.0, high=1.0))


def test_a_terminal_heat_map() -> None:
    plain = terminal_heat_map(MAP)
    assert [line.split() for line in plain.splitlines()[2:]] == [["0%", "1.00", "0.25"], ["100%", "0.50", "–"]]
    assert "\x1b" not in plain
    colour = terminal_heat_map(MAP, colour=True)
    assert "48;2;254;232;56" in colour  # 1.0: the light end of the scale
    assert re.sub(r"\x1b\[[\d;]*m", "", colour).split() == plain.split()
    assert terminal_heat_map(HeatMap("", "x", "y", ["a"], ["b"], [[None]])).split() == ["y", "\\", "x", "a", "b", "–"]


@pytest.mark.parametrize("name", ["plot", "plot.jpeg", "plot.txt"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputProblem, match="an image ends in "):
        check_image_path(tmp_path / name)


def test_a_missing_folder_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InputProblem, match="there is no folder"):
        check_image_path(tmp_path / "no" / "plot.png")
    check_image_path(tmp_path / "plot.PNG")
