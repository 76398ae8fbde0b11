"""Text that facts are hidden in: the corpus, and several kinds of generated text.

A filler is a list of units (a sentence, a line) that join to the text; facts go between units.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from .corpus import Corpus
from .names import CITIES, COLOURS, FIRST_NAMES, digits, draw_value, syllable_word

# RULER's "noise" haystack, and neighbours of it.
NOISE_SENTENCES = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
)  # fmt: skip
SUBJECTS = (
    "The old man", "A young woman", "The teacher", "My neighbour", "The captain", "Every visitor", "The committee",
    "A small dog", "The engineer", "Our team", "The mayor", "Someone", "The student", "The machine", "A traveller",
)  # fmt: skip
VERBS = (
    "walked to", "looked at", "wrote about", "remembered", "painted", "forgot", "described", "visited", "sold",
    "repaired", "asked about", "waited near", "measured", "watched", "talked about",
)  # fmt: skip
OBJECTS = (
    "the bridge", "the market", "a long letter", "the river", "the garden", "an empty house", "the station",
    "the report", "a broken clock", "the mountain", "the library", "the harbour", "two red boats", "the new road",
    "the village",
)  # fmt: skip
ENDINGS = (
    "in the morning", "after the rain", "without a word", "every Sunday", "before dinner", "for the third time",
    "because it was late", "when the bell rang", "as usual", "last winter", "with great care", "during the summer",
)  # fmt: skip
LOG_PARTS = ("scheduler", "storage", "network", "auth", "worker", "cache", "api", "db", "queue", "monitor")
LOG_TEXTS = (
    "request finished in {n} ms", "connection from 10.{b}.{b}.{b} closed", "retry {b} of 5", "flushed {n} rows",
    "user {w} logged in", "checkpoint written", "queue length {n}", "timeout while reading {w}", "job {n} started",
    "disk usage at {b}%",
)  # fmt: skip


def corpus_units(rng: Random, corpus: Corpus, characters: int, evaluation: bool) -> list[str]:
    """A stretch of one document, from a line's start; sentences of prose, lines of code."""
    document = rng.choice(corpus.documents(evaluation))
    text = document.text
    start = rng.randrange(max(1, len(text) - characters))
    start = text.find("\n", start) + 1 if start else 0
    stretch = text[start : start + characters]
    if document.kind == "python-lib":
        return stretch.splitlines(keepends=True)
    return [unit for unit in re.split(r"(?<=[.!?;] )|(?<=\n)", stretch) if unit]


def _noise(rng: Random) -> str:
    return " ".join(NOISE_SENTENCES) + (" " if rng.random() < 0.5 else "\n")


def _sentence(rng: Random) -> str:
    tail = rng.choice((" ", " ", " ", "\n"))
    who = rng.choice(FIRST_NAMES) if rng.random() < 0.3 else rng.choice(SUBJECTS)
    return f"{who} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(ENDINGS)}.{tail}"


def word_salad(rng: Random, words: tuple[str, ...]) -> str:
    picked = [rng.choice(words) for _ in range(rng.randint(4, 14))]
    return " ".join(picked).capitalize() + rng.choice((". ", ". ", ".\n", "? ", "! "))


def _log_line(rng: Random, words: tuple[str, ...]) -> str:
    text = rng.choice(LOG_TEXTS).format(n=rng.randint(1, 99999), b=rng.randint(0, 255), w=rng.choice(words))
    day = f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    stamp = f"{day} {rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}"
    return f"{stamp} {rng.choice(('INFO', 'INFO', 'WARN', 'DEBUG', 'ERROR'))} {rng.choice(LOG_PARTS)}: {text}\n"


def _table_row(rng: Random, words: tuple[str, ...]) -> str:
    cells = [rng.choice(words), digits(rng, rng.randint(1, 7)), rng.choice(CITIES), rng.choice(COLOURS)]
    rng.shuffle(cells)
    return ",".join(cells) + "\n" if rng.random() < 0.5 else "| " + " | ".join(cells) + " |\n"


def code_line(rng: Random, words: tuple[str, ...]) -> str:
    a, b, c = (rng.choice(words) for _ in range(3))
    form = rng.randrange(6)
    return (
        f"def {a}_{b}({c}):\n", f"    {a} = {b}({c}, {rng.randint(0, 500)})\n", f"    if {a} > {rng.randint(0, 99)}:\n",
        f"        return {a} + {b}\n", f"{a}.{b} = {digits(rng, rng.randint(1, 6))}\n", f"# {a} {b} {c}\n",
    )[form]  # fmt: skip


def markdown_line(rng: Random, words: tuple[str, ...]) -> str:
    a, b, c, d = (rng.choice(words) for _ in range(4))
    form = rng.randrange(7)
    return (
        f"{'#' * rng.randint(1, 3)} {a.capitalize()} {b}\n\n", f"- {a} {b}: {c} {d}\n", f"- **{a}** {b} {c}\n",
        f"    $ {a} --{b} {rng.randint(1, 4096)} {c}.{rng.choice(('txt', 'py', 'md'))}\n", f"`{a}_{b}` {c}s the {d}.\n",
        f"| {a} | {rng.randint(1, 9999)} | {b} |\n", f"{a.capitalize()} {b} {c} {d}, see [{a}]({b}.md). ",
    )[form]  # fmt: skip


def _number_line(rng: Random, words: tuple[str, ...]) -> str:
    """Numbers that belong to no key that is asked for."""
    form = rng.randrange(4)
    if form == 0:
        year, count = rng.randint(1500, 2030), digits(rng, rng.randint(2, 7))
        return f"In {year} there were {count} {rng.choice(words)} in {rng.choice(CITIES)}. "
    if form == 1:
        return f"See page {rng.randint(1, 999)} and note {digits(rng, 7)}. "
    if form == 2:
        return f"{syllable_word(rng, 2).capitalize()} counted {digits(rng, rng.randint(3, 8))} {rng.choice(words)}. "
    return f"{rng.choice(words)} {draw_value(rng, 'mixed', words)}\n"


CORPUS_SHARE = 0.56
# The cumulative share of each kind of generated text, and what makes a unit of it.
MAKERS: tuple[tuple[float, Callable[[Random, tuple[str, ...]], str]], ...] = (
    (0.66, lambda rng, words: _noise(rng)),
    (0.76, lambda rng, words: _sentence(rng)),
    (0.82, word_salad),
    (0.87, _log_line),
    (0.90, _table_row),
    (0.93, code_line),
    (0.97, markdown_line),
    (1.0, _number_line),
)


def draw_units(rng: Random, corpus: Corpus, characters: int, evaluation: bool = False) -> list[str]:
    """About ``characters`` of filler in one style or a mixture of stretches."""
    units: list[str] = []
    left = characters
    style = rng.random()
    while left > 0:
        if rng.random() < 0.25:  # styles mostly last for the whole text
            style = rng.random()
        stretch = min(left, rng.randint(300, 4000))
        if style < CORPUS_SHARE:
            new = corpus_units(rng, corpus, stretch, evaluation)
        else:
            make = next(m for limit, m in MAKERS if style < limit)
            new, total = [], 0
            while total < stretch:
                new.append(make(rng, corpus.words))
                total += len(new[-1])
        if units and not units[-1].endswith((" ", "\n")):
            units[-1] += "\n"
        units += new
        left -= max(1, sum(map(len, new)))
    return units
