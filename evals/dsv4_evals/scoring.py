"""Scoring rules: pure functions from an answer (and what was expected) to a score from 0 to 1.

The rules of published benchmarks are theirs to the letter, edge cases included; where a published snippet contradicts
itself, the docstring says what is done instead.  Knows no task and no model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import SequenceMatcher

_CONTROL = re.compile(r"[\x00-\x1f]")
_FINAL_ANSWER = re.compile(r"Final Answer:\s*\[(.*)\]")
# What InfiniteBench takes for the end of a word in an answer about key and value.
_KEY_VALUE_MARKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
_ANSWER_LINE = re.compile(r"answer\s*:", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER (NIAH, VT, CWE, FWE): the share of ``references`` that the prediction contains, letter case aside.

    Control characters of the prediction become line breaks first (RULER, scripts/eval/evaluate.py), and a reference
    counts wherever it stands, within a longer word too.  Raises ValueError without references.
    """
    if not references:
        raise ValueError("a match needs references")
    cleaned = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return sum(reference.lower() in cleaned for reference in references) / len(references)


def final_nodes(answer: str) -> list[str] | None:
    """GraphWalks: the nodes of "Final Answer: [a, b]" on the last line; None when that line has no such list.

    Line breaks behind the last line are ignored, and quotation marks around a node are taken off.  The snippet in the
    data set's card instead leaves "Final Answer: [" on the first node, which would make it wrong in every answer;
    this is the reading of lm-eval and other harnesses.
    """
    found = _FINAL_ANSWER.search(answer.rstrip("\n").split("\n")[-1])
    if not found:
        return None
    return [node.strip().strip("'\"") for node in found.group(1).split(",") if node.strip()]


def set_f1(predicted: Collection[str], truth: Collection[str]) -> float:
    """F1 of two sets.  1 when both are empty, 0 when one is, or when they share nothing.

    The snippet in GraphWalks' card says 1 for every answer that shares nothing with the truth; that can only be meant
    for two empty sets.
    """
    ours, true = set(predicted), set(truth)
    if not ours and not true:
        return 1.0
    return 2 * len(ours & true) / (len(ours) + len(true))


def graphwalks(answer: str, truth: Collection[str]) -> float:
    """GraphWalks: F1 of the nodes on the last line; 0 without a list there, even where nothing is the right answer."""
    nodes = final_nodes(answer)
    return 0.0 if nodes is None else set_f1(nodes, truth)


def first_number_is(answer: str, expected: str) -> float:
    """InfiniteBench (passkey): the first run of the digits 0-9 in the answer is the expected one."""
    digits = re.search(r"[0-9]+", answer)
    return float(digits is not None and digits.group() == expected)


def has_word(answer: str, expected: str) -> float:
    """InfiniteBench (key-value retrieval): the expected value is a word of the answer, punctuation aside."""
    return float(expected in _CONTROL.sub(" ", answer).translate(_KEY_VALUE_MARKS).split())


def mrcr(response: str, answer: str, prefix: str) -> float:
    """OpenAI MRCR: 0 unless the response begins with ``prefix``; else how alike response and answer are without it.

    Likeness is difflib's ratio with its defaults, as in the data set's card; nothing is stripped or normalised.
    """
    if not response.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix)).ratio()


def named_f1(answer: str, truth: Collection[str], pattern: str) -> float:
    """F1 of the names that match ``pattern`` anywhere in the answer's conclusion (see `conclusion`)."""
    return set_f1(re.findall(pattern, conclusion(answer)), truth)


def number_is(answer: str, expected: int) -> float:
    """The first number of the answer's conclusion equals ``expected``; "1,204" and "1204.0" are the same number."""
    found = _NUMBER.search(conclusion(answer))
    return float(found is not None and float(found.group().replace(",", "")) == expected)


def name_is(answer: str, expected: str, known: Collection[str]) -> float:
    """Of the ``known`` names, the answer's conclusion has the expected one and no other, letter case aside."""
    said = conclusion(answer).lower()
    named = {name for name in known if re.search(rf"\b{re.escape(name.lower())}\b", said)}
    return float(named == {expected})


def conclusion(answer: str) -> str:
    """What follows the last "Answer:" where there is one, else the whole answer."""
    marks = list(_ANSWER_LINE.finditer(answer))
    return answer[marks[-1].end() :] if marks else answer
