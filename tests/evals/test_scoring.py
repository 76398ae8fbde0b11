"""The scoring rules on crafted answers, with expectations derived by hand, and against lm-eval's where it is installed.

lm-eval is an extra of the project (`pip install 'dsv4[eval]'`); the comparisons skip without it.
"""

from __future__ import annotations

import random
from types import ModuleType

import pytest

from dsv4_evals import scoring

NO_LM_EVAL = "needs lm-eval (pip install 'dsv4[eval]')"


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("1234567", ["1234567"], 1.0),
        ("It is 1234567.", ["1234567"], 1.0),
        ("1234567 and 2345678", ["1234567", "2345678", "3456789", "4567890"], 0.5),
        ("PEAR, Apple", ["pear", "aPPLE"], 1.0),
        ("a party", ["art"], 1.0),  # within a word counts
        ("", ["x"], 0.0),
        ("anything", [""], 1.0),  # every answer contains nothing
        ("12 34567", ["1234567"], 0.0),
        ("a\tb", ["a\nb"], 1.0),  # a control character of the answer becomes a line break ...
        ("a\nb", ["a\tb"], 0.0),  # ... one of the reference does not
        ("\x00one two\x1f", ["one two"], 1.0),
        ("same same", ["same", "same"], 1.0),
    ],
)
def test_ruler_counts_the_references_in_the_answer(prediction: str, references: list[str], score: float) -> None:
    assert scoring.match_all(prediction, references) == score


def test_a_match_without_references_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="references"):
        scoring.match_all("x", [])


def _predictions(seed: int) -> list[tuple[str, list[str]]]:
    """Answers that hold some of their references, in mixed case, with separators of all kinds."""
    rng = random.Random(seed)
    made = []
    for _ in range(300):
        references = ["".join(rng.choices("abC19-", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 10))]
        kept = [r for r in references if rng.random() < 0.6]
        answer = rng.choice(["", "The words are: ", "\t", "\x0b1. "])
        answer += rng.choice([", ", "\n", "\x01", " "]).join(rng.choice([r, r.upper(), r.lower()]) for r in kept)
        made.append((answer, references))
    return made


def test_ruler_scores_equal_lm_evals_on_the_same_predictions() -> None:
    theirs = pytest.importorskip("lm_eval.tasks.ruler.common_utils", reason=NO_LM_EVAL)
    cases = _predictions(0)
    for prediction, references in cases:
        result = theirs.process_results({"max_length": 4096, "outputs": references}, [prediction])
        assert scoring.match_all(prediction, references) == pytest.approx(result["4096"], abs=1e-12)
    mean = sum(scoring.match_all(*case) for case in cases) / len(cases)
    cleaned = theirs.postprocess_pred([prediction for prediction, _ in cases])
    assert mean == pytest.approx(theirs.string_match_all(cleaned, [references for _, references in cases]))


@pytest.mark.parametrize(
    ("answer", "nodes"),
    [
        ("Final Answer: [a, b]", ["a", "b"]),
        ("So it is.\nFinal Answer: [a]", ["a"]),
        ("Final Answer: [a]\n\n", ["a"]),
        ("Final Answer: [a]\nThat is all.", None),
        ("Final Answer: a, b", None),
        ("final answer: [a]", None),
        ("Final Answer: []", []),
        ("Final Answer: [ ]", []),
        ("Final Answer:[a,b]", ["a", "b"]),
        ("Final Answer: ['a', \"b\"]", ["a", "b"]),
        ("Final Answer: [a, , b,]", ["a", "b"]),
        ("Final Answer: [a, b", None),
        ("Final Answer: [a] or [b]", ["a] or [b"]),  # the list ends with the line's last bracket
        ("I say Final Answer: [a].", ["a"]),
        ("Final Answer: [a]\r", ["a"]),
        ("Final Answer: [a] \n ", None),
        ("", None),
    ],
)
def test_graphwalks_reads_the_list_on_the_last_line(answer: str, nodes: list[str] | None) -> None:
    assert scoring.final_nodes(answer) == nodes


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Final Answer: [a, b]", ["b", "a"], 1.0),
        ("Final Answer: [a, a, b]", ["a", "b"], 1.0),
        ("Final Answer: [a]", ["a", "b"], 2 / 3),
        ("Final Answer: [a, b, c, d]", ["a", "b"], 2 / 3),
        ("Final Answer: [c]", ["a"], 0.0),
        ("Final Answer: []", ["a"], 0.0),
        ("Final Answer: []", [], 1.0),
        ("Final Answer: [a]", [], 0.0),
        ("There are none.", [], 0.0),
    ],
)
def test_graphwalks_is_the_f1_of_sets(answer: str, truth: list[str], score: float) -> None:
    assert scoring.graphwalks(answer, truth) == pytest.approx(score)


