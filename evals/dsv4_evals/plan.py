"""What a run will take before it is started: samples, tokens, time and memory by length.

Time is extrapolated from one short reading and one answer, by the FLOPs of each length where the model's configuration
tells them, else by tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .model import Model, Prompt
from .run import Drawing, building_of
from .task import Cell, Filler, Task

PROBE_TOKENS = 4096
PROBE_ANSWER = 32


@dataclass(frozen=True)
class Row:
    """One length.  tokens: to be read, all samples together.  seconds: expected; kv_bytes: of one sequence's cache."""

    ctx: int
    samples: int
    questions: int
    tokens: int
    seconds: float
    kv_bytes: float | None
    kv_bytes_v32: float | None


def work(model: Model, tokens: int) -> float:
    """What reading so many tokens takes, in units of no meaning: FLOPs where they are known, else tokens."""
    if tokens < 1:
        return 0.0
    cost = model.cost(tokens, 0)
    return cost.flops_raw if cost else float(tokens)


def plan(task: Task, cells: Sequence[Cell], model: Model, filler: Filler, drawing: Drawing) -> list[Row]:
    """One row a length.  Builds each length's first sample, and reads and answers a short piece of the first one.

    Raises what the task refuses to build.
    """
    building = building_of(model, filler, drawing)
    firsts = {ctx: task.build(next(some), building) for ctx, some in groupby(cells, lambda cell: cell.ctx)}
    sample = next(iter(firsts.values()))
    settings = drawing.settings(PROBE_ANSWER, PROBE_ANSWER, 0)
    context = model.read(Prompt(sample.prompt.ids[:PROBE_TOKENS], chat=sample.prompt.chat), settings)
    question = sample.questions[0]
    reply = context.ask(question.ids, settings, question.opening if drawing.thinking == "none" else ())
    per_work = context.prefill_s / work(model, context.tokens)
    rows = []
    for ctx, sample in firsts.items():
        number = sum(cell.ctx == ctx for cell in cells)
        own = len(sample.prompt.ids) + sum(len(turn.ids) for turn in sample.prompt.turns)
        tokens = own + model.overhead(sample.prompt, settings)
        seconds = per_work * work(model, tokens) + len(sample.questions) * (reply.prefill_s + reply.decode_s)
        cost = model.cost(tokens, 1)
        rows.append(
            Row(
                ctx,
                number,
                number * len(sample.questions),
                number * tokens,
                number * seconds,
                cost.kv_bytes if cost else None,
                cost.kv_bytes_v32 if cost else None,
            )
        )
    return rows
