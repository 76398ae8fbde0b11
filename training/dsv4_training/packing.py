"""Batches: whole documents as token ids with a class a token, one after another in sequences of a fixed length.

Every batch is a function of the recipe and its step alone, whichever process draws it, so a run that is resumed goes on
with the same batches.  A document fills whole blocks of 128: text is put in at its seams until it does, and what has
no seams is followed by tokens without a class.
Letters: B sequences, S tokens, A = S/128 blocks, Q queries for the indexer's loss.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import tokenizers

from . import episodes, membership, tasks
from .code_tree import CodeTree
from .corpus import Corpus
from .episodes import Episode, Part, Seam, Special
from .facts import ANSWER, ASKED, NOISE, TEXT, VALUE
from .pools import Pools
from .recipe import BLOCK, Data, Recipe, Stage

Array = np.ndarray[Any, Any]
PADDING = 1  # EOS; of class NOISE, in the last block of what has no seams
ATTEMPTS = 4
QUEUED = 3  # batches that each process may be ahead


@dataclass(frozen=True)
class Batch:
    """ids [B, S] uint16, classes [B, S] uint8; of each block its document's first block and its position / 128, int32
    [B, A]; rows [B, Q] int32: positions on which the indexer is taught."""

    ids: Array
    classes: Array
    start: Array
    place: Array
    rows: Array


@dataclass(frozen=True)
class Source:
    """What documents are drawn from."""

    corpus: Corpus
    tree: CodeTree
    pools: Pools
    definition: str  # the tokenizer's


def classified(tokenizer: tokenizers.Tokenizer, episode: Episode) -> tuple[Array, Array, list[int]]:
    """Token ids (uint16), their classes (uint8) and the places of the seams.  A token has its last character's
    class."""
    runs: list[list[Part]] = [[]]
    for part in episode.parts:
        if isinstance(part, Seam):
            runs.append([])
        else:
            runs[-1].append(part)
    ids, classes = zip(*(_classified(tokenizer, run) for run in runs), strict=True)
    seams = np.cumsum([len(part) for part in ids])[:-1]
    return np.concatenate(ids), np.concatenate(classes), seams.tolist()


def _classified(tokenizer: tokenizers.Tokenizer, parts: list[Part]) -> tuple[Array, Array]:
    texts = [episodes.written(part) for part in parts]
    if not any(texts):
        return np.empty(0, np.uint16), np.empty(0, np.uint8)
    kinds = [
        (ANSWER if part.trained else NOISE) if isinstance(part, Special) else part[1]  # type: ignore[index]
        for part in parts
    ]
    encoding = tokenizer.encode("".join(texts), add_special_tokens=False)
    ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
    by_character = np.repeat(np.array(kinds, dtype=np.uint8), [len(text) for text in texts])
    return np.array(encoding.ids, dtype=np.uint16), by_character[ends - 1]


def lengthened(
    rng: Random, pools: Pools, ids: Array, classes: Array, seams: list[int], length: int
) -> tuple[Array, Array]:
    """The document with text at its seams, ``length`` tokens in all; without seams, padded to it."""
    missing = length - len(ids)
    if missing == 0:
        return ids, classes
    if not seams:
        return np.pad(ids, (0, missing), constant_values=PADDING), np.pad(classes, (0, missing), constant_values=NOISE)
    parts, kinds, done = [], [], 0
    for seam, stretches in zip(seams, pools.fill(rng, missing, len(seams)), strict=True):
        parts += [ids[done:seam], *stretches]
        kinds += [classes[done:seam], *(np.full(len(s), TEXT, np.uint8) for s in stretches)]
        done = seam
    return np.concatenate([*parts, ids[done:]]), np.concatenate([*kinds, classes[done:]])


def draw_episode(rng: Random, source: Source, data: Data, stage: Stage, tokens: int) -> Episode:
    """An episode that is to have about ``tokens`` tokens at last."""
    names = ("needles", "many_keys", "tracking", "code_lookup", "told", "talk", "text", "grouped")
    kind = rng.choices(names, [getattr(data, name) for name in names])[0]
    corpus, written = source.corpus, round(tokens * 0.9)
    if kind == "talk":
        return episodes.small_talk(rng, corpus)
    if kind == "told":
        return episodes.told_in_chat(rng, corpus)
    if kind == "text":
        return episodes.plain_text(rng, corpus, written)
    if kind == "grouped":
        return membership.grouped(rng, corpus, source.tree, written, stage.hints)
    if kind == "many_keys":
        return tasks.many_keys(rng, corpus, written)
    if kind == "tracking":
        return tasks.tracking(rng, corpus, written)
    if kind == "code_lookup":
        return tasks.code_lookup(rng, corpus, source.tree, min(written, round(8192 * rng.uniform(0.3, 1.0))))
    density = rng.choices((1.0, 0.5, 0.0), (stage.many, stage.some, stage.few))[0]
    return episodes.retrieval(rng, corpus, written, density)


def draw_document(
    rng: Random, source: Source, tokenizer: tokenizers.Tokenizer, data: Data, stage: Stage, room: int
) -> tuple[Array, Array]:
    """A document of whole blocks, at most ``room`` tokens (whole blocks too)."""
    shortest = min(stage.shortest, room)
    full = rng.random() < stage.full or room < 2 * shortest
    tokens = room if full else round(math.exp(rng.uniform(math.log(shortest), math.log(room))))
    tokens = min(room, -tokens // BLOCK * -BLOCK)
    wanted = tokens
    for _ in range(ATTEMPTS):
        ids, classes, seams = classified(tokenizer, draw_episode(rng, source, data, stage, wanted))
        if len(ids) <= room:
            length = max(tokens, -len(ids) // BLOCK * -BLOCK) if seams else -len(ids) // BLOCK * -BLOCK
            return lengthened(rng, source.pools, ids, classes, seams, length)
        wanted = max(BLOCK, wanted * 3 // 4)
    # Nothing fits so little room: running text does.
    ids = source.pools.draw(rng).stretch(rng, room)
    return ids, np.full(room, TEXT, np.uint8)


def places(rng: Random, stage: Stage, blocks: int) -> Array:
    """The positions / 128 of a document's blocks: rising from 0, with a few jumps in some documents."""
    place = np.arange(blocks, dtype=np.int32)
    spare = stage.farthest // BLOCK - blocks
    if blocks < 2 or spare < 1 or rng.random() >= stage.jumps:
        return place
    count = min(rng.randint(1, 4), blocks - 1)
    total = round(math.exp(rng.uniform(0, math.log(spare))))
    cuts = sorted(rng.randint(0, total) for _ in range(count - 1))
    for before, by in zip(
        rng.sample(range(1, blocks), count),
        (b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)),
        strict=True,
    ):
        place[before:] += by
    return place


