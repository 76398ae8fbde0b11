"""Post-training as a whole: specialists from one checkpoint, their merging, and how the student compares with them.

Owns the order of the stages and their folders: OUT/NAME for every specialist, OUT/student-1 and so on (not rounded),
OUT/student, their mean, and OUT/run with the recipe and records.  What has a checkpoint is not run again; a stage that
was killed starts anew, but for the supervised one, which goes on from its state.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch

from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import InputError
from dsv4_engine.ranks import launched

from . import card, code_tree, corpus, distill, evaluate, grpo
from .evaluate import Ground, Sample
from .export import load_parameters, save_checkpoint
from .generation import Writer
from .layout import BLOCK
from .learner import Learner, mode_on
from .metrics import Metrics, Record
from .packing import Source, Stream
from .parameters import working_weights
from .pools import Pools
from .post import Comparison, PostRecipe, Specialist, Writing
from .prompts import END, Plan
from .run import device_for, machine_time, workers_for
from .trainer import Trainer

log = logging.getLogger(__name__)
STUDENT = "student"
TIME = "-time.json"  # behind a specialist's or student's name: its machine time
SAY_EVERY = 10.0  # seconds between two lines of the log
AT_ONCE = 1 << 16  # tokens of prompts that are read at a time when answers are compared


class Run:
    """base: the folder of the checkpoint that everything starts from; workers: processes that draw text, 0 for none."""

    def __init__(self, recipe: PostRecipe, base: Path, out: Path, device: torch.device, workers: int) -> None:
        """Raises InputError when the base is not the recipe's model, or text is missing."""
        self.recipe, self.base, self.out, self.device, self.workers = recipe, base, out, device, workers
        self.students = recipe.merging.named()
        given, _ = load_parameters(base)
        self.config = recipe.model.config()
        # The base may be as published, or a copy that is not packed.
        own = self.config
        if dataclasses.replace(given, quantization=own.quantization, expert_dtype=own.expert_dtype) != own:
            raise InputError(
                f"the model in {base} is not the one that [model] in the recipe describes",
                "Give the [model] table of the recipe that it was trained with.",
            )
        self.folder = out / "run"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.definition = (base / "tokenizer.json").read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{base} has no tokenizer.json that can be read", "Give a whole checkpoint.") from error
        text = corpus.load()
        tree = code_tree.load(recipe.specialists[0].data.code, text)
        self.tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        pools = Pools.build(self.tokenizer, text, tree, recipe.seed)
        self.source = Source(text, tree, pools, self.definition)

    def _named(self, only: str | None) -> list[Specialist]:
        """All, or the one of that name; raises InputError where there is none."""
        named = [s for s in self.recipe.specialists if only in (None, s.name)]
        if not named:
            names = ", ".join(s.name for s in self.recipe.specialists)
            students = ", ".join([*self.students, STUDENT])
            raise InputError(f"there is no specialist {only}", f"There are {names}, and for training {students}.")
        return named

    def train(self, only: str | None = None) -> None:
        """All that is not there yet, or of it ``only`` one specialist, one student or all of them and their mean.

        Specialists know nothing of each other, nor do students: each may have a process and a GPU of its own.  Raises
        InputError for a name that there is not, and for a student whose teachers are not there.
        """
        if only not in (STUDENT, *self.students):
            for specialist in self._named(only):
                if not self._there(specialist.name):
                    self._specialise(specialist)
            if only is not None:
                return
        if only not in self.students and self._there(STUDENT):
            return
        if missing := [s.name for s in self.recipe.specialists if not self._there(s.name)]:
            raise InputError(f"there is no {self.out / missing[0]} yet", "Make the specialists first.")
        for name in self.students:
            if only in (None, STUDENT, name) and not self._there(name):
                self._merge(name)
        if only not in self.students:
            self._average()

    def _there(self, name: str) -> bool:
        return (self.out / name / "config.json").is_file()

    def parameters(self, folder: Path) -> dict[str, torch.Tensor]:
        _, loaded = load_parameters(folder)
        return {n: p.detach().to(self.device).requires_grad_(p.requires_grad) for n, p in loaded.items()}

    def _specialise(self, specialist: Specialist) -> None:
        began = time.monotonic()
        parameters = self.parameters(self.base)
        tuned = self.recipe.tuned(specialist)
        state = self.folder / f"{specialist.name}.safetensors"
        trainer = Trainer(tuned, parameters, self.device, compiled=self.device.type == "cuda")
        if state.is_file():
            trainer.load(state)
        stream = Stream(tuned, self.source, trainer.step_number, self.workers)
        try:
            record = Metrics(self.folder / f"{specialist.name}-tuning.jsonl", trainer.step_number)
            trainer.run(stream, record, state)
        finally:
            stream.close()
        del trainer
        rewards = self.recipe.rewards
        learner = self._learner(parameters, rewards.writing, rewards.optimiser, rewards.updates)
        plan = self._plan((specialist,), rewards.writing, specialist.name)
        note = self._noted(f"{specialist.name}-rewards", rewards.writing.steps)
        grpo.run(learner, rewards, plan.drawn(rewards.writing.steps, self.workers), self.tokenizer, note)
        save_checkpoint(self.out / specialist.name, self.config, parameters, self.definition)
        self._account(specialist.name, began)
        state.unlink()

    def _account(self, name: str, began: float) -> None:
        machine_time(self.folder / (name + TIME), time.monotonic() - began, self.device)

    def _merge(self, name: str) -> None:
        began = time.monotonic()
        start, own = self.recipe.merging.start, self.students[name]
        parameters = self.parameters(self.out / start if start else self.base)
        student = self._learner(parameters, own.writing, own.optimiser, 1)
        teachers = [
            distill.Teacher.of(s.name, self.parameters(self.out / s.name), s.weight, student.mode)
            for s in self.recipe.specialists
        ]
        plan = self._plan(self.recipe.specialists, own.writing, name)
        note = self._noted(name, own.writing.steps)
        distill.run(student, teachers, plan.drawn(own.writing.steps, self.workers), note)
        save_checkpoint(self.out / name, self.config, parameters, self.definition, quantised=False)
        self._account(name, began)

    def _average(self) -> None:
        """The student, with a card where the base has one."""
        mean = distill.mean([self.parameters(self.out / name) for name in self.students])
        save_checkpoint(self.out / STUDENT, self.config, mean, self.definition)
        base = self.base / card.FILE
        if base.is_file() and card.is_card(text := base.read_text(encoding="utf-8")):
            kept = {path.name.removesuffix(TIME): path for path in self.folder.glob(f"*{TIME}")}
            accounts = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in kept.items()}
            made = card.student_card(text, self.recipe, accounts)
            (self.out / STUDENT / card.FILE).write_text(made, encoding="utf-8")

    def _learner(self, parameters: dict[str, torch.Tensor], writing: Writing, optimiser: Any, updates: int) -> Learner:
        steps = writing.steps * updates
        return Learner(self.config, parameters, writing, optimiser, steps, self.recipe.seed, self.device)

    def _plan(self, specialists: Sequence[Specialist], writing: Writing, of: str) -> Plan:
        seed = f"{self.recipe.seed}/{of}"
        data = tuple(s.data for s in specialists)
        return Plan(seed, self.source, data, self.recipe.tuning, writing.prompts, writing.length)

    def _noted(self, name: str, steps: int) -> Callable[[Record], None]:
        """Writes a step's record, and every few seconds a line with the time left."""
        metrics, start, said = Metrics(self.folder / f"{name}.jsonl"), time.monotonic(), [0.0]

        def note(record: Record) -> None:
            metrics.add(record)
            gone = time.monotonic() - start
            if gone - said[0] > SAY_EVERY or record["step"] == steps:
                said[0] = gone
                left = gone / record["step"] * (steps - record["step"]) / 60
                values = "  ".join(f"{key} {value:.3f}" for key, value in record.items() if key != "step")
                log.info("%s %d/%d  %s  about %.1f min left", name, record["step"], steps, values, left)

        return note

    def compare(self, only: str | None = None) -> list[Row]:
        """Base, specialists (or ``only`` one) and student on the same held-out questions.

        Also written to OUT/comparison.json, or comparison-NAME.json.
        """
        chosen = self._named(only)
        for name in (*(s.name for s in chosen), STUDENT):
            if not self._there(name):
                raise InputError(f"there is no {self.out / name} yet", "Run post-train first.")
        ground = Ground.of(self.source.corpus, self.source.tree, self.tokenizer)
        rows = compared(self, chosen, self.recipe.comparison, ground)
        path = self.out / ("comparison.json" if only is None else f"comparison-{only}.json")
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        return rows


