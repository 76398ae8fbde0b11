"""Facts that a document states and a question asks for, in many wordings; and RULER's own.

A text is a tuple of pieces, each with a class that says what training takes from it.  Some nouns, statements and
questions are kept for evaluation (the ends of the lists), so that scores can be taken on wordings never trained on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from random import Random

from .corpus import Corpus
from .names import Attribute, draw_keys, draw_value, word_pair_key

# Classes of text: running text; what nobody can predict (a key or value at its first mention); what a user writes;
# what the assistant writes; within that the value that was asked for; the name of a part (a file, a section) and a
# thing in that part, neither of which is predicted; what an answer says of such a thing before it names the part.
TEXT, NOISE, PROMPT, ANSWER, VALUE, PART, MEMBER, ASKED = range(8)
SAID = (ANSWER, VALUE, ASKED)  # by the assistant
Piece = tuple[str, int]
Pieces = tuple[Piece, ...]

RULER_INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
RULER_STATEMENT = "One of the special magic numbers for {k} is: {v}."
RULER_QUESTION = "What is the special magic number for {k} mentioned in the provided text?"
RULER_ANSWER = "The special magic number for {k} mentioned in the provided text is {v}."

NUMBER_NOUNS = (
    "magic number", "special magic number", "secret number", "access code", "security code", "pass code",
    "serial number", "ticket number", "order number", "invoice number", "phone number", "extension", "locker number",
    "account number", "tracking number", "reference number", "employee number", "part number", "batch number",
    "badge number", "PIN", "catalogue number", "port", "error code", "door code", "membership number",
    "customer number", "ID", "id number", "case number", "registration number", "code", "number", "key number",
    "record number", "budget", "population", "price", "score", "weight", "postal code", "room number",
    "flight number", "secret code", "verification code", "lucky number", "vault combination", "passport number",
    "patient number", "licence number",
)  # fmt: skip
WORD_NOUNS = (
    ("password", "word"), ("code word", "word"), ("secret word", "word"), ("favourite word", "word"),
    ("nickname", "word"), ("home town", "city"), ("city", "city"), ("destination", "city"), ("office", "city"),
    ("birthplace", "city"), ("access key", "mixed"), ("reference", "mixed"), ("licence plate", "mixed"),
    ("product code", "mixed"),
)  # fmt: skip
STATEMENTS = (
    "The {a} for {k} is {v}.", "The {a} of {k} is {v}.", "The {a} for {k} is: {v}.", "{k} has the {a} {v}.",
    "One of the {a}s for {k} is: {v}.", "Remember that the {a} for {k} is {v}.", "Note: the {a} of {k} is {v}.",
    "{k}: {a} {v}.", "{k} was given the {a} {v}.", "For {k}, use the {a} {v}.", "The {a} assigned to {k} is {v}.",
    "Please note that {k} has {a} {v}.", "{k}'s {a} is {v}.", "If anyone asks for the {a} of {k}, it is {v}.",
    "It was decided that the {a} for {k} would be {v}.", "The {a} belonging to {k} is {v}.",
    "By the way, {k}'s {a} is {v}.", "As of today the {a} of {k} is {v}.", "{k} - {a}: {v}", "{a} for {k}: {v}",
    "{a} of {k} = {v}", "INFO {a} {k}={v}", "# {a} of {k}: {v}", "{k} now uses {v} as its {a}.",
    "The special {a} for {k} is: {v}.", "Here is the {a} for {k}: {v}.", "You will need the {a} {v} for {k}.",
    "Do not forget: {k}, {a} {v}.", "The register lists {k} with the {a} {v}.", "We set the {a} of {k} to {v}.",
    "The {a} mentioned for {k} is {v}.", "{k} registered under the {a} {v}.",
    "Keep in mind that {k} is known by the {a} {v}.",
)  # fmt: skip
QUESTIONS = (
    "What is the {a} for {k}?", "What is the {a} of {k}?", "What is {k}'s {a}?", "Which {a} does {k} have?",
    "What is the {a} for {k} mentioned in the provided text?", "Tell me the {a} of {k}.", "Give me the {a} for {k}.",
    "According to the text, what is the {a} of {k}?", "Find the {a} for {k}.", "What {a} was given to {k}?",
    "I need the {a} for {k}.", "Can you tell me the {a} of {k}?", "Look up the {a} of {k}.", "{k}: what is the {a}?",
    "What does the text say about the {a} of {k}?", "Please give the {a} for {k}.", "Which {a} belongs to {k}?",
    "What is the {a} for {k} in the file?", "What's the {a} for {k}?", "what is the {a} of {k}", "{a} of {k}?",
    "Do you know the {a} for {k}?", "Somewhere in the document is the {a} of {k}. What is it?",
    "Could you find {k}'s {a} in the text?", "Which {a} is mentioned for {k}?",
)  # fmt: skip
BARE_REQUESTS = (
    " Answer with the {a} only.", " Reply with just the {a}.", " Just the {a}, please.", " Answer briefly.",
    " Give only the {a}.",
)  # fmt: skip
# Facts without a key: the noun itself says which.
PLAIN_STATEMENTS = (
    "The {a} is {v}.", "The {a} is: {v}.", "Remember that the {a} is {v}.", "{a}: {v}", "The {a} you need is {v}.",
    "By the way, the {a} is {v}.", "Use {v} as the {a}.", "Today's {a} is {v}.", "Note: {a} = {v}",
    "The {a} was set to {v}.",
)  # fmt: skip
PLAIN_QUESTIONS = (
    "What is the {a}?", "What is the {a} mentioned in the text?", "Tell me the {a}.", "Which {a} does the text give?",
    "I forgot the {a}. What is it?", "What's the {a}?", "Find the {a}.", "what is the {a}", "Please give me the {a}.",
)  # fmt: skip
# What a noun of two words may end with, after any word; and what may stand before and after a statement or question.
NOUN_HEADS = (
    "number", "number", "code", "id", "key", "count", "value", "total", "level", "limit", "score", "index", "size",
    "rate", "amount", "combination", "address", "quota", "date code", "identifier", "sum", "distance",
    "number of visitors",
)  # fmt: skip
BEFORE = (
    "According to our records, ", "As agreed, ", "In the end, ", "Note that ", "Note: ", "It is known that ",
    "Important: ", "Reminder: ", "For the record, ", "Let it be known that ", "I was told that ", "We learnt that ",
    "Also, ", "Fact: ", "He said that ", "She wrote that ", "They say ", "TODO: ", "- ", "* ", "> ", "1. ", "(", '"',
)  # fmt: skip
AFTER = (
    ", as far as we know.", ", as you know.", " until further notice.", " since 2019.", " (see page 12).",
    ", not more.", " this year.", "!", ";", ", and that will not change.", " according to the list.",
    ", said the captain.", ")", '"', "",
)  # fmt: skip
BEFORE_QUESTION = (
    "Based on the file, ", "In the text above, ", "Quick question: ", "Hi! ", "Please answer: ", "Question: ",
    "Now tell me: ", "From the document: ", "I have a question. ", "Hello. ", "Thanks. And ", "Next: ",
    "Read carefully. ",
)  # fmt: skip
AFTER_QUESTION = (
    " Thanks.", " Please.", " I forgot it.", " Look in the text.", " It is in the file.", " It's important.",
)  # fmt: skip
HELD_OUT_NOUNS, HELD_OUT_STATEMENTS, HELD_OUT_QUESTIONS = 5, 3, 3


@dataclass(frozen=True)
class Fact:
    """A key's attribute and value, and how the document puts it."""

    attribute: Attribute
    key: str
    value: str
    statement: str

    def stated(self) -> Pieces:
        return fill(self.statement, self, TEXT, NOISE, NOISE)

    def called(self, noun: str) -> Fact:
        """The same fact under another noun, as a question may put it."""
        return replace(self, attribute=Attribute(noun, self.attribute.kind))

    def is_ruler(self) -> bool:
        return self.statement == RULER_STATEMENT


