"""Which section, list or file is something in?  Names of parts, things in them, and the distance between the two.

What a code look-up asks for ("which file defines this function?") needs two steps at once: every definition must know
the last name before it, and the question must find the definition.  Here the things stand right behind the name or far
behind it, and any number of them: the near ones lead to the far ones.  Names and keys of evaluation are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import filler
from .code_tree import CodeTree
from .corpus import Corpus, is_held_out
from .episodes import Episode, Seam, Turn, chat, file_block
from .facts import ANSWER, ASKED, MEMBER, PART, PROMPT, TEXT, VALUE, Piece
from .names import CITIES, digits, draw_keys, syllable_word
from .tasks import CHARACTERS_A_TOKEN, CODE_ANSWER, CODE_QUESTIONS, path_of

FILES = 0.5  # share of documents whose parts are files with definitions


@dataclass(frozen=True)
class Wording:
    """How parts begin and end, how a thing stands in one, and what is asked and answered; {p} the part's name, {k} a
    thing, {n} a number that only the text tells.

    The answer quotes the thing as it stands: copying it leads the model to the place where its part can be read off.
    """

    begin: str
    item: str
    end: str
    questions: tuple[str, ...]
    answer: str


WORDINGS = (
    Wording("Section {p}\n", "- {k}: {n}\n", "\n", ("Which section is {k} in?", "In which section is {k}?"),
            "{k}: {n} is in section {p}."),
    Wording("## {p}\n\n", "* {k} ({n})\n", "\n", ("Under which heading is {k}?", "Which heading does {k} stand under?"),
            "{k} ({n}) stands under {p}."),
    Wording("In box {p} there are: ", "{k} {n}, ", "and nothing else.\n", ("Which box is {k} in?", "Where is {k}?"),
            "{k} {n} is in box {p}."),
    Wording("[{p}]\n", "{k} = {n}\n", "\n", ("Which part has {k}?", "Which part is {k} in?"), "{k} = {n} is in {p}."),
    Wording("{p} has ", "{k}, {n} of it; ", "that is all. ", ("Who has {k}?", "Which one has {k}?"),
            "{k}, {n} of it, is with {p}."),
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """tail: what follows it in the text, and only there: of a function its parameter, of another thing a number; text:
    what stands before it; hint: whether the part's name stands behind it again."""

    key: str
    tail: str
    text: str
    hint: bool


