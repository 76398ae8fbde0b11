"""One object file: a header that says all about it, the segment's tokens (with "rows"), and the payload.

Owns the bytes of a file.  A header has its own digest, so that what a store holds can be listed without reading
payloads; ids and payload share the other one, which every read checks.  Knows no folder layout and no index.

    fixed part (little endian) | origin as JSON | SHA-256 of both | ids | payload
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from .keys import Key, Origin, Segment, chain_key, unpack_ids

Kind = Literal["rows", "state"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Buffer = bytes | bytearray | memoryview

MAGIC = b"dsv4pfx\n"
VERSION = 1
# magic, version, kind, bytes a token id, size of the origin, start, end, payload size, key, parent, tokens, digest
_FIXED = struct.Struct("<8sHBBIQQQ32s32s32s32s")
_DIGEST_BYTES = 32
_MOST_ORIGIN = 1 << 16
_PIECE = 1 << 20


class DamagedObject(ValueError):
    """These bytes are not the whole, unchanged object that their name promises."""


class OtherVersion(DamagedObject):
    """Written by another version of dsv4."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.  Sizes in bytes; digest: SHA-256 over ids and payload."""

    key: Key
    kind: Kind
    parent: Key
    tokens: Key
    start: int
    end: int
    origin: Origin
    id_bytes: int
    payload: int
    digest: bytes

    @property
    def ids(self) -> int:
        return (self.end - self.start) * self.id_bytes

    @property
    def size(self) -> int:
        """Of the whole file."""
        return _FIXED.size + len(self._origin()) + _DIGEST_BYTES + self.ids + self.payload

    def pack(self) -> bytes:
        origin = self._origin()
        assert len(origin) <= _MOST_ORIGIN, "model, row format and name together are too long"
        fixed = _FIXED.pack(
            MAGIC, VERSION, KINDS.index(self.kind), self.id_bytes, len(origin), self.start, self.end, self.payload,
            self.key, self.parent, self.tokens, self.digest,
        )  # fmt: skip
        return fixed + origin + hashlib.sha256(fixed + origin).digest()

    def _origin(self) -> bytes:
        return json.dumps([self.origin.model, self.origin.row_format, self.origin.name]).encode()


def compose(segment: Segment, kind: Kind, payload: Buffer | Sequence[Buffer]) -> tuple[Header, list[memoryview]]:
    """The header of a new object, and the buffers of the whole file in order; payloads are not copied."""
    given = [payload] if isinstance(payload, bytes | bytearray | memoryview) else payload
    parts = [memoryview(part).cast("B") for part in given]
    assert len(segment.ids) == 4 * (segment.end - segment.start) > 0
    id_bytes, ids = _narrow(segment.ids) if kind == "rows" else (0, b"")
    digest = hashlib.sha256(ids)
    for part in parts:
        digest.update(part)
    header = Header(
        segment.key, kind, segment.parent, segment.tokens, segment.start, segment.end, segment.origin,
        id_bytes, sum(len(part) for part in parts), digest.digest(),
    )  # fmt: skip
    return header, [memoryview(header.pack()), memoryview(ids), *parts]


def read_header(path: Path, key: Key | None = None, kind: Kind | None = None) -> Header:
    """The header of a file, which must be as long as the header says; the payload is not read.

    Raises DamagedObject (also when it is not the header of ``key`` and ``kind``) and OSError.
    """
    with _open(path) as file:
        return _header(file, key, kind)


def read_payload(path: Path, key: Key, kind: Kind) -> bytearray:
    """The payload, checked against the digest.  Raises DamagedObject and OSError."""
    with _open(path) as file:
        header = _header(file, key, kind)
        digest = hashlib.sha256(_exactly(file, header.ids))
        payload = _exactly(file, header.payload)
        digest.update(payload)
    if digest.digest() != header.digest:
        raise DamagedObject("its checksum does not match")
    return payload


def read_ids(path: Path, key: Key) -> list[int]:
    """The tokens of a "rows" object, checked against the key.  Raises DamagedObject and OSError."""
    with _open(path) as file:
        header = _header(file, key, "rows")
        packed = _exactly(file, header.ids)
    ids = _widen(packed, header.id_bytes)
    if chain_key(header.parent, ids) != key:
        raise DamagedObject("its tokens do not give its key")
    return ids


