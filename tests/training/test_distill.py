"""Merging: the divergence against one computed from full logits, what is cached, and a student that follows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_training import distill
from dsv4_training.distill import Teacher, reverse_kl
from dsv4_training.learner import Learner, mode_on
from dsv4_training.model import Network
from dsv4_training.post import Writing
from dsv4_training.prompts import Question
from dsv4_training.recipe import Optimiser
from training.common import lively_parameters, small_config

CPU = torch.device("cpu")


def direct(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """sum over the vocabulary of p (log p - log q), in float64."""
    p, q = p_logits.double().softmax(-1), q_logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def test_divergence_and_gradient_equal_those_of_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "PIECE", 4)  # ten tokens in three pieces
    torch.manual_seed(0)
    teacher_hidden, teacher_head = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    got = reverse_kl(hidden, head, teacher_hidden, teacher_head)
    weight = torch.rand(10)
    (got * weight).sum().backward()
    h, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    wanted = direct(h @ w.T, (teacher_hidden @ teacher_head.T).detach())
    (wanted * weight).sum().backward()
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(head.grad.double(), w.grad, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    assert teacher_hidden.grad is None
    assert teacher_head.grad is None
    forward = direct(teacher_hidden.detach() @ teacher_head.detach().T, (h @ w.T).detach())
    assert float((forward - wanted.detach()).abs().min()) > 1e-3  # the direction matters
    assert float(reverse_kl(hidden, head, hidden, head).detach().abs().max()) < 1e-6


def learner(steps: int, prompts: int, answers: int, passes: int, device: torch.device = CPU) -> Learner:
    config = small_config()
    optimiser = Optimiser(muon_lr=1e-3, adam_lr=2e-3, warmup_steps=1, decay_from=0.9)
    writing = Writing(steps, prompts, answers, 128, 6, 1.0, passes)
    here = lively_parameters(config)
    parameters = {n: p.detach().to(device).requires_grad_(p.requires_grad) for n, p in here.items()}
    return Learner(config, parameters, writing, optimiser, steps, 1, device)


def teacher(name: str, seed: int, weight: float = 1.0) -> Teacher:
    """The student with some of its matrices changed."""
    config = small_config()
    parameters, other = lively_parameters(config), lively_parameters(config, seed)
    with torch.no_grad():
        for part in ("head.weight", "layers.2.ffn.experts.w2", "layers.1.attn.wo_b.weight"):
            parameters[part].lerp_(other[part], 0.5)
    return Teacher.of(name, parameters, weight, mode_on(CPU))


def questions(count: int) -> list[Question]:
    draw = np.random.default_rng(0)
    return [Question(draw.integers(2, 512, 20 + 30 * i).astype(np.uint16), ("x",), 4) for i in range(count)]


def test_logits_are_made_anew_from_what_is_cached() -> None:
    """The divergence of a pass is that of both models' whole forward passes at the written tokens."""
    student, other = learner(1, 1, 2, 1), teacher("a", 7)
    answers = student.write(questions(1))
    network = Network(small_config())
    cached = other.hidden(network, answers, student.mode)
    assert cached.shape == (int(answers.mask.sum()), 128)
    with torch.no_grad():
        theirs = network.logits(other.weights, answers.ids, student.mode)
        weights = {n: w.detach() for n, w in student.weights().items()}
        ours = network.logits(weights, answers.ids, student.mode)
        hidden = network.forward(weights, answers.ids, student.mode).hidden.unflatten(0, answers.ids.shape)
    row = torch.arange(2)[:, None]
    wanted = direct(ours[row, answers.at], theirs[row, answers.at])[answers.mask].mean()
    at = hidden[row, answers.at]
    got = distill.divergence(at, weights["head.weight"], answers, other, cached)
    assert float(wanted) > 0.05
    assert float(got) == pytest.approx(float(wanted), rel=1e-4)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, dict[str, bool]]]:
    """Of every forward pass whether gradients are on, and which weights ask for one: what is compiled depends on it."""
    passes: list[tuple[bool, dict[str, bool]]] = []
    forward = Network.forward

    def noted(self: Network, w: dict[str, Tensor], *rest: object) -> object:
        passes.append((torch.is_grad_enabled(), {name: value.requires_grad for name, value in w.items()}))
        return forward(self, w, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Network, "forward", noted)
    return passes


