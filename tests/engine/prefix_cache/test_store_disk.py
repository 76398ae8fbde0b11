"""Disks that are full, cannot be written to, or fail: the store gives what it has, says so once, and raises nothing.

The real thing where this machine allows it: a small tmpfs, full or mounted read-only, in a mount namespace of its own;
another user's rights in a forked process.  Errors that no test can cause are raised in place of the system's.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4_engine.errors import InputError
from dsv4_engine.prefix_cache import PrefixStore, folder, objects

from .store_common import ROOT, chain, consistent, fill, object_files, payload, right

# ---- a small disk ----------------------------------------------------------------------------------------------------


def namespace() -> list[str]:
    """The command that gives a process mounts of its own."""
    return ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-U", "-r", "-m"]


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to make a mount namespace with")
    folder = tmp_path_factory.mktemp("mount")
    tried = subprocess.run([*namespace(), "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine allows no mounts: {tried.stderr.strip()}")


def on_small_disk(tmp_path: Path, size: str, source: str) -> str:
    """Run Python source with ``folder`` on a tmpfs of its own.  Returns what it prints."""
    import sys

    head = (
        "import os, subprocess, sys\nfrom pathlib import Path\n"
        "from dsv4_engine.prefix_cache import PrefixStore, segments\n"
        "from dsv4_engine.prefix_cache.folder import Folder\n"
        "from store_common import *\nfolder = Path(sys.argv[1])\n"
        "def remount(how): subprocess.run(['mount', '-o', f'remount,{how}', str(folder)], check=True)\n"
    )
    paths = [str(ROOT / name) for name in (".", "engine", "kernels", "tests")] + [str(Path(__file__).parent)]
    command = 'mount -t tmpfs -o size="$1" none "$2" && exec "$3" -c "$4" "$2"'
    done = subprocess.run(
        [*namespace(), "sh", "-c", command, "sh", size, str(tmp_path), sys.executable, head + source],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("unforeseen", [False, True])
def test_a_full_disk(tmp_path: Path, unforeseen: bool) -> None:
    """Seen coming from the free space, and not seen coming (a quota, another writer)."""
    printed = on_small_disk(
        tmp_path,
        "1m",
        f"unforeseen = {unforeseen}\n"
        "real = Folder.free\n"
        "if unforeseen: Folder.free = lambda self: 1 << 40\n"
        "links = [link for number in range(40) for link in chain(number, 3)]\n"
        "with PrefixStore.open(folder, budget=10**9) as store:\n"
        "    kept = [link for link in links if store.write(link, 'rows', payload(link.key, 'rows'))]\n"
        "    assert 5 < len(kept) < len(links), len(kept)\n"
        "    assert len(store.notices) == 1, store.notices\n"
        "    assert store.writable != unforeseen\n"
        "    for link in kept: assert store.read(link.key, 'rows') == payload(link.key, 'rows')\n"
        "    assert [link for link in links if store.find([link.key])] == kept\n"
        "    store.touch([kept[0].key]), store.stats(), store.entries()\n"
        "Folder.free = real\n"
        "consistent(folder)\n"
        "with PrefixStore.open(folder, budget=10**9) as store:\n"
        "    assert store.prune(100_000).kept <= 100_000\n"
        "    fill(store, chain(99, 2))\n"
        "consistent(folder)\n"
        "print(len(kept))",
    )
    assert int(printed) > 5


@pytest.mark.usefixtures("mounts")
def test_a_disk_that_others_filled_to_the_last_byte(tmp_path: Path) -> None:
    on_small_disk(
        tmp_path,
        "1m",
        "def fill_up():\n"
        "    with open(folder / 'others', 'ab', buffering=0) as file:\n"
        "        try:\n"
        "            while True: file.write(bytes(512))\n"
        "        except OSError: pass\n"
        "links = chain(1, 4)\n"
        "with PrefixStore.open(folder, budget=10**9) as store: fill(store, links)\n"
        "fill_up()\n"
        "for attempt in range(3):\n"
        "    with PrefixStore.open(folder, budget=10**9) as store:\n"
        "        assert right(store, links) == 4\n"
        "        assert not store.write(chain(2, 1)[0], 'rows', bytes(100_000))\n"
        "        store.touch([links[0].key]), store.stats(), store.miss(chain(2, 1)[0])\n"
        "        assert len(store.notices) <= 2, store.notices\n"
        # The next attempt finds no index, nor room for one.
        "    for path in (folder / 'v1').glob('index*'): path.unlink()\n"
        "    fill_up()\n"
        "with PrefixStore.open(folder, budget=10**9) as store:\n"
        "    assert right(store, links) == 4\n"
        "    assert not store.writable and store.notices\n"
        "    store.clear()\n"
        "    assert object_files(folder) == []\n"
        "with PrefixStore.open(folder, budget=10**9) as store:\n"
        "    assert store.stats().segments == 0 and store.notices == [], store.notices\n"
        "(folder / 'others').unlink()\n"
        "consistent(folder)\n",
    )


@pytest.mark.usefixtures("mounts")
def test_a_disk_mounted_read_only(tmp_path: Path) -> None:
    on_small_disk(
        tmp_path,
        "4m",
        "links = chain(1, 4)\n"
        "store = PrefixStore.open(folder, budget=10**9)\n"
        "fill(store, links[:3])\n"
        "store.close()\n"
        "store = PrefixStore.open(folder, budget=10**9)\n"
        "fill(store, links)\n"  # left open: the index has a log that a reader cannot replay
        "bad = object_files(folder)[0]\n"
        "content = bytearray(bad.read_bytes()); content[-1] ^= 1\n"
        "subprocess.run(['mount', '--bind', str(folder), str(folder)], check=True)\n"
        "remount('bind,ro')\n"
        "with PrefixStore.open(folder) as reader:\n"
        "    assert not reader.writable and len(reader.notices) == 1 and 'only read' in reader.notices[0]\n"
        "    assert right(reader, links) == 4\n"
        "    assert not reader.write(chain(2, 1)[0], 'rows', b'x')\n"
        "    assert reader.write(links[0], 'rows', payload(links[0].key, 'rows')) is False\n"
        "    reader.touch([links[0].key]); reader.discard(links[0].key, 'rows')\n"
        "    assert reader.tokens(links[2].key) is not None\n"
        "    assert reader.miss(chain(2, 1)[0]).reason == 'new'\n"
        "    assert reader.stats().segments == 4 and len(reader.path(links[3].key)) == 4\n"
        "    assert reader.verify().sound\n"
        "    assert len(reader.notices) == 1, reader.notices\n"
        "remount('bind,rw')\n"
        "bad.write_bytes(content)\n"
        "remount('bind,ro')\n"
        "with PrefixStore.open(folder) as reader:\n"
        "    key, kind = bytes.fromhex(bad.stem), bad.suffix[1:]\n"
        "    for attempt in range(3): assert reader.read(key, kind) is None\n"
        "    assert len(reader.notices) == 2, reader.notices\n"
        "    assert all(kind not in entry.kinds for entry in reader.find([key]))\n"
        "    assert list(reader.verify().damaged) == [bad.name]\n"
        "    assert bad.exists()\n",
    )


# ---- rights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a process without privileges can reach and owns."""
    path = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(path, 65_534, 65_534)
    yield path
    subprocess.run(["chmod", "-R", "u+rwX", str(path)], check=True)
    shutil.rmtree(path)


