"""What the checkpoint can do, asked through the engine: facts, many keys, chains of variables, code, bits per byte.

Keys, numbers, variable names, code and the text around them are of the held-out side, never trained on.  A question is
right when the greedy answer holds what is asked for; of a chain of variables the share of its names counts.  Answers
are generated, nothing is given away.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import tokenizers
import torch

from dsv4_engine import Engine
from dsv4_engine.generate import Answer, generate
from dsv4_engine.protocol import BOS
from dsv4_engine.sampling import Sampling

from . import episodes, facts, packing, tasks
from .code_tree import CodeTree
from .corpus import Corpus, Document
from .episodes import Episode, Seam, Turn
from .facts import PROMPT, SAID, TEXT, VALUE
from .names import Attribute, draw_keys, draw_value, word_pair_key
from .pools import Pools

Array = np.ndarray[Any, Any]
# RULER's prompt with its answer prefix; the same needle in a file asked about in chat; any wording and kind of value;
# numbers in wordings kept out of training; RULER's needle among eight of other keys; RULER's chain of four hops; and
# which of about eight files defines a function.
SINGLE = ("ruler", "file", "worded", "held-out")
TASKS = (*SINGLE, "multikey", "tracking", "code")
LENGTHS = (1024, 2048, 4096, 8192)
DISTRACTORS, HOPS, FILES = 8, 4, 8
WINDOW = 8192  # tokens that the engine reads at a time for bits per byte


@dataclass(frozen=True)
class Sample:
    """One question: everything up to the answer, and what the answer must hold.  depth: of what is asked for, 0 to
    1."""

    task: str
    length: int
    depth: float
    wanted: tuple[str, ...]
    prompt_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Ground:
    """The held-out side, in tokens."""

    corpus: Corpus
    tree: CodeTree
    pools: Pools
    tokenizer: tokenizers.Tokenizer

    @classmethod
    def of(cls, corpus: Corpus, tree: CodeTree, tokenizer: tokenizers.Tokenizer) -> Ground:
        return cls(corpus, tree, Pools.build(tokenizer, corpus, None, 7, evaluation=True), tokenizer)


def draw_samples(
    ground: Ground, count: int, seed: int, names: Sequence[str] = TASKS, lengths: Sequence[int] = LENGTHS
) -> Iterator[Sample]:
    """``count`` samples of every task and length, depths spread evenly."""
    for name in names:
        for length in lengths:
            rng = Random(f"evaluation/{seed}/{name}/{length}")
            for i in range(count):
                yield draw_sample(rng, ground, name, length, (i + 0.5) / count)


def draw_sample(rng: Random, ground: Ground, task: str, length: int, depth: float) -> Sample:
    """A prompt of exactly ``length`` tokens but for code, whose files end with a line."""
    if task == "tracking":
        return _tracking(rng, ground, length)
    if task == "code":
        return _code(rng, ground, length)
    episode, depths, value = _needles(rng, ground.corpus, task, depth)
    return _sample(rng, ground, task, length, depth, episode, depths, (value,))


def _needles(rng: Random, corpus: Corpus, task: str, depth: float) -> tuple[Episode, list[float], str]:
    new = task == "held-out"
    others = DISTRACTORS if task == "multikey" else rng.choice((0, rng.randint(1, 6)))
    if task in ("worded", "held-out"):
        stated = facts.draw_facts(rng, corpus, 1 + others, evaluation=True, ruler=0.0, new_wordings=new)
    else:
        special = Attribute("special magic number", "number7")
        keys = [draw_keys(rng, corpus, 1, True)[0] if task == "file" else word_pair_key(rng, corpus, True)]
        while len(keys) < 1 + others:
            if (key := word_pair_key(rng, corpus, True)) not in keys:
                keys.append(key)
        stated = [facts.Fact(special, k, draw_value(rng, "number7", corpus.words), facts.RULER_STATEMENT) for k in keys]
    needle = stated[0]
    exchange = facts.ask(rng, needle, evaluation=task != "worded")
    depths = [depth, *(rng.random() for _ in stated[1:])]
    content: list[facts.Piece | Seam] = []
    for at in sorted(range(len(stated)), key=depths.__getitem__):
        content += [Seam(), *stated[at].stated(), (" " if stated[at].statement.endswith(".") else "\n", TEXT)]
    content.append(Seam())
    if task in ("ruler", "multikey"):
        opening: list[facts.Piece | Seam] = [(facts.RULER_INTRODUCTION + "\n", PROMPT), *content, ("\n", PROMPT)]
        turn = Turn([*opening, *exchange.question], exchange.answer)
        # Everything before the value is RULER's answer prefix.
        parts = episodes.chat([turn], prefilled=len(exchange.answer) - 2)
    else:
        turn = Turn([*episodes.file_block(episodes.file_name(rng), content), *exchange.question], exchange.answer)
        parts = episodes.chat([turn])
    return Episode(parts), sorted(depths), needle.value


def _sample(
    rng: Random,
    ground: Ground,
    task: str,
    length: int,
    depth: float,
    episode: Episode,
    depths: list[float],
    wanted: tuple[str, ...],
    max_tokens: int = 60,
) -> Sample:
    """The episode with held-out text at its seams, so that the n-th of what is hidden comes at the n-th of
    ``depths``."""
    ids, classes, seams = packing.classified(ground.tokenizer, episode)
    answer = int(np.flatnonzero(np.isin(classes, SAID))[0])
    missing = length - answer
    if missing < 0:
        raise ValueError(f"a question of {task} takes {answer} tokens, more than the {length} asked for")
    places = [0, *(round(missing * d) for d in depths), missing]
    pieces, done, pool = [], 0, ground.pools.draw(rng)
    for seam, start, end in zip(seams, places[:-1], places[1:], strict=True):
        pieces += [ids[done:seam], *([pool.stretch(rng, end - start)] if end > start else [])]
        done = seam
        if rng.random() < 0.2:
            pool = ground.pools.draw(rng)
    prompt = np.concatenate([*pieces, ids[done:answer]])
    return Sample(task, length, depth, wanted, prompt.tolist(), max_tokens)


def _tracking(rng: Random, ground: Ground, length: int) -> Sample:
    chain = tasks.draw_chains(rng, 1, HOPS, 5, True)[0]
    content: list[facts.Piece | Seam] = []
    for statement in chain.statements():
        content += [Seam(), (" ", TEXT), *statement, ("\n", TEXT)]
    parts = tasks.ruler_tracking(rng, [*content, Seam()], [chain], raw=True)
    depths = sorted(rng.random() for _ in chain.names)
    names = len(chain.names)
    return _sample(
        rng, ground, "tracking", length, depths[0], Episode(parts), depths, chain.names, max_tokens=16 * names
    )


def _code(rng: Random, ground: Ground, length: int) -> Sample:
    tokens = length
    while True:
        episode = tasks.code_lookup(rng, ground.corpus, ground.tree, tokens, files=FILES, evaluation=True)
        ids, classes, _ = packing.classified(ground.tokenizer, episode)
        answer = int(np.flatnonzero(np.isin(classes, SAID))[0])
        if answer <= length:
            break
        tokens = tokens * 9 // 10
    path = next(p[0] for p in episode.parts if isinstance(p, tuple) and p[1] == VALUE)
    return Sample("code", length, 0.0, (path,), ids[:answer].tolist(), 60)


def score(engine: Engine, sample: Sample) -> float:
    """The share of what is wanted in what the engine writes greedily."""
    events = generate(
        engine.session(), sample.prompt_ids, engine.tokenizer, Sampling(temperature=0), max_tokens=sample.max_tokens
    )
    answer = "".join(event.text for event in events if isinstance(event, Answer))
    return sum(wanted in answer for wanted in sample.wanted) / len(sample.wanted)


def run(
    engine: Engine, samples: Sequence[Sample], done: Callable[[int], None] = lambda n: None
) -> list[dict[str, Any]]:
    """{task, length, right, asked} of every task and length, in the samples' order; right may be no whole number."""
    table: dict[tuple[str, int], list[float]] = {}
    for number, sample in enumerate(samples, 1):
        table.setdefault((sample.task, sample.length), []).append(score(engine, sample))
        done(number)
    return [
        {"task": task, "length": length, "right": round(sum(scores), 4), "asked": len(scores)}
        for (task, length), scores in table.items()
    ]


def interval(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bits_per_byte(engine: Engine, documents: Sequence[Document]) -> dict[str, float]:
    """{bytes, model, xz}: bits a byte of the documents' text, each read on its own; xz -9 packs them all together."""
    bits, size = 0.0, 0
    start = engine.tokenizer.special_id(BOS)
    for document in documents:
        ids = [start, *engine.tokenizer.encode(document.text)]
        session = engine.session()
        for at in range(0, len(ids) - 1, WINDOW):
            part = ids[at : at + WINDOW]
            logits = session.extend(part, logits="all")
            following = ids[at + 1 : at + len(part) + 1]
            rows = logits[: len(following)].cpu().log_softmax(-1)
            bits -= float(rows.gather(1, torch.tensor(following)[:, None]).double().sum()) / math.log(2)
        size += len(document.text.encode("utf-8"))
    packed = len(lzma.compress("".join(d.text for d in documents).encode("utf-8"), preset=9))
    return {"bytes": size, "model": bits / size, "xz": 8 * packed / size}
