"""GRPO against cases worked out by hand, rewards, and one step that makes rewarded answers likelier."""

import math

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor

from dsv4_training import grpo
from dsv4_training.guard import Diverged
from dsv4_training.learner import Answers, Learner, joined, padded
from dsv4_training.post import Rewards, Writing
from dsv4_training.prompts import END, Question, reward
from dsv4_training.recipe import Optimiser
from training.common import lively_parameters, small_config

ALL = torch.ones(1, 1, dtype=torch.bool)


def one(
    new: float, drawn: float, advantage: float, reference: float | None = None, kl: float = 0.0
) -> tuple[float, float]:
    """Loss and its derivative by the token's log probability, of one answer of one token, clip 0.2."""
    x = torch.tensor([[new]], requires_grad=True)
    back = torch.tensor([[new if reference is None else reference]])
    loss = grpo.policy_loss(x, torch.tensor([[drawn]]), back, torch.tensor([advantage]), ALL, 0.2, kl)
    loss.backward()
    assert x.grad is not None
    return float(loss.detach()), float(x.grad)


def test_the_gradient_is_the_policy_gradient_where_the_answer_was_drawn() -> None:
    assert one(-1.0, -1.0, 2.0) == pytest.approx((-2.0, -2.0))
    assert one(-1.0, -1.0, -0.5) == pytest.approx((0.5, 0.5))


def test_what_became_much_likelier_earns_nothing_more() -> None:
    likelier = -1.0 + math.log(1.5)
    assert one(likelier, -1.0, 1.0) == pytest.approx((-1.2, 0.0))
    assert one(likelier, -1.0, -1.0) == pytest.approx((1.5, 1.5))  # a bad answer is pushed back without bound
    rarer = -1.0 + math.log(0.5)
    assert one(rarer, -1.0, -1.0) == pytest.approx((0.8, 0.0))
    assert one(rarer, -1.0, 1.0) == pytest.approx((-0.5, -0.5))


def test_divergence_from_the_reference() -> None:
    """r (q - log q - 1), whose derivative by log p is r (q - log q - 1) + r (1 - q)."""
    q, r = math.exp(-0.7 - -1.2), math.exp(-1.2 - -1.0)
    estimate = q - math.log(q) - 1
    loss, slope = one(-1.2, -1.0, 0.0, reference=-0.7, kl=0.3)
    assert loss == pytest.approx(0.3 * r * estimate, rel=1e-5)
    assert slope == pytest.approx(0.3 * (r * estimate + r * (1 - q)), rel=1e-5)


def test_what_stands_behind_an_answers_end_changes_nothing_however_unlikely_it_became() -> None:
    """exp of a difference of 200 is infinite, and infinity times a mask of zero is not a number."""
    new = torch.tensor([[-1.0, -200.0]], requires_grad=True)
    mask, drawn = torch.tensor([[True, False]]), torch.tensor([[-1.0, 0.0]])
    loss = grpo.policy_loss(new, drawn, torch.tensor([[-1.5, 0.0]]), torch.tensor([2.0]), mask, 0.2, 0.01)
    loss.backward()
    short = grpo.policy_loss(
        new.detach()[:, :1], drawn[:, :1], torch.tensor([[-1.5]]), torch.tensor([2.0]), ALL, 0.2, 0.01
    )
    assert loss.item() == short.item()
    assert new.grad is not None and new.grad[0, 1] == 0 and torch.isfinite(new.grad).all()


def test_an_answer_counts_as_one_however_long_it_is() -> None:
    """Two answers of one and three tokens: by hand, d loss / d log p of a token is -A / (2 * tokens of its answer)."""
    new = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    grpo.policy_loss(new, torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask, 0.2, 0.1).backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-0.5, 0.0, 0.0], [1 / 6, 1 / 6, 1 / 6]]))


def test_gradient_by_the_logits() -> None:
    """-A (1[token] - p) / temperature for one drawn token."""
    logits = torch.tensor([[[0.3, -0.2, 1.0]]], requires_grad=True)
    new = grpo.token_logprobs(logits, torch.eye(3), torch.tensor([[2]]), 0.5)
    grpo.policy_loss(new, new.detach(), new.detach(), torch.tensor([1.5]), ALL, 0.2, 0.0).backward()
    p = (logits.detach() / 0.5).softmax(-1)
    torch.testing.assert_close(logits.grad, -1.5 * (torch.tensor([[[0.0, 0.0, 1.0]]]) - p) / 0.5)


def test_advantages_are_relative_to_the_group() -> None:
    got = grpo.advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(got[0], torch.tensor([1.0, -1.0, -1.0, 1.0]), atol=1e-3, rtol=0)
    assert got[1].eq(0).all()
    torch.testing.assert_close(got[2], torch.tensor([3.0, -1.0, -1.0, -1.0]) / math.sqrt(3), atol=1e-3, rtol=0)