def without_privileges(work: Callable[[], None]) -> None:
    """Do ``work`` in a forked process that is not root."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65_534)
                os.setuid(65_534)
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_without_the_right_to_write(shared: Path) -> None:
    links = chain(1, 3)

    def work() -> None:
        with PrefixStore.open(shared) as store:
            fill(store, links)
        for path in sorted((shared / "v1").rglob("*"), reverse=True):
            path.chmod(0o500 if path.is_dir() else 0o400)
        (shared / "v1").chmod(0o500)
        with PrefixStore.open(shared) as store:
            assert not store.writable and len(store.notices) == 1
            assert right(store, links) == 3
            assert not store.write(chain(2, 1)[0], "rows", b"x")
            assert store.stats().segments == 3 and store.verify().sound
            with pytest.raises(InputError):
                store.prune(0)
            with pytest.raises(InputError):
                store.clear()
            assert len(store.notices) == 1

    without_privileges(work)


def test_a_folder_that_cannot_be_made_or_entered(shared: Path) -> None:
    def work() -> None:
        shared.chmod(0o500)
        with PrefixStore.open(shared / "below" / "prefix") as store:
            nothing_works(store)
        shared.chmod(0o700)
        with PrefixStore.open(shared) as store:
            fill(store, chain(1, 1))
        (shared / "v1").chmod(0o000)
        with PrefixStore.open(shared) as store:
            nothing_works(store)
        shared.chmod(0o000)
        with PrefixStore.open(shared) as store:
            nothing_works(store)

    without_privileges(work)


def nothing_works(store: PrefixStore) -> None:
    (link,) = chain(1, 1)
    assert store.find([link.key]) == [] and store.read(link.key, "rows") is None
    assert not store.write(link, "rows", b"x")
    assert store.miss(link).reason == "off"
    assert store.stats().segments == 0 and store.entries() == []
    assert len(store.notices) == 1, store.notices


def test_an_object_that_may_not_be_read(shared: Path) -> None:
    links = chain(1, 3)

    def work() -> None:
        with PrefixStore.open(shared) as store:
            fill(store, links)
            object_files(shared)[0].chmod(0o000)
            right(store, links)
            assert len(store.notices) == 1 and "permission denied" in store.notices[0]
            fill(store, links)
            assert right(store, links) == 3
        consistent(shared)

    without_privileges(work)


# ---- errors in the middle --------------------------------------------------------------------------------------------


def failing(number: int) -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("where", ["open", "sync", "rename", "sync_folder"])
def test_writing_fails_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    links = chain(1, 5)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links[:2])
        with monkeypatch.context() as broken:
            if where == "open":
                broken.setattr(objects, "write_durably", failing(number))
            elif where == "sync":
                broken.setattr(objects, "sync", failing(number))
            elif where == "rename":
                broken.setattr(folder.os, "rename", failing(number))
            else:
                broken.setattr(folder, "sync_folder", failing(number))
            for _ in range(3):
                assert not store.write(links[2], "rows", payload(links[2].key, "rows"))
        assert not store.writable
        assert len(store.notices) == 1 and os.strerror(number).lower() in store.notices[0]
        assert right(store, links) == 2
    consistent(tmp_path)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        assert right(store, links) == 5 and store.notices == []


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    links = chain(1, 3)

    def work() -> None:
        with PrefixStore.open(tmp_path) as store:
            fill(store, links[:2])
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            assert not store.write(links[2], "rows", bytes(300_000))
            assert len(store.notices) == 1 and "too large" in store.notices[0]
            assert right(store, links) == 2

    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    consistent(tmp_path)


def test_too_many_open_files_condemn_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = chain(1, 2)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links)
        with monkeypatch.context() as broken:
            broken.setattr(objects, "_open", failing(errno.EMFILE))
            assert store.read(links[0].key, "rows") is None
        assert right(store, links) == 2
        assert store.read(links[0].key, "rows") == payload(links[0].key, "rows")
        assert len(store.notices) == 1
    consistent(tmp_path)


def test_an_index_that_stays_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    from dsv4_engine.prefix_cache import index

    monkeypatch.setattr(index, "BUSY_SECONDS", 0.05)
    links = chain(1, 4)
    with PrefixStore.open(tmp_path) as store:
        fill(store, links[:2])
        path = next(path for path in (tmp_path / "v1").glob("index*.sqlite"))
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            assert not store.write(links[2], "rows", payload(links[2].key, "rows"))
            store.touch([links[0].key])
        assert right(store, links) >= 2
        assert len(store.notices) == 1 and "busy" in store.notices[0]
        blocker.execute("ROLLBACK")
        blocker.close()
        fill(store, links)  # a lock passes
        assert right(store, links) == 4
    consistent(tmp_path)
