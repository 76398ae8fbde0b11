"""The model card that ships with the checkpoint: what it is, what it was trained on, what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dsv4_engine.config import ModelConfig

from .evaluate import interval

KINDS = {0: "window", 4: "CSA", 128: "HCA"}
FORM_NAMES = {
    "ruler": "RULER's prompt with its answer prefix",
    "file": "RULER's needle in a file, asked in chat",
    "worded": "other wordings, in a file, asked in chat",
    "held-out": "nouns, statements and questions never trained on, in a file, asked in chat",
}
CARD = """\
---
license: mit
language: en
---

# dsv4-tiny

A language model of {millions:.0f} million parameters with the architecture of DeepSeek-V4, in the published checkpoint
format. It exists so that dsv4 can be tried and tested anywhere. It is not DeepSeek's, and it knows next to nothing.

## What it can do

- find a fact in a text of up to about 4,000 tokens and answer a question about it, best about numbers;
- hold a very short conversation: greet, say what it is, answer a few simple questions.

## What it cannot do

- reason, calculate, summarise, translate, write code, follow instructions that it was not trained on;
- be relied upon: it mostly answers with a plausible wrong number rather than say that it did not find one, the more so
  the further a question's wording is from those it was trained on;
- anything in a language but English; texts far longer than 4,000 tokens (it runs on them, the answers are often wrong).

Greedy decoding is its default (generation_config.json).

## Measured

Needle questions with keys, numbers and documents never seen in training. Half of the documents also hold one to six
facts about other keys; depths are spread evenly. 95% intervals (Wilson). Weights, activations and cache are rounded as
the engine does.

{tables}

## How it was made

`python -m dsv4_training --out FOLDER --seed {seed}`: {steps:,} steps, {tokens:.0f} million tokens,
{minutes:.1f} minutes from corpus to checkpoint on one {device}. Muon and AdamW; sequences of {lengths} tokens; dense
attention first, then the indexer, then sparse attention; FP4 experts, FP8 linears and cache rounding
emulated in the last part.

Text: the King James Bible (public domain), the documentation and parts of the standard library of Python 3.11 (PSF
licence), and texts from the project's own templates. evals/dsv4_evals/data/SOURCES.md has the details.

## Shape

{layers} layers ({kinds}) and an MTP block; hidden {hidden}, {heads} query heads of {head_dim},
{experts} experts of which {active} are used, {hashed} hash layers, mHC {streams}, {index_heads} index heads,
top {topk}, window {window}, vocabulary {vocabulary}; {megabytes:.1f} MB.
"""


def score_table(title: str, scores: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown lines; a score is {form, length, right, asked}."""
    yield from (f"{title}:", "", "| questions | tokens | right | share | interval |", "|---|---|---|---|---|")
    for score in scores:
        good, asked = score["right"], score["asked"]
        low, high = interval(good, asked)
        share = f"{good / asked:.1%} | {low:.1%} to {high:.1%}"
        yield f"| {FORM_NAMES[score['form']]} | {score['length']} | {good} of {asked} | {share} |"


def model_card(config: ModelConfig, result: dict[str, Any], generated: Sequence[dict[str, Any]] = ()) -> str:
    """Markdown.  result: what run.train measured; generated: scores of the checkpoint in the engine, if taken."""
    lines: list[str] = []
    if generated:
        lines += [*score_table("Answers generated greedily by the engine on a CPU that hold the number", generated), ""]
    title = "At the end of training, given the answer so far, every token of the number the most likely one"
    lines += score_table(title, result["scores"])
    settings = result["settings"]
    return CARD.format(
        millions=result["parameters"] / 1e6,
        tables="\n".join(lines),
        seed=settings["seed"],
        steps=result["steps"],
        tokens=result["tokens"] / 1e6,
        minutes=result["seconds"] / 60,
        device=result["device"],
        lengths=", ".join(f"{phase['length']:,}" for phase in settings["phases"]),
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
        megabytes=result["bytes"] / 1e6,
    )
