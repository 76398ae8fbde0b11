"""The whole run: text and tokenizer, training in one or several goes, checkpoint, scores, model card.

A run has two folders: the checkpoint's, and beside it NAME-run with the recipe, the tokenizer, the state to go on from,
metrics.jsonl and the plot.  Recipes whose later stages were edited under way stay there as recipe-until-STEP.toml.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch

from dsv4_engine import Engine
from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import InputError

from . import card, code_tree, corpus, episodes, evaluate, leaks, metrics, packing, ranks, state, tasks, vocabulary
from .code_tree import CodeTree
from .corpus import Corpus
from .export import save_checkpoint
from .parameters import initial_parameters
from .pools import Pools
from .post import PostRecipe
from .recipe import Recipe
from .trainer import Trainer

log = logging.getLogger(__name__)


def folder_of(out: Path) -> Path:
    """Where a run keeps what is not the checkpoint: beside it."""
    return out.with_name(out.name + "-run")


def make_tokenizer(text: Corpus, tree: CodeTree, size: int, seed: int) -> str:
    """A tokenizer.json for the corpus and for what the episodes' templates say."""
    rng = Random(f"{seed}/vocabulary")
    templates = [episodes.retrieval(rng, text, 600, 1.0).text() for _ in range(400)]
    templates += [episodes.small_talk(rng, text).text() for _ in range(300)]
    templates += [tasks.tracking(rng, text, 400).text() for _ in range(150)]
    templates += [tasks.code_lookup(rng, text, tree, 600).text() for _ in range(100)]
    return vocabulary.train_tokenizer([*(d.text[:12000] for d in text.training), *templates], size)


def prepare(recipe: Recipe, folder: Path) -> packing.Source:
    """The text of a run.  The tokenizer is made once and kept in ``folder``.  Raises InputError where text lacks."""
    text = corpus.load()
    tree = code_tree.load(recipe.data.code, text)
    path = folder / "tokenizer.json"
    if not path.is_file():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(make_tokenizer(text, tree, recipe.model.vocabulary, recipe.seed), encoding="utf-8")
        os.replace(partial, path)
    definition = path.read_text(encoding="utf-8")
    leaks.check(text, tree)
    pools = Pools.build(tokenizers.Tokenizer.from_str(definition), text, tree, recipe.seed)
    log.info(
        "text: %d documents of the corpus; %s; %s tokens of filler",
        len(text.training), tree.about, f"{sum(len(pool.ids) for pool in pools.pools):,}",
    )  # fmt: skip
    return packing.Source(text, tree, pools, definition)


