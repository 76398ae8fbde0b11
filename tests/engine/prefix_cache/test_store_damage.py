"""Bytes changed, cut, added or exchanged anywhere: no wrong byte comes out, nothing fails or is tried for ever."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4_engine.prefix_cache import Origin, PrefixStore, folder, objects
from dsv4_engine.prefix_cache.folder import MOST_QUARANTINED

from .store_common import ORIGIN, chain, consistent, fill, index_files, object_files, payload, right, script

pytestmark = pytest.mark.usefixtures("unsynced")

# ---- objects ---------------------------------------------------------------------------------------------------------


def small_object(tmp_path: Path, kind: objects.Kind) -> tuple[Path, bytes]:
    """An object whose every byte a test can afford to change."""
    (link,) = chain(1, 1)
    _, parts = objects.compose(link, kind, b"all of the payload")
    file = tmp_path / "object"
    objects.write_durably(file, parts)
    return file, link.key


@pytest.mark.parametrize("kind", objects.KINDS)
def test_every_changed_byte_of_an_object_is_noticed(tmp_path: Path, kind: objects.Kind) -> None:
    file, key = small_object(tmp_path, kind)
    whole = file.read_bytes()
    assert objects.read_payload(file, key, kind) == b"all of the payload"
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        for look in (objects.read_payload, objects.check):
            with pytest.raises(objects.DamagedObject):
                look(file, key, kind)


@pytest.mark.parametrize("kind", objects.KINDS)
def test_every_cut_and_addition_is_noticed(tmp_path: Path, kind: objects.Kind) -> None:
    file, key = small_object(tmp_path, kind)
    whole = file.read_bytes()
    cuts = [whole[:size] for size in [*range(0, len(whole), 5), len(whole) - 1]]
    for content in [*cuts, whole + b"\0", whole + whole, bytes(len(whole))]:
        file.write_bytes(content)
        for look in (objects.read_payload, objects.check, objects.read_header):
            with pytest.raises(objects.DamagedObject):
                look(file, key, kind)


def test_an_object_under_another_name_is_noticed(tmp_path: Path) -> None:
    file, key = small_object(tmp_path, "rows")
    with pytest.raises(objects.DamagedObject, match="another object"):
        objects.read_payload(file, key, "state")
    with pytest.raises(objects.DamagedObject, match="another object"):
        objects.read_payload(file, bytes(32), "rows")


def test_tokens_that_do_not_give_the_key_are_noticed(tmp_path: Path) -> None:
    one, two = chain(1, 2)
    forged = objects.Segment(one.key, one.parent, one.tokens, one.start, one.end, one.origin, two.ids)
    file = tmp_path / "object"
    objects.write_durably(file, objects.compose(forged, "rows", b"x")[1])
    with pytest.raises(objects.DamagedObject, match="tokens"):
        objects.check(file, one.key, "rows")
    with pytest.raises(objects.DamagedObject, match="tokens"):
        objects.read_ids(file, one.key)


def test_an_object_of_another_version_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = chain(1, 2)
    with PrefixStore.open(tmp_path) as store:
        with monkeypatch.context() as other:
            other.setattr(objects, "VERSION", 2)
            fill(store, links)
        assert store.read(links[0].key, "rows") is None
        assert "format 2" in store.notices[0]
        assert not store.verify().sound
        fill(store, links)
        assert right(store, links) == 2
    consistent(tmp_path)


def test_two_versions_share_a_folder_and_leave_each_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = chain(1, 2)
    with monkeypatch.context() as other:
        other.setattr(folder, "CURRENT", "v2")
        with PrefixStore.open(tmp_path) as store:
            fill(store, links)
    with PrefixStore.open(tmp_path) as store:
        assert store.find([links[0].key]) == [] and store.notices == []
        fill(store, links)
        assert store.verify().sound
        store.prune(0)
        assert store.stats().other_versions > 0
    with monkeypatch.context() as other:
        other.setattr(folder, "CURRENT", "v2")
        with PrefixStore.open(tmp_path) as store:
            assert right(store, links) == 2


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[-1] ^= 1
    elif how == "cut":
        del content[-1]
    elif how == "empty":
        content.clear()
    elif how == "grow":
        content += b"more"
    elif how == "zeros":
        content = bytearray(len(content))
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "grow", "zeros"])
def test_a_bad_object_is_set_aside_once_and_written_again(tmp_path: Path, how: str) -> None:
    links = chain(1, 4)
    bad = links[2].key
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
    file = tmp_path / "v1/objects" / bad.hex()[:1] / f"{bad.hex()}.rows"
    damage(file, how)
    with PrefixStore.open(tmp_path) as store:
        assert store.read(bad, "rows") is None
        assert len(store.notices) == 1 and "set aside" in store.notices[0]
        assert not file.exists() and store.stats().quarantined_files == 1
        assert store.read(bad, "rows") is None
        assert [entry.kinds for entry in store.find([bad])] == [{"state"}]
        assert store.miss(links[2]).reason == "damaged"
        assert len(store.notices) == 1
    with PrefixStore.open(tmp_path) as store:  # the next process neither meets nor mentions it
        assert store.read(bad, "rows") is None and store.notices == []
        fill(store, links)
        assert right(store, links) == 4 and store.notices == []
        assert store.read(bad, "rows") == payload(bad, "rows")
    consistent(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "link", "dangling", "pipe"])
def test_something_else_in_place_of_an_object(tmp_path: Path, kind: str) -> None:
    links = chain(1, 2)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        file = object_files(tmp_path)[0]
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "link":
            file.symlink_to("/dev/zero")
        elif kind == "dangling":
            file.symlink_to(tmp_path / "nowhere")
        else:
            os.mkfifo(file)
        right(store, links)
        fill(store, links)
        assert right(store, links) == 2
    consistent(tmp_path)


def test_strangers_among_the_objects_are_moved_out(tmp_path: Path) -> None:
    links = chain(1, 2)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        group = object_files(tmp_path)[0].parent
        (group / "notes.txt").write_text("hello")
        (group / ("0" * 64 + ".rows")).write_text("not even in its own folder")
        (tmp_path / "v1/objects/loose").write_text("x")
        (group / "deeper").mkdir()
        checked = store.verify()
        assert len(checked.damaged) == 4 and checked.objects == 4
        assert store.verify().sound
        assert right(store, links) == 2
    consistent(tmp_path)


def test_the_quarantine_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = chain(1, MOST_QUARANTINED)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        for file in object_files(tmp_path):
            damage(file, "flip")
        checked = store.verify()
        assert len(checked.damaged) == 2 * len(links) and checked.objects == 0
        assert store.stats().quarantined_files == MOST_QUARANTINED
        assert len(store.notices) == 1
        assert store.stats().quarantined <= folder.MOST_QUARANTINED_BYTES
        monkeypatch.setattr(folder, "MOST_QUARANTINED_BYTES", 100_000)
        assert store.write(links[0], "rows", bytes(80_000))
        damage(object_files(tmp_path)[0], "flip")
        assert store.read(links[0].key, "rows") is None
        assert 80_000 < store.stats().quarantined <= 100_000
        assert store.write(links[0], "rows", bytes(120_000))
        damage(object_files(tmp_path)[0], "flip")
        assert store.read(links[0].key, "rows") is None
        assert store.stats().quarantined_files == 0
    consistent(tmp_path)


def test_vanished_objects_are_a_miss(tmp_path: Path) -> None:
    links = chain(1, 4)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        for file in object_files(tmp_path):
            if file.stem == links[1].key.hex():
                file.unlink()
        assert store.read(links[1].key, "rows") is None and store.read(links[1].key, "state") is None
        assert right(store, links) == 1
        assert len(store.notices) == 1 and "vanished" in store.notices[0]
        fill(store, links)
        assert right(store, links) == 4
        os.unlink(object_files(tmp_path)[3])
        assert store.verify().vanished == 1
    consistent(tmp_path)


# ---- index -----------------------------------------------------------------------------------------------------------


def opened(tmp_path: Path) -> Path:
    """A store whose index still has a log, as a killed process leaves it."""
    links = chain(1, 12)
    source = tmp_path / "source"
    store = PrefixStore.open(source)
    fill(store, links)
    store.prune(store.stats().size - 1)  # also tombstones
    fill(store, links)
    left = tmp_path / "left"
    shutil.copytree(source, left)
    store.close()
    shutil.rmtree(source)
    assert {path.suffix for path in index_files(left)} == {".sqlite", ".sqlite-wal", ".sqlite-shm"}
    return left


def survives(store_folder: Path) -> None:
    """Whatever is wrong with the index: nothing raises, nothing is lost, and another process finds all well."""
    links = chain(1, 12)
    with PrefixStore.open(store_folder) as store:
        assert right(store, links) == 12, store.notices
        store.touch([link.key for link in links])
        assert isinstance(store.miss(chain(2, 1)[0]).text, str)
        assert len(store.path(links[-1].key)) == 12
        more = chain(3, 1)
        fill(store, more)
        assert right(store, more) == 1
        store.stats()
        assert len(store.notices) <= 1
        store.verify()
    consistent(store_folder)
    with PrefixStore.open(store_folder) as store:
        assert right(store, links) == 12 and store.notices == []


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda index: index.write_bytes(b""),
    "text": lambda index: index.write_bytes(b"This is no database, but long enough to be taken for one. " * 100),
    "half": lambda index: os.truncate(index, index.stat().st_size // 2),
    "gone": lambda index: index.unlink(),
    "zeros": lambda index: index.write_bytes(bytes(index.stat().st_size)),
    "folder": lambda index: (index.unlink(), index.mkdir()),
}


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("how", sorted(BROKEN))
def test_a_broken_index_is_made_again(tmp_path: Path, how: str, log: bool) -> None:
    left = opened(tmp_path)
    index, *rest = index_files(left)
    if not log:
        for path in rest:
            path.unlink()
    BROKEN[how](index)
    survives(left)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE segment",
        "DROP TABLE total",
        "DROP INDEX segment_tokens",
        "CREATE TABLE more(x)",
        "DELETE FROM total WHERE name = 'kept'",
        "UPDATE total SET value = 'much'",
        "UPDATE total SET value = 1e300",
        "UPDATE total SET value = 9223372036854775807 WHERE name = 'kept'",
        "DELETE FROM segment",
        "DELETE FROM origin",
        "UPDATE origin SET row_format = x'ff00'",
        "UPDATE segment SET rows = 'text'",
        "UPDATE segment SET rows = 9223372036854775807",
        "UPDATE segment SET rows = 0, state = 0",
        "UPDATE segment SET used = 'yesterday'",
        "UPDATE segment SET parent = 12",
        "UPDATE segment SET parent = key",
        "UPDATE segment SET first = 5, last = 5",
        "UPDATE segment SET hits = -1",
        "UPDATE segment SET origin = 99",
        "UPDATE segment SET key = randomblob(32)",
        "UPDATE segment SET key = randomblob(7)",
        "INSERT OR REPLACE INTO gone SELECT key, 17, 'then' FROM segment",
        "PRAGMA user_version = 77",
    ],
)
def test_an_index_that_says_something_wrong_does_no_harm(tmp_path: Path, statement: str) -> None:
    left = opened(tmp_path)
    with sqlite3.connect(index_files(left)[0]) as db:
        db.execute(statement)
    db.close()
    survives_but_paths(left)


def survives_but_paths(left: Path) -> None:
    """A well-formed lie about who follows whom is found by `verify` alone, which the index needs anyway."""
    links = chain(1, 12)
    with PrefixStore.open(left) as store:
        assert right(store, links) == 12, store.notices
        store.touch([link.key for link in links])
        fill(store, chain(3, 1))
        store.prune(10**12)  # the totals are wrong, but nothing may be removed for it
        assert right(store, links) == 12
        store.verify()
        store.stats(), store.path(links[-1].key)
        assert len(store.notices) <= 1, store.notices
    with PrefixStore.open(left) as store:
        assert right(store, links) == 12 and store.notices == []


def flips(left: Path, rounds: int, seed: int) -> None:
    numbers = random.Random(seed)
    whole = {path.name: path.read_bytes() for path in index_files(left)}
    copy = left.with_name("copy")
    for _ in range(rounds):
        shutil.copytree(left, copy)
        name = numbers.choice(sorted(whole))
        content = bytearray(whole[name])
        for _ in range(numbers.choice([1, 1, 4, 64])):
            # The first page holds the header and the layout: most of what can go wrong goes wrong there.
            place = numbers.randrange(numbers.choice([100, 4096, len(content)]))
            content[place] = numbers.randrange(256)
        (copy / "v1" / name).write_bytes(content)
        survives_but_paths(copy)
        shutil.rmtree(copy)


def test_bytes_changed_anywhere_in_the_index(tmp_path: Path) -> None:
    flips(opened(tmp_path), 25, seed=1)


@pytest.mark.slow
def test_bytes_changed_anywhere_in_the_index_many_times(tmp_path: Path) -> None:
    flips(opened(tmp_path), 1500, seed=2)


def test_bytes_changed_anywhere_in_any_object(tmp_path: Path) -> None:
    numbers = random.Random(3)
    links = chain(1, 6)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
    for _ in range(60):
        file = numbers.choice(object_files(tmp_path))
        content = bytearray(file.read_bytes())
        content[numbers.randrange(numbers.choice([64, len(content)]))] ^= 1 << numbers.randrange(8)
        file.write_bytes(content)
        with PrefixStore.open(tmp_path) as store:
            right(store, links)
            fill(store, links)
            assert right(store, links) == 6
            assert len(store.notices) == 1
    consistent(tmp_path)


def test_the_index_is_lost_while_others_use_it(tmp_path: Path) -> None:
    """Two open stores; the index is broken under both.  One makes it again, the other goes over to the new one."""
    links, more = chain(1, 6), chain(2, 3)
    with PrefixStore.open(tmp_path) as one, PrefixStore.open(tmp_path) as two:
        fill(one, links)
        assert right(two, links) == 6
        for path in index_files(tmp_path):
            if path.suffix == ".sqlite":
                with open(path, "r+b") as file:
                    file.write(b"\xff" * 8192)
        fill(one, more)
        fill(two, more)
        assert right(one, links) == right(two, links) == 6
        assert right(one, more) == right(two, more) == 3
    consistent(tmp_path)


def test_an_index_that_breaks_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_engine.prefix_cache import index

    links = chain(1, 3)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
    monkeypatch.setattr(index.Index, "kinds", lambda self, keys: self._db.execute("SELECT * FROM nothing"))
    with PrefixStore.open(tmp_path) as store:
        for _ in range(10):
            assert right(store, links) == 3  # from the files alone
        assert not store.writable
        assert len(store.notices) == 2
    assert len(index_files(tmp_path)) == 1


def test_a_new_index_knows_all_that_the_old_one_knew_of_the_files(tmp_path: Path) -> None:
    links = [*chain(1, 3), *chain(2, 3, Origin("other", "format=2", "name"))]
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        before = {entry.key: entry for entry in store.entries()}
    index_files(tmp_path)[0].unlink()
    with PrefixStore.open(tmp_path) as store:
        after = {entry.key: entry for entry in store.entries()}
        assert {entry.origin.name for entry in after.values()} == {"tiny", "name"}
        for key, entry in before.items():
            again = after[key]
            assert (again.parent, again.start, again.end) == (entry.parent, entry.start, entry.end)
            assert (again.origin, again.sizes) == (entry.origin, entry.sizes)
            assert abs(again.used - entry.used) < 60
        assert store.miss(chain(1, 1, Origin("third", ORIGIN.row_format))[0]).reason == "model"
        assert store.notices == []


def test_another_process_reads_what_this_one_checks(tmp_path: Path) -> None:
    links = chain(1, 3)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        reader = script(
            "import sys; from pathlib import Path; from store_common import *\n"
            "from dsv4_engine.prefix_cache import PrefixStore\n"
            "with PrefixStore.open(Path(sys.argv[1])) as store: sys.stdout.write(str(right(store, chain(1, 3))))",
            tmp_path,
        )
        assert reader.communicate()[0] == b"3"
