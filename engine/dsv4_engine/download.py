"""A published model from the hub to this disk: what of it is needed, whether it fits, what is there, and the rest.

Owns which files a model needs and the order of the whole.  Transfers are hub.py's, paths download_place.py's.  Nothing
is believed: what is there already is read and compared with the hub's hashes, what comes is hashed on its way, and a
file gets its name when its hash was right.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from .accounting import readable_bytes
from .config import ModelConfig
from .download_part import READ, Part, Progress, Tally, opened
from .download_place import HubCache, OwnFolder, Place, alone, safe_revision
from .errors import DownloadError, InputError
from .hub import (
    DEFAULT_REVISION,
    ON_AGAIN,
    HubFile,
    Listing,
    WrongContent,
    check_listed,
    hub_settings,
    list_files,
    transfer,
)
from .locate import INDEX_NAME, SINGLE_NAME
from .strict_json import parse_json

WORKERS = 8  # files at a time
GRACE = 1.0  # seconds that threads have to end after an error
MOST_JSON = 1 << 28  # bytes of a config.json or an index that are taken into memory
_NEEDED = re.compile(r"(config|generation_config|tokenizer|tokenizer_config)\.json|LICEN[CS]E[\w.-]*|encoding/.+")

Bar = Callable[[str], AbstractContextManager[Progress]]
Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A model that is whole.  bytes: of its files; transferred: of them, this time, in transfer_seconds of seconds."""

    folder: Path
    repo: str
    revision: str
    commit: str
    files: int
    bytes: int
    transferred: int
    transfer_seconds: float
    seconds: float


def download(
    repo: str,
    revision: str = DEFAULT_REVISION,
    folder: Path | None = None,
    bar: Bar = lambda label: nullcontext(lambda done, total: None),
    say: Say = lambda text: None,
) -> Done:
    """Have the model ``repo`` (owner/name) whole and checked in the hub's cache, or in ``folder``; get what is missing.

    bar(label) opens a progress bar over bytes; say(text) tells a person what happens.  An interruption of any kind
    loses at most some MiB: the same call goes on.  Raises InputError for what cannot be had (no such model, no access,
    no room, another model's folder) and DownloadError for what failed; OSError where the disk does.
    """
    started = time.monotonic()
    if not safe_revision(revision):
        raise InputError(f"{revision!r} is no name of a revision", "Name a branch, a tag or a commit.")
    with hub_settings():
        listing = list_files(repo, revision)
        place: Place = HubCache(listing) if folder is None else OwnFolder(folder, listing)
        files, known = _choose(listing, place, say)
        place.refuse_foreign(files)
        _check_room(place, files)
        with alone(place, say):
            there, missing = _survey(place, files)
            size, waiting = sum(file.size for file in files), _to_come(place, missing)
            had = "" if waiting == size else f", {readable_bytes(size - waiting)} of it here already"
            say(f"{repo} at {listing.commit[:12]}: {len(files)} files, {readable_bytes(size)}{had}")
            missing += _damaged(place, there, bar, say)
            if missing:
                place.begin()
            begun = time.monotonic()
            came = _fetch(listing, place, missing, known, bar, say)
            ended = time.monotonic()
            place.finish(files)
    seconds = ended - begun, ended - started
    return Done(place.folder, repo, revision, listing.commit, len(files), size, came, *seconds)


# ---- which files, and whether they fit -------------------------------------------------------------------------------


def _choose(listing: Listing, place: Place, say: Say) -> tuple[list[HubFile], Mapping[str, bytes]]:
    """The files that the engine needs, and the contents of those that had to be read to know it.

    Weights are what the index names, so that a second copy in another form stays where it is.
    """
    repo, known = listing.repo, dict[str, bytes]()

    def read(name: str) -> bytes:
        known[name] = _contents(listing, listing.files[name], place)
        return known[name]

    if "config.json" not in listing.files:
        raise InputError(f"{repo} has no config.json: it holds no model", "Name the repository of a V4 checkpoint.")
    where = f"config.json of {repo}"
    try:
        ModelConfig.from_dict(parse_json(read("config.json")), where)
        if INDEX_NAME in listing.files:
            shards = set(parse_json(read(INDEX_NAME))["weight_map"].values())
        else:
            shards = {SINGLE_NAME}
        unlisted = sorted(str(name) for name in shards - listing.files.keys())
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where} or its index cannot be read ({error})", "Tell its publisher.") from error
    if unlisted:
        raise InputError(
            f"{repo} lacks {len(unlisted)} of {len(shards)} files of weights: {', '.join(unlisted[:3])}",
            "Name a repository with a whole checkpoint in safetensors files.",
        )
    if "tokenizer.json" not in listing.files:
        say(f"{repo} has no tokenizer.json: it can be inspected, but not be asked anything")
    files = [file for name, file in listing.files.items()
             if name in shards or name in known or _NEEDED.fullmatch(name)]  # fmt: skip
    for file in files:
        check_listed(file)
    return files, known


def _contents(listing: Listing, file: HubFile, place: Place) -> bytes:
    """A small file, from this disk if it is there whole, else from the hub."""
    check_listed(file)
    if file.size > MOST_JSON:
        raise InputError(f"{file.name} of {listing.repo} has {file.size:,} bytes", "It cannot be a model's.")
    try:
        content = place.path(file).read_bytes()
    except OSError:
        content = b""
    hasher = file.hasher()
    hasher.update(content)
    if hasher.hexdigest() == file.etag:
        return content
    memory, stop = BytesIO(), threading.Event()
    _receive(listing, Part(file, memory, Tally(file.size), stop), stop, lambda text: None)
    return memory.getvalue()


