"""Episodes: one document with facts and questions about them, or a conversation, as pieces and special tokens.

Owns the layouts: `dsv4 run --file`'s, RULER's, a question before the document, several questions in a row, thinking and
not, raw text with an answer prefix.  The chat markup follows dsv4_engine.encoding; a test holds the two together.
Documents have seams, at which packing.py makes them as long as is wanted.  More tasks are in tasks.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from dsv4_engine.protocol import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

from . import dialogue, facts, filler
from .corpus import Corpus
from .facts import ANSWER, PART, PROMPT, TEXT, Exchange, Fact, Piece, Pieces
from .names import syllable_word

CHARACTERS_A_TOKEN = 3.0
WRITTEN_TOKENS = 2400  # of a longer document, the rest is put in at its seams
LONG_TOKENS = 12000
SUFFIXES = ("txt", "md", "log", "py", "csv", "json", "rst", "html", "cfg")
FOLDERS = ("", "", "", "docs/", "src/", "notes/", "data/", "/home/user/", "./", "/tmp/")


@dataclass(frozen=True)
class Special:
    """One special token; ``trained`` when the assistant writes it."""

    token: str
    trained: bool = False


@dataclass(frozen=True)
class Seam:
    """A place in a document between two sentences or lines, where more text may be put."""


Part = Piece | Special | Seam


@dataclass
class Turn:
    """A user's text and the answer to it; ``reasoning`` makes it an answer with thinking."""

    user: list[Piece | Seam]
    answer: Pieces
    reasoning: Pieces | None = None


@dataclass
class Episode:
    """Parts in order.  ``asked``: the facts of the questions, in order."""

    parts: list[Part]
    asked: list[Fact] = field(default_factory=list)

    def text(self) -> str:
        return "".join(written(part) for part in self.parts)


def written(part: Part) -> str:
    if isinstance(part, Special):
        return part.token
    return "" if isinstance(part, Seam) else part[0]


def chat(turns: list[Turn], thinking: bool = False, system: str = "", prefilled: int = 0) -> list[Part]:
    """A conversation in the published encoding.

    ``prefilled``: how many pieces of the last answer are given, not learnt.

    In thinking mode only the last answer has reasoning; before it the answers follow </think> directly, as published.
    """
    parts: list[Part] = [Special(BOS)]
    if system:
        parts.append((system, PROMPT))
    for number, turn in enumerate(turns):
        last = number == len(turns) - 1
        parts += [Special(USER), *turn.user, Special(ASSISTANT)]
        if thinking and last:
            parts += [Special(THINK), *(turn.reasoning or ()), Special(END_THINK, trained=True)]
        else:
            parts.append(Special(END_THINK))
        parts += _given(turn.answer, prefilled) if last and prefilled else list(turn.answer)
        parts.append(Special(EOS, trained=True))
    return parts


def _given(answer: Pieces, count: int) -> list[Piece]:
    """The answer with its first pieces given.  A prefix ends without its last space, which the assistant writes."""
    prefix = "".join(text for text, _ in answer[:count])
    bare = prefix.rstrip(" ")
    return [piece for piece in ((bare, PROMPT), (prefix[len(bare) :], ANSWER), *answer[count:]) if piece[0]]


def document(
    rng: Random, corpus: Corpus, stated: list[Fact], characters: int, evaluation: bool, depth: float | None
) -> list[Piece | Seam]:
    """Filler of about ``characters`` with the facts between its units, in order of a random place (or at ``depth``).

    There is a seam before every fact and at the end.
    """
    units = filler.draw_units(rng, corpus, characters, evaluation) if characters > 0 else []
    if not evaluation and rng.random() < 0.15:  # facts between any two words
        units = re.findall(r"\s*\S+\s*", "".join(units))
    places = sorted(round(depth * len(units)) if depth is not None else rng.randint(0, len(units)) for _ in stated)
    pieces: list[Piece | Seam] = []
    start = 0
    for fact, place in zip(stated, places, strict=True):
        before = "".join(units[start:place])
        start = place
        if before and not before.endswith((" ", "\n")):
            before += " "
        if before:
            pieces.append((before, TEXT))
        pieces += [Seam(), *fact.stated()]
        inline = fact.statement.endswith(".") and not before.endswith("\n")
        pieces.append(
            (" " if inline else rng.choice((" ", "\n", "\n")) if fact.statement.endswith(".") else "\n", TEXT)
        )
    rest = "".join(units[start:]).rstrip()
    return [*pieces, Seam(), *([(rest, TEXT)] if rest else [])]


