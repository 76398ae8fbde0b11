"""A small server that speaks the hub's protocol, with everything that can go wrong on the way: for tests of downloads.

It lists a repository at its revisions with sizes and hashes, redirects large files to another host as the hub does,
knows ranges, and counts what it sends.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

REPO = "someone/small-v4"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 4096  # bytes written at a time


@dataclass
class Trouble:
    """What happens to one file; each is used up by the requests it spoils."""

    drops: list[int] = field(default_factory=list)  # end the connection after so many bytes
    resets: list[int] = field(default_factory=list)  # the same, with a reset instead of an end
    corrupt: int = 0  # so many requests get a wrong byte
    statuses: list[int] = field(default_factory=list)  # answer with these first
    resize: int = 0  # always send so many bytes more, or less
    no_ranges: bool = False  # always send everything


@dataclass
class Hub:
    """A hub with one repository.  The test changes it at any time."""

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: dict[str, str] = field(default_factory=dict)  # others than main, to commits
    gated: bool = False
    token: str | None = None  # the only one that may read it
    rate: float | None = None  # bytes a second of each connection
    listing: Any = None  # sent instead of the listing
    troubles: dict[str, Trouble] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)  # bytes of bodies, by file
    asked: list[tuple[str, int]] = field(default_factory=list)  # file and first byte
    leaked: list[str] = field(default_factory=list)  # tokens that reached the other host
    url: str = ""

    def trouble(self, name: str, **what: Any) -> None:
        self.troubles[name] = Trouble(**what)

    def forget(self) -> None:
        """Count anew.  What still goes out of requests before, to a client that was killed say, is not counted then."""
        self.sent, self.asked = Counter(), []

    def siblings(self) -> list[dict[str, Any]]:
        """The listing's files, as the hub describes them when asked for blobs."""
        found = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if is_large(name):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 135}
            found.append(entry)
        return found


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(name) else git_id(content)


def is_large(name: str) -> bool:
    """Whether git-lfs keeps the file."""
    return name.endswith((".safetensors", ".bin", "tokenizer.json"))


@contextmanager
def hub_serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """The server, until the block is left."""
    hub = Hub(dict(files))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                self._list(match[1], match[2])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/lfs/(.+)", path):
                if "Authorization" in self.headers:
                    hub.leaked.append(self.headers["Authorization"])
                self._send(match[1])
            else:
                self._fail(404, "EntryNotFound", "Entry not found")

        def _list(self, repo: str, revision: str) -> None:
            if hub.listing is not None:
                self._reply(200, hub.listing)
                return
            if repo != REPO:
                self._fail(401, "RepoNotFound", "Invalid username or password.")
            elif commit := self._commit(revision):
                self._reply(200, json.dumps({"id": repo, "sha": commit, "siblings": hub.siblings()}).encode())
            else:
                self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")

        def _commit(self, revision: str) -> str | None:
            known = {"main": hub.commit, **hub.revisions}
            return revision if revision in known.values() else known.get(revision)

        def _resolve(self, repo: str, revision: str, name: str) -> None:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if hub.gated and given != hub.token:
                self._fail(403 if given else 401, "GatedRepo", f"Access to model {repo} is restricted.")
            elif repo != REPO or not self._commit(revision) or name not in hub.files:
                self._fail(404, "EntryNotFound", "Entry not found")
            elif is_large(name):
                other = hub.url.replace("127.0.0.1", "localhost")
                self.send_response(302)
                self.send_header("Location", f"{other}/lfs/{name}?signature=secret")
                self.send_header("X-Repo-Commit", hub.commit)
                self.send_header("X-Linked-ETag", f'"{etag(name, hub.files[name])}"')
                self.send_header("X-Linked-Size", str(len(hub.files[name])))
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._send(name)

        def _send(self, name: str) -> None:
            content, trouble = hub.files[name], hub.troubles.get(name, Trouble())
            if trouble.statuses:
                self._fail(trouble.statuses.pop(0), "", "Not now")
                return
            if trouble.corrupt:
                trouble.corrupt -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            content = content[: len(content) + trouble.resize] + b"x" * max(0, trouble.resize)
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match and not trouble.no_ranges else 0
            hub.asked.append((name, start))
            if start >= len(content) > 0:
                self._fail(416, "", "Range not satisfiable")
                return
            body = content[start:]
            self.send_response(206 if match and not trouble.no_ranges else 200)
            self.send_header("ETag", f'"{etag(name, content)}"')
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            reset = bool(trouble.resets)
            limits = trouble.resets or trouble.drops
            limit = limits.pop(0) if limits else len(body)
            self._write(name, body[:limit])
            if limit < len(body):
                if reset:
                    time.sleep(0.05)  # a reset takes with it what was not read yet
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

        def _write(self, name: str, body: bytes) -> None:
            sent = hub.sent
            for at in range(0, len(body), PIECE):
                piece = body[at : at + PIECE]
                self.wfile.write(piece)
                sent[name] += len(piece)
                if hub.rate:
                    time.sleep(len(piece) / hub.rate)

        def _reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def _fail(self, status: int, code: str, message: str) -> None:
            body = json.dumps({"error": message}).encode()
            headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
            self._reply(status, b"" if self.command == "HEAD" else body, **headers)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that leave in the middle are what this is for."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub of this process at the server, as HF_ENDPOINT, HF_HOME and the others would."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "no-tokens"))
    waits = type("Waits", (), {"sleep": staticmethod(lambda seconds: None), "time": staticmethod(time.time)})
    monkeypatch.setattr(file_download, "time", waits)
    if any(name in os.environ for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")):
        huggingface_hub.close_session()  # what it knows of proxies; making a new one takes a while


def environment_for(hub: Hub, home: Any) -> dict[str, str]:
    """The same for another process."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "HF_TOKEN": ""}


def repository(checkpoint: Mapping[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files among everything else that a repository holds."""
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"# Small\n",
        "LICENSE": b"MIT\n",
        "paper.pdf": b"%PDF" * 100,
        "inference/model.py": b"print()\n",
        "encoding/encoding_dsv4.py": b"# text\n",
        "pytorch_model.bin": b"\0" * 5000,
        "original/consolidated.safetensors": b"\0" * 5000,
        **checkpoint,
    }
