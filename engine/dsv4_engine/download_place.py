"""Where downloaded files go: the hub's cache, or a folder of one's own.

Owns paths, links and marks on disk.  Knows nothing of the network.  In neither place can a model that is not whole be
taken for whole: the cache gets its links when everything is there, config.json last, and a folder of one's own is
marked as unfinished from before its first byte to after its last.
Source of the cache's layout: huggingface_hub's guide "Understand caching" (blobs by hash, snapshots of links, refs).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from .errors import InputError
from .hub import HubFile, Listing
from .locate import DOWNLOAD_MARK, DOWNLOAD_STATE, download_state

_POLL = 0.2  # seconds between two looks at another process' lock


class Place(Protocol):
    """Where one listing's files go.  folder: what a model is loaded from when all are there."""

    @property
    def folder(self) -> Path: ...
    @property
    def lock(self) -> Path: ...
    def path(self, file: HubFile) -> Path:
        """Where the whole file lies."""

    def partial(self, file: HubFile) -> Path:
        """Where it grows."""

    def refuse_foreign(self, files: Iterable[HubFile]) -> None:
        """Raise InputError if something else is there, which a download would mix with or write over."""

    def may_replace(self) -> bool:
        """Whether a file that is there and differs is a download's, so that it may be replaced."""

    def begin(self) -> None:
        """From now on the model is not whole."""

    def finish(self, files: Iterable[HubFile]) -> None:
        """All of the files are there."""


class HubCache:
    """The cache that every program shares which uses huggingface_hub; HF_HOME and HF_HUB_CACHE say where it is."""

    def __init__(self, listing: Listing) -> None:
        from huggingface_hub import constants

        cache, name = Path(constants.HF_HUB_CACHE), f"models--{listing.repo.replace('/', '--')}"
        self._listing, self._storage = listing, cache / name
        self.folder = self._storage / "snapshots" / listing.commit
        self.lock = cache / ".locks" / name / "dsv4-download.lock"

    def path(self, file: HubFile) -> Path:
        return self._storage / "blobs" / file.etag

    def partial(self, file: HubFile) -> Path:
        return self._storage / "blobs" / f"{file.etag}.incomplete"

    def refuse_foreign(self, files: Iterable[HubFile]) -> None:
        pass

    def may_replace(self) -> bool:
        return True

    def begin(self) -> None:
        # Nothing of it can be found before it has links.  On a disk that knows none it is better to say so now.
        blobs = self._storage / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        trial = blobs / f".link.{secrets.token_hex(4)}"
        try:
            os.symlink("nowhere", trial)
        except OSError as error:
            raise InputError(
                f"the disk of {blobs} takes no symbolic links, which the hub's cache is made of ({error.strerror})",
                "Name a folder with --dir, or set HF_HOME to a folder on another disk.",
            ) from error
        trial.unlink()

    def finish(self, files: Iterable[HubFile]) -> None:
        for file in sorted(files, key=lambda file: file.name == "config.json"):
            link = self.folder / file.name
            blob = os.path.relpath(self.path(file), link.parent)
            if not (link.is_symlink() and os.readlink(link) == blob):
                link.parent.mkdir(parents=True, exist_ok=True)
                _replace(link, lambda new, blob=blob: os.symlink(blob, new))  # type: ignore[misc]
        revision = self._listing.revision
        if revision != self._listing.commit:
            ref = self._storage / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            _replace(ref, lambda new: new.write_text(self._listing.commit, encoding="ascii"))


class OwnFolder:
    """A folder with the files under their own names."""

    def __init__(self, folder: Path, listing: Listing) -> None:
        self.folder, self._listing, self._mark = folder, listing, folder / DOWNLOAD_MARK
        self.lock = self._mark / "lock"

    def path(self, file: HubFile) -> Path:
        return self.folder / file.name

    def partial(self, file: HubFile) -> Path:
        return self._mark / f"{quote(file.name, safe='')}.{file.etag[:16]}.incomplete"

    def refuse_foreign(self, files: Iterable[HubFile]) -> None:
        state = download_state(self.folder)
        if state is not None:
            if state["repo"] != self._listing.repo:
                raise InputError(f"{self.folder} holds a download of {state['repo']}", "Name another with --dir.")
            return
        try:
            entries = sorted(entry.name for entry in self.folder.iterdir())
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise InputError(f"{self.folder} is a file", "Name a folder with --dir.") from None
        known = {name.split("/")[0] for name in self._listing.files}
        known |= {DOWNLOAD_MARK, ".cache"}  # .cache is of hf download
        if foreign := [name for name in entries if name not in known]:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise InputError(
                f"{self.folder} is not empty: it holds {foreign[0]}{more}",
                "Name a new or empty folder with --dir.",
            )
        for file in files:
            path = self.path(file)
            if path.exists() and (not path.is_file() or path.stat().st_size != file.size):
                raise InputError(
                    f"{path} is not the file of {file.size:,} bytes that {self._listing.repo} has, nor of a download",
                    "Name another folder with --dir, or remove it.",
                )

    def may_replace(self) -> bool:
        return download_state(self.folder) is not None

    def begin(self) -> None:
        self._write_state(finished=False)

    def finish(self, files: Iterable[HubFile]) -> None:
        for left in self._mark.glob("*.incomplete"):  # of another commit
            left.unlink()
        self._write_state(finished=True)

    def _write_state(self, finished: bool) -> None:
        listing = self._listing
        state = {"repo": listing.repo, "revision": listing.revision, "commit": listing.commit, "finished": finished}
        self._mark.mkdir(parents=True, exist_ok=True)
        _replace(self._mark / DOWNLOAD_STATE, lambda new: new.write_text(json.dumps(state) + "\n", encoding="utf-8"))


@contextmanager
def alone(place: Place, say: Callable[[str], None]) -> Iterator[None]:
    """No other download into the same place, in this process or another, while inside; waits for one that runs."""
    place.lock.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    told = False
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say("another download of this model is running; waiting until it ends")
                told = True
                time.sleep(_POLL)
            except OSError as error:
                say(f"{place.lock.parent} knows no locks ({error.strerror}): start no second download of this model")
                break
        yield
    finally:
        os.close(handle)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Make ``path`` anew in one step: nobody sees it half done."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def safe_revision(revision: str) -> bool:
    """Whether the name of a branch, a tag or a commit can be a path below refs/."""
    return bool(re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision)) and ".." not in revision.split("/")