def fill(template: str, fact: Fact, text: int, key: int, value: int) -> Pieces:
    """The template's pieces: {a}, {k} and {v} stand for the noun, key and value; the first letter is made a capital."""
    pieces: list[Piece] = []
    for part in re.split(r"(\{[akv]\})", template):
        if part == "{k}":
            pieces.append((fact.key, key))
        elif part == "{v}":
            pieces.append((fact.value, value))
        elif part:
            pieces.append((fact.attribute.noun if part == "{a}" else part, text))
    if template.startswith("{a}"):
        pieces[0] = (pieces[0][0][:1].upper() + pieces[0][0][1:], pieces[0][1])
    return tuple(pieces)


def _pool(items: tuple[str, ...], held_out: int, evaluation: bool) -> tuple[str, ...]:
    return items[-held_out:] if evaluation else items[:-held_out]


def draw_facts(
    rng: Random,
    corpus: Corpus,
    count: int,
    evaluation: bool = False,
    ruler: float = 0.25,
    new_wordings: bool | None = None,
) -> list[Fact]:
    """Facts with distinct keys: all in RULER's wording (with probability ``ruler``), all of one noun, or mixed.

    evaluation: keys of the held-out side; new_wordings: nouns and statements of it too (default: as ``evaluation``).
    """
    new = evaluation if new_wordings is None else new_wordings
    if rng.random() < ruler:
        keys: list[str] = []
        while len(keys) < count:
            key = (
                word_pair_key(rng, corpus, evaluation)
                if rng.random() < 0.7
                else draw_keys(rng, corpus, 1, evaluation)[0]
            )
            if key not in keys:
                keys.append(key)
        special = Attribute("special magic number", "number7")
        return [Fact(special, key, draw_value(rng, "number7", corpus.words), RULER_STATEMENT) for key in keys]
    if not evaluation and count <= 2 and rng.random() < 0.3:
        return _keyless_facts(rng, corpus, count)
    shared = _draw_attribute(rng, corpus, new)
    statement = _draw_statement(rng, new)
    one_noun, one_statement = rng.random() < 0.6, rng.random() < 0.4
    facts = []
    for key in draw_keys(rng, corpus, count, evaluation):
        attribute = shared if one_noun else _draw_attribute(rng, corpus, new)
        put = statement if one_statement else _draw_statement(rng, new)
        facts.append(Fact(attribute, key, draw_value(rng, attribute.kind, corpus.words), put))
    return facts