def test_graphwalks_scores_equal_lm_evals() -> None:
    theirs = pytest.importorskip("lm_eval.tasks.graphwalks.utils", reason=NO_LM_EVAL)
    rng = random.Random(1)
    nodes = ["0a1b", "2c3d", "4e5f", "6071", "8293"]
    for _ in range(400):
        truth = rng.sample(nodes, rng.randint(1, 5))
        named = ", ".join(rng.choice(["{}", "'{}'", " {}"]).format(node) for node in rng.choices(nodes, k=3))
        shapes = ["Final Answer: [{}]", "Final Answer:[{}]\n", "Final Answer: [{}]\nDone.", "[{}]", "Hm.\n{}"]
        shape = rng.choice(shapes)
        answer = shape.format(rng.choice([named, ""]))
        result = theirs.process_results({"answer_nodes": truth}, [answer])
        assert scoring.graphwalks(answer, truth) == pytest.approx(result["f1"], abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("71432", 1.0),
        ("The key is 71432.", 1.0),
        ("71432 or 99999", 1.0),
        ("-71432", 1.0),
        ("Key 1: 71432", 0.0),
        ("714325", 0.0),
        ("71,432", 0.0),
        ("７１４３２", 0.0),
        ("", 0.0),
    ],
)
def test_passkey_is_the_first_number(answer: str, score: float) -> None:
    assert scoring.first_number_is(answer, "71432") == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("ab-12", 1.0),
        ('"ab-12"', 1.0),
        ("{'key': 'ab-12'}", 1.0),
        ("It is ab-12.", 1.0),
        ("Value:ab-12!", 1.0),
        ("ab-12x", 0.0),
        ("ab-1", 0.0),
        ("AB-12", 0.0),
        ("(ab-12)", 0.0),  # round brackets are no separators in the rule
        ("", 0.0),
    ],
)
def test_a_value_is_a_word_of_the_answer(answer: str, score: float) -> None:
    assert scoring.has_word(answer, "ab-12") == score


def test_passkey_and_values_score_as_in_lm_evals_infinitebench() -> None:
    theirs: ModuleType = pytest.importorskip("lm_eval.tasks.infinitebench.utils", reason=NO_LM_EVAL)
    rng = random.Random(2)
    for _ in range(400):
        expected = rng.choice(["71432", "ab-12", "0f"])
        parts = [expected, "71", "x", '"', ".", "\n", " ", "{", ":", "\t", "\x02"]
        answer = "".join(rng.choices(parts, k=rng.randint(0, 6)))
        document = {"answer": [expected]}
        assert scoring.has_word(answer, expected) == theirs.process_results_kv(document, [answer])["score"]
        number = theirs.process_results_int_match(document, [answer])["score"]
        assert scoring.first_number_is(answer, expected) == number


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("PFXabcd", 1.0),
        ("PFXbcde", 0.75),  # three of four letters each: 2 * 3 / 8
        ("PFX", 0.0),
        ("abcd", 0.0),
        (" PFXabcd", 0.0),
        ("pfxabcd", 0.0),
        ("PFX abcd", 8 / 9),  # one letter more: 2 * 4 / 9
        ("PFXPFXabcd", 8 / 11),  # only one prefix is taken off: 2 * 4 / (7 + 4)
        ("", 0.0),
    ],
)
def test_mrcr_is_zero_without_the_prefix_and_else_a_likeness(response: str, score: float) -> None:
    assert scoring.mrcr(response, "PFXabcd", "PFX") == pytest.approx(score)


def test_mrcr_edge_cases() -> None:
    assert scoring.mrcr("PFX", "PFX", "PFX") == 1.0  # two empty texts are alike
    assert scoring.mrcr("PFXab", "ab", "PFX") == 1.0  # an answer without the prefix is taken as it is
    assert scoring.mrcr("ab", "ab", "") == 1.0
    # From 200 characters on, difflib leaves out characters that are more than a hundredth of the text: "a" here.
    assert scoring.mrcr("P" + "a" * 300, "Pb" + "a" * 300, "P") == 0.0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Answer: 1204", 1.0),
        ("I count 3, then 5.\nAnswer: 1,204 crates", 1.0),
        ("Answer: 3. No, wait. ANSWER: 1204.0", 1.0),
        ("1204", 1.0),
        ("First 3, then 1204", 0.0),
        ("Answer: -1204", 0.0),
        ("Answer: 12040", 0.0),
        ("Answer: 1204.5", 0.0),
        ("Answer: none", 0.0),
        ("", 0.0),
    ],
)
def test_a_number_is_the_first_of_the_conclusion(answer: str, score: float) -> None:
    assert scoring.number_is(answer, 1204) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Answer: Dunvale", 1.0),
        ("Larkholm has few, Dunvale many.\nAnswer: DUNVALE.", 1.0),
        ("Answer: Dunvale or Larkholm", 0.0),
        ("Answer: Larkholm", 0.0),
        ("Answer: Dunvaleshire", 0.0),
        ("", 0.0),
    ],
)
def test_a_name_is_the_only_known_one_of_the_conclusion(answer: str, score: float) -> None:
    assert scoring.name_is(answer, "Dunvale", ["Dunvale", "Larkholm"]) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Answer: ABCDE, FGHIJ", 1.0),
        ("Answer: VAR FGHIJ and VAR ABCDE and ABCDE", 1.0),
        ("ABCDE is the start. KLMNO is not.\nAnswer: ABCDE", 2 / 3),
        ("Answer: ABCDE, FGHIJ, KLMNO, PQRST", 2 / 3),
        ("Answer: abcde", 0.0),
        ("Answer: none", 0.0),
    ],
)
def test_names_of_the_conclusion_are_a_set(answer: str, score: float) -> None:
    assert scoring.named_f1(answer, ["ABCDE", "FGHIJ"], r"\b[A-Z]{5}\b") == pytest.approx(score)
