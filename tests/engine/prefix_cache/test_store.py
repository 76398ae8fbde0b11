"""The prefix store as its callers see it: keys, partial reuse, reasons for a miss, budget, privacy."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from dsv4_engine.errors import InputError
from dsv4_engine.prefix_cache import Origin, PrefixStore, Segment, chain_key, root_key, segments
from dsv4_engine.prefix_cache.eviction import HALF_LIFE_SECONDS, value
from dsv4_engine.prefix_cache.folder import default_folder
from dsv4_engine.prefix_cache.index import Entry

from .store_common import LENGTH, ORIGIN, chain, consistent, fill, object_files, payload, right

# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_hash_of_parent_and_tokens() -> None:
    parent = root_key("m", "f")
    tokens = (1).to_bytes(4, "little") + (70_000).to_bytes(4, "little")
    expected = hashlib.blake2b(parent + tokens, digest_size=32, person=b"dsv4 prefix 1").digest()
    assert chain_key(parent, [1, 70_000]) == expected
    assert len(expected) == 32


def test_keys_differ_by_everything_that_decides_the_rows() -> None:
    keys = {
        root_key("m", "f"), root_key("m", "g"), root_key("n", "f"), root_key("mf", ""), root_key("", "mf"),
        chain_key(root_key("m", "f"), [1]), chain_key(root_key("m", "f"), [2]), chain_key(root_key("m", "f"), [1, 1]),
        chain_key(root_key("m", "g"), [1]),
    }  # fmt: skip
    assert len(keys) == 9
    with pytest.raises(OverflowError):
        chain_key(root_key("m", "f"), [2**31])


def test_segments_are_whole_and_chained() -> None:
    found = segments(ORIGIN, list(range(70)), 32)
    assert [(link.start, link.end) for link in found] == [(0, 32), (32, 64)]
    assert found[0].parent == ORIGIN.key and found[1].parent == found[0].key
    assert found[1].key == chain_key(found[0].key, list(range(32, 64)))
    assert segments(ORIGIN, list(range(31)), 32) == []
    other = segments(Origin("another", ORIGIN.row_format), list(range(70)), 32)
    assert [link.tokens for link in other] == [link.tokens for link in found]
    assert not {link.key for link in other} & {link.key for link in found}


def test_a_change_late_in_a_prompt_keeps_the_keys_before_it() -> None:
    ids = list(range(160))
    edited = [*ids[:130], 7, *ids[131:]]
    same = [a.key == b.key for a, b in zip(segments(ORIGIN, ids, 16), segments(ORIGIN, edited, 16), strict=True)]
    assert same == [True] * 8 + [False] * 2


# ---- finding, reading, writing ---------------------------------------------------------------------------------------


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    links = chain(1, 5)
    with PrefixStore.open(tmp_path) as store:
        assert store.find([link.key for link in links]) == []
        assert store.read(links[0].key, "rows") is None
        fill(store, links[:4], ("rows",))
        assert store.write(links[2], "state", [b"one", bytearray(b"two"), memoryview(b"three")])
        assert store.notices == []
    with PrefixStore.open(tmp_path) as store:
        found = store.find([link.key for link in links])
        assert [sorted(entry.kinds) for entry in found] == [["rows"], ["rows"], ["rows", "state"], ["rows"]]
        assert store.read(links[2].key, "state") == b"onetwothree"
        assert store.read(links[3].key, "rows") == payload(links[3].key, "rows")
        assert store.read(links[3].key, "state") is None
        assert store.notices == []
    consistent(tmp_path)


def test_what_is_written_is_durable_before_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, then folder, then index: the order that survives a power cut."""
    from dsv4_engine.prefix_cache import index, objects

    steps: list[str] = []
    real_sync, real_rename, real_add = objects.sync, os.rename, index.Index.add

    def sync(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        real_sync(handle)

    with PrefixStore.open(tmp_path) as store:
        fill(store, chain(1, 1), ("rows",))
        monkeypatch.setattr(objects, "sync", sync)
        monkeypatch.setattr(os, "rename", lambda *names: (steps.append("rename"), real_rename(*names)))
        monkeypatch.setattr(index.Index, "add", lambda *given: (steps.append("index"), real_add(*given))[1])
        fill(store, chain(1, 1), ("state",))
    assert steps == ["file", "rename", "folder", "index"]


def test_the_payload_may_be_empty_or_of_any_shape(tmp_path: Path) -> None:
    import array

    first, second = chain(1, 2)
    with PrefixStore.open(tmp_path) as store:
        assert store.write(first, "rows", b"")
        assert store.read(first.key, "rows") == b""
        numbers = array.array("f", [1.5, -2.0, 3.25, 0.0])
        assert store.write(second, "rows", [memoryview(numbers).cast("B").cast("f", (2, 2)), b""])
        assert store.read(second.key, "rows") == numbers.tobytes()


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    links = chain(1, 3)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        before = {path: path.stat().st_mtime_ns for path in object_files(tmp_path)}
        written = store.stats().written
        fill(store, links)
        assert {path: path.stat().st_mtime_ns for path in object_files(tmp_path)} == before
        assert store.stats().written == written == store.stats().size
        assert store.stats().write_amplification == 1.0


def test_two_prompts_share_what_they_begin_with(tmp_path: Path) -> None:
    ids = list(range(10 * LENGTH))
    one, two = segments(ORIGIN, ids, LENGTH), segments(ORIGIN, [*ids[: 7 * LENGTH], *range(5000, 5048)], LENGTH)
    with PrefixStore.open(tmp_path) as store:
        fill(store, one, ("rows",))
        assert len(store.find([link.key for link in two])) == 7
        fill(store, two, ("rows",))
        assert store.stats().segments == 13
        assert right(store, one) == right(store, two) == 10


def test_find_among_prompts_written_in_turn(tmp_path: Path) -> None:
    """Also when their segments lie between each other's, and after the index was made anew."""
    prompts = [chain(number, 40) for number in range(3)]
    with PrefixStore.open(tmp_path) as store:
        for place in range(40):
            for links in prompts if place < 20 else prompts[:1]:
                fill(store, links[place : place + 1], ("rows",))
        for links, count in zip(prompts, (40, 20, 20), strict=True):
            assert len(store.find([link.key for link in links])) == count
        for number in range(3, 25):  # others come between
            fill(store, chain(number, 1), ("rows",))
        fill(store, prompts[1], ("rows",))
        keys = [link.key for link in prompts[1]]
        assert len(store.find(keys)) == 40
        assert [entry.key for entry in store.find(keys[:2] * 2)] == keys[:2] * 2
        assert store.find([]) == []
    for index in (tmp_path / "v1").glob("index*"):
        index.unlink()
    with PrefixStore.open(tmp_path) as store:
        assert [len(store.find([link.key for link in links])) for links in prompts] == [40, 40, 20]
    consistent(tmp_path)


def test_find_ends_at_the_first_gap(tmp_path: Path) -> None:
    links = chain(1, 6)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        for kind in ("rows", "state"):
            store.discard(links[3].key, kind)
        assert right(store, links) == 3
        assert store.path(links[5].key) == []
        assert store.verify().unreachable == 2
        fill(store, links[3:4])  # the gap is filled, and what lies behind it is of use again
        assert right(store, links) == 6
        assert [entry.key for entry in store.path(links[5].key)] == [link.key for link in links]
    consistent(tmp_path)


def test_a_segment_without_its_parent_is_not_kept(tmp_path: Path) -> None:
    links = chain(1, 3)
    with PrefixStore.open(tmp_path) as store:
        assert not store.write(links[1], "rows", b"rows")
        assert not store.write(links[2], "state", b"state")
        assert object_files(tmp_path) == []
        fill(store, links)
    consistent(tmp_path)


def test_a_state_within_a_segment(tmp_path: Path) -> None:
    first, second = segments(ORIGIN, list(range(32)), 16)
    inner = Segment(chain_key(first.key, range(16, 20)), first.key, first.tokens, 16, 20, ORIGIN, second.ids[:16])
    with PrefixStore.open(tmp_path) as store:
        fill(store, [first])
        assert store.write(inner, "state", b"state")
        assert [entry.kinds for entry in store.find([inner.key])] == [{"state"}]
        assert store.verify().unreachable == 0
        assert store.stats().tokens == 16
        store.discard(inner.key, "state")
        assert store.find([inner.key]) == []
        store.discard(inner.key, "state")
    consistent(tmp_path)


@pytest.mark.parametrize("largest", [0, 255, 256, 65_535, 65_536, 2**24 - 1, 2**24, 2**31 - 1])
def test_tokens_come_back(tmp_path: Path, largest: int) -> None:
    ids = [largest, 0, 1, 2, 3, 4, 5, largest]
    (link,) = segments(ORIGIN, ids, 8)
    with PrefixStore.open(tmp_path) as store:
        assert store.tokens(link.key) is None
        fill(store, [link])
        assert store.tokens(link.key) == ids
        assert right(store, [link]) == 1


def test_many_threads_write_and_read_one_store(tmp_path: Path) -> None:
    links = chain(1, 12)
    failures: list[BaseException] = []

    def work(store: PrefixStore, number: int) -> None:
        try:
            for link in links:
                deadline = time.monotonic() + 60
                while not store.write(link, "rows", payload(link.key, "rows")):
                    assert time.monotonic() < deadline
                store.touch([link.key])
                right(store, links)
        except BaseException as error:
            failures.append(error)

    with PrefixStore.open(tmp_path) as store:
        threads = [threading.Thread(target=work, args=(store, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [] and store.notices == []
        assert right(store, links) == 12
    consistent(tmp_path)


def test_a_closed_store_finds_nothing_and_does_not_fail(tmp_path: Path) -> None:
    links = chain(1, 1)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
    assert store.find([links[0].key]) == [] and store.read(links[0].key, "rows") is None
    assert not store.write(links[0], "rows", b"")
    store.touch([links[0].key])
    assert store.miss(links[0]).reason == "off"
    store.close()


# ---- why a prefix is not there ---------------------------------------------------------------------------------------


def test_a_miss_says_why(tmp_path: Path) -> None:
    links = chain(1, 3)
    with PrefixStore.open(tmp_path) as store:
        assert store.miss(links[0]).reason == "new"
        fill(store, links)
        other_format = chain(1, 3, Origin(ORIGIN.model, "kv_dtype=fp32 chunk=16 extra=1"))
        miss = store.miss(other_format[1])
        assert (miss.reason, miss.other) == ("format", ORIGIN)
        assert "kv_dtype mixed instead of fp32" in miss.text and "extra - instead of 1" in miss.text
        miss = store.miss(chain(1, 3, Origin("new weights", ORIGIN.row_format))[2])
        assert (miss.reason, miss.other) == ("model", ORIGIN) and "tiny" in miss.text
        assert store.miss(chain(2, 1)[0]).reason == "new"

        store.prune(0)
        assert store.miss(links[2]).reason == "evicted"
        fill(store, links)
        next(path for path in object_files(tmp_path) if path.stem == links[1].key.hex()).write_bytes(b"nothing")
        store.verify()
        assert [store.miss(link).reason for link in links] == ["new", "damaged", "new"]
        fill(store, links)
        assert right(store, links) == 3
        assert store.miss(links[1]).reason == "new"


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_the_budget_holds_and_the_least_valuable_goes_first(tmp_path: Path) -> None:
    def write(store: PrefixStore, links: list[Segment]) -> None:
        for link in links:
            assert store.write(link, "rows", link.key * 1000)

    def kept(store: PrefixStore, links: list[Segment]) -> int:
        return len(store.find([link.key for link in links]))

    used, old, new = chain(1, 4), chain(2, 4), chain(3, 4)
    with PrefixStore.open(tmp_path, budget=10**9) as store:
        write(store, used)
        write(store, old)
        store.touch([link.key for link in used])
        size = store.stats().size
    with PrefixStore.open(tmp_path, budget=size + 2000) as store:
        write(store, new)
        assert store.stats().size <= store.budget
        assert (kept(store, new), kept(store, used), kept(store, old)) == (4, 4, 0)
        assert store.stats().removed == size // 2
        assert store.notices == []
    consistent(tmp_path)


def test_values_compare_hits_recency_and_size() -> None:
    def entry(hits: int, age: float, size: int) -> Entry:
        return Entry(b"k" * 32, b"p" * 32, 0, 16, ORIGIN, {"rows": size}, hits, now - age)

    now, day = 1e9, 86_400.0
    plain = value(entry(0, day, 1000), now)
    assert value(entry(1, day, 1000), now) > plain > value(entry(0, 2 * day, 1000), now)
    assert value(entry(0, day, 500), now) > plain > value(entry(0, day, 2000), now)
    assert value(entry(1, day + HALF_LIFE_SECONDS, 1000), now) == pytest.approx(plain)
    assert value(entry(0, -1000 * day, 1000), now) == value(entry(0, 0, 1000), now)  # a clock was wrong


def test_a_prompt_larger_than_the_budget_keeps_its_beginning(tmp_path: Path) -> None:
    links = chain(1, 30)
    with PrefixStore.open(tmp_path, budget=150_000) as store:
        kept = [store.write(link, "rows", payload(link.key, "rows")) for link in links]
        count = kept.index(False)
        assert count > 3 and not any(kept[count:])
        assert right(store, links) == count
        assert store.stats().size <= 150_000
        assert len(store.notices) == 1 and "150,000" in store.notices[0]
    consistent(tmp_path)


def test_what_a_kept_segment_chains_to_is_never_removed(tmp_path: Path) -> None:
    trunk = list(range(4 * LENGTH))
    branches = [segments(ORIGIN, [*trunk, *range(1000 * n, 1000 * n + 3 * LENGTH)], LENGTH) for n in range(1, 6)]
    with PrefixStore.open(tmp_path) as store:
        for links in branches:
            fill(store, links)
        for links in branches:  # the trunk is never used again, and its followers are
            store.touch([link.key for link in links[4:]])
        budget = store.stats().size
        while budget > 0:
            budget -= 60_000
            pruned = store.prune(max(budget, 0))
            entries = {entry.key: entry for entry in store.entries()}
            assert pruned.kept == sum(entry.size for entry in entries.values()) <= max(budget, 0)
            assert all(entry.start == 0 or entry.parent in entries for entry in entries.values())
        assert object_files(tmp_path) == []
    consistent(tmp_path)


def test_default_budget_is_a_share_of_what_the_disk_could_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_engine.prefix_cache.folder import Folder

    monkeypatch.setattr(Folder, "free", lambda self: 1_000_000)
    with PrefixStore.open(tmp_path) as store:
        assert store.budget == 250_000
        fill(store, chain(1, 2))
        size = store.stats().size
    with PrefixStore.open(tmp_path) as store:
        assert store.budget == (1_000_000 + size) // 4


def test_clear_leaves_nothing_of_what_was_fed(tmp_path: Path) -> None:
    other = tmp_path / "v7" / "objects"
    other.mkdir(parents=True)
    (other / "thing").write_bytes(b"x" * 1000)
    with PrefixStore.open(tmp_path) as store:
        fill(store, chain(1, 4))
        assert store.stats().other_versions == 1000
        object_files(tmp_path)[0].write_bytes(b"damaged")
        store.verify()
        assert store.stats().quarantined_files == 1
        assert store.clear() > 0
        own = next(path.name for path in (tmp_path / "v1/staging").iterdir())  # says that this process lives
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {path.name.split("-")[0] for path in left} <= {"index", "rebuild.lock", own}
        assert store.stats().segments == 0 and store.miss(chain(1, 1)[0]).reason == "new"
        fill(store, chain(1, 4))
    consistent(tmp_path)


# ---- folders and permissions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_owner_can_read(tmp_path: Path, mask: int) -> None:
    folder = tmp_path / "deep" / "prefix"
    before = os.umask(mask)
    try:
        with PrefixStore.open(folder) as store:
            fill(store, chain(1, 2))
            object_files(folder)[0].write_bytes(b"")
            store.verify()
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    finally:
        os.umask(before)
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kinds = {path.suffix for path in modes}
    assert {".sqlite", ".sqlite-wal", ".rows", ".state", ".lock"} <= kinds  # the modes of all of these were looked at


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    links = chain(1, 1)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
    (tmp_path / "v1").chmod(0o755)
    with PrefixStore.open(tmp_path) as store:
        assert right(store, links) == 1
    assert stat.S_IMODE((tmp_path / "v1").stat().st_mode) == 0o700
    (tmp_path / "v1").chmod(0o770)
    with PrefixStore.open(tmp_path) as store:
        assert store.find([links[0].key]) == [] and not store.writable
        assert len(store.notices) == 1 and "other users" in store.notices[0]


def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = chain(1, 1)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)
    with PrefixStore.open(tmp_path) as store:
        assert store.find([links[0].key]) == [] and store.read(links[0].key, "rows") is None
        assert not store.write(links[0], "rows", b"")
        assert "another user" in store.notices[0]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "below"):
        with pytest.raises(InputError, match="not a folder"):
            PrefixStore.open(folder)
    assert file.read_text() == "mine"


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DSV4_CACHE_DIR", raising=False)
    assert default_folder() == tmp_path / ".cache/dsv4/prefix"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache/dsv4/prefix"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/dsv4/prefix")
    monkeypatch.setenv("DSV4_CACHE_DIR", "/chosen")
    assert default_folder() == Path("/chosen")


def test_the_folder_may_vanish_while_the_store_is_open(tmp_path: Path) -> None:
    import shutil

    links = chain(1, 4)
    folder = tmp_path / "prefix"
    with PrefixStore.open(folder) as store:
        fill(store, links[:3])
        shutil.rmtree(folder)
        assert store.find([link.key for link in links]) == []
        assert store.read(links[0].key, "rows") is None
        fill(store, links)
        assert right(store, links) == 4
    consistent(folder)
