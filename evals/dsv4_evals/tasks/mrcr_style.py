"""`mrcr-style`: a long conversation in which the same thing is asked for several times; give back the i-th reply.

In the manner of OpenAI's MRCR, with its wording of the last question and its score, but not that benchmark: the
replies are passages of the run's haystack instead of a model's writing, so that scores are not comparable with
published ones (`mrcr` runs the official files).
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping, Sequence

from ..errors import TaskError
from ..model import Prompt, Turn
from ..scoring import mrcr
from ..task import Building, Cell, Json, Question, Sample, Text
from . import words
from .layout import finish, fits, seam
from .options import Options, grid, shared

_FORMS = (
    "blog post", "diary entry", "essay", "fable", "letter", "limerick", "news article", "poem", "riddle",
    "scene in a play", "short story", "social media post", "song", "speech",
)  # fmt: skip
_TOPICS = (
    "anchors", "bakeries", "beavers", "bridges", "candles", "canoes", "castles", "clocks", "comets", "deserts",
    "dolphins", "drums", "falcons", "ferries", "forests", "foxes", "gardens", "glaciers", "hedgehogs", "honey",
    "islands", "kites", "lanterns", "libraries", "lighthouses", "markets", "mirrors", "moths", "mountains", "museums",
    "mushrooms", "oceans", "orchards", "owls", "pianos", "puppets", "rain", "rivers", "rocks", "sailors", "salmon",
    "shadows", "snails", "spices", "storms", "swans", "tapirs", "teachers", "tides", "trains", "tunnels", "turtles",
    "umbrellas", "violins", "volcanoes", "walnuts", "whales", "windmills", "winter", "wolves",
)  # fmt: skip
_QUESTION = (
    "Prepend {prefix} to the {place} (1 indexed) {form} about {topic}. Do not include any other text in your response."
)
_PREFIX_LETTERS = 10
# Tokens of a reply, drawn evenly, and how many more or less it may take for the end of a sentence.
_SHORTEST, _LONGEST, _REACH = 64, 160, 24


class MrcrStyle:
    """Cells are lengths x samples; the conversation is read once and each of its equal requests asked about."""

    name = "mrcr-style"
    max_tokens = 256

    def cells(self, lengths: Sequence[int], samples: int, seed: int, options: Mapping[str, Json]) -> list[Cell]:
        """Option: needles (how often the same is asked for: 8)."""
        with Options(self.name, options) as given:
            params = {"needles": given.integer("needles", 8, 2, 64)}
        return grid(self.name, lengths, samples, seed, [params])

    def build(self, cell: Cell, building: Building) -> Sample:
        text, rng, number = building.text, cell.rng("conversation"), cell.params["needles"]
        wanted = rng.choice(_FORMS), rng.choice(_TOPICS)
        prefixes = words.unique(
            lambda: words.letters(rng, _PREFIX_LETTERS, string.ascii_letters + string.digits), number
        )
        asked = [
            text.encode(_QUESTION.format(prefix=prefix, place=_ordinal(i), form=wanted[0], topic=wanted[1]))
            for i, prefix in enumerate(prefixes, 1)
        ]
        room = building.room(cell) - max(map(len, asked)) - self.max_tokens
        pair = _overhead(building, 2) - _overhead(building, 1)
        room -= _overhead(building, 1) - pair

        filler = building.filler.take(max(0, building.room(cell)), shared(cell).rng("haystack"))
        source = _Passages(text, filler, rng)
        requests: list[list[int]] = []
        replies: list[list[int]] = []
        for reply in source.passages():
            request = text.encode(_request(*(wanted if len(requests) < number else _other(rng, wanted))))
            if len(request) + len(reply) + pair > room:
                break
            room -= len(request) + len(reply) + pair
            requests.append(request)
            replies.append(reply)
        fits(cell, len(requests), "the conversation (counted in requests)", 2 * number)
        rng.shuffle(replies)
        replies[-1].extend(source.exactly(room))
        spelt = [text.decode(reply) for reply in replies[:number]]
        if len(set(spelt)) < number:
            raise TaskError(f"the haystack is too short for {cell.id}: a passage came twice", "Give more text.")

        # The equal requests come first in the lists, the others after them: they are dealt out to random places.
        order = sorted(rng.sample(range(len(requests)), number))
        equal, others = iter(range(number)), iter(range(number, len(requests)))
        turns: list[Turn] = []
        for place in range(len(requests)):
            i = next(equal if place in order else others)
            turns += [Turn("user", requests[i]), Turn("assistant", replies[i])]
        questions = [
            Question(
                asked[i],
                {"answer": prefixes[i] + spelt[i], "prefix": prefixes[i]},
                facts={"instance": i + 1, "turn": 2 * place + 1, "depth": round(100 * place / (len(requests) - 1), 2)},
            )
            for i, place in enumerate(order)
        ]
        return finish(cell, building, (), questions, self.max_tokens, turns)

    def score(self, question: Question, answer: str) -> float:
        """MRCR's: 0 without the prefix, else the likeness of the rest."""
        return mrcr(answer, question.expected["answer"], question.expected["prefix"])


class _Passages:
    """Passages of running text, one after the other."""

    def __init__(self, text: Text, filler: list[int], rng: random.Random) -> None:
        self._text, self._filler, self._rng, self._used = text, filler, rng, 0

    def exactly(self, tokens: int) -> list[int]:
        """The next tokens."""
        self._used += tokens
        return self._filler[self._used - tokens : self._used]

    def passages(self) -> Iterator[list[int]]:
        """Passages from sentence to sentence where those are near, without space around them."""
        while self._used < len(self._filler):
            end = seam(self._text, self._filler, self._used + self._rng.randint(_SHORTEST, _LONGEST), _REACH)
            piece = self._text.decode(self.exactly(end - self._used))
            # A cut through a character leaves a mark at the edge.
            if plain := piece.strip("\ufffd").strip():
                yield self._text.encode(plain)


def _overhead(building: Building, pairs: int) -> int:
    """Tokens that so many pairs of request and reply add around themselves."""
    turns = (Turn("user", ()), Turn("assistant", ())) * pairs
    return building.overhead(Prompt((), turns)) - building.overhead(Prompt(()))


def _request(form: str, topic: str) -> str:
    return f"write {'an' if form[0] in 'aeiou' else 'a'} {form} about {topic}"


def _other(rng: random.Random, wanted: tuple[str, str]) -> tuple[str, str]:
    """Another form or topic, or both: half of the requests share one of the two with what is asked for."""
    while True:
        kind = rng.randrange(4)
        drawn = (
            wanted[0] if kind == 0 else rng.choice(_FORMS),
            wanted[1] if kind == 1 else rng.choice(_TOPICS),
        )
        if drawn != wanted:
            return drawn


def _ordinal(number: int) -> str:
    """ "1st", "2nd", "3rd", "11th"."""
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
