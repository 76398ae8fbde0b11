"""The prefix cache of one engine: sessions that begin with what is kept, and keep what they compute.

Owns what is kept when, and that a session started here goes on bit for bit as one that read everything itself.  Knows
positions, keys and states; bytes and files are the store's, tensors those of rows.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..engine import Engine
from ..session import Session
from .index import Entry
from .keys import Key, Segment, chain_key, pack_ids, segments
from .objects import Kind
from .origin import grid_of, origin_of
from .policy import Policy, Start
from .rows import PayloadError, StateCodec
from .store import Miss, PrefixStore

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reuse:
    """Where a session started.

    tokens: of the prompt, not computed again.  replayed: those after them whose rows were known, and the windows not.
    miss: why the first segment that was not found is not there; None where there is no whole one left.
    """

    tokens: int
    replayed: int = 0
    miss: Miss | None = None


class _Unusable(Exception):
    """An object that was listed and cannot be used."""

    def __init__(self, end: int, kind: Kind) -> None:
        super().__init__(f"{kind} at {end}")
        self.end, self.kind = end, kind


class PrefixCache:
    """Made over an open store, which stays its caller's to close."""

    def __init__(self, store: PrefixStore, engine: Engine, policy: Policy | None = None) -> None:
        self.store, self.engine, self.policy = store, engine, policy or Policy()
        self.grid, self.origin = grid_of(engine), origin_of(engine)
        self.codec = StateCodec(engine.model)

    def start(
        self, ids: Sequence[int], base: Session | None = None, progress: Progress | None = None
    ) -> tuple[Session, Reuse]:
        """A session that holds the longest usable beginning of ``ids``, the last id never included.

        It keeps what it computes of the others, in whole chunks, as it is extended.  base: a session without cuts that
        holds a beginning of ``ids`` (see Session.whole); it is what comes back where the store has nothing longer.
        progress(done, total) counts the tokens that are run again to find windows; an exception from it ends that, and
        nothing is lost.
        """
        base = self.engine.session() if base is None else base
        assert not base.cuts and base.tokens == list(ids[: base.position]) and base.position < len(ids)
        prompt = _Prompt(self, list(ids))
        session, start = base, Start(base.position, base.position)
        for start in prompt.starts(base.position):
            try:
                session = self._load(prompt, start, progress)
                break
            except _Unusable as gone:
                prompt.drop(gone)
        else:
            session, start = base, Start(base.position, base.position)
        if self.store.writable:
            session.on_chunk = _Keeper(self, prompt).chunk_done
        return session, Reuse(start.computed, start.position - start.computed, prompt.miss(start))

    @cached_property
    def replays(self) -> bool:
        """Whether windows may be found again from rows (policy.py): whether, on this machine, the experts' products
        round a token's row alike whatever other tokens stand beside it.  It is what kernels/dsv4_kernels/moe.py is
        built for; libraries promise it nowhere, so it is tried, unless the model says so itself.
        """
        if self.engine.model.row_invariant:
            return True
        if self.engine.model.ranks.count > 1:  # the others are not asked to try
            return False
        config, layer = self.engine.config, self.engine.model.blocks[-1].ffn
        seed = torch.Generator().manual_seed(0)
        u_SD = torch.randn(2 * self.grid.chunk, config.hidden_size, generator=seed)
        ids_S = torch.randint(config.vocab_size, (2 * self.grid.chunk,), generator=seed)
        u_SD, ids_S = u_SD.to(self.engine.backend.device, self.engine.model.dtype), ids_S.to(self.engine.backend.device)
        half, kept = self.grid.chunk // 2, slice(0, self.grid.chunk // 2)
        others = (slice(half, 2 * half), slice(2 * half, 3 * half), slice(3 * half, 4 * half))
        with torch.inference_mode():
            outs = [
                layer.forward(torch.cat([u_SD[kept], u_SD[other]]), torch.cat([ids_S[kept], ids_S[other]]))[kept]
                for other in others
            ]
        return all(torch.equal(outs[0], out) for out in outs[1:])

    def _load(self, prompt: _Prompt, start: Start, progress: Progress | None) -> Session:
        """The session at ``start``.  Raises _Unusable."""
        segment = self.grid.segment
        room = self.codec.room(start.position)
        state = self.codec.blank(start.computed)
        used = [link for link in prompt.chain if link.end <= start.position]
        if not start.replays:
            link = prompt.states[start.position]
            payload = self._read(link, "state")
            inner = start.position - self.grid.last_segment(start.position)
            cut = len(payload) - self.codec.rows_bytes(inner)
            try:
                self.codec.fill(state, payload[: max(cut, 0)])
                room.put(payload[max(cut, 0) :], start.position - inner, start.position)
            except PayloadError:
                raise _Unusable(link.end, "state") from None
            if inner:
                used.append(link)
        for link in used:
            if link.end - link.start == segment:
                try:
                    room.put(self._read(link, "rows"), link.start, link.end)
                except PayloadError:
                    raise _Unusable(link.end, "rows") from None
        room.give(state, start.position)
        state = self.engine.model.adopted(state)
        session = self.engine.session().holding(prompt.ids[: start.computed], state)
        if start.replays:
            session.extend(prompt.ids[start.computed : start.position], logits="none", progress=progress)
        self.store.touch([link.key for link in used])
        return session

    def _read(self, link: Segment, kind: Kind) -> memoryview:
        payload = self.store.read(link.key, kind)
        if payload is None:
            raise _Unusable(link.end, kind)
        return memoryview(payload)