def check(path: Path, key: Key, kind: Kind) -> Header:
    """Verify a whole file a piece at a time: digests, and the key where the tokens are there.

    Raises DamagedObject and OSError.
    """
    with _open(path) as file:
        header = _header(file, key, kind)
        ids = _exactly(file, header.ids)
        digest = hashlib.sha256(ids)
        left = header.payload
        while left:
            piece = _exactly(file, min(left, _PIECE))
            digest.update(piece)
            left -= len(piece)
    if digest.digest() != header.digest:
        raise DamagedObject("its checksum does not match")
    if header.id_bytes and chain_key(header.parent, _widen(ids, header.id_bytes)) != key:
        raise DamagedObject("its tokens do not give its key")
    return header


def write_durably(path: Path, parts: Iterable[memoryview]) -> None:
    """Write a new private file and wait until the disk has it.  Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        sync(file.fileno())


def sync(handle: int) -> None:
    """fsync that also reaches the platters on macOS, where plain fsync stops at the drive's cache."""
    try:
        from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        os.fsync(handle)
        return
    try:
        fcntl(handle, F_FULLFSYNC)
    except OSError:  # a file system without it
        os.fsync(handle)


def _open(path: Path) -> io.FileIO:
    """Never through a link, and never waiting for the other end of a pipe."""
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedObject("it is not a file")
    return file


def _header(file: io.FileIO, key: Key | None, kind: Kind | None) -> Header:
    fixed = _exactly(file, _FIXED.size)
    magic, version, number, id_bytes, origin_size, start, end, payload, *keys, digest = _FIXED.unpack(fixed)
    own, parent, tokens = keys
    if magic != MAGIC:
        raise DamagedObject("it is not an object of this store")
    if version != VERSION:
        raise OtherVersion(f"it was written in format {version}; this is format {VERSION}")
    if origin_size > _MOST_ORIGIN:
        raise DamagedObject("its header is damaged")
    rest = _exactly(file, origin_size + _DIGEST_BYTES)
    text = rest[:origin_size]
    if rest[origin_size:] != hashlib.sha256(fixed + text).digest():
        raise DamagedObject("its header is damaged")
    # From here on the header is what somebody wrote; it may still not be one of ours.
    try:
        model, row_format, name = json.loads(text.decode())
        found = Header(
            own, KINDS[number], parent, tokens, start, end, Origin(model, row_format, name), id_bytes, payload, digest
        )
    except (ValueError, TypeError, IndexError) as error:
        raise DamagedObject("its header makes no sense") from error
    strings = all(isinstance(part, str) for part in (model, row_format, name))
    if not strings or not start < end < 1 << 62 or id_bytes > 4 or (id_bytes > 0) != (found.kind == "rows"):
        raise DamagedObject("its header makes no sense")
    if (key is not None and own != key) or (kind is not None and found.kind != kind):
        raise DamagedObject("it is another object than its name says")
    size = os.fstat(file.fileno()).st_size
    whole = _FIXED.size + origin_size + _DIGEST_BYTES + found.ids + payload
    if size != whole:
        raise DamagedObject(f"it has {size:,} bytes instead of {whole:,}")
    return found


def _exactly(file: io.FileIO, size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = file.readinto(view)
        if not count:
            raise DamagedObject("it ends too early")
        view = view[count:]
    return content


def _narrow(ids: bytes) -> tuple[int, bytes]:
    """int32-LE ids in as few bytes each as the largest needs."""
    assert len(ids) % 4 == 0
    for width in (1, 2, 3):
        if not any(any(ids[byte::4]) for byte in range(width, 4)):
            narrow = bytearray(len(ids) // 4 * width)
            for byte in range(width):
                narrow[byte::width] = ids[byte::4]
            return width, bytes(narrow)
    return 4, ids


def _widen(packed: bytes | bytearray, width: int) -> list[int]:
    wide = bytearray(len(packed) // width * 4)
    for byte in range(width):
        wide[byte::4] = packed[byte::width]
    return unpack_ids(bytes(wide))
