"""The model card that ships with the checkpoint: what it is, what it was trained on, what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv4_engine.config import ModelConfig

from .evaluate import interval
from .parameters import initial_parameters
from .post import PostRecipe
from .recipe import Recipe

FILE = "README.md"
KINDS = {0: "window", 4: "CSA", 128: "HCA"}
TASK_NAMES = {
    "ruler": "one needle: RULER's prompt with its answer prefix",
    "file": "one needle in a file, asked in chat",
    "worded": "one needle in other wordings, in a file, asked in chat",
    "held-out": "one needle: nouns, statements and questions never trained on",
    "multikey": "nine needles of different keys (eight distractors), one asked for",
    "tracking": "variable tracking: RULER's prompt, one chain of four hops (share of its names)",
    "code": "which of eight files of real code defines a function",
}
CARD = """\
---
license: mit
language: en
---

# {name}

A language model of {millions:.0f} million parameters with the architecture of DeepSeek-V4, in the published checkpoint
format. It exists so that dsv4 can be tried and tested anywhere. It is not DeepSeek's, and it knows next to nothing.

## What it was trained to do

How well it does, and in how long a text, the scores below say.

- find a fact in a text and answer a question about it, best about numbers;
- follow a chain of variable assignments;
- say which of several files of code defines a function;
- hold a very short conversation: greet, say what it is, answer a few simple questions.

## What it cannot do

- reason, calculate, summarise, translate, write code, follow instructions that it was not trained on;
- be relied upon: it mostly answers with a plausible wrong number rather than say that it did not find one, the more so
  the further a question's wording is from those it was trained on;
- anything in a language but English.

Greedy decoding is its default (generation_config.json).

{measured}

## How it was made

`python -m dsv4_training --recipe {name}.toml`: {steps} steps, {tokens:,.0f} million tokens, {minutes:.1f} minutes
of one
{device} in {calls} go{plural}, from corpus to checkpoint.

| stage | steps | sequence | tokens a step | attention | rounding | MTP weight | positions to |
|---|---|---|---|---|---|---|---|
{stages}

Muon (matrices) and AdamW; experts balanced by bias; FP4 experts, FP8 linears and cache rounding emulated where a
stage says so. Where "positions to" is given, some documents jump forward between two blocks of 128 tokens, so that
far positions are seen on short texts; the card's scores are of texts of full length. At the end the indexer's choice
held {mass:.1%} of the attention over sequences of {longest:,} tokens, and the MTP block's second token was the model's
own in {accepted:.0%} of cases.

Text: the King James Bible (public domain), the documentation and parts of the standard library of Python 3.11 (PSF
licence), {code} (PSF licence), and texts from the project's own templates and RULER's wordings (Apache-2.0).
evals/dsv4_evals/data/SOURCES.md has the details. One document in ten, chosen by its name, was kept out.

## Shape

{layers} layers ({kinds}) and an MTP block; hidden {hidden},
{heads} query heads of {head_dim}, {experts} experts of which {active} are used, {hashed} hash layers, mHC {streams},
{index_heads} index heads, top {topk}, window {window}, vocabulary {vocabulary}; {megabytes:.1f} MB.
"""
SCORES, SHAPE = "## Measured\n", "## Shape\n"  # headings of what is written anew, and of what that stands before
MEASURED = """\
{heading}
Answers generated greedily by dsv4's engine from the published precision. Keys, numbers, variable names, code and the
text around them were never trained on. 95% intervals (Wilson).

{scores}"""
POST = """\
### Post-training

`python -m dsv4_training post-train --recipe {name}.toml` made specialists of that model, each tuned on data of its own
and then rewarded for right answers (GRPO, {answers} answers to a question), and merged them by on-policy distillation
into {students}. A student began as {start}, wrote answers to each specialist's questions, and learnt that
specialist's whole distribution on them.

| | steps of tuning | million tokens | steps of rewards or merging | minutes, machine |
|---|---|---|---|---|
{rows}

"""
HEADING = "\n## "


def score_table(scores: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines; a score is {task, length, right, asked}."""
    yield from ("| questions | tokens | right | share | interval |", "|---|---|---|---|---|")
    for score in scores:
        good, asked = score["right"], score["asked"]
        low, high = interval(good, asked)
        share = f"{good / asked:.1%} | {low:.1%} to {high:.1%}"
        yield f"| {TASK_NAMES[score['task']]} | {score['length']} | {good:g} of {asked} | {share} |"