def test_rewards_can_be_checked() -> None:
    question = Question(np.zeros(3, np.uint16), ("4711", "Oslo"), 10)
    assert reward(question, "It is 4711, in Oslo.", 8) == 1.0
    assert reward(question, "It is 4711, in Rome.", 8) == 0.5
    assert reward(question, "4711 Oslo and much else", 40) == 0.25
    assert reward(question, "4711 Oslo?</think>I do not know.", 8) == 0.0


def small_learner(writing: Writing, muon_lr: float = 2e-3, adam_lr: float = 2e-3) -> Learner:
    config = small_config()
    optimiser = Optimiser(muon_lr=muon_lr, adam_lr=adam_lr, warmup_steps=1, decay_from=0.9)
    return Learner(config, lively_parameters(config), writing, optimiser, writing.steps, 1, torch.device("cpu"))


def questions(count: int) -> list[Question]:
    draw = np.random.default_rng(0)
    return [Question(draw.integers(2, 512, 20 + 30 * i).astype(np.uint16), ("x",), 4) for i in range(count)]


def test_a_step_makes_rewarded_answers_likelier() -> None:
    learner = small_learner(Writing(4, 1, 4, 128, 6, 1.0, 2))
    answers = learner.write(questions(1))
    first = answers.written.ids[:, 0]
    good = (first > first.median()).float()
    advantage = grpo.advantages(good.view(1, 4)).flatten().split(2)
    assert 0 < float(good.sum()) < 4

    def loss(number: int, part: Answers, weights: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        new = grpo.token_logprobs(hidden, weights["head.weight"], part.written.ids, 1.0)
        drawn = part.written.logprobs
        seen.append((new.detach() * part.mask).sum(1))
        return grpo.policy_loss(new, drawn, drawn, advantage[number], part.mask, 0.2, 0.0) / 2, torch.zeros(())

    seen: list[Tensor] = []
    for _ in range(2):  # the second shows what the first did
        learner.learn(answers, loss)
    before, after = torch.cat(seen[:2]), torch.cat(seen[2:])
    wanted = torch.cat(advantage)
    assert float(((after - before) * wanted).sum()) > 0.5
    # The forward pass gives the tokens about the probability with which they were drawn.
    assert float((before - (answers.written.logprobs * answers.mask).sum(1)).abs().median()) < 0.5


def test_a_gradient_that_is_no_number_ends_the_run_and_is_not_taken() -> None:
    learner = small_learner(Writing(4, 1, 4, 128, 6, 1.0, 2))
    answers = learner.write(questions(1))
    before = {name: value.detach().clone() for name, value in learner.parameters.items()}
    with pytest.raises(Diverged, match="step 1"):
        learner.learn(answers, lambda number, part, weights, hidden: (hidden.sum() * math.nan, torch.zeros(())))
    assert all(torch.equal(value, before[name]) for name, value in learner.parameters.items())


def test_the_rate_falls_to_its_last_share_and_no_further() -> None:
    learner = small_learner(Writing(10, 2, 4, 128, 6, 1.0, 2))
    scales = [learner.rate_scale(step) for step in (0, 5, 9, 10, 20)]
    assert scales == pytest.approx([1.0, 1.0, 1.0, 0.02, 0.02])


def test_answers_stand_behind_their_prompts() -> None:
    asked = questions(2)
    learner = small_learner(Writing(4, 2, 4, 128, 6, 1.0, 2))
    answers = learner.write(asked)
    assert answers.ids.shape == (8, 256)
    for row in range(8):
        prompt, n = asked[row // 4].ids.astype(np.int64).tolist(), int(answers.written.lengths[row])
        got = answers.ids[row].tolist()
        assert got[: len(prompt)] == prompt
        assert got[len(prompt) : len(prompt) + n] == answers.written.ids[row, :n].tolist()
        assert set(got[len(prompt) + 6 :]) == {END}
        assert answers.at[row, 0] == len(prompt) - 1
        assert int(answers.mask[row].sum()) == n
    ids, lengths = padded(asked, 128, torch.device("cpu"))
    again = joined(ids, lengths, answers.written, 4, 256)
    assert torch.equal(again.ids, answers.ids)


@pytest.mark.slow
def test_rewards_rise() -> None:
    """A model that is paid for words that begin with a two learns to say them."""
    writing = Writing(8, 1, 16, 128, 2, 1.0, 1)
    learner = small_learner(writing, muon_lr=5e-4, adam_lr=2e-2)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, "w0"))
    asked = [Question(q.ids, ("w2",), 2) for q in questions(1)]
    paid: list[float] = []
    settings = Rewards(writing, Optimiser(), clip=0.2, kl=0.0)
    grpo.run(learner, settings, [asked] * 8, words, lambda record: paid.append(record["reward"]))
    assert np.mean(paid[-3:]) > np.mean(paid[:3]) + 0.25
