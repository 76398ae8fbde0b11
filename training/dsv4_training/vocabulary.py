"""The bundled model's tokenizer: a byte-level BPE with the protocol's special tokens and a small vocabulary of its own.

Digits are grouped by three from the left, as DeepSeek's tokenizer does, and every group of up to three digits is one
token whether the corpus holds it or not: a number's tokens then follow from its digits alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv4_engine.protocol import SPECIAL_TOKENS

DIGITS = r"\p{N}{1,3}"
WORDS = r" ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _pre_tokenizer() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(DIGITS), "isolated"),
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str], size: int) -> str:
    """The text of a tokenizer.json with exactly ``size`` entries, special tokens first.

    Raises ValueError when ``size`` leaves no room for the fixed entries.
    """
    digits = "0123456789"
    groups = [a + b for a in digits for b in digits] + [a + b + c for a in digits for b in digits for c in digits]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*SPECIAL_TOKENS, *alphabet, *groups]
    if size < len(fixed):
        raise ValueError(f"a vocabulary of {size} is too small: {len(fixed)} entries are fixed")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + size - len(fixed),
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=16,
    )
    # Digits are taken out, so that no merge is spent on them.
    learner.train_from_iterator((re.sub(r"\d+", " ", text) for text in texts), trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    # Whichever neighbours merge first, a group of three must come out as one token: both ways are listed.
    merges = [[g[0], g[1]] for g in groups[:100]]
    merges += [pair for g in groups[100:] for pair in ([g[:2], g[2]], [g[0], g[1:]])]
    merges += [pair if isinstance(pair, list) else pair.split(" ") for pair in learned]
    entries = list(dict.fromkeys([*fixed, *(a + b for a, b in merges)]))
    if len(entries) != size:
        raise ValueError(f"the texts gave {len(entries)} entries instead of {size}: more text is needed")
    shell = tokenizers.Tokenizer(models.BPE())
    shell.pre_tokenizer = _pre_tokenizer()
    shell.decoder = decoders.ByteLevel()
    definition: dict[str, Any] = json.loads(shell.to_str())
    definition["model"]["vocab"] = {entry: i for i, entry in enumerate(entries)}
    definition["model"]["merges"] = merges
    definition["added_tokens"] = [
        {"id": i, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate(SPECIAL_TOKENS)
    ]
    return json.dumps(definition, ensure_ascii=False)


def number_tokens(definition: str) -> dict[int, str]:
    """Token id -> digits, for the entries that are one to three digits."""
    vocabulary: dict[str, int] = json.loads(definition)["model"]["vocab"]
    return {i: entry for entry, i in vocabulary.items() if re.fullmatch(r"[0-9]{1,3}", entry)}