def test_a_judge_is_computed_as_the_learner_is(monkeypatch: pytest.MonkeyPatch) -> None:
    student = learner(1, 1, 2, 1)
    before = {name: value.detach().clone() for name, value in student.parameters.items()}
    judge = Teacher.of("itself", student.parameters, 1.0, student.mode)
    answers = student.write(questions(1))
    passes = watched(monkeypatch)
    cached = judge.hidden(student.network, answers, student.mode)
    assert not cached.requires_grad
    student.learn(answers, lambda _n, part, w, h: (distill.divergence(h, w["head.weight"], part, judge, cached), h[0]))
    assert passes[0] == passes[1]
    assert all(w.grad is None for w in judge.weights.values())
    # The learner has moved; its judge has not moved with it.
    assert not torch.equal(student.parameters["norm.weight"], before["norm.weight"])
    assert torch.equal(judge.weights["norm.weight"], before["norm.weight"].bfloat16().float())


@pytest.mark.gpu
def test_a_model_does_not_diverge_from_itself() -> None:
    """Compiled, as it is on a GPU only."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    student = learner(1, 2, 2, 2, torch.device("cuda"))
    answers = student.write(questions(2))
    judge = Teacher.of("itself", student.parameters, 1.0, student.mode)
    cached = [judge.hidden(student.network, part, student.mode) for part in answers.parts(2)]

    def loss(number: int, part: distill.Answers, weights: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        value = distill.divergence(hidden, weights["head.weight"], part, judge, cached[number])
        return value, value.detach()

    assert float(student.learn(answers, loss)[0]) < 1e-6


def test_each_teacher_judges_its_own_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step: the loss is the weighted sum, each teacher over the answers to its part of the questions."""
    student, teachers = learner(1, 2, 1, 2), [teacher("a", 7, 3.0), teacher("b", 8, 1.0)]
    judged: list[tuple[str, list[int]]] = []
    hidden = Teacher.hidden

    def noted(self: Teacher, network: Network, answers: distill.Answers, mode: object) -> Tensor:
        judged.append((self.name, (answers.at[:, 0] + 1).tolist()))
        return hidden(self, network, answers, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(Teacher, "hidden", noted)
    records: list[dict[str, float]] = []
    distill.run(student, teachers, [questions(2)], records.append)
    assert judged == [("a", [20]), ("b", [50])]
    record = records[0]
    assert record["kl"] == pytest.approx(0.75 * record["kl_a"] + 0.25 * record["kl_b"], abs=2e-5)
    assert record["kl_a"] > 0.05
    assert record["kl_b"] > 0.05


def test_the_mean_of_models() -> None:
    models = [lively_parameters(small_config(), seed) for seed in (1, 2, 3)]
    got = distill.mean(models)
    assert got.keys() == models[0].keys()
    for name, value in got.items():
        first, second, third = (model[name].detach() for model in models)
        assert value.dtype == first.dtype
        wanted = (first + second + third) / 3 if first.is_floating_point() else first
        torch.testing.assert_close(value, wanted, atol=1e-7, rtol=1e-6)
    assert torch.equal(distill.mean(models[:1])["norm.weight"], models[0]["norm.weight"])


@pytest.mark.slow
def test_the_student_comes_nearer_to_both() -> None:
    student, teachers = learner(25, 4, 2, 2), [teacher("a", 7), teacher("b", 8)]
    records: list[dict[str, float]] = []
    distill.run(student, teachers, [questions(4)] * 25, records.append)
    for name in ("kl_a", "kl_b"):
        first, last = (np.mean([r[name] for r in part]) for part in (records[:3], records[-3:]))
        assert last < 0.8 * first
