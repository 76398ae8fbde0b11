"""Two and three processes against one: the same losses, gradients and steps, whatever is divided among them."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_engine.errors import InputError
from dsv4_engine.ranks import Ranks
from dsv4_training import losses, state
from dsv4_training.context_parallel import World
from dsv4_training.optimizer import Optimizer
from dsv4_training.packing import Batch
from dsv4_training.ranks import RankedTrainer, SharedOptimizer, assign, check, matrices
from dsv4_training.recipe import Optimiser, Recipe, Shape, Stage
from dsv4_training.trainer import MEASURES, Form, Trainer
from training.common import lively_parameters
from training.processes import across

SHAPE = Shape(
    vocabulary=512,
    hidden_size=128,
    heads=2,
    compress_ratios=(0, 4, 128),
    index_heads=8,
    index_topk=16,
    experts=4,
    hash_layers=1,
)
CPU = torch.device("cpu")
STAGE = Stage("sparse", 2, 384, 768, "sparse", quantised=False, mtp=0.3, index_rows=64)


def recipe(**changes: Any) -> Recipe:
    return Recipe("ranks", 1, False, (Stage(**{**vars(STAGE), **changes}),), SHAPE, Optimiser(warmup_steps=1))


def batches() -> list[Batch]:
    """Two steps of two sequences: two documents, one of them with a jump, and one document."""
    draw = np.random.default_rng(0)
    return [
        Batch(
            draw.integers(2, 512, (2, 384)).astype(np.uint16),
            draw.integers(0, 5, (2, 384)).astype(np.uint8),
            np.array([[0, 1, 1], [0, 0, 0]], np.int32),
            np.array([[0, 0, 9], [0, 1, 2]], np.int32),
            np.stack([draw.permutation(384)[:32] for _ in range(2)]).astype(np.int32),
        )
        for _ in range(2)
    ]


def steps(trainer: Trainer) -> dict[str, Any]:
    """The measures of both steps, the gradients of the first, the parameters after the second."""
    gradients: dict[str, Tensor] = {}
    share = trainer._share_gradients

    def noted() -> None:
        share()
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None})

    trainer._share_gradients = noted  # type: ignore[method-assign]
    form = Form(trainer.recipe.stages[0], False)
    measures = [trainer.step(batch, form, 1.0) for batch in batches()]
    return {
        "measures": torch.stack(measures),
        "gradients": gradients,
        "parameters": {n: p.detach() for n, p in trainer.parameters.items()},
    }


@functools.cache
def alone(recipe: Recipe) -> dict[str, Any]:
    return steps(Trainer(recipe, lively_parameters(recipe.model.config()), CPU))


def made(ranks: Ranks, context: int, recipe: Recipe) -> RankedTrainer:
    # Only the leader's parameters count.
    parameters = lively_parameters(recipe.model.config(), seed=ranks.rank)
    return RankedTrainer(recipe, parameters, CPU, World.of(ranks, context))


def ranked(ranks: Ranks, context: int, recipe: Recipe) -> dict[str, Any]:
    return steps(made(ranks, context, recipe))


def same(one: dict[str, Any], several: list[dict[str, Any]]) -> None:
    """Losses of both steps, the second with parameters that the first made, and gradients, to rounding."""
    for other in several:
        for name, value in other["parameters"].items():
            assert torch.equal(value, several[0]["parameters"][name]), name
    shared = [i for i, name in enumerate(MEASURES) if name not in ("recall", "mass")]
    torch.testing.assert_close(several[0]["measures"][:, shared], one["measures"][:, shared], atol=2e-5, rtol=2e-5)
    assert several[0]["gradients"].keys() == one["gradients"].keys()
    for name, expected in one["gradients"].items():
        error = float((several[0]["gradients"][name] - expected).norm() / (expected.norm() + 1e-12))
        assert error < 2e-5 or float(expected.norm()) < 1e-7, (name, error)


@pytest.mark.parametrize(("count", "context"), [(2, 1), (2, 2), (3, 3)])
def test_processes_compute_what_one_does(count: int, context: int, tmp_path: Path) -> None:
    several = across(count, tmp_path, ranked, context, recipe())
    one = alone(recipe())
    same(one, several)
    assert float(one["measures"][0, MEASURES.index("index_loss")]) > 0.01


@pytest.mark.slow
def test_batches_and_sequences_divided_at_once(tmp_path: Path) -> None:
    same(alone(recipe()), across(4, tmp_path, ranked, 2, recipe()))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "warmup"])
def test_other_stages_with_recomputed_blocks(attention: str, tmp_path: Path) -> None:
    one = recipe(attention=attention, recompute=True)
    same(alone(one), across(3, tmp_path, ranked, 3, one))


def test_loads_are_balanced() -> None:
    """Graham's bound, and no more than the mean plus the largest; every matrix has one owner."""
    draw = np.random.default_rng(0)
    for ranks in (1, 2, 3, 7):
        for _ in range(20):
            loads = (draw.pareto(1.0, 40) * 100 + 1).astype(int).tolist()
            owners = assign(loads, ranks)
            sums = np.bincount(owners, loads, ranks)
            best = max(sum(loads) / ranks, max(loads), sum(sorted(loads)[-ranks - 1 : -ranks + 1 or None]))
            assert sums.max() <= 4 / 3 * best
            assert sums.max() <= sum(loads) / ranks + max(loads) * (1 - 1 / ranks)
    parameters = lively_parameters(SHAPE.config())
    every = list(matrices(parameters, 2))
    assert len({m.key for m in every}) == len(every)
    assert sum(m.rows * m.columns for m in every) == sum(parameters[name].numel() for name in {m.name for m in every})
    assert {m.rows for m in every if m.name.endswith("wo_a.weight")} == {128}
    sums = np.bincount(assign([m.load for m in every], 2), [m.load for m in every], 2)
    assert sums.max() / sums.mean() < 1.01


