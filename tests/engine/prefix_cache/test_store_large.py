"""A hundred thousand segments.  How long it takes is measured by benchmarks/prefix_store.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_engine.prefix_cache import PrefixStore, objects
from dsv4_engine.prefix_cache.folder import Folder

from .store_common import chain, consistent, object_files

CHAINS, LENGTH = 200, 500


@pytest.mark.slow
def test_a_hundred_thousand_segments(tmp_path: Path) -> None:
    files = Folder(tmp_path)
    files.make()
    for number in range(CHAINS):
        for link in chain(number, LENGTH):
            path = files.path(link.key, "rows")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(objects.compose(link, "rows", link.key)[1]))
    with PrefixStore.open(tmp_path) as store:  # an index is made from the files
        assert store.notices == []
        stats = store.stats()
        assert (stats.segments, stats.tokens) == (CHAINS * LENGTH, CHAINS * LENGTH * 16)
    with PrefixStore.open(tmp_path) as store:
        for number in range(0, CHAINS, 7):
            links = chain(number, LENGTH + 3)
            assert len(store.find([link.key for link in links])) == LENGTH
            assert store.read(links[LENGTH - 1].key, "rows") == links[LENGTH - 1].key
            assert store.miss(links[LENGTH]).reason == "new"
        used = [link.key for link in chain(11, LENGTH)]
        store.touch(used)
        size = store.stats().size
        assert store.prune(size // 10).kept <= size // 10
        assert len(store.find(used)) == LENGTH
        kept = {entry.key: entry for entry in store.entries()}
        assert len(object_files(tmp_path)) == len(kept) >= CHAINS * LENGTH // 10 - 1
        assert all(entry.start == 0 or entry.parent in kept for entry in kept.values())
    consistent(tmp_path)
