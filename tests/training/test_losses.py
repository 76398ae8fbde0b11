"""What ties things to their parts: whose names are wanted where, and how far a hidden state is from them."""

import math

import pytest
import torch

from dsv4_training import losses
from dsv4_training.facts import ANSWER, ASKED, MEMBER, PART, TEXT, VALUE


def wanted(ids: list[int], classes: list[int], document: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """The names' tokens at each position: for things, and for answers."""
    rows = [torch.tensor([x]) for x in (ids, classes, document)]
    names, member, asked = losses.parts_of(*rows)
    of_things, of_answers = (
        [row[there].tolist() for row, there in zip(names[0], shown[0], strict=True)] for shown in (member, asked)
    )
    return of_things, of_answers


def test_a_thing_wants_the_last_name_before_it_and_an_answer_the_one_behind_it() -> None:
    classes = [PART, PART, TEXT, MEMBER, PART, TEXT, MEMBER, MEMBER, ANSWER, ASKED, ASKED, VALUE, VALUE, ANSWER]
    ids = list(range(10, 24))
    member, asked = wanted(ids, classes, [0] * 14)
    assert member == [[], [], [], [10, 11], [], [], [14], [14], [], [], [], [], [], []]
    assert asked == [[], [], [], [], [], [], [], [], [], [21, 22], [21, 22], [], [], []]


def test_names_of_other_documents_do_not_count() -> None:
    member, asked = wanted([5, 6, 7, 8, 9], [PART, ASKED, MEMBER, VALUE, MEMBER], [0, 0, 1, 1, 1])
    assert member == [[]] * 5
    assert asked == [[]] * 5


def test_long_names_want_their_first_tokens_and_names_at_the_end_what_there_is() -> None:
    many = losses.NAMED + 3
    member, _ = wanted(list(range(many + 1)), [PART] * many + [MEMBER], [0] * (many + 1))
    assert member[-1] == list(range(losses.NAMED))
    _, asked = wanted([1, 2, 3], [ASKED, VALUE, VALUE], [0, 0, 0])
    assert asked[0] == [2, 3]


def test_the_divergence_is_zero_where_a_names_tokens_are_expected_alike_and_nothing_else_is() -> None:
    """By hand: of four tokens two are wanted; logits 9 9 0 0 leave 2 exp(-9) / 2 for the others."""
    head = torch.eye(4)
    hidden = torch.tensor([[50.0, 50.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    names = torch.tensor([[0, 1]] * 4)
    shown = torch.tensor([[True, True], [True, True], [False, False], [True, False]])
    got = losses.binding_losses(hidden, head, names, shown).tolist()
    assert got == pytest.approx([0.0, math.log1p(math.exp(-9.0)), 0.0, math.log(4)], abs=1e-5)
