"""The training loop: steps along a recipe's stages, looks at the loss every few of them, resumes where it was stopped.

Dense attention, then the indexer learns to imitate it, then only what it selects is attended to; weights and
activations are rounded as the checkpoint and the engine round them where a stage says so, with straight-through
gradients.  On a GPU a step is captured as one graph.  Knows no files but the run's state.
Letters: B sequences, S tokens, N = B*S, V vocabulary.
Source: report, sections 4.2 and 5.2.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4_engine.errors import InputError

from . import losses, state
from .guard import KEPT, Guard
from .layout import Layout
from .metrics import Metrics, Record
from .model import Mode, Network
from .optimizer import Optimizer, clip_gradients
from .packing import Batch
from .parameters import judging_weights, working_weights
from .recipe import EARLY, Recipe, Stage

log = logging.getLogger(__name__)

MEASURES = (
    "loss", "text", "answer", "value", "right", "index_loss", "recall", "mass", "mtp", "accepted", "balance",
    "binding", "finding", "grad_norm",
)  # fmt: skip
REPORT_EVERY = 10.0  # seconds between two lines of the log
HOST_AHEAD = 8  # steps that the host may be ahead of the GPU


@dataclass(frozen=True)
class Form:
    """What decides the operations of a step.  Steps of one form are one fixed sequence of them."""

    stage: Stage
    anticipated: bool


class Trainer:
    """One run over one recipe; parameters are changed in place."""

    def __init__(
        self,
        recipe: Recipe,
        parameters: dict[str, Tensor],
        device: torch.device,
        compiled: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """compiled: compile the operations and capture steps (a CUDA device only)."""
        self.recipe, self.device, self.parameters = recipe, device, parameters
        self.config = recipe.model.config()
        self.network = self._make_network(compiled)
        self.optimizer = self._make_optimizer()
        self.guard = Guard(recipe.routing, {**parameters, **self._optimizer_state()})
        self.step_number = 0
        self._stop = False
        self._compiled, self._clock = compiled, clock
        self._piece: Any = torch.compile(losses.piece_losses, dynamic=False) if compiled else losses.piece_losses
        self._captured: tuple[Form, _Recording] | None = None
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        sizes = [stage.tokens * stage.steps for stage in recipe.stages]
        self._all_tokens = sum(sizes)

    def _make_network(self, compiled: bool) -> Network:
        return Network(self.config, compiled)

    def _make_optimizer(self) -> Optimizer:
        return Optimizer(self.parameters, self.config.o_groups, self.recipe.optimiser)

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {f"optimiser.{name}": value for name, value in self.optimizer.state().items()}

    # Resuming --------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        state.save(path, *self.whole_state())

    def whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file of the state holds."""
        tensors = {**self.parameters, **self._optimizer_to_save()}
        if self.guard.older is not None and self.guard.anticipates(self.step_number):
            tensors |= {f"older.{name}": self.guard.older[name] for name in self.parameters}
        step = self.step_number
        return tensors, {"step": step, "recipe": self.recipe.digest(step), "guard": self.guard.facts()}

    def load(self, path: Path) -> None:
        """Raises InputError when the state is damaged, or of another recipe."""
        tensors, facts = state.load(path)
        if facts["recipe"] != self.recipe.digest(facts["step"]):
            raise InputError(
                f"{path} is the state of another recipe",
                "Give that recipe, or another folder with --out. What may be edited are stages that have not begun and "
                "the number of steps of the one under way.",
            )
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(tensors[name])
        self._take_optimizer({n: t for n, t in tensors.items() if n.startswith("optimiser.")})
        older = {n.removeprefix("older."): t.to(self.device) for n, t in tensors.items() if n.startswith("older.")}
        self.guard.restore(facts["guard"], older)
        self.step_number = facts["step"]

    # The loop --------------------------------------------------------------------------------------------------------

    def tokens(self, step: int) -> int:
        """Of all steps before ``step``."""
        total = 0
        for stage in self.recipe.stages:
            taken = min(step, stage.steps)
            total += taken * stage.tokens
            step -= taken
        return total

    def rate_scale(self, step: int) -> float:
        """Warm-up by steps; a plateau and a straight line down to ``last_scale`` by tokens; times the stage's own."""
        o, own = self.recipe.optimiser, self.recipe.stage(step).rate
        fall = max(0.0, self.tokens(step) / self._all_tokens - o.decay_from) / (1 - o.decay_from)
        return own * min(1.0, (step + 1) / o.warmup_steps) * (1 - fall * (1 - o.last_scale))

    def run(
        self,
        batches: Iterable[Batch],
        metrics: Metrics | None = None,
        save_to: Path | None = None,
        save_every: float = 60.0,
        stop_after: float | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Record]:
        """Train to the recipe's end, or until ``stop_after`` seconds are over; returns the records of this call.

        batches: those of step_number, step_number + 1, ...; a state is written every ``save_every`` seconds and at the
        end.  on_step is called before each step (to provoke what tests provoke).
        """
        source = _Replay(iter(batches), self.step_number)
        watch = self.recipe.routing.watch_every
        start = saved = reported = self._clock()
        window_start, pending = start, list[Tensor]()
        records: list[Record] = []
        self.guard.keep(self.step_number)
        while self.step_number < self.recipe.steps:
            step = self.step_number
            stage = self.recipe.stage(step)
            if on_step is not None:
                on_step(step)
            pending.append(
                self.step(source.get(step), Form(stage, self.guard.anticipates(step)), self.rate_scale(step))
            )
            self.step_number += 1
            if len(pending) % HOST_AHEAD == 0:
                pending[-1].cpu()
            last = self.step_number == self.recipe.steps or self.recipe.stage(self.step_number) != stage
            if self.step_number % watch and not last:
                continue
            window = torch.stack(pending).cpu().tolist()
            now = self._clock()
            record = self._record(stage, window, (now - window_start) / len(pending))
            window_start, pending = now, []
            if self.recipe.routing.guard and self.guard.is_spike(stage.name, [row[0] for row in window]):
                self.step_number = self.guard.roll_back(self.step_number)
                record["event"] = f"spike; back to step {self.step_number}, routing anticipated to {self.guard.until}"
                log.warning("step %d: %s", record["step"], record["event"])
                source.back_to(self.step_number)
            else:
                self.guard.keep(self.step_number)
                source.forget(self.step_number - (1 + KEPT) * watch)
            records.append(record)
            if metrics is not None:
                metrics.add(record)
            if now - reported > REPORT_EVERY or last:
                log.info("%s", self._line(record, now - start))
                reported = now
            stopping = self._stop or (stop_after is not None and now - start >= stop_after)
            if save_to is not None and (now - saved > save_every or stopping):
                self.save(save_to)
                saved = self._clock()
            if stopping:
                return records
        if save_to is not None:
            self.save(save_to)
        return records

    def stop(self) -> None:
        """At the next look at the loss `run` writes the state and returns (may be called from a signal handler)."""
        self._stop = True

    def _record(self, stage: Stage, window: list[list[float]], seconds: float) -> Record:
        mean = [sum(column) / len(window) for column in zip(*window, strict=True)]
        record: Record = {
            "step": self.step_number, "stage": stage.name, "length": stage.length, "attention": stage.attention,
            "tokens": self.tokens(self.step_number), "ms": round(1000 * seconds, 2),
            "scale": round(self.rate_scale(self.step_number - 1), 4),
        }  # fmt: skip
        return record | {name: round(value, 4) for name, value in zip(MEASURES, mean, strict=True)}

    def _line(self, record: Record, gone: float) -> str:
        """Time left at this stage's pace: a token of a later stage is taken to cost what one costs now."""
        left = (self._all_tokens - record["tokens"]) / self.recipe.stage(record["step"] - 1).tokens * record["ms"] / 1e3
        names = ("text", "value", "right", "recall", "mass", "accepted", "binding", "finding")
        parts = [f"{name} {record[name]:.3f}" for name in names]
        return (
            f"step {record['step']}/{self.recipe.steps} {record['stage']} ({record['length']:,})  {'  '.join(parts)}  "
            f"{record['ms']:.1f} ms a step, {gone / 60:.1f} min gone, about {left / 60:.1f} left"
        )

    # One step --------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, form: Form, scale: float) -> Tensor:
        """One optimiser step; returns the step's MEASURES on the device."""
        tensors = tuple(
            torch.from_numpy(x.astype(np.int64))
            for x in (batch.ids, batch.classes, batch.start, batch.place, batch.rows)
        )
        self.optimizer.scale.fill_(scale)
        if not self._compiled:
            return self._step_on_device(form, *(t.to(self.device) for t in tensors))
        if self._captured is None or self._captured[0] != form:
            self._captured = None  # its memory is freed before the next one's is taken
            self._captured = (form, self._record_step(form, tensors))
        return self._captured[1].replay(tensors)

    def _record_step(self, form: Form, tensors: tuple[Tensor, ...]) -> _Recording:
        """Captures a step of this form; the steps that warm up are undone."""
        changed = {**self.parameters, **self._optimizer_state()}
        before = {name: value.detach().clone() for name, value in changed.items()}
        recording = _Recording(lambda *t: self._step_on_device(form, *t), tensors, self.device)
        with torch.no_grad():
            for name, value in changed.items():
                value.copy_(before[name])
        return recording

    def _step_on_device(
        self, form: Form, ids: Tensor, classes: Tensor, start: Tensor, place: Tensor, rows: Tensor
    ) -> Tensor:
        stage, weigh = form.stage, self.recipe.losses
        early = EARLY if stage.binding else ()
        mode = Mode(stage.quantised, stage.attention == "sparse", stage.mtp > 0, stage.recompute, self._dtype, early)
        layout = Layout.of(start, place, self.network.frequencies(self.device))
        weights = working_weights(self.parameters, mode.quantised, mode.dtype)
        routes = self._older_routes(ids, mode, layout) if form.anticipated else None
        taught = None if stage.attention == "dense" else rows
        output = self.network.forward(weights, ids, mode, taught, layout, routes)
        head = weights["head.weight"]
        document = start.repeat_interleave(ids.shape[1] // start.shape[1], 1)
        over = self.network.total
        first = self._own(losses.ahead(ids, 1, 0))
        loss, best = losses.token_losses(output.hidden, head, first, self._piece)
        kinds = self._own(losses.following(classes, document, 1).view_as(ids))
        mean = losses.ByClass.of(loss, kinds, weigh.prompt, over)
        main = weigh.text * mean.text + weigh.answer * mean.answer + weigh.value * mean.value
        right = losses.mean((best == first).float(), (kinds == losses.VALUE).float(), over)
        total = main + output.index_loss + self.recipe.routing.balance * output.balance
        mtp = accepted = main.new_zeros(())
        if output.mtp_hidden is not None:
            second = self._own(losses.ahead(ids, 2, 0))
            loss2, best2 = losses.token_losses(output.mtp_hidden, head, second, self._piece)
            kinds2 = self._own(losses.following(classes, document, 2).view_as(ids))
            mean2 = losses.ByClass.of(loss2, kinds2, weigh.prompt, over)
            mtp = weigh.text * mean2.text + weigh.answer * mean2.answer + weigh.value * mean2.value
            total = total + stage.mtp * mtp
            # The model's own choice one position later is what a drafted token must equal.
            own = self._next_choice(best, ids)
            accepted = losses.mean((best2 == own).float(), (kinds2 != losses.NOISE).float(), over)
        binding = finding = main.new_zeros(())
        if output.early:
            names, *shown = (
                torch.stack([self._own(x) for x in part.unbind(-1)], -1)
                for part in losses.parts_of(ids, classes, document)
            )
            binding, finding = (
                losses.mean(losses.binding_losses(hidden, head, names, there), there.any(1).float(), over)
                for hidden, there in zip(output.early, shown, strict=True)
            )
            total = total + stage.binding * (binding + finding)
        total.backward()
        self._share_gradients()
        norm = clip_gradients(self.parameters.values(), self.recipe.optimiser.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._balance(output.loads)
        measures = (
            main, mean.text, mean.answer, mean.value, right, output.index_loss, output.recall[0], output.recall[1], mtp,
            accepted, output.balance, binding, finding, norm,
        )  # fmt: skip
        return self._shared(torch.stack([x.detach().float() for x in measures]))

    # What a run on several processes does otherwise ------------------------------------------------------------------

    def _own(self, x_BS: Tensor) -> Tensor:
        """Of all positions those that this process has, flat."""
        return x_BS.flatten()

    def _next_choice(self, best_N: Tensor, ids_BS: Tensor) -> Tensor:
        """The most likely token one position later, -1 behind the end."""
        return losses.ahead(best_N.view_as(ids_BS), 1, -1).flatten()

    def _optimizer_to_save(self) -> dict[str, Tensor]:
        return self._optimizer_state()

    def _take_optimizer(self, saved: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._optimizer_state().items():
                value.copy_(saved[name])

    def _share_gradients(self) -> None:
        """Makes the gradients those of all processes' parts of the loss."""

    def _shared(self, measures: Tensor) -> Tensor:
        return measures

    def _older_routes(self, ids: Tensor, mode: Mode, layout: Layout) -> dict[str, Tensor]:
        """The experts' choice with the guard's older parameters."""
        assert self.guard.older is not None, "anticipated without older parameters"
        older = {name: self.guard.older[name] for name in self.parameters}
        weights = judging_weights(older, mode.quantised, mode.dtype)
        return self.network.forward(weights, ids, mode, None, layout).chosen

    @torch.no_grad()
    def _balance(self, loads: dict[str, Tensor]) -> None:
        """Experts that served less than the mean get a larger bias (report, section 2.1)."""
        for prefix, load in loads.items():
            bias = self.parameters.get(f"{prefix}.ffn.gate.bias")
            if bias is not None:
                bias += self.recipe.routing.bias_rate * torch.sign(load.mean() - load)


class _Replay:
    """Batches in order, with a memory for the steps that a rollback repeats."""

    def __init__(self, batches: Iterator[Batch], step: int) -> None:
        self._batches, self._next = batches, step
        self._kept: deque[tuple[int, Batch]] = deque()

    def get(self, step: int) -> Batch:
        for number, batch in self._kept:
            if number == step:
                return batch
        assert step == self._next, f"batch {step} was asked for, {self._next} is next"
        batch = next(self._batches)
        self._kept.append((step, batch))
        self._next += 1
        return batch

    def back_to(self, step: int) -> None:
        assert not self._kept or self._kept[0][0] <= step, "batches of the rollback are gone"

    def forget(self, step: int) -> None:
        """Batches before ``step`` will not be asked for again."""
        while self._kept and self._kept[0][0] < step:
            self._kept.popleft()


class _Recording:
    """A step captured as a CUDA graph: replaying it costs one launch, where the step's thousands of small kernels cost
    the host more time than they cost the GPU."""

    def __init__(self, step: Callable[..., Tensor], tensors: tuple[Tensor, ...], device: torch.device) -> None:
        self._inputs = tuple(t.to(device) for t in tensors)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, and fills the caches that a capture must not touch
            for _ in range(2):
                step(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._measures = step(*self._inputs)

    def replay(self, tensors: tuple[Tensor, ...]) -> Tensor:
        for own, new in zip(self._inputs, tensors, strict=True):
            own.copy_(new)
        self._graph.replay()
        return self._measures.clone()