def _optimiser_steps(ranks: Ranks) -> tuple[dict[str, Tensor], int]:
    parameters = lively_parameters(SHAPE.config())
    shared = SharedOptimizer(parameters, 2, Optimiser(), World.of(ranks))
    _give_gradients(parameters)
    shared.step()
    mine = sum(m.load for m in shared.owned[ranks.rank])
    return {n: p.detach() for n, p in parameters.items()}, mine


def _give_gradients(parameters: dict[str, Tensor], seed: int = 3) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=g)


def _resumed(ranks: Ranks, path: Path) -> dict[str, Tensor]:
    """The parameters after a step, a stop, and another step, which must be those without the stop."""
    first, again = made(ranks, ranks.count, recipe()), made(ranks, ranks.count, recipe())
    _give_gradients(first.parameters)
    first.optimizer.step()
    first.save(path)
    again.load(path)
    for trainer in (first, again):
        _give_gradients(trainer.parameters, 4)
        trainer.optimizer.step()
    for name, p in first.parameters.items():
        assert torch.equal(p, again.parameters[name]), name
    return {n: p.detach() for n, p in again.parameters.items()}


def test_the_state_on_disk_is_that_of_one_process(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    got = across(3, tmp_path, _resumed, path)[0]
    trainer, resumed = (Trainer(recipe(), lively_parameters(SHAPE.config(), seed), CPU) for seed in (0, 7))
    _give_gradients(trainer.parameters)
    trainer.optimizer.step()
    saved, facts = state.load(path)
    own, own_facts = trainer.whole_state()
    assert facts == own_facts
    assert saved.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(saved[name], value.detach(), atol=1e-6, rtol=1e-4, msg=name)
    resumed.load(path)
    _give_gradients(resumed.parameters, 4)
    resumed.optimizer.step()
    for name, p in resumed.parameters.items():
        torch.testing.assert_close(got[name], p.detach(), atol=1e-6, rtol=1e-4, msg=name)


def test_divided_steps_are_one_optimisers(tmp_path: Path) -> None:
    parameters = lively_parameters(SHAPE.config())
    optimizer = Optimizer(parameters, 2, Optimiser())
    _give_gradients(parameters)
    optimizer.step()
    shares = []
    for got, load in across(3, tmp_path, _optimiser_steps):
        shares.append(load)
        for name, p in parameters.items():
            torch.testing.assert_close(got[name], p.detach(), atol=1e-6, rtol=1e-4)
    assert max(shares) < 1.1 * sum(shares) / 3


def _next_choices(ranks: Ranks, best: Tensor) -> Tensor:
    world = World.of(ranks, ranks.count)
    start, end = world.span(best.shape[1])
    trainer: Any = SimpleNamespace(world=world)
    return RankedTrainer._next_choice(trainer, best[:, start:end].flatten(), best).unflatten(0, (len(best), -1))


def test_the_next_choice_is_seen_across_the_border(tmp_path: Path) -> None:
    """384 positions on two processes, 128 and 256: a drafted token is compared with what one process would."""
    best = torch.randint(0, 512, (2, 384), generator=torch.Generator().manual_seed(0))
    parts = across(2, tmp_path, _next_choices, best)
    assert [part.shape[1] for part in parts] == [128, 256]
    assert torch.equal(torch.cat(parts, 1), losses.ahead(best, 1, -1))


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(InputError, match="3 processes are not whole lines of 2"):
        World.of(Ranks(0, 3), 2)
    with pytest.raises(InputError, match="2 sequences a step cannot be divided among 3"):
        check(recipe(), World(Ranks(0, 3)))
    with pytest.raises(InputError, match="384 tokens are less than a block of 128 for each of 4"):
        check(recipe(), World(Ranks(0, 4), 4))
