"""Names of segments: a chain of hashes over tokens that starts from the model and the format of its rows.

Owns what a key is made of.  Two prompts that share their first whole segments share those keys, and nothing computed by
another model or kept in another format can have one of them.  Knows no file and no tensor.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

Key = bytes
KEY_BYTES = 32


def _digest(content: bytes) -> Key:
    return hashlib.blake2b(content, digest_size=KEY_BYTES, person=b"dsv4 prefix 1").digest()


def root_key(model: str, row_format: str) -> Key:
    """The parent of every first segment.

    model: fingerprint of weights and configuration; row_format: everything else that decides the bytes (cache type, row
    layout, tokens a segment, chunk, arithmetic).  Both are hashed with their lengths, so no two pairs run together.
    """
    parts = [part.encode() for part in (model, row_format)]
    return _digest(b"root" + b"".join(len(part).to_bytes(8, "little") + part for part in parts))


def chain_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """The key of the segment of ``token_ids`` that follows ``parent``: blake2b-256 over both, tokens as int32-LE.

    Raises OverflowError for an id that is not an int32.
    """
    assert len(parent) == KEY_BYTES
    return _digest(parent + pack_ids(token_ids))


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """int32-LE, 4 bytes a token.  Raises OverflowError for an id that is not an int32."""
    ids = array("i", token_ids)
    assert ids.itemsize == 4
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    ids = array("i", packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


# Chains over tokens alone begin here.  They are what tells "these tokens are known, but under another model".
_NO_ORIGIN = _digest(b"tokens")


@dataclass(frozen=True)
class Origin:
    """What must be equal for kept rows to be usable.  ``name`` is for people, and no part of any key."""

    model: str
    row_format: str
    name: str = field(default="", compare=False)

    @property
    def key(self) -> Key:
        return root_key(self.model, self.row_format)


@dataclass(frozen=True)
class Segment:
    """One link of a chain: tokens [start, end) of a sequence, after all those before them.

    key: with the origin in it; parent: the key before, at the start the origin's; tokens: the same chain without the
    origin; ids: the tokens themselves as `pack_ids` wrote them.
    """

    key: Key
    parent: Key
    tokens: Key
    start: int
    end: int
    origin: Origin
    ids: bytes = field(repr=False)


def segments(origin: Origin, token_ids: Sequence[int], length: int) -> list[Segment]:
    """The whole segments of ``length`` tokens that ``token_ids`` begins with, in order; the rest has no key."""
    assert length > 0
    found = []
    parent, tokens = origin.key, _NO_ORIGIN
    for start in range(0, len(token_ids) - length + 1, length):
        ids = pack_ids(token_ids[start : start + length])
        key, tokens = _digest(parent + ids), _digest(tokens + ids)
        found.append(Segment(key, parent, tokens, start, start + length, origin, ids))
        parent = key
    return found
