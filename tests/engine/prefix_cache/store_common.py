"""What the store's tests share: chains of made-up tokens, and payloads that follow from a key, so that any process can
tell a right one from a wrong one."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

from dsv4_engine.prefix_cache import Key, Origin, PrefixStore, Segment, segments
from dsv4_engine.prefix_cache.objects import KINDS, Kind

ORIGIN = Origin("a model", "kv_dtype=mixed chunk=16", "tiny")
LENGTH = 16
ROOT = Path(__file__).resolve().parents[3]


def chain(seed: int, count: int, origin: Origin = ORIGIN, length: int = LENGTH) -> list[Segment]:
    """``count`` segments; the same seed begins with the same tokens."""
    numbers = random.Random(seed)
    return segments(origin, [numbers.randrange(4096) for _ in range(count * length)], length)


def payload(key: Key, kind: Kind) -> bytes:
    """1 to 32 KiB that nothing else has."""
    size = 1024 + int.from_bytes(key[:2], "little") % 31_000
    return hashlib.shake_256(key + kind.encode()).digest(size)


def fill(store: PrefixStore, links: list[Segment], kinds: tuple[Kind, ...] = KINDS) -> None:
    for link in links:
        for kind in kinds:
            assert store.write(link, kind, payload(link.key, kind)), store.notices


def right(store: PrefixStore, links: list[Segment]) -> int:
    """How many leading segments the store finds.  Every byte that it gives out must be right."""
    found = store.find([link.key for link in links])
    assert [entry.key for entry in found] == [link.key for link in links][: len(found)]
    for entry in found:
        for kind in entry.kinds:
            content = store.read(entry.key, kind)
            assert content is None or content == payload(entry.key, kind)
    return len(found)


def object_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "v1" / "objects").rglob("*") if path.is_file())


def index_files(folder: Path) -> list[Path]:
    return sorted((folder / "v1").glob("index-*"))


def consistent(folder: Path) -> None:
    """After an open and close, files, index and totals agree, and nothing unfinished lies about."""
    with PrefixStore.open(folder) as store:
        stats, entries = store.stats(), store.entries()
        on_disk = {path.name: path.stat().st_size for path in object_files(folder)}
        known = {f"{entry.key.hex()}.{kind}": size for entry in entries for kind, size in entry.sizes.items()}
        assert known == on_disk
        assert stats.size == sum(on_disk.values())
        assert stats.staged == 0
        assert store._keeper.ask(lambda index: index.kept()) == stats.size
        checked = store.verify()
        assert checked.sound and not checked.adopted, checked
    assert not list((folder / "v1" / "staging").iterdir())


def script(source: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Python source in a process of its own, with this tree's packages; what it prints can be read from stdout."""
    paths = [str(ROOT / name) for name in (".", "engine", "kernels", "tests")] + [str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
