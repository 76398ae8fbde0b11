"""What the hub has and how it comes over, through huggingface_hub: a repository's files with sizes and hashes, the
transfer of one, and in words every way in which that fails.

Address, token, proxy, timeout and offline mode are what the hub's own variables say.  Knows no folders and no models.
Transfers are plain HTTP through huggingface_hub's `http_get`: its `hf_hub_download`, and Xet, throw away what they have
of a file when they are interrupted, and shards have 3 to 14 GB.
"""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import httpx2

from .errors import DownloadError, InputError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

    from .download_part import Part

DEFAULT_REVISION = "main"
LISTING_TIMEOUT = 60  # seconds; a listing with sizes and hashes takes the hub some of them
PATIENCE = 300  # seconds without one byte of a file, after which its transfer is given up
CHUNK = 1 << 20  # bytes
ON_AGAIN = "Run the same command again: it goes on where it stopped."


class WrongContent(Exception):
    """What came is not the file that the hub lists.  The text says how: "has ..."."""


class Stopped(Exception):
    """The transfer was told to stop."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it.

    name: its path in the repository; size in bytes; etag: the SHA-256 of what git-lfs keeps, else the git object id,
    which is a SHA-1 over a header and the content.
    """

    name: str
    size: int
    etag: str

    def hasher(self) -> Any:
        """A hashlib object whose hexdigest after all of the content is `etag`."""
        if len(self.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.  revision: the branch, tag or commit it was asked for by."""

    repo: str
    revision: str
    commit: str
    files: Mapping[str, HubFile]


def list_files(repo: str, revision: str = DEFAULT_REVISION) -> Listing:
    """Ask the hub what it has.  Raises InputError or DownloadError, each with what to do next."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    with explained(repo, revision):
        try:
            info = HfApi(library_name="dsv4").model_info(
                repo, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT
            )
            found = [(item.rfilename, item.size, item.lfs.sha256 if item.lfs else item.blob_id)
                     for item in info.siblings or ()]  # fmt: skip
        except HFValidationError:
            raise
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DownloadError(f"{endpoint()} does not answer like a hub ({error})", _CHECK_ENDPOINT) from error
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise DownloadError(f"{endpoint()} names no commit of {repo}, revision {revision}", _CHECK_ENDPOINT)
    files = {name: HubFile(name, size or 0, etag or "") for name, size, etag in found}
    return Listing(repo, revision, str(info.sha), MappingProxyType(files))


def check_listed(file: HubFile) -> None:
    """Raise DownloadError if the file's path, size or hash are none; they become paths on this disk."""
    odd = "\\" in file.name or not file.name.isprintable()
    if odd or any(part in ("", ".", "..") for part in file.name.split("/")):
        raise DownloadError(f"{endpoint()} lists a file {file.name!r}, which cannot be written", _CHECK_ENDPOINT)
    if file.size < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.etag):
        raise DownloadError(f"{endpoint()} lists {file.name} without a size and a hash to check it by", _CHECK_ENDPOINT)
    from huggingface_hub import constants

    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        raise InputError(
            f"{file.name} has {file.size:,} bytes, and the hub serves files of up to "
            f"{constants.MAX_HTTP_DOWNLOAD_SIZE:,} bytes to plain HTTP",
            "Get it with the hub's own tool: hf download",
        )


def transfer(
    listing: Listing, file: HubFile, part: Part, stop: threading.Event, say: Callable[[str], None] = lambda text: None
) -> None:
    """Write the file's bytes from ``part.at`` on into ``part``, trying again for as long as some come now and then.

    say: told of each interruption.  Raises WrongContent, Stopped, DownloadError or InputError, and OSError where the
    disk fails.
    """
    moved, failures = time.monotonic(), 0
    while not stop.is_set():
        before = part.at
        failure = _attempt(listing, file, part)
        if failure is None:
            return
        if stop.is_set():
            break
        moved, failures = (time.monotonic(), 0) if part.at > before else (moved, failures + 1)
        if time.monotonic() - moved >= PATIENCE:
            raise failure
        wait = min(2**failures, 30)
        say(f"{file.name}: {failure.message}, at {part.at:,} of {file.size:,} bytes; trying again in {wait} s")
        stop.wait(wait)
    raise Stopped