def draw_batch(recipe: Recipe, step: int, source: Source, tokenizer: tokenizers.Tokenizer) -> Batch:
    """The batch of step 0, 1, ..."""
    stage, rng = recipe.stage(step), Random(f"{recipe.seed}/{step}")
    drawn = [_sequence(rng, source, tokenizer, stage.data or recipe.data, stage) for _ in range(stage.batch)]
    ids, classes, start, place = (np.stack(column) for column in zip(*drawn, strict=True))
    noise = np.random.default_rng(rng.getrandbits(64)).random(classes.shape, dtype=np.float32)
    return Batch(ids, classes, start, place, _rows(classes, noise, stage.index_rows // stage.batch))


def _sequence(
    rng: Random, source: Source, tokenizer: tokenizers.Tokenizer, data: Data, stage: Stage
) -> tuple[Array, Array, Array, Array]:
    ids, classes, start, place = [], [], [], []
    total = 0
    while total < stage.length:
        new, kinds = draw_document(rng, source, tokenizer, data, stage, stage.length - total)
        blocks = len(new) // BLOCK
        ids.append(new)
        classes.append(kinds)
        start.append(np.full(blocks, total // BLOCK, np.int32))
        place.append(places(rng, stage, blocks))
        total += len(new)
    return np.concatenate(ids), np.concatenate(classes), np.concatenate(start), np.concatenate(place)


def _rows(classes: Array, noise: Array, count: int) -> Array:
    """Positions for the indexer's loss: those before answers and values first, the rest at random."""
    following = np.roll(classes, -1, 1)
    score = noise + 2 * (following == VALUE) + ((following == ANSWER) | (following == ASKED))
    return np.argpartition(-score, count - 1, 1)[:, :count].astype(np.int32)


def _work(recipe: Recipe, source: Source, first: int, stride: int, out: Any) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(source.definition)
    for step in range(first, recipe.steps, stride):
        out.put(draw_batch(recipe, step, source, tokenizer))


class Stream:
    """The batches of steps ``first``, ``first`` + 1, ... drawn ahead by ``workers`` processes; 0 draws them here."""

    def __init__(self, recipe: Recipe, source: Source, first: int, workers: int) -> None:
        self._recipe, self._source, self._first = recipe, source, first
        context = multiprocessing.get_context("fork")
        self._queues: list[Any] = [context.Queue(maxsize=QUEUED) for _ in range(workers)]
        self._processes = [
            context.Process(target=_work, args=(recipe, source, first + i, workers, out), daemon=True)
            for i, out in enumerate(self._queues)
        ]
        for process in self._processes:
            process.start()

    def __iter__(self) -> Iterator[Batch]:
        if not self._queues:
            tokenizer = tokenizers.Tokenizer.from_str(self._source.definition)
            for step in range(self._first, self._recipe.steps):
                yield draw_batch(self._recipe, step, self._source, tokenizer)
            return
        for step in range(self._first, self._recipe.steps):
            place = (step - self._first) % len(self._queues)
            yield self._next(place)

    def _next(self, place: int) -> Batch:
        while True:
            try:
                batch: Batch = self._queues[place].get(timeout=5)
                return batch
            except queue.Empty:
                if not self._processes[place].is_alive():
                    raise RuntimeError("a process that draws training text has died") from None

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