def measured(scores: Sequence[dict[str, Any]], bits: dict[str, float] | None) -> str:
    """The card's section of scores, Markdown without an end of line."""
    written = "\n".join(score_table(scores)) if scores else "Not yet: `python -m dsv4_training score` does it."
    if bits is not None:
        written += f"\n\nBits a byte of {bits['bytes']:,.0f} bytes of held-out text: {bits['model']:.2f} (`xz -9`: "
        written += f"{bits['xz']:.2f})."
    return MEASURED.format(heading=SCORES, scores=written)


def is_card(text: str) -> bool:
    """Whether a checkpoint's README has the sections that are written anew here."""
    return SCORES in text and SHAPE in text


def with_measured(text: str, scores: Sequence[dict[str, Any]], bits: dict[str, float] | None) -> str:
    """A card with these scores in place of those it has."""
    first = text.index(SCORES)
    return text[:first] + measured(scores, bits) + "\n" + text[text.index(HEADING, first) :]


def student_card(base: str, recipe: PostRecipe, accounts: Mapping[str, dict[str, Any]]) -> str:
    """The base's card without scores, and how its student came to be; accounts: machine time of each that was made."""
    rows = []
    for one in recipe.specialists:
        tuned = recipe.tuned(one)
        tokens = sum(stage.steps * stage.tokens for stage in tuned.stages) / 1e6
        rows.append((one.name, f"{tuned.steps:,}", f"{tokens:,.0f}", recipe.rewards.writing.steps))
    students = recipe.merging.named()
    rows += [(name, "", "", one.writing.steps) for name, one in students.items()]
    time = {name: f"{account['seconds'] / 60:.1f}, {account['device']}" for name, account in accounts.items()}
    made = POST.format(
        name=recipe.name,
        answers=recipe.rewards.writing.answers,
        start=f"the specialist of {recipe.merging.start}" if recipe.merging.start else "the base",
        students="one student" if len(students) == 1 else f"the mean of {len(students)} students' weights",
        rows="\n".join(f"| {n} | {a} | {b} | {c} | {time.get(n, 'not kept')} |" for n, a, b, c in rows),
    )
    card = with_measured(base, [], None)
    return card[: card.index(SHAPE)] + made + card[card.index(SHAPE) :]


def model_card(
    recipe: Recipe,
    config: ModelConfig,
    account: dict[str, Any],
    last: dict[str, Any],
    code: str,
    size: int,
) -> str:
    """Markdown, nothing measured yet.  account: machine time; last: the last record of the metrics; code: the code
    tree; size: bytes."""
    return CARD.format(
        name=recipe.name,
        millions=parameter_count(config) / 1e6,
        measured=measured([], None),
        steps=f"{last['step']:,}" + (f" of {recipe.steps:,}" if last["step"] < recipe.steps else ""),
        tokens=last["tokens"] / 1e6,
        minutes=account["seconds"] / 60,
        device=account["device"],
        calls=account["calls"],
        plural="" if account["calls"] == 1 else "es",
        stages="\n".join(
            f"| {s.name} | {s.steps:,} | {s.length:,} | {s.tokens:,} | {s.attention} | "
            f"{'yes' if s.quantised else 'no'} | {s.mtp:g} | {f'{s.farthest:,}' if s.jumps else '-'} |"
            for s in recipe.stages
        ),
        mass=last["mass"],
        longest=last["length"],
        accepted=last["accepted"],
        code=code,
        layers=config.num_hidden_layers,
        kinds=", ".join(KINDS[r] for r in config.compress_ratios),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        experts=config.n_routed_experts,
        active=config.num_experts_per_tok,
        hashed=config.num_hash_layers,
        streams=config.hc_mult,
        index_heads=config.index_n_heads,
        topk=config.index_topk,
        window=config.sliding_window,
        vocabulary=config.vocab_size,
        megabytes=size / 1e6,
    )


def parameter_count(config: ModelConfig) -> int:
    """Trained values, MTP block included."""
    return sum(p.numel() for p in initial_parameters(config, 0, {}).values() if p.requires_grad)
