"""More tasks with ground truth: many keys of one form, chains of variables, and "which file defines this function?".

Wordings are RULER's (Apache-2.0, github.com/NVIDIA/RULER) where said, else the project's own.  Keys, variable names and
code of evaluation are never trained on (names.is_held_out by name).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from . import episodes, filler
from .code_tree import CodeTree, SourceFile, excerpt
from .corpus import Corpus, is_held_out
from .episodes import Episode, Part, Seam, Special, Turn, chat, file_block
from .facts import ANSWER, ASKED, MEMBER, NOISE, PROMPT, RULER_STATEMENT, TEXT, VALUE, Fact, Piece, Pieces
from .names import Attribute, digits, draw_value, syllable_word, word_pair_key

RULER_TRACKING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
RULER_TRACKING_QUESTION = "\nQuestion: Find all variables that are assigned the value {v} in the text above."
RULER_TRACKING_ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assgined the value "
    "{v}, they are:"
)
TRACKING_INTRODUCTION = (
    'The following text hides chains of variable assignments, like "VAR A = 12345." and "VAR B = VAR A." Keep track of '
    "the value of every variable; I will ask about them afterwards.\n\n"
)
TRACKING_QUESTIONS = (
    "\n\nWhich variables have the value {v}, directly or through other variables? "
    'End your reply with "Answer:" and their names, separated by commas.',
    "\nWhich variables are equal to {v}? List their names.",
    "\nName every variable whose value is {v}.",
    "\nFind the variables with the value {v}.",
)
CODE_QUESTIONS = (
    "Which file defines the function {f}?", "Which file defines this function: {f}?", "Where is {f} defined?",
    "In which file is the function {f} defined?", "Which file defines {f}()?", "Which file contains def {f}?",
    "Which file is the function {f} in?", "Find the file that defines {f}.", "where is the function {f}",
)  # fmt: skip
# The definition as it stands, and then its file: copying it leads to the place where the file can be read off.
CODE_ANSWER = "def {f} is in {p}."
_SIGNATURE = re.compile(r"(?<=def )(\w+\([^)\n]*\)?)")
CHARACTERS_A_TOKEN = 3.0


# Many keys -----------------------------------------------------------------------------------------------------------


def similar_keys(rng: Random, corpus: Corpus, count: int, evaluation: bool) -> list[str]:
    """Keys of two words and a hyphen; some share a word with another."""
    keys = [word_pair_key(rng, corpus, evaluation)]
    while len(keys) < count:
        first, _, second = rng.choice(keys).partition("-")
        chance = rng.random()
        if chance < 0.25:
            key = f"{first}-{rng.choice(corpus.words)}"
        elif chance < 0.4:
            key = f"{rng.choice(corpus.words)}-{second}"
        else:
            key = word_pair_key(rng, corpus, evaluation)
        if key not in keys and is_held_out(key) == evaluation:
            keys.append(key)
    return keys


def many_keys(rng: Random, corpus: Corpus, tokens: int) -> Episode:
    """Facts of one form about many keys, some of them alike, and little else when there is no room for more."""
    count = max(2, min(rng.choice((4, 9, 9, 16, 32, 64)), tokens // 60))
    keys = similar_keys(rng, corpus, count, False)
    attribute = Attribute("special magic number", "number7")
    stated = [Fact(attribute, key, draw_value(rng, "number7", corpus.words), RULER_STATEMENT) for key in keys]
    questions = min(count, rng.randint(2, 32 if tokens > episodes.LONG_TOKENS else 12))
    written = min(tokens, episodes.WRITTEN_TOKENS)
    room = int((written - 22 * count - 42 * questions - 30) * CHARACTERS_A_TOKEN) if rng.random() < 0.7 else 0
    return episodes.about(rng, corpus, stated, episodes.document(rng, corpus, stated, room, False, None), questions)


# Chains of variables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """Variables in the order of their assignment: the first gets the value, each other the one before it."""

    names: tuple[str, ...]
    value: str

    def statements(self) -> list[Pieces]:
        """The first mentions of names and the value cannot be predicted; what stands behind "= VAR" cannot either."""
        first: Pieces = (("VAR ", TEXT), (self.names[0], NOISE), (" = ", TEXT), (self.value, NOISE))
        others = [
            (("VAR ", TEXT), (new, NOISE), (" = VAR ", TEXT), (old, NOISE))
            for old, new in zip(self.names, self.names[1:], strict=False)
        ]
        return [first, *others]


def variable_name(rng: Random, letters: int, evaluation: bool) -> str:
    while True:
        name = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(letters))
        if is_held_out(name) == evaluation:
            return name


def draw_chains(rng: Random, count: int, hops: int, letters: int, evaluation: bool) -> list[Chain]:
    """Chains of ``hops`` + 1 variables without a name or value in common."""
    names: dict[str, None] = {}
    while len(names) < count * (hops + 1):
        names[variable_name(rng, letters, evaluation)] = None
    values: dict[str, None] = {}
    while len(values) < count:
        values[digits(rng, 5)] = None
    every = list(names)
    return [Chain(tuple(every[i * (hops + 1) : (i + 1) * (hops + 1)]), value) for i, value in enumerate(values)]


def interleaved(rng: Random, chains: list[Chain]) -> list[Pieces]:
    """All statements, each chain's in order."""
    order = [i for i, chain in enumerate(chains) for _ in chain.names]
    rng.shuffle(order)
    left = [iter(chain.statements()) for chain in chains]
    return [next(left[i]) for i in order]


