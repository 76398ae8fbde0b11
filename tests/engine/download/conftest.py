"""A hub that serves a small checkpoint, and the two kinds of place that it is downloaded to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_server import Hub, hub_serving, repository, use
from support.random_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small checkpoint in three shards."""
    folder = make_checkpoint(tmp_path_factory.mktemp("published"), shards=3, quantised=True)
    return {"tokenizer.json": b'{"model": 1}', **{file.name: file.read_bytes() for file in sorted(folder.iterdir())}}


@pytest.fixture
def hub(checkpoint: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from dsv4_engine import hub as hub_client  # not everywhere there is what it needs
    from support.download_case import CHUNK

    with hub_serving(repository(checkpoint)) as hub:
        use(hub, tmp_path / "hub", monkeypatch)
        monkeypatch.setattr(hub_client, "CHUNK", CHUNK)
        monkeypatch.setattr(hub_client, "PATIENCE", 0.0)
        yield hub


@pytest.fixture(params=["cache", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Both kinds of place: the hub's cache, and a folder of one's own."""
    return None if request.param == "cache" else tmp_path / "own"
