"""What the tests of downloads share: the repository that is served, and what of it a model needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsv4_engine.download import Done
from dsv4_engine.locate import DOWNLOAD_MARK, INDEX_NAME
from support.hub_server import Hub

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
NEEDED = {"config.json", "tokenizer.json", "LICENSE", "encoding/encoding_dsv4.py", INDEX_NAME, *SHARDS}
CHUNK = 1024


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and DOWNLOAD_MARK not in path.parts
    }


def needed(hub: Hub) -> dict[str, bytes]:
    return {name: content for name, content in hub.files.items() if name in NEEDED}


def lengths(hub: Hub, names: Sequence[str] | set[str] = tuple(NEEDED)) -> dict[str, int]:
    return {name: len(hub.files[name]) for name in names}


def place_of(hub: Hub, done: Done, name: str) -> Path:
    """The real file behind a name, not a link to it."""
    return (done.folder / name).resolve()