def _keyless_facts(rng: Random, corpus: Corpus, count: int) -> list[Fact]:
    """Facts told apart by their nouns alone."""
    attributes: dict[str, Attribute] = {}
    while len(attributes) < count:
        attribute = _draw_attribute(rng, corpus, False)
        if not any(attribute.noun in other or other in attribute.noun for other in attributes):
            attributes[attribute.noun] = attribute
    return [
        Fact(a, "", draw_value(rng, a.kind, corpus.words), rng.choice(PLAIN_STATEMENTS)) for a in attributes.values()
    ]


def _draw_statement(rng: Random, evaluation: bool) -> str:
    statement = rng.choice(_pool(STATEMENTS, HELD_OUT_STATEMENTS, evaluation))
    if evaluation:
        return statement
    if rng.random() < 0.25:
        lowered = (
            statement[:1].lower() + statement[1:]
            if statement.startswith(("The ", "If ", "For ", "We ", "It "))
            else statement
        )
        statement = rng.choice(BEFORE) + lowered
    if statement.endswith("."):
        ending = rng.random()
        if ending < 0.12:
            statement = statement[:-1] + rng.choice(AFTER)
    return statement


def _draw_attribute(rng: Random, corpus: Corpus, evaluation: bool) -> Attribute:
    if evaluation:
        return Attribute(rng.choice(_pool(NUMBER_NOUNS, HELD_OUT_NOUNS, True)), "number7")
    kind = rng.random()
    if kind < 0.15:
        return Attribute(*rng.choice(WORD_NOUNS))
    noun = rng.choice(_pool(NUMBER_NOUNS, HELD_OUT_NOUNS, False))
    if kind < 0.45:
        noun = f"{rng.choice(corpus.words)} {rng.choice(NOUN_HEADS)}"
    return Attribute(noun, "number7" if rng.random() < 0.5 else "number")