@dataclass(frozen=True)
class Row:
    """Scores in percent of one ground of a specialist at one length, or of all of its (length 0)."""

    specialist: str
    ground: str
    length: int
    asked: int
    base: float
    special: float
    student: float

    @property
    def behind(self) -> float:
        """Points by which the student is behind the specialist."""
        return self.special - self.student


def compared(run: Run, specialists: Sequence[Specialist], settings: Comparison, ground: Ground) -> list[Row]:
    """Rows of these specialists' grounds and lengths, each specialist's sum last."""
    folders = {"base": run.base, STUDENT: run.out / STUDENT}
    folders |= {s.name: run.out / s.name for s in specialists}
    models = {name: run.parameters(folder) for name, folder in folders.items()}
    rows = []
    for specialist in specialists:
        sums = dict.fromkeys(("base", specialist.name, STUDENT), 0.0)
        asked = 0
        for task in specialist.grounds:
            for length in settings.lengths:
                seed = run.recipe.seed + 3000
                samples = list(evaluate.draw_samples(ground, settings.questions, seed, (task,), (length,)))
                right = {
                    name: sum(scores(run.config, models[name], samples, run.tokenizer, run.device)) for name in sums
                }
                asked += len(samples)
                sums = {name: sums[name] + right[name] for name in sums}
                rows.append(_row(specialist.name, task, length, len(samples), right))
        rows.append(_row(specialist.name, "all", 0, asked, sums))
    return rows