def _survey(place: Place, files: Sequence[HubFile]) -> tuple[list[HubFile], list[HubFile]]:
    """Files that are there in their size, and the others; where two have one place, one of them."""
    different = {place.path(file): file for file in files}
    there = [file for path, file in different.items() if _size(path) == file.size]
    return there, [file for file in different.values() if file not in there]


def _to_come(place: Place, missing: Sequence[HubFile]) -> int:
    """Bytes that are not on this disk yet."""
    return sum(file.size - _begun(place, file) for file in missing)


def _begun(place: Place, file: HubFile) -> int:
    """Bytes there are of an unfinished file."""
    size = _size(place.partial(file)) or 0
    return size if size <= file.size else 0


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_room(place: Place, files: Sequence[HubFile]) -> None:
    """Raise InputError if the disk has less room than what is to come."""
    _, missing = _survey(place, files)
    needed, free = _to_come(place, missing), _free(place.folder)
    if needed > free:
        raise InputError(
            f"{readable_bytes(needed)} are to be downloaded, and the disk of {place.folder} has {readable_bytes(free)} "
            "free",
            f"Free {readable_bytes(needed - free)}, or choose another disk with --dir or HF_HOME.",
        )


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- what is there ---------------------------------------------------------------------------------------------------


def _damaged(place: Place, there: Sequence[HubFile], bar: Bar, say: Say) -> list[HubFile]:
    """Read what is there; what has the wrong hash is removed and returned.

    Raises InputError if such a file is not a download's to replace.
    """
    found: list[HubFile] = []
    stop = threading.Event()
    with bar("Checking") as progress:
        tally = Tally(sum(file.size for file in there), progress)

        def check(file: HubFile) -> None:
            hasher = file.hasher()
            with place.path(file).open("rb", buffering=0) as handle:
                while data := handle.read(READ):
                    if stop.is_set():
                        return
                    hasher.update(data)
                    tally.add(len(data))
            if hasher.hexdigest() != file.etag:
                found.append(file)

        _each(check, there, stop)
    if found and not place.may_replace():
        names = ", ".join(sorted(file.name for file in found)[:3])
        raise InputError(
            f"{place.folder} has other contents in {len(found)} files than the hub, and they are not of a download: "
            f"{names}",
            "Name another folder with --dir, or remove these files.",
        )
    if found:
        place.begin()
    for file in found:
        say(f"{file.name} is damaged; downloading it again")
        place.path(file).unlink()
    return found


# ---- what is missing -------------------------------------------------------------------------------------------------


def _receive(listing: Listing, part: Part, stop: threading.Event, say: Say) -> None:
    """All of a file.  A wrong one is got once more from its start: what was here before may have been to blame.

    Raises DownloadError when that is wrong too.
    """
    for again in (True, False):
        try:
            transfer(listing, part.file, part, stop, say)
            part.check()
            return
        except WrongContent as wrong:
            part.restart()
            if not again:
                hint = "The server or what is between damages it. Try later, or another mirror with HF_ENDPOINT."
                raise DownloadError(f"{part.file.name} of {listing.repo} {wrong}, twice", hint) from wrong
            say(f"{part.file.name} {wrong}; downloading it again")


def _fetch(
    listing: Listing, place: Place, missing: Sequence[HubFile], known: Mapping[str, bytes], bar: Bar, say: Say
) -> int:
    """Get the missing files, several at a time; the bytes that came."""
    if not missing:
        return 0
    stop = threading.Event()
    with bar("Downloading") as progress:
        tally = Tally(_to_come(place, missing), progress)

        def get(file: HubFile) -> None:
            path, growing = place.path(file), place.partial(file)
            with _disk_errors(place, growing, tally), opened(growing) as handle:
                part = Part(file, handle, tally, stop)
                if file.name in known:
                    part.restart()
                    part.write(known[file.name])
                _receive(listing, part, stop, say)
                os.fsync(handle.fileno())
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(growing, path)

        _each(get, sorted(missing, key=lambda file: file.size), stop)
    return tally.done


@contextmanager
def _disk_errors(place: Place, path: Path, tally: Tally) -> Iterator[None]:
    """A full disk becomes a DownloadError with both numbers; other errors of the disk name the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            left = readable_bytes(tally.total - tally.done)
            raise DownloadError(
                f"the disk is full: {left} are still to come, and {place.folder} has "
                f"{readable_bytes(_free(place.folder))} free (of your quota, if there is one)",
                f"Free that much. {ON_AGAIN}",
            ) from error
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def _each(work: Callable[[T], None], items: Sequence[T], stop: threading.Event) -> None:
    """work(item) for all of them, WORKERS at a time; the first error, or Ctrl-C, sets ``stop`` and is raised.

    No executor: that would wait at exit for threads that sit in a read from a line that is dead.
    """
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def run() -> None:
        try:
            while not stop.is_set():
                work(todo.get_nowait())
        except queue.Empty:
            pass
        except Exception as error:
            ended.put(error)
            return
        ended.put(None)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(WORKERS, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            error = ended.get()
            if error is not None:
                raise error
    finally:
        stop.set()
        until = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