def _attempt(listing: Listing, file: HubFile, part: Part) -> DownloadError | None:
    """One go at the rest of a file: None when all of it is there, else what ended it, if that may pass."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    try:
        with explained(listing.repo, listing.revision):
            http_get(
                hf_hub_url(listing.repo, file.name, revision=listing.commit),
                cast(BinaryIO, part),  # it has what http_get uses of one
                resume_size=part.at,
                # What is compressed on the way could not be continued in its middle.
                headers={**build_hf_headers(library_name="dsv4"), "Accept-Encoding": "identity"},
                expected_size=file.size,
                tqdm_class=cast(Any, _NoBar),
            )
    except DownloadError as error:
        status = _status(error.__cause__)
        if status == 416:
            raise WrongContent(f"has less than {part.at:,} of its {file.size:,} bytes there") from error
        if status is not None and status not in (408, 429) and status < 500:
            raise DownloadError(f"{file.name}: {error.message}", error.hint) from error
        return error
    except OSError as error:
        if error.errno is not None:
            raise
        raise WrongContent(f"has {part.at:,} bytes there instead of {file.size:,}") from error  # http_get has counted
    return None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of the hub's stands for."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def hub_settings() -> Iterator[None]:
    """huggingface_hub as a download needs it.

    It hands over 10 MB at a time: on a slow line nothing would move for a minute, and a line that drops sooner than
    that would never get anywhere.  And its log would go across the bar, with addresses that are signed.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    chunk, verbosity = constants.DOWNLOAD_CHUNK_SIZE, logging.get_verbosity()
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = chunk
        logging.set_verbosity(verbosity)


class _NoBar:
    """In the place of huggingface_hub's own bar."""

    def __init__(self, **settings: object) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


# ---- failures in words -----------------------------------------------------------------------------------------------

_CHECK_ENDPOINT = "Check HF_ENDPOINT, if it is set; or use another mirror."


def endpoint() -> str:
    """The hub's address, as HF_ENDPOINT says."""
    from huggingface_hub import constants

    return constants.ENDPOINT


@contextmanager
def explained(repo: str, revision: str) -> Iterator[None]:
    """Whatever huggingface_hub raises inside becomes an InputError, or a DownloadError where trying again may help."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise InputError(
            "HF_HUB_OFFLINE is set, so nothing is downloaded",
            "Unset it (and TRANSFORMERS_OFFLINE); what was downloaded before is found by --model in any case.",
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{repo!r} is no name of a model on the hub", "Write owner/name.") from error
    except errors.HfHubHTTPError as error:
        raise _refused(error, repo, revision) from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise InputError(f"{endpoint()} is no address of a hub", "Correct HF_ENDPOINT, or unset it.") from error
    except httpx2.HTTPError as error:
        raise _unreachable(error) from error


def _refused(error: HfHubHTTPError, repo: str, revision: str) -> InputError:
    """The hub answered, with an error."""
    from huggingface_hub import errors, get_token

    at, status = endpoint(), error.response.status_code
    words = " ".join((error.server_message or "").split())[:200]
    said = f": {words}" if words else ""
    if isinstance(error, errors.GatedRepoError):
        who = "the account of your token has no access" if get_token() else "no token is given"
        hint = f"Accept its terms at {at}/{repo}, then set HF_TOKEN to a token of that account (or: hf auth login)."
        return InputError(f"{repo} is gated, and {who}{said}", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repo} has no revision {revision!r}", f"{at}/{repo}/tree/main lists its branches and tags.")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "Check the name. If it is private, set HF_TOKEN to a token that may read it (or: hf auth login)."
        return InputError(f"{at} has no model {repo}, or it is private", hint)
    if status in (401, 403):
        what = "HF_TOKEN, or what hf auth login kept,"
        return InputError(f"{at} refuses your access to {repo}{said}", f"Check {what} with: hf auth whoami")
    if status == 429:
        return DownloadError(f"{at} lets in no more requests for now{said}", f"{ON_AGAIN} A token raises the limit.")
    if status >= 500:
        return DownloadError(f"{at} is in trouble (status {status}{said})", ON_AGAIN)
    return DownloadError(f"{at} answers with status {status} for {repo}{said}", _CHECK_ENDPOINT)


def _unreachable(error: httpx2.HTTPError) -> DownloadError:
    """The hub did not answer, or not to the end."""
    host = httpx2.URL(endpoint()).host
    with suppress(RuntimeError):  # it never came to a request
        host = error.request.url.host
    causes = list(_causes(error))
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return DownloadError(
            f"the name {host} cannot be resolved: no network, or a wrong HF_ENDPOINT",
            f"Check the connection and HF_ENDPOINT. {ON_AGAIN}",
        )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return DownloadError(
            f"no secure connection to {host} ({error})", "Check the clock, SSL_CERT_FILE, and what is between."
        )
    if isinstance(error, httpx2.ProxyError):
        return DownloadError(f"the proxy fails: {error}", f"Check HTTPS_PROXY. {ON_AGAIN}")
    if isinstance(error, httpx2.ConnectError):
        return DownloadError(f"no connection to {host} ({error})", f"Check the network and HF_ENDPOINT. {ON_AGAIN}")
    if isinstance(error, httpx2.TimeoutException):
        return DownloadError(
            f"{host} does not answer", f"{ON_AGAIN} HF_HUB_DOWNLOAD_TIMEOUT sets how many seconds to wait."
        )
    return DownloadError(f"the connection to {host} broke ({error})", ON_AGAIN)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, to the root."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__