def grouped(rng: Random, corpus: Corpus, tree: CodeTree, tokens: int, hints: float = 0.0) -> Episode:
    """Parts with things in them, and questions which part some of the things are in; behind a share of them the text
    says it again."""
    questions = rng.randint(2, 6 if tokens <= 700 else 12 if tokens <= 3000 else 20)
    room = max(300, int((tokens - 40 * questions - 20) * CHARACTERS_A_TOKEN))
    files = rng.random() < FILES
    fixed = 85 if files else 25  # characters of a part's frame
    each = 30 if files else 16
    parts = max(2, min(round(math.exp(rng.uniform(math.log(2), math.log(16)))), room // (fixed + each)))
    things = max(1, min(rng.choice((1, 1, 2, 3, 4, 8)), (room // parts - fixed) // each))
    # Text between the things: none, or up to all that fits.
    spare = max(0, room // parts - fixed - things * each) // things
    gap = 0 if rng.random() < 0.3 else round(math.exp(rng.uniform(0, math.log(spare + 1))))
    names = _part_names(rng, corpus, tree, parts, files)
    keys = _function_names(rng, corpus, parts * things) if files else draw_keys(rng, corpus, parts * things, False)
    tails = [rng.choice(corpus.words) if files else digits(rng, rng.randint(1, 4)) for _ in keys]
    drawn = [
        Thing(key, tail, _between(rng, corpus, gap, files), rng.random() < hints)
        for key, tail in zip(keys, tails, strict=True)
    ]
    wording = rng.choice(WORDINGS)
    opening: list[Piece | Seam] = [Seam()]
    for number, name in enumerate(names):
        own = drawn[number * things : (number + 1) * things]
        opening += _file(rng, corpus, name, own) if files else _section(wording, name, own)
    asked = rng.sample(range(len(keys)), min(questions, len(keys)))
    turns = []
    for place, which in enumerate(asked):
        key, tail, name = keys[which], tails[which], names[which // things]
        template = rng.choice(CODE_QUESTIONS if files else wording.questions)
        question = template.replace("{f}", key).replace("{k}", key)
        said = CODE_ANSWER.replace("{f}", f"{key}({tail})") if files else wording.answer
        before, after = said.replace("{k}", key).replace("{n}", tail).split("{p}")
        lead, rest = before.split(key, 1)
        pieces = ((lead, ANSWER), (key + rest, ASKED), (name, VALUE), (after, ANSWER))
        answer = tuple(piece for piece in pieces if piece[0])
        turns.append(Turn([*(opening if place == 0 else []), (question, PROMPT)], answer))
    return Episode(chat(turns))


def _between(rng: Random, corpus: Corpus, characters: int, code: bool) -> str:
    """Whole units of text, at most about ``characters``; empty where none is so short."""
    if characters < 12:
        return ""
    make: Callable[[Random, tuple[str, ...]], str] = (
        filler.code_line if code else rng.choice((filler.word_salad, filler.markdown_line))
    )
    if rng.random() < 0.5 and characters > 200:
        text = "".join(filler.draw_units(rng, corpus, characters))
    else:
        text = ""
        while len(text) < characters:
            text += make(rng, corpus.words)
    end = text.rfind("\n", 0, characters) + 1
    return text[:end]


def _section(wording: Wording, name: str, things: list[Thing]) -> list[Piece | Seam]:
    before, after = wording.begin.split("{p}")
    pieces: list[Piece] = [(before, TEXT), (name, PART), (after, TEXT)]
    for thing in things:
        left, right = wording.item.replace("{n}", thing.tail).split("{k}")
        pieces += [(thing.text, TEXT), (left, TEXT), (thing.key, MEMBER), (right, MEMBER)]
        pieces += [("(still in ", TEXT), (name, VALUE), (")\n", TEXT)] * thing.hint
    pieces.append((wording.end, TEXT))
    return [piece for piece in pieces if piece[0]]


def _file(rng: Random, corpus: Corpus, name: str, things: list[Thing]) -> list[Piece | Seam]:
    """Functions as `dsv4 run --file` shows a file."""
    pieces: list[Piece] = []
    for thing in things:
        a, b = thing.tail, rng.choice(corpus.words)
        line = f"    return {a} + {rng.randint(0, 99)}\n" if rng.random() < 0.5 else f"    {a} = {b}({a})\n"
        pieces += [(thing.text, TEXT), ("def ", TEXT), (thing.key, MEMBER), (f"({a}):\n", MEMBER), (line, TEXT)]
        pieces += [("    # in ", TEXT), (name, VALUE), ("\n", TEXT)] * thing.hint
    return file_block(name, [(text.rstrip("\n") if i == len(pieces) - 1 else text, kind)
                             for i, (text, kind) in enumerate(pieces) if text])  # fmt: skip


def _function_names(rng: Random, corpus: Corpus, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        words = [rng.choice(corpus.words) for _ in range(rng.randint(1, 3))]
        name = "_" * (rng.random() < 0.15) + "_".join(words)
        if not is_held_out(name):
            names[name] = None
    return list(names)


def _part_names(rng: Random, corpus: Corpus, tree: CodeTree, count: int, files: bool) -> list[str]:
    """Distinct; of one kind within a document."""
    kind = rng.randrange(5)
    makers: tuple[Callable[[], str], ...] = (
        lambda: digits(rng, 7), lambda: digits(rng, rng.randint(1, 4)), lambda: rng.choice(corpus.words),
        lambda: rng.choice(CITIES), lambda: syllable_word(rng, 2).capitalize(),
    )  # fmt: skip
    names: dict[str, None] = {}
    while len(names) < count:
        name = path_of(rng, corpus, rng.choice(tree.training).path) if files else makers[kind]()
        names[name] = None
    return list(names)