class _Prompt:
    """A prompt's links, and which of them the store has."""

    def __init__(self, cache: PrefixCache, ids: list[int]) -> None:
        self._cache, self.ids, self.grid = cache, ids, cache.grid
        self.chain = segments(cache.origin, ids[:-1], cache.grid.segment)
        found = cache.store.find([link.key for link in self.chain])
        kinds = {entry.key: entry.kinds for entry in found}
        self.rows = 0
        for link in self.chain:
            if "rows" not in kinds.get(link.key, ()):
                break
            self.rows = link.end
        self.states = {
            link.end: link for link in self.chain if link.end <= self.rows and "state" in kinds.get(link.key, ())
        }
        # Prompts end within segments, too: those near enough to start from, or to make room for this one's end.
        segment, chunk = self.grid.segment, self.grid.chunk
        near = range(max(0, self.rows - segment), min(self.rows + segment, len(ids)), chunk)
        for end in (end for end in near if end % segment):
            link = self.link(end)
            if any("state" in entry.kinds for entry in cache.store.find([link.key])):
                self.states[end] = link

    def link(self, end: int) -> Segment:
        """The link that ends at the chunk end ``end``, which may lie inside a segment."""
        before = self.grid.last_segment(end - 1)
        if end - before == self.grid.segment:
            return self.chain[before // self.grid.segment]
        part = self.ids[before:end]
        if not before:
            return segments(self._cache.origin, part, len(part))[0]
        last = self.chain[before // self.grid.segment - 1]
        keys = (chain_key(last.key, part), last.key, chain_key(last.tokens, part))
        return Segment(*keys, before, end, self._cache.origin, pack_ids(part))

    def starts(self, beyond: int) -> Iterator[Start]:
        """Where to start, best first, anew after every `drop`; ends when nothing saves more than ``beyond`` tokens."""
        while (start := self.grid.start(self.rows, self.states)).computed > beyond:
            if start.replays and not self._cache.replays:
                start = self.grid.start(0, self.states)
                if start.computed <= beyond:
                    return
            yield start

    def drop(self, gone: _Unusable) -> None:
        """Do without an object, and without what builds on it."""
        if gone.kind == "state":
            del self.states[gone.end]
        else:
            self.rows = gone.end - self.grid.segment
            self.states = {end: link for end, link in self.states.items() if end <= self.rows}

    def miss(self, start: Start) -> Miss | None:
        if self.rows and not start.position:
            return Miss("policy", "its rows are kept, but no state that they could go on from")
        missing = next((link for link in self.chain if link.end > self.rows), None)
        return None if missing is None else self._cache.store.miss(missing)


class _Keeper:
    """Keeps what one session computes of its prompt."""

    def __init__(self, cache: PrefixCache, prompt: _Prompt) -> None:
        self._cache, self._prompt, self._grid = cache, prompt, cache.grid
        self._length = len(prompt.ids) - 1  # the last token is fed apart, after the whole chunks
        self._passing = [link for end, link in prompt.states.items() if not cache.grid.lasting(cache.policy, end)]

    def chunk_done(self, session: Session) -> None:
        """Called at every chunk end of a session without cuts."""
        position, grid = session.position, self._grid
        chunk = self._prompt.ids[position - grid.chunk : position]
        if position > self._length or session.tokens[-grid.chunk :] != chunk:
            session.on_chunk = None  # it goes on with something else than the prompt
            return
        while self._prompt.rows + grid.segment <= position:
            if not self._write(session, "rows", self._prompt.rows + grid.segment):
                session.on_chunk = None  # what builds on it could not be found either
                return
            self._prompt.rows += grid.segment
        wanted = position not in self._prompt.states and grid.keeps(self._cache.policy, position, self._length)
        if wanted and self._write(session, "state", position) and position == grid.last_chunk(self._length):
            self._thin(position)

    def _write(self, session: Session, kind: Kind, position: int) -> bool:
        codec, link = self._cache.codec, self._prompt.link(position)
        if kind == "rows":
            parts = codec.rows(session.state, link.start, link.end)
        else:
            inner = self._grid.last_segment(position)
            parts = codec.position(session.state) + codec.rows(session.state, inner, position)
        return self._cache.store.write(link, kind, parts)

    def _thin(self, position: int) -> None:
        """Let go of states that were the ends of shorter prompts and lie more than a segment behind this one's."""
        for link in self._passing:
            if link.end < position - self._grid.segment:
                self._cache.store.discard(link.key, "state")


@dataclass(frozen=True)
class Replayed:
    """checked, skipped: segments; skipped are those that another model, format or machine computed.  different: keys of
    those whose rows, or whose state at the end, came out otherwise."""

    checked: int
    different: list[Key]
    skipped: int


def replay(store: PrefixStore, engine: Engine, sample: int, progress: Progress | None = None) -> Replayed:
    """Compute ``sample`` random segments again, each from what is kept before it, and compare every bit.

    progress(done, total) counts segments.
    """
    cache = PrefixCache(store, engine)
    kept = [entry for entry in store.entries() if "rows" in entry.sizes]
    ours = [entry for entry in kept if entry.origin == cache.origin]
    chosen = random.sample(ours, min(sample, len(ours)))
    different = []
    for done, entry in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        if not _comes_out_alike(cache, entry):
            different.append(entry.key)
    if progress is not None:
        progress(len(chosen), len(chosen))
    return Replayed(len(chosen), different, len(kept) - len(ours))


def _comes_out_alike(cache: PrefixCache, entry: Entry) -> bool:
    store, ids = cache.store, []
    for link in store.path(entry.key):
        tokens = store.tokens(link.key)
        if tokens is None:
            return False
        ids += tokens
    if len(ids) != entry.end:
        return False
    session, _ = cache.start(ids[: entry.start + 1])
    session.on_chunk = None
    session.extend(ids[session.position :], logits="none")
    kept = {kind: store.read(entry.key, kind) for kind in entry.sizes}
    now = {
        "rows": cache.codec.rows(session.state, entry.start, entry.end),
        "state": cache.codec.position(session.state),
    }
    return all(payload == b"".join(now[kind]) for kind, payload in kept.items())