@dataclass(frozen=True)
class Exchange:
    """A question about a fact and its answer, as pieces."""

    question: Pieces
    answer: Pieces


def ask(rng: Random, fact: Fact, evaluation: bool = False) -> Exchange:
    """A question in some wording; the answer is a sentence with the key, or the bare value where that was asked for."""
    if fact.is_ruler() and (evaluation or rng.random() < 0.6):
        return Exchange(
            fill(RULER_QUESTION, fact, PROMPT, PROMPT, PROMPT), fill(RULER_ANSWER, fact, ANSWER, ANSWER, VALUE)
        )
    template = _draw_question(rng, fact.key == "", evaluation)
    if not evaluation and fact.key and rng.random() < 0.12:
        fact = fact.called(_shorter(rng, fact.attribute))
    bare = not evaluation and rng.random() < 0.15
    question = fill(template + rng.choice(BARE_REQUESTS) * bare, fact, PROMPT, PROMPT, PROMPT)
    answer = "{v}" if bare else "The {a} for {k} is {v}." if fact.key else "The {a} is {v}."
    return Exchange(question, fill(answer, fact, ANSWER, ANSWER, VALUE))


def _draw_question(rng: Random, keyless: bool, evaluation: bool) -> str:
    template = rng.choice(PLAIN_QUESTIONS if keyless else _pool(QUESTIONS, HELD_OUT_QUESTIONS, evaluation))
    if evaluation:
        return template
    if rng.random() < 0.12:
        template = rng.choice(BEFORE_QUESTION) + template[:1].lower() + template[1:]
    return template + rng.choice(AFTER_QUESTION) if rng.random() < 0.08 else template


def _shorter(rng: Random, attribute: Attribute) -> str:
    """The noun without its first word, or a general one: keys are distinct, so the fact is still the only one."""
    words = attribute.noun.split(" ")
    if len(words) > 1 and rng.random() < 0.6:
        return " ".join(words[1:])
    return "number" if attribute.kind.startswith("number") else "value"


def ask_two(rng: Random, first: Fact, second: Fact) -> Exchange:
    """One question about two facts of the same noun; the answer is a sentence for each."""
    template = rng.choice(
        ("What are the {a}s for {k} and ", "Give me the {a} for {k} and for ", "What is the {a} of {k} and of ")
    )
    question = fill(template, first, PROMPT, PROMPT, PROMPT) + fill("{k}?", second, PROMPT, PROMPT, PROMPT)
    answers = [fill("The {a} for {k} is {v}.", fact, ANSWER, ANSWER, VALUE) for fact in (first, second)]
    return Exchange(question, (*answers[0], (" ", ANSWER), *answers[1]))


def ask_missing(rng: Random, facts: list[Fact], corpus: Corpus) -> Exchange:
    """A question about a key that the document does not mention."""
    known = rng.choice(facts)
    if not known.key:
        known = known.called("special magic number")
    taken = {fact.key for fact in facts}
    key = next(k for k in iter(lambda: draw_keys(rng, corpus, 1, False)[0], None) if k not in taken)
    absent = Fact(known.attribute, key, "", known.statement)
    question = fill(rng.choice(_pool(QUESTIONS, HELD_OUT_QUESTIONS, False)), absent, PROMPT, PROMPT, PROMPT)
    return Exchange(question, fill("The text does not mention the {a} for {k}.", absent, ANSWER, ANSWER, ANSWER))


def thought(fact: Fact) -> Pieces:
    """Short reasoning before the answer in thinking mode: what is asked and what the text says."""
    asked = fill("The user asks for the {a} of {k}. ", fact, ANSWER, ANSWER, VALUE)
    return asked + fill("The text says that the {a} for {k} is {v}.", fact, ANSWER, ANSWER, VALUE)
