"""A spike of the loss, provoked, with and without the guard: what anticipatory routing is for.

The fault is in the routers: for some steps the experts' rows of every gate are exchanged, so that tokens go to experts
that have not learnt them; then they are put back.  A rollback alone meets the fault again; routing with older
parameters goes past it.  The language is a fixed successor for every token, with noise; embedding and head stay as they
are drawn, so that the experts must hold the successors.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import metrics
from .facts import TEXT
from .guard import Diverged
from .packing import Batch
from .parameters import initial_parameters
from .recipe import BLOCK, Recipe
from .trainer import Trainer

log = logging.getLogger(__name__)

NOISE = 0.1  # share of tokens that follow no rule


class Fault:
    """Exchanges the experts of every gate from step ``start`` to before step ``end``; call it with each step."""

    def __init__(self, parameters: dict[str, Tensor], start: int, end: int) -> None:
        self._gates = [p for name, p in parameters.items() if name.endswith(("ffn.gate.weight", "ffn.gate.bias"))]
        self._start, self._end = start, end

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        if step in (self._start, self._end):
            for gate in self._gates:
                half = gate.shape[0] // 2
                gate.copy_(gate.roll(half if step == self._start else -half, 0))


def window(recipe: Recipe) -> tuple[int, int]:
    """The steps of the fault: from half-way on, half as long as routing is anticipated, from a look at the loss on."""
    watch = recipe.routing.watch_every
    start = recipe.steps // 2 // watch * watch
    return start, start + max(1, recipe.routing.anticipate_steps // 2 // watch) * watch


def batches(recipe: Recipe) -> list[Batch]:
    rng, size = np.random.default_rng(recipe.seed), recipe.model.vocabulary
    successor = rng.permutation(size)
    made = []
    for step in range(recipe.steps):
        stage = recipe.stage(step)
        shape, blocks = (stage.batch, stage.length), stage.length // BLOCK
        ids = rng.integers(0, size, shape)
        ruled = rng.random(shape) >= NOISE
        for t in range(1, stage.length):
            ids[:, t] = np.where(ruled[:, t], successor[ids[:, t - 1]], ids[:, t])
        start = np.zeros((stage.batch, blocks), np.int32)
        rows = np.zeros((stage.batch, stage.index_rows // stage.batch), np.int32)
        place = np.tile(np.arange(blocks, dtype=np.int32), (stage.batch, 1))
        made.append(Batch(ids.astype(np.uint16), np.full(shape, TEXT, np.uint8), start, place, rows))
    return made


def fresh(recipe: Recipe) -> dict[str, Tensor]:
    config = recipe.model.config()
    parameters = initial_parameters(config, recipe.seed, {})
    g = torch.Generator().manual_seed(recipe.seed)
    for name, spread in (("embed.weight", 1.0), ("head.weight", 0.3)):
        parameters[name] = spread * torch.randn(config.vocab_size, config.hidden_size, generator=g)
    return parameters


def run(
    recipe: Recipe, faulty: bool, guarded: bool, text: list[Batch], anticipated: bool = True
) -> list[metrics.Record]:
    """The records of one run.  Raises Diverged where rollbacks do not help."""
    routing = dataclasses.replace(recipe.routing, guard=guarded)
    if not anticipated:
        routing = dataclasses.replace(routing, anticipate_steps=0)
    parameters = fresh(recipe)
    trainer = Trainer(dataclasses.replace(recipe, routing=routing), parameters, torch.device("cpu"))
    return trainer.run(text, on_step=Fault(parameters, *window(recipe)) if faulty else None)


def highest(recipe: Recipe, records: list[metrics.Record]) -> float:
    """The highest loss after the fault began that was kept: what a rollback undid does not count."""
    start, _ = window(recipe)
    return max(r["loss"] for r in records if r["step"] > start and not r.get("event"))


def provoke(recipe: Recipe, out: Path) -> dict[str, Any]:
    """An undisturbed run, and the fault with and without the guard: records and a plot go to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    text = batches(recipe)
    cases = {"undisturbed": (False, True), "guarded": (True, True), "unguarded": (True, False)}
    records = {name: run(recipe, *case, text) for name, case in cases.items()}
    for name, rows in records.items():
        record = metrics.Metrics(out / f"{name}.jsonl")
        for row in rows:
            record.add(row)
    metrics.plot(records, out / "spike.png")
    found: dict[str, Any] = {
        name: {"highest": highest(recipe, rows), "last": rows[-1]["loss"], "rollbacks": sum("event" in r for r in rows)}
        for name, rows in records.items()
    }
    try:
        run(recipe, True, True, text, anticipated=False)
        found["rollback alone"] = "survived"
    except Diverged as error:
        found["rollback alone"] = error.message
    log.info("%s", json.dumps(found, indent=1))
    return found