def _row(specialist: str, ground: str, length: int, asked: int, right: dict[str, float]) -> Row:
    points = {name: 100 * value / asked for name, value in right.items()}
    return Row(specialist, ground, length, asked, points["base"], points[specialist], points[STUDENT])


def scores(
    config: ModelConfig,
    parameters: dict[str, torch.Tensor],
    samples: Sequence[Sample],
    tokenizer: tokenizers.Tokenizer,
    device: torch.device,
) -> Iterator[float]:
    """Of each sample the share of what is wanted in the greedy answer, in the published precision."""
    mode = mode_on(device)
    with torch.no_grad():
        weights = working_weights(parameters, True, mode.dtype)
    longest = max(len(s.prompt_ids) for s in samples)
    length, tokens = -longest // BLOCK * -BLOCK, max(s.max_tokens for s in samples)
    count = max(1, min(len(samples), AT_ONCE // length))
    writer = Writer(config, count, 1, length + -tokens // BLOCK * -BLOCK, mode, device)
    for start in range(0, len(samples), count):
        part = samples[start : start + count]
        full = [*part, *[part[0]] * (count - len(part))]  # a writer's batches are of one size
        ids = torch.full((count, length), END)
        for row, sample in enumerate(full):
            ids[row, : len(sample.prompt_ids)] = torch.tensor(sample.prompt_ids)
        writer.read(weights, ids.to(device), torch.tensor([len(s.prompt_ids) for s in full], device=device))
        written = writer.write(tokens, END, 0.0).ids.tolist()
        for sample, row in zip(part, written, strict=False):
            answer = tokenizer.decode([t for t in row[: sample.max_tokens] if t != END])
            yield sum(wanted in answer for wanted in sample.wanted) / len(sample.wanted)


def table(rows: Sequence[Row], points: float) -> str:
    """For people; a specialist's last line says whether the student is near enough."""
    names = f"{'specialist':<14}{'ground':<12}{'length':>8}{'asked':>7}"
    lines = [f"{names}{'base':>8}{'special':>9}{'student':>9}  behind"]
    for row in rows:
        verdict = "" if row.length else ("  within" if row.behind <= points else "  TOO FAR") + f" {points:g} points"
        length = f"{row.length:,}" if row.length else ""
        lines.append(
            f"{row.specialist:<14}{row.ground:<12}{length:>8}{row.asked:>7}{row.base:>8.1f}{row.special:>9.1f}"
            f"{row.student:>9.1f}{row.behind:>8.1f}{verdict}"
        )
    return "\n".join(lines)


def near_enough(rows: Sequence[Row], points: float) -> bool:
    return all(row.behind <= points for row in rows if not row.length)


def start(recipe: PostRecipe, recipe_file: Path, base: Path, out: Path, workers: int | None) -> Run:
    """A run on the GPU, or on the CPU where there is none and the recipe does without; its recipe is kept beside its
    records.  Raises InputError where it cannot begin."""
    if launched().count > 1:
        raise InputError("post-training runs in one process", "Start it without torchrun.")
    device = device_for(recipe)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64  # as in training: one compiled form a kind of layer and shape
    run = Run(recipe, base, out, device, workers_for(workers, device))
    shutil.copyfile(recipe_file, run.folder / "recipe.toml")
    return run
