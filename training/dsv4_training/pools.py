"""Filler as tokens: long texts of one kind each, encoded once, from which stretches of any exact length are cut.

Kinds and their shares are those of filler.py.  A stretch ends where a sentence or a line ends and with a space or line
break, so that what follows it begins as it would in a text; it begins anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import tokenizers

from . import filler
from .code_tree import CodeTree
from .corpus import Corpus

Array = np.ndarray[Any, Any]
GENERATED_CHARACTERS = 120_000
SHORT = 48  # tokens; a stretch that is shorter may end anywhere


@dataclass(frozen=True)
class Pool:
    """ids: uint16; ends: places (rising) in front of which a sentence or line ends; spaces: ids that end with a space
    or line break, the first of them a line break's and a space's."""

    ids: Array
    ends: Array
    spaces: Array

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Pool:
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encodings])
        written = {i: tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())}
        closing = [i for i, text in written.items() if text.endswith((".", "!", "?", "\n"))]
        ends = np.flatnonzero(np.isin(ids, np.array(closing, dtype=np.uint16))) + 1
        separators = [next(i for i, text in written.items() if text == mark) for mark in ("\n", " ")]
        spaces = separators + [i for i, text in written.items() if text.endswith((" ", "\n")) and i not in separators]
        return cls(ids, ends if len(ends) else np.array([len(ids)]), np.array(spaces, dtype=np.uint16))

    def stretch(self, rng: Random, tokens: int) -> Array:
        """Exactly ``tokens`` ids; a pool that is shorter is read round and round."""
        size = len(self.ids)
        end = int(rng.choice(self.ends)) if tokens >= SHORT else rng.randrange(size)
        ids = np.take(self.ids, np.arange(end - tokens, end), mode="wrap")
        if ids[-1] not in self.spaces:
            ids[-1] = self.spaces[rng.randrange(2)]
        return ids


@dataclass(frozen=True)
class Pools:
    """weights: the cumulative share of each pool."""

    pools: tuple[Pool, ...]
    weights: tuple[float, ...]

    @classmethod
    def build(
        cls, tokenizer: tokenizers.Tokenizer, corpus: Corpus, tree: CodeTree | None, seed: int, evaluation: bool = False
    ) -> Pools:
        """The corpus (and the code tree's files), and text of every generated kind.  One side of the split only."""
        documents = [d.text for d in corpus.documents(evaluation)]
        if tree is not None:
            documents += [file.text for file in tree.files(evaluation)]
        Random(f"{seed}/order").shuffle(documents)
        pools, weights = [Pool.of(tokenizer, documents)], [filler.CORPUS_SHARE]
        for limit, make in filler.MAKERS:
            rng = Random(f"{seed}/pool/{limit}/{evaluation}")
            units, size = [], 0
            while size < GENERATED_CHARACTERS:
                units.append(make(rng, corpus.words))
                size += len(units[-1])
            pools.append(Pool.of(tokenizer, ["".join(units)]))
            weights.append(limit)
        return cls(tuple(pools), tuple(weights))

    def draw(self, rng: Random) -> Pool:
        chance = rng.random()
        return self.pools[next((i for i, limit in enumerate(self.weights) if chance < limit), 0)]

    def fill(self, rng: Random, tokens: int, seams: int) -> list[list[Array]]:
        """``tokens`` ids in all for ``seams`` places, split at random; mostly of one kind within a document."""
        if seams == 0:
            raise ValueError("a document without seams cannot be made longer")
        if tokens < 2 * SHORT:
            sizes = [0] * seams
            sizes[rng.randrange(seams)] = tokens
        else:
            cuts = sorted(rng.randint(0, tokens) for _ in range(seams - 1))
            sizes = [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
        pool = self.draw(rng)
        out: list[list[Array]] = []
        for size in sizes:
            parts: list[Array] = []
            while size:
                if rng.random() < 0.2:
                    pool = self.draw(rng)
                part = min(size, round(math.exp(rng.uniform(math.log(256), math.log(16384)))))
                parts.append(pool.stretch(rng, part))
                size -= part
            out.append(parts)
        return out