def tracking_content(
    rng: Random, corpus: Corpus, chains: list[Chain], characters: int, end: str, evaluation: bool = False
) -> list[Piece | Seam]:
    """Filler with the statements between its units, and a seam before each."""
    units = filler.draw_units(rng, corpus, characters, evaluation) if characters > 0 else []
    stated = interleaved(rng, chains)
    places = sorted(rng.randint(0, len(units)) for _ in stated)
    pieces: list[Piece | Seam] = []
    start = 0
    for statement, place in zip(stated, places, strict=True):
        before = "".join(units[start:place])
        start = place
        pieces += [(before, TEXT)] if before else []
        pieces += [Seam(), (" ", TEXT), *statement, (end, TEXT)]
    rest = "".join(units[start:])
    return [*pieces, Seam(), *([(rest, TEXT)] if rest else [])]


def named(names: tuple[str, ...], separator: str) -> Pieces:
    """Names as an answer gives them."""
    pieces: list[Piece] = []
    for i, name in enumerate(names):
        if i:
            pieces.append((separator, ANSWER))
        pieces.append((name, VALUE))
    return tuple(pieces)


def tracking(rng: Random, corpus: Corpus, tokens: int) -> Episode:
    """Chains of assignments in a text, and which variables have a value in the end: RULER's wording or another."""
    hops = rng.choice((1, 2, 3, 4, 4, 4, 5)) if tokens > 400 else rng.randint(1, 3)
    long = tokens > episodes.LONG_TOKENS
    count = max(1, min(rng.randint(1, 10 if long else 6), tokens // (26 * (hops + 1) + 40)))
    ruler = rng.random() < 0.5
    if ruler and not long and rng.random() < 0.5:
        count = 1
    letters = 5 if rng.random() < 0.7 else rng.randint(3, 6)
    chains = draw_chains(rng, count, hops, letters, False)
    written = min(tokens, episodes.WRITTEN_TOKENS) - count * (26 * (hops + 1) + 50) - 60
    end = rng.choice(("", " ", "\n")) if ruler else rng.choice((".", ".", "\n", ";"))
    if ruler and end == "":
        end = "\n"
    content = tracking_content(rng, corpus, chains, int(written * CHARACTERS_A_TOKEN), end)
    rng.shuffle(chains)
    asked = chains[: rng.randint(1, 8 if long else 4)]
    if ruler:
        if tokens > 900 and rng.random() < 0.4:
            content = [*worked_example(rng), *content]
        return Episode(ruler_tracking(rng, content, asked, raw=rng.random() < 0.5))
    return Episode(own_tracking(rng, content, asked))


def worked_example(rng: Random) -> list[Piece | Seam]:
    """What may stand behind RULER's first line: a chain of shorter names with its answer, and that line again."""
    chain = draw_chains(rng, 1, 4, 3, False)[0]
    lines = [" ".join(filler.NOISE_SENTENCES)] * rng.randint(5, 15)
    places = sorted(rng.sample(range(len(lines)), len(chain.names)))
    for offset, (place, statement) in enumerate(zip(places, chain.statements(), strict=True)):
        lines.insert(place + offset, "".join(text for text, _ in statement))
    asked = RULER_TRACKING_QUESTION.format(v=chain.value)
    answer = RULER_TRACKING_ANSWER.format(n=len(chain.names), v=chain.value)
    text = "\n ".join(lines) + f"\n{asked} {answer}  {' '.join(chain.names)}\n\n\n\n" + RULER_TRACKING
    return [(text, PROMPT)]


def ruler_tracking(rng: Random, content: list[Piece | Seam], asked: list[Chain], raw: bool) -> list[Part]:
    """RULER's prompt with its answer prefix given or written, raw or in chat; further chains are asked for alike."""
    turns = []
    for number, chain in enumerate(asked):
        question = RULER_TRACKING_QUESTION.format(v=chain.value)
        opening = [(RULER_TRACKING, PROMPT), *content] if number == 0 else []
        prefix = RULER_TRACKING_ANSWER.format(n=len(chain.names), v=chain.value)
        answer = ((prefix, ANSWER), (" ", ANSWER), *named(chain.names, " "))
        turns.append(Turn([*opening, (question, PROMPT)], answer))
    if not raw:
        return chat(turns, prefilled=1 if rng.random() < 0.6 else 0)
    parts: list[Part] = [Special(episodes.BOS)]
    for turn in turns:
        (prefix, _), *names = turn.answer
        parts += [*turn.user, (" " + prefix, PROMPT), *names, ("\n", ANSWER)]
    return [*parts, Special(episodes.EOS, trained=True)]


def own_tracking(rng: Random, content: list[Piece | Seam], asked: list[Chain]) -> list[Part]:
    template = rng.choice(TRACKING_QUESTIONS) if rng.random() < 0.5 else TRACKING_QUESTIONS[0]
    heading = TRACKING_INTRODUCTION if rng.random() < 0.7 else ""
    turns = []
    for number, chain in enumerate(asked):
        opening: list[Piece | Seam] = [*([(heading, PROMPT)] if heading else []), *content] if number == 0 else []
        answer: Pieces = (("Answer: ", ANSWER), *named(chain.names, ", "))
        turns.append(Turn([*opening, (template.format(v=chain.value), PROMPT)], answer))
    return chat(turns)


# Code look-up --------------------------------------------------------------------------------------------------------


def path_of(rng: Random, corpus: Corpus, path: str) -> str:
    """A file's own path, or one that the code does not give away."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(("", "", "Lib/", "src/", "./", "/usr/lib/python3/")) + path
    stem = "_".join(
        rng.choice(corpus.words) if rng.random() < 0.7 else syllable_word(rng, 2) for _ in range(rng.randint(1, 2))
    )
    folder = rng.choice(("", "", "src/", "lib/", f"{rng.choice(corpus.words)}/"))
    return f"{folder}{stem}.py"


def code_lookup(
    rng: Random, corpus: Corpus, tree: CodeTree, tokens: int, files: int = 0, evaluation: bool = False
) -> Episode:
    """Files of a code tree as `dsv4 run --file` lays them out, and which of them defines a function.

    files: how many; 0 draws it.  In evaluation the paths are the tree's own, and there is one question.
    """
    questions = 1 if evaluation else rng.randint(1, 3 if tokens <= 700 else 6 if tokens <= 3000 else 12)
    room = int((tokens - 45 * questions - 20) * CHARACTERS_A_TOKEN)
    count = files or max(2, min(rng.randint(2, 14), room // 240))
    pool = tree.files(evaluation)
    chosen = rng.sample(pool, min(count, len(pool)))
    each = max(150, room // len(chosen) - 90)
    shown: list[SourceFile] = []
    for file in chosen:
        part = excerpt(rng, file, each if evaluation else max(120, int(each * rng.uniform(0.4, 1.6))))
        shown.append(SourceFile(file.path if evaluation else path_of(rng, corpus, file.path), part.text))
    parts: list[Piece | Seam] = []
    for file in shown:
        parts += file_block(file.path, _definitions(file.text.rstrip("\n")))
    if not evaluation:
        parts.insert(0, Seam())  # more text before the files
    return Episode(chat(_code_turns(rng, shown, parts, questions, evaluation)))


def _definitions(text: str) -> list[Piece]:
    """The text with what it defines as pieces of their own."""
    return [(piece, MEMBER if number % 2 else TEXT) for number, piece in enumerate(_SIGNATURE.split(text)) if piece]


def _code_turns(
    rng: Random, shown: list[SourceFile], opening: list[Piece | Seam], questions: int, evaluation: bool
) -> list[Turn]:
    defined = [(name, file) for file in shown for name in file.functions()]
    unique = [(name, its) for name, its in defined if sum(f"def {name}(" in file.text for file in shown) == 1]
    if not unique:
        unique = defined[:1]
    turns = []
    for number, (function, file) in enumerate(rng.sample(unique, min(questions, len(unique)))):
        template = CODE_QUESTIONS[0] if evaluation else rng.choice(CODE_QUESTIONS)
        quoted = next(s for s in _SIGNATURE.findall(file.text) if s.startswith(f"{function}("))
        before, after = CODE_ANSWER.format(f=quoted, p="\0").split("\0")
        lead, rest = before.split(function, 1)
        answer: Pieces = ((lead, ANSWER), (function + rest, ASKED), (file.path, VALUE), (after, ANSWER))
        turns.append(Turn([*(opening if number == 0 else []), (template.format(f=function), PROMPT)], answer))
    return turns
