"""`dsv4 cache`: tables for people, JSON for programs, questions before anything is removed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_engine.prefix_cache import Origin, PrefixStore, Segment, segments
from dsv4cli.commands import cache

from .conftest import Cli, environment

ORIGIN = Origin("f" * 64, "kv=mixed chunk=16", "small")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with two prompts that share their first two segments of three."""
    folder = tmp_path / "prefix"
    monkeypatch.setenv("DSV4_CACHE_DIR", str(folder))
    monkeypatch.delenv("DSV4_CACHE_BUDGET", raising=False)
    return folder


@pytest.fixture
def filled(folder: Path) -> list[list[Segment]]:
    numbers = random.Random(0)
    ids = [numbers.randrange(4096) for _ in range(64)]
    prompts = [segments(ORIGIN, ids[:48], 16), segments(ORIGIN, [*ids[:32], *ids[48:]], 16)]
    with PrefixStore.open(folder) as store:
        for links in prompts:
            for link in links:
                assert store.write(link, "rows", bytes(10_000))
            assert store.write(links[-1], "state", bytes(5_000))
        store.touch([link.key for link in prompts[0]])
    return prompts


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "v1/objects").rglob("*") if path.is_file())


@pytest.mark.usefixtures("filled")
def test_ls(cli: Cli, folder: Path, filled: list[list[Segment]]) -> None:
    found = cli("cache", "ls", "--json").json
    assert found["folder"] == str(folder)
    first, second = found["prompts"]
    assert [first["key"], second["key"]] == [links[-1].key.hex() for links in filled]
    assert (first["tokens"], first["uses"], first["model"], first["format"]) == (48, 1, "small", ORIGIN.row_format)
    assert 35_000 < first["bytes"] < 37_500 and 15_000 < first["own_bytes"] < 16_500
    shown = cli("cache", "ls").out.splitlines()
    assert len(shown) == 3 and filled[0][-1].key.hex()[:12] in shown[1] and "small" in shown[1]
    assert cli("cache", "ls", "--cache-dir", folder / "other").out == ""
    assert cli("cache", "ls", "--cache-dir", folder / "other", "--json").json["prompts"] == []


def test_stats(cli: Cli, folder: Path, filled: list[list[Segment]]) -> None:
    found = cli("cache", "stats", "--json").json
    assert (found["segments"], found["tokens"], found["objects"]) == (4, 64, {"rows": 4, "state": 2})
    assert found["size"] == sum(path.stat().st_size for path in files(folder)) == found["written"]
    assert found["write_amplification"] == 1.0
    assert found["shares"][0]["origin"] == {"model": "f" * 64, "row_format": ORIGIN.row_format, "name": "small"}
    assert found["budget"] > 0 and found["free"] > 0 and found["writable"] is True
    shown = cli("cache", "stats")
    for words in (str(folder), "64 tokens in 4 segments", "of the disk are free", "1.00 times", "kv=mixed"):
        assert words in shown.out
    assert shown.err == ""


def test_verify_and_damage(cli: Cli, folder: Path, filled: list[list[Segment]]) -> None:
    done = cli("cache", "verify")
    assert (done.code, done.err) == (0, "") and "6 objects" in done.out
    file = next(path for path in files(folder) if path.stem == filled[0][1].key.hex())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = cli("cache", "verify", "--json")
    assert done.code == 1
    assert done.json["damaged"] == {file.name: "its checksum does not match"}
    assert (done.json["sound"], done.json["objects"], done.json["unreachable"]) == (False, 5, 2)
    assert "set aside" in done.err and file.name[:8] in done.err
    done = cli("cache", "verify")
    assert done.code == 0 and "behind a gap" in done.out and done.err == ""
    assert "1 damaged" in cli("cache", "stats").out


@pytest.mark.usefixtures("filled")
def test_nothing_is_removed_unasked(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(folder)
    for command in (["cache", "clear"], ["cache", "prune", "--budget", "20K"]):
        done = cli(*command, input="y\n")
        assert done.code == 2 and "--yes" in done.err and done.out == ""
    monkeypatch.setattr(cache, "_asked_on_terminal", lambda: True)
    for command in (["cache", "clear", "--json"], ["cache", "prune", "--budget", "20K", "--json"]):
        done = cli(*command, input="n\n")
        assert done.code == 0 and "nothing was removed" in done.err
        assert json.loads(done.out.partition("\n")[2])["freed"] == 0  # the test's own echo of the answer comes first
        assert f"from {folder}?" in done.err
    assert files(folder) == before
    done = cli("cache", "clear", input="y\n")
    assert done.code == 0 and "removed" in done.err and files(folder) == []


def test_prune(cli: Cli, folder: Path, filled: list[list[Segment]], monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("cache", "prune", "--budget", "1G", "--yes")
    assert done.code == 0 and "nothing to remove" in done.err
    done = cli("cache", "prune", "--budget", "38K", "--yes", "--json")
    assert (done.code, done.json["segments"]) == (0, 1)
    assert done.json["kept"] == sum(path.stat().st_size for path in files(folder))
    with PrefixStore.open(folder) as store:
        assert len(store.find([link.key for link in filled[0]])) == 3
        assert len(store.find([link.key for link in filled[1]])) == 2
    monkeypatch.setenv("DSV4_CACHE_BUDGET", "0")
    assert cli("cache", "prune", "--yes").code == 0
    assert files(folder) == []


@pytest.mark.parametrize("text", ["much", "-1", "5X", "1e9", ""])
def test_wrong_sizes(cli: Cli, folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("cache", "prune", "--yes", "--budget", text)
    assert done.code == 2 and "is not a size" in " ".join(done.err.replace("│", " ").split())
    if text:
        monkeypatch.setenv("DSV4_CACHE_BUDGET", text)
        done = cli("cache", "stats")
        assert done.code == 2 and "is not a size" in done.err and "hint: " in done.err
    assert not folder.exists()


def test_a_file_as_folder(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for command in ("ls", "stats", "verify", "prune", "clear"):
        done = cli("cache", command, "--cache-dir", file)
        assert done.code == 2 and "not a folder" in done.err and done.out == ""
    assert file.read_text() == "mine"


def test_help_and_lists_load_no_torch(folder: Path) -> None:
    for line in ("cache prune --help", "cache stats", "cache verify"):
        code = (
            f"import sys; sys.argv = ['dsv4', *{line.split()!r}]\n"
            "from dsv4cli.main import main\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
