"""Training on several processes against one: the same losses and gradients, then milliseconds a step and memory.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.training_ranks [--length 65536] [--steps 4]

Every process takes part; the first one prints.  First a short sequence in float32 without rounding, alone, with batches
divided and with sequences divided: speeds are printed only when losses and gradients agree.  Then the published
precision: a batch of sequences divided, and one long sequence divided.  Runs on GPUs (NCCL) or CPUs (gloo).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4_engine.ranks import leave
from dsv4_training import ranks
from dsv4_training.context_parallel import World
from dsv4_training.packing import Batch
from dsv4_training.parameters import initial_parameters
from dsv4_training.recipe import Recipe, Shape, Stage
from dsv4_training.trainer import MEASURES, Form, Trainer

TOLERANCE = 1e-3  # of a gradient's norm; products of a GPU are summed in another order for another shape


def batch(stage: Stage) -> Batch:
    draw = np.random.default_rng(0)
    count, blocks = stage.batch, stage.length // 128
    return Batch(
        draw.integers(2, 4096, (count, stage.length)).astype(np.uint16),
        draw.integers(0, 5, (count, stage.length)).astype(np.uint8),
        np.zeros((count, blocks), np.int32),
        np.tile(np.arange(blocks, dtype=np.int32), (count, 1)),
        np.stack([draw.permutation(stage.length)[: stage.index_rows // count] for _ in range(count)]).astype(np.int32),
    )


def made(stage: Stage, device: torch.device, world: World | None) -> Trainer:
    recipe = Recipe("ranks", 1, False, (stage,), Shape())
    parameters = {
        name: p.detach().to(device).requires_grad_(p.requires_grad)
        for name, p in initial_parameters(recipe.model.config(), 1, {}).items()
    }
    if world is None:
        return Trainer(recipe, parameters, device)
    return ranks.RankedTrainer(recipe, parameters, device, world)


def first_step(trainer: Trainer, stage: Stage) -> tuple[Tensor, dict[str, Tensor]]:
    """Measures and gradients in float32."""
    trainer._dtype = torch.float32
    gradients: dict[str, Tensor] = {}
    share = trainer._share_gradients

    def noted() -> None:
        share()
        gradients.update({n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None})

    trainer._share_gradients = noted  # type: ignore[method-assign]
    return trainer.step(batch(stage), Form(stage, False), 1.0), gradients


def timed(trainer: Trainer, stage: Stage, steps: int) -> dict[str, float]:
    """Milliseconds of a step, its first loss, and this process' largest memory in GB."""
    gpu = trainer.device.type == "cuda"
    drawn, form = batch(stage), Form(stage, False)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    loss = float(trainer.step(drawn, form, 1e-3)[0])
    start = time.perf_counter()
    for _ in range(steps):
        float(trainer.step(drawn, form, 1e-3)[0])  # waits for the device
    took = (time.perf_counter() - start) / steps
    memory = torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0
    return {"ms": 1000 * took, "loss": loss, "gb": memory}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest over the parameters, as a share of the gradient's norm (of the whole, where a part is near zero)."""
    floor = 1e-4 * torch.stack([g.norm() for g in theirs.values()]).norm()
    return max(float((ours[n] - g).norm() / torch.maximum(g.norm(), floor)) for n, g in theirs.items())


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--length", type=int, default=65536, help="of the long sequence (default: 65536)")
    p.add_argument("--steps", type=int, default=4, help="that are timed (default: 4)")
    p.add_argument("--cpu", action="store_true", help="not on GPUs")
    options = p.parse_args()
    by_batch = ranks.enter(1)
    count = by_batch.ranks.count
    by_sequence = World.of(by_batch.ranks, count)
    leads = by_batch.ranks.rank == 0
    device = ranks.device_of(by_batch, torch.device("cpu" if options.cpu or not torch.cuda.is_available() else "cuda"))
    short = Stage("short", 1, 128 * 2 * count, 256 * count * count, "sparse", False, 0.3, index_rows=64 * count)
    alone = first_step(made(short, device, None), short)
    losses = [i for i, name in enumerate(MEASURES) if name not in ranks.MEANS]
    found: dict[str, Any] = {"processes": count, "device": str(device.type), "agreement": {}, "steps": {}}
    for name, world in (("batches divided", by_batch), ("sequences divided", by_sequence)):
        measures, gradients = first_step(made(short, device, world), short)
        apart = float(((measures - alone[0])[losses] / alone[0][losses].abs().clamp_min(1e-2)).abs().max())
        found["agreement"][name] = {"losses": apart, "gradients": difference(gradients, alone[1])}
    agree = all(max(v.values()) <= TOLERANCE for v in found["agreement"].values())
    if agree:
        each = min(8192, options.length)
        many = Stage("many", 1, each, each * 2 * count, "sparse", index_rows=each // 4 * count)
        long = Stage("long", 1, options.length, options.length, "sparse")
        for name, stage, parts in (
            (f"{many.batch} x {each:,}, one process", many, None),
            (f"{many.batch} x {each:,}, batches divided", many, by_batch),
            (f"1 x {long.length:,}, one process", long, None),
            (f"1 x {long.length:,}, sequence divided", long, by_sequence),
        ):
            found["steps"][name] = timed(made(stage, device, parts), stage, options.steps)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    leave()
    if not leads:
        return 0
    for name, values in found["agreement"].items():
        print(f"{name:<44} losses apart {values['losses']:.1e}   gradients apart {values['gradients']:.1e}")
    for name, values in found["steps"].items():
        print(f"{name:<44} {values['ms']:9.1f} ms a step {values['gb']:7.1f} GB a process   loss {values['loss']:.4f}")
    print(json.dumps(found))
    if not agree:
        print(f"no speeds: results differ by more than {TOLERANCE}", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