def file_name(rng: Random) -> str:
    return f"{rng.choice(FOLDERS)}{syllable_word(rng, rng.randint(1, 3))}.{rng.choice(SUFFIXES)}"


def file_block(name: str, content: Sequence[Piece | Seam]) -> list[Piece | Seam]:
    """The layout of a file in `dsv4 run`."""
    return [
        ("[file name]: ", PROMPT), (name, PART), ("\n[file content begin]\n", PROMPT), *content,
        ("\n[file content end]\n", PROMPT),
    ]  # fmt: skip


def _ask_some(rng: Random, corpus: Corpus, stated: list[Fact], count: int) -> tuple[list[Exchange], list[Fact]]:
    asked = rng.sample(stated, min(count, len(stated)))
    exchanges = [facts.ask(rng, fact) for fact in asked]
    if len(asked) > 1 and asked[0].key and asked[0].attribute == asked[1].attribute and rng.random() < 0.08:
        exchanges[0] = facts.ask_two(rng, asked[0], asked[1])
    if rng.random() < 0.06:
        place = rng.randrange(len(exchanges) + 1)
        exchanges.insert(place, facts.ask_missing(rng, stated, corpus))
    return exchanges, asked


def retrieval(rng: Random, corpus: Corpus, tokens: int, density: float) -> Episode:
    """A document of about ``tokens`` tokens, questions included; density 1: many facts and questions, 0: few facts.

    Of a longer one the seams are to take what is beyond WRITTEN_TOKENS.
    """
    most = max(1, tokens // 60)
    # A long document costs much: it gets many questions.
    size = sum(tokens > limit for limit in (WRITTEN_TOKENS, LONG_TOKENS))
    cap, at_most = (24, 48, 96)[size], (12, 24, 48)[size]
    count = (
        max(1, min(cap, round(most * density * rng.uniform(0.5, 1.0))))
        if rng.random() < 0.3 + 0.7 * density
        else rng.randint(1, 3)
    )
    count = min(count, most)
    stated = facts.draw_facts(rng, corpus, count)
    questions = rng.randint(1, 10) if density < 0.5 else rng.randint(max(1, min(count // 2, at_most // 2)), at_most)
    questions = min(count, questions)
    room = int((min(tokens, WRITTEN_TOKENS) - 22 * count - 42 * questions - 30) * CHARACTERS_A_TOKEN)
    content = document(rng, corpus, stated, room, False, None)
    return about(rng, corpus, stated, content, questions)


def about(rng: Random, corpus: Corpus, stated: list[Fact], content: list[Piece | Seam], questions: int) -> Episode:
    """The content in some layout, with questions about what it states."""
    exchanges, asked = _ask_some(rng, corpus, stated, questions)
    ruler = stated[0].is_ruler()
    layout = rng.random()
    if ruler and layout < 0.5:
        return Episode(_ruler(rng, content, exchanges), asked)
    if layout < 0.62:
        opening = file_block(file_name(rng), content)
        if rng.random() < 0.12:
            opening += file_block(file_name(rng), [(filler_text(rng, corpus, rng.randint(60, 400)), TEXT)])
    elif layout < 0.80:
        head = rng.choice(("", "", "Text:\n", "Document:\n", "Read this.\n\n", "Here is a text:\n\n", "Context: "))
        opening = [(head, PROMPT), *content, (rng.choice(("\n", "\n\n", "\n\nQuestion: ", "\n\nQ: ", " ")), PROMPT)]
    elif layout < 0.88:
        return _question_first(rng, content, exchanges, asked)
    else:
        return Episode(_raw(rng, content, exchanges), asked)
    turns = _turns([piece for piece in opening if isinstance(piece, Seam) or piece[0]], exchanges)
    thinking = rng.random() < 0.12 and _add_thought(turns, asked)
    return Episode(chat(turns, thinking, _system(rng)), asked)


def filler_text(rng: Random, corpus: Corpus, characters: int, evaluation: bool = False) -> str:
    return "".join(filler.draw_units(rng, corpus, characters, evaluation))


def _turns(opening: list[Piece | Seam], exchanges: list[Exchange]) -> list[Turn]:
    """The document with the first question; the other questions follow on their own."""
    first, *others = exchanges
    turns = [Turn([*opening, *first.question], first.answer)]
    return turns + [Turn(list(e.question), e.answer) for e in others]


def _add_thought(turns: list[Turn], asked: list[Fact]) -> bool:
    """Reasoning for the last turn, when its question is about a stated fact."""
    if len(turns) != len(asked):
        return False
    turns[-1].reasoning = facts.thought(asked[-1])
    return True


def _system(rng: Random) -> str:
    if rng.random() < 0.9:
        return ""
    return rng.choice(
        ("You are a helpful assistant.", "Answer briefly.", "You answer questions about texts.", "Be precise.")
    )


def _ruler(rng: Random, content: list[Piece | Seam], exchanges: list[Exchange]) -> list[Part]:
    """RULER's prompt, in chat (with or without the answer prefix) or raw."""
    opening: list[Piece | Seam] = [(facts.RULER_INTRODUCTION + "\n", PROMPT), *content, ("\n", PROMPT)]
    turns = _turns(opening, exchanges)
    form = rng.random()
    if form < 0.4:
        return chat(turns, prefilled=0)
    if form < 0.7:
        if rng.random() < 0.7:  # RULER's prefix opens with a space
            turns[-1].answer = ((" ", ANSWER), *turns[-1].answer)
        return chat(turns, prefilled=max(0, len(turns[-1].answer) - 2))
    parts: list[Part] = [Special(BOS), *opening]
    for number, exchange in enumerate(exchanges):
        parts += [*((("\n"), PROMPT),) * (number > 0), *exchange.question, (" ", PROMPT), *exchange.answer]
    return [*parts, Special(EOS, trained=True)]


def _question_first(rng: Random, content: list[Piece | Seam], exchanges: list[Exchange], asked: list[Fact]) -> Episode:
    """The question before the document, and (mostly) once more after it."""
    first = exchanges[0]
    again = list(first.question) if rng.random() < 0.7 else []
    gap: Piece = (rng.choice(("\n", "\n\n")), PROMPT)
    body = file_block(file_name(rng), content) if rng.random() < 0.5 else [*content, gap]
    turns = [Turn([*first.question, gap, *body, *again], first.answer)]
    turns += [Turn(list(e.question), e.answer) for e in exchanges[1:]]
    return Episode(chat(turns), asked)


def _raw(rng: Random, content: list[Piece | Seam], exchanges: list[Exchange]) -> list[Part]:
    """No chat tokens: the text, then questions with answers on lines of their own."""
    q, a = rng.choice((("Question: ", "\nAnswer: "), ("Q: ", "\nA: "), ("", " "), ("", "\n")))
    parts: list[Part] = [Special(BOS), *content]
    for exchange in exchanges:
        parts += [("\n\n" + q, PROMPT), *exchange.question, (a, PROMPT), *exchange.answer]
    return [*parts, Special(EOS, trained=True)]


def told_in_chat(rng: Random, corpus: Corpus) -> Episode:
    """Facts told and asked for in a conversation."""
    stated = facts.draw_facts(rng, corpus, rng.randint(1, 6), ruler=0.1)
    turns = []
    for fact in stated:
        opening = rng.choice(("", "Remember: ", "Please remember this. ", "Note this: "))
        user = [(opening, PROMPT), *fact.stated()]
        turns.append(
            Turn([p for p in user if p[0]], ((rng.choice(("OK.", "I will remember that.", "Noted.")), ANSWER),))
        )
    exchanges, asked = _ask_some(rng, corpus, stated, len(stated))
    turns += [Turn(list(e.question), e.answer) for e in exchanges]
    return Episode(chat(turns), asked)


def small_talk(rng: Random, corpus: Corpus) -> Episode:
    exchanges = dialogue.draw_conversation(rng, corpus, rng.randint(1, 6))
    turns = [Turn(list(e.question), e.answer) for e in exchanges]
    thinking = rng.random() < 0.2
    if thinking:
        said = "".join(text for text, _ in exchanges[-1].question)
        turns[-1].reasoning = ((f'The user says "{said}" I can answer that directly.', ANSWER),)
    return Episode(chat(turns, thinking, _system(rng)))


def plain_text(rng: Random, corpus: Corpus, tokens: int) -> Episode:
    written = min(tokens, WRITTEN_TOKENS)
    text = filler_text(rng, corpus, int(written * CHARACTERS_A_TOKEN))
    return Episode([Special(BOS), (text, TEXT), Seam(), Special(EOS)])
