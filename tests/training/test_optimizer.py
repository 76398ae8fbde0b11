"""Muon and AdamW against their formulas written out, one matrix at a time, in float64."""

import pytest
import torch
from torch import Tensor

from dsv4_training.optimizer import FAST, STABILISING, Optimizer, is_matrix, newton_schulz, orthogonalise
from dsv4_training.recipe import Optimiser as Settings


def muon_by_hand(w: Tensor, momentum: Tensor, g: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """Report, section 2.4, algorithm 1, with mu 0.95 and weight decay 0.1."""
    momentum = 0.95 * momentum + g
    m = 0.95 * momentum + g
    rows, columns = m.shape
    m = m / m.norm()
    if rows > columns:
        m = m.t()
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        mm = m @ m.t()
        m = a * m + b * mm @ m + c * mm @ mm @ m
    if rows > columns:
        m = m.t()
    return w * (1 - lr * 0.1) - lr * 0.18 * max(rows, columns) ** 0.5 * m, momentum


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_step_equals_the_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    p = start.clone().requires_grad_()
    optimizer = Optimizer({"a.weight": p}, 1, Settings(muon_lr=0.01))
    w, momentum = start.double(), torch.zeros(shape).double()
    for scale in (1.0, 0.5, 0.5):
        g = torch.randn(shape)
        p.grad = g.clone()
        optimizer.scale.fill_(scale)
        optimizer.step()
        w, momentum = muon_by_hand(w, momentum, g.double(), 0.01 * scale)
    torch.testing.assert_close(p.detach().double(), w, atol=1e-5, rtol=1e-4)


def test_stacked_matrices_are_stepped_as_if_alone() -> None:
    torch.manual_seed(1)
    stack = torch.randn(3, 8, 16)
    grads = torch.randn(3, 8, 16)
    together = stack.clone().requires_grad_()
    alone = [m.clone().requires_grad_() for m in stack]
    joint = Optimizer({"experts": together}, 1, Settings())
    single = Optimizer({str(i): m for i, m in enumerate(alone)}, 1, Settings())
    together.grad = grads.clone()
    for m, g in zip(alone, grads, strict=True):
        m.grad = g.clone()
    joint.step()
    single.step()
    torch.testing.assert_close(together, torch.stack(alone))


def test_wo_a_is_orthogonalised_group_by_group() -> None:
    torch.manual_seed(2)
    p, g = torch.zeros(8, 12, requires_grad=True), torch.randn(8, 12)
    p.grad = g.clone()
    Optimizer({"attn.wo_a.weight": p}, 2, Settings(muon_lr=1.0, weight_decay=0.0)).step()
    step = orthogonalise(1.95 * g.view(2, 4, 12)).view(8, 12) * 0.18 * 12**0.5
    torch.testing.assert_close(p.detach(), -step, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 128, 256), (512, 128), (24, 1024)])
@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_singular_values_of_the_update_are_one(shape: tuple[int, ...], fast: torch.dtype) -> None:
    """Within 0.02, also with the fast steps in bfloat16 as on a GPU; without the stabilising steps they are not."""
    torch.manual_seed(3)
    g = torch.randn(shape)
    if fast == torch.float32:
        done = orthogonalise(g)
    else:
        wide = g if shape[-2] < shape[-1] else g.mT
        m = (wide / wide.norm(dim=(-2, -1), keepdim=True)).to(fast)
        done = newton_schulz(newton_schulz(m, FAST).float(), STABILISING)
    assert float((torch.linalg.svdvals(done) - 1).abs().max()) <= 0.02
    hasty = newton_schulz(g / g.norm(dim=(-2, -1), keepdim=True), FAST)
    assert float((torch.linalg.svdvals(hasty) - 1).abs().max()) > 0.1


def test_adamw_alone_steps_matrices_too() -> None:
    p = {"a.weight": torch.randn(4, 6, requires_grad=True), "norm.weight": torch.randn(4, requires_grad=True)}
    optimizer = Optimizer(p, 1, Settings(kind="adamw"))
    assert {"second.a.weight", "second.norm.weight"} <= set(optimizer.state())
    before = p["a.weight"].detach().clone()
    for value in p.values():
        value.grad = torch.ones_like(value)
    optimizer.step()
    # The first step of Adam is the rate, whatever the gradient; decay goes on matrices only.
    torch.testing.assert_close(p["a.weight"].detach(), before * (1 - 5e-3 * 0.1) - 5e-3, atol=1e-6, rtol=1e-5)


def test_state_names_everything_a_step_changes() -> None:
    p = {"norm.weight": torch.randn(4, requires_grad=True), "a.weight": torch.randn(4, 4, requires_grad=True)}
    optimizer = Optimizer(p, 1, Settings())
    assert set(optimizer.state()) == {"steps", "first.norm.weight", "second.norm.weight", "first.a.weight"}
    for value in p.values():
        value.grad = torch.ones_like(value)
    optimizer.step()
    assert all(bool(value.any()) for value in optimizer.state().values())


def test_adam_step_equals_the_formula() -> None:
    torch.manual_seed(4)
    start = torch.randn(7)
    p = start.clone().requires_grad_()
    optimizer = Optimizer({"norm.weight": p}, 1, Settings(adam_lr=0.01))
    w, m, v = start.double(), torch.zeros(7).double(), torch.zeros(7).double()
    for step in range(1, 5):
        g = torch.randn(7)
        p.grad = g.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * g.double()
        v = 0.95 * v + 0.05 * g.double() ** 2
        w = w - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-20)
    torch.testing.assert_close(p.detach().double(), w, atol=1e-5, rtol=1e-4)


def test_which_parameters_are_matrices() -> None:
    matrix, vector = torch.zeros(4, 4), torch.zeros(4)
    assert is_matrix("layers.0.attn.wq_a.weight", matrix)
    assert is_matrix("layers.0.hc_attn_fn", matrix)
    assert is_matrix("layers.0.ffn.experts.w1", torch.zeros(2, 4, 4))
    for name in ("embed.weight", "head.weight", "layers.2.attn.compressor.ape"):
        assert not is_matrix(name, matrix)
    assert not is_matrix("norm.weight", vector)