def device_for(recipe: Recipe | PostRecipe) -> torch.device:
    """Raises InputError when the recipe asks for a GPU and there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if recipe.gpu:
        raise InputError(
            f"the recipe {recipe.name} needs a CUDA GPU, and there is none here",
            "Run it on a machine with one; recipes/smoke.toml shows the same in a few minutes on a CPU.",
        )
    return torch.device("cpu")


def begin(out: Path) -> Path:
    """The run's folder, made where it is missing.

    Raises InputError where it cannot be made, or where ``out`` holds files that are no checkpoint of such a run.
    """
    folder = folder_of(out)
    if not folder.is_dir() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and holds something else", "Name a new or empty folder with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}", "Name another one with --out.") from None
    return folder


def train(
    recipe: Recipe,
    recipe_file: Path,
    out: Path,
    stop_after: float | None = None,
    workers: int | None = None,
    context: int = 1,
) -> bool:
    """Trains, or goes on from the last state, and writes the checkpoint.  Returns whether the recipe's end was reached.

    stop_after: minutes after which the rest is left to another call; a termination signal does the same.  Of several
    processes, as torchrun starts them, every ``context`` share their sequences, and the first one writes.
    """
    began = time.monotonic()
    world = ranks.enter(context)
    ranks.check(recipe, world)
    leads = world.ranks.rank == 0
    device = ranks.device_of(world, device_for(recipe))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64  # one compiled form a stage and kind of layer
    folder = begin(out)
    source = ranks.leader_first(world, lambda: prepare(recipe, folder))
    parameters = initial_parameters(recipe.model.config(), recipe.seed, vocabulary.number_tokens(source.definition))
    path = state_of(folder)
    step = int(state.load(path)[1]["step"]) if path.is_file() else 0
    # The processes are forked before the GPU is touched: one that uses it cannot be forked.
    stream = packing.Stream(recipe, source, step, workers_for(workers, device))
    try:
        parameters = {n: p.detach().to(device).requires_grad_(p.requires_grad) for n, p in parameters.items()}
        trainer = ranks.trainer(recipe, parameters, device, world, compiled=device.type == "cuda")
        if step:
            trainer.load(path)
            log.info("going on from step %d of %d", step, recipe.steps)
        if leads:
            _keep_recipe(recipe_file, folder / "recipe.toml", step)
        if world.ranks.count == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
        record = metrics.Metrics(folder / "metrics.jsonl", trainer.step_number) if leads else None
        trainer.run(
            stream, record, path, stop_after=None if stop_after is None else max(0.0, 60 * stop_after - _gone(began))
        )
    finally:
        stream.close()
    if record is None:
        return trainer.step_number == recipe.steps
    account = machine_time(folder / "time.json", _gone(began), device)
    size = _write_checkpoint(out, trainer.config, parameters, source.definition)
    last = metrics.read(record.path)[-1]
    made = card.model_card(recipe, trainer.config, account, last, source.tree.about, size)
    (out / card.FILE).write_text(made, encoding="utf-8")
    log.info("wrote %s bytes to %s", f"{size:,}", out)
    metrics.plot({recipe.name: metrics.read(record.path)}, folder / "training.png")
    if trainer.step_number < recipe.steps:
        log.info("stopped at step %d of %d; the same command goes on from there", trainer.step_number, recipe.steps)
    return trainer.step_number == recipe.steps


def _write_checkpoint(out: Path, config: ModelConfig, parameters: dict[str, torch.Tensor], tokenizer: str) -> int:
    """Scores are of one checkpoint: those of the one before go."""
    (folder_of(out) / "scores.json").unlink(missing_ok=True)
    return save_checkpoint(out, config, parameters, tokenizer)


def _gone(began: float) -> float:
    return time.monotonic() - began


def workers_for(asked: int | None, device: torch.device) -> int:
    return asked if asked is not None else max(1, (os.cpu_count() or 2) - 2) if device.type == "cuda" else 0


def state_of(folder: Path) -> Path:
    return folder / "state.safetensors"


def _keep_recipe(new: Path, kept: Path, step: int) -> None:
    if kept.is_file() and kept.read_bytes() != new.read_bytes():
        os.replace(kept, kept.with_name(f"{kept.stem}-until-{step}.toml"))
    shutil.copyfile(new, kept)


def export(recipe: Recipe, out: Path) -> int:
    """Writes the checkpoint of the run's last state, also while the run goes on; returns that state's step.

    Raises InputError when there is no state, or one of another recipe.
    """
    folder = folder_of(out)
    path, tokenizer = state_of(folder), folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"there is no {path} yet", "A run writes it every minute and when it stops.")
    tensors, facts = state.load(path)
    if facts["recipe"] != recipe.digest(facts["step"]):
        raise InputError(f"{path} is the state of another recipe", "Give the one beside it, recipe.toml.")
    config = recipe.model.config()
    parameters = {name: tensors[name] for name in initial_parameters(config, recipe.seed, {})}
    size = _write_checkpoint(out, config, parameters, tokenizer.read_text(encoding="utf-8"))
    log.info("step %d of %d: wrote %s bytes to %s", facts["step"], recipe.steps, f"{size:,}", out)
    return int(facts["step"])


def machine_time(path: Path, seconds: float, device: torch.device) -> dict[str, Any]:
    """Adds the machine time of this call to the account in this file; returns all of it."""
    account = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0.0, "calls": 0}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    account = {"seconds": round(account["seconds"] + seconds, 1), "calls": account["calls"] + 1, "device": name}
    path.write_text(json.dumps(account | {"torch": torch.__version__}) + "\n", encoding="utf-8")
    return account


def score(
    recipe: Recipe, out: Path, count: int, lengths: Sequence[int], names: Sequence[str], device: str = "cpu"
) -> list[dict[str, Any]]:
    """Scores the checkpoint in the engine, and puts the scores into its card; they are kept in scores.json.

    A task and length that was scored before is scored anew; others stay.  What was exported from a run that has not
    stopped yet has no card, and a README that is none is left alone.
    """
    engine = Engine.load(str(out), device=device)
    text = corpus.load()
    tree = code_tree.load(recipe.data.code, text)
    ground = evaluate.Ground.of(text, tree, tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")))
    path = folder_of(out) / "scores.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"scores": [], "bits": None}
    for name in names:
        for length in lengths:
            samples = list(evaluate.draw_samples(ground, count, recipe.seed + 2000, (name,), (length,)))
            row = evaluate.run(engine, samples)[0]
            log.info("%s", json.dumps(row))
            others = [r for r in known["scores"] if (r["task"], r["length"]) != (name, length)]
            known["scores"] = [*others, row]
            path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    known["scores"].sort(key=lambda r: (evaluate.TASKS.index(r["task"]), r["length"]))
    if known["bits"] is None:
        known["bits"] = evaluate.bits_per_byte(engine, text.evaluation)
        log.info("%s", json.dumps(known["bits"]))
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    written = out / card.FILE
    if written.is_file() and card.is_card(old := written.read_text(encoding="utf-8")):
        written.write_text(card.with_measured(old, known["scores"], known["bits"]), encoding="utf-8")
    return list(known["scores"])


def compare_optimisers(recipe: Recipe, out: Path) -> None:
    """The recipe with Muon and with AdamW: the same batches, as many steps; curves and plot go to ``out``."""
    device = device_for(recipe)
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    source = prepare(recipe, out)
    curves = {}
    for kind in ("muon", "adamw"):
        one = dataclasses.replace(recipe, optimiser=dataclasses.replace(recipe.optimiser, kind=kind))
        digits = vocabulary.number_tokens(source.definition)
        parameters = {
            n: p.detach().to(device).requires_grad_(p.requires_grad)
            for n, p in initial_parameters(one.model.config(), one.seed, digits).items()
        }
        record = metrics.Metrics(out / f"{kind}.jsonl")
        curves[kind] = Trainer(one, parameters, device, device.type == "cuda").run(
            packing.Stream(one, source, 0, 0), record
        )
        log.info("%s: text %.3f, value %.3f", kind, curves[kind][-1]["text"], curves[kind][-1]["value"])
    metrics.plot(curves, out / "optimisers.png")
