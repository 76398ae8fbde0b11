"""Where a needle lies for a model that compresses its past, and whether its indexers chose it.

A needle's tokens are summarised by the compressed entries of their blocks; where a layer's blocks overlap, the next
block's entry holds them too.  All arithmetic on positions; knows neither engines nor tasks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .model import LayerChoice, Trace

FINE, COARSE = 4, 128  # tokens of a block in CSA and HCA layers
WINDOW = 128


def diagnose(
    needle: tuple[int, int], value: tuple[int, int], prompt_tokens: int, trace: Trace | None
) -> dict[str, Any]:
    """needle, value: [start, end) positions in the sequence; prompt_tokens: of the whole prompt.

    position, mod_4 and mod_128 are the needle's; straddles_4: the value lies in more than one block of 4,
    straddles_128: the needle lies in more than one block of 128; in_window: the prompt's last token sees all of the
    value uncompressed.  layers: one entry for each indexer (empty without a trace), see `_layer`.
    """
    window = trace.window if trace else WINDOW
    return {
        "position": needle[0],
        "mod_4": needle[0] % FINE,
        "mod_128": needle[0] % COARSE,
        "value_mod_4": value[0] % FINE,
        "straddles_4": len(blocks(value, FINE)) > 1,
        "straddles_128": len(blocks(needle, COARSE)) > 1,
        "distance": prompt_tokens - value[1],
        "in_window": value[0] > prompt_tokens - 1 - window,
        "layers": [_layer(choice, needle, value) for choice in trace.layers] if trace else [],
    }


def blocks(span: tuple[int, int], ratio: int) -> range:
    """The blocks of ``ratio`` tokens that positions [start, end) lie in."""
    return range(span[0] // ratio, (span[1] - 1) // ratio + 1)


def entries(span: tuple[int, int], ratio: int, overlap: bool) -> frozenset[int]:
    """The compressed entries that summarise some of these positions."""
    own = blocks(span, ratio)
    return frozenset(range(own.start, own.stop + overlap))


def _layer(choice: LayerChoice, needle: tuple[int, int], value: tuple[int, int]) -> dict[str, Any]:
    """Shares of the needle's and of the value's entries that one layer's indexer chose.

    prompt: at the prompt's last token; answer_best and answer_mean: over the answer tokens that were traced, the best
    one and the mean (None without any).  value_found: at one of all these tokens, every block of the value was chosen
    in one of the entries that hold it.  all: every entry could be attended to, so nothing was chosen.
    """
    found: dict[str, Any] = {
        "layer": choice.layer,
        "all": all(step is None for step in choice.steps),
        "entries": len(entries(needle, choice.ratio, choice.overlap)),
    }
    for name, span in (("needle", needle), ("value", value)):
        wanted = entries(span, choice.ratio, choice.overlap)
        shares = [1.0 if step is None else len(wanted & step) / len(wanted) for step in choice.steps]
        found[name] = {
            "prompt": shares[0],
            "answer_best": max(shares[1:], default=None),
            "answer_mean": sum(shares[1:]) / len(shares[1:]) if shares[1:] else None,
        }
    found["value_found"] = any(step is None or _covers(step, value, choice) for step in choice.steps)
    return found


def _covers(chosen: Iterable[int], span: tuple[int, int], choice: LayerChoice) -> bool:
    held = set(chosen)
    return all(block in held or (choice.overlap and block + 1 in held) for block in blocks(span, choice.ratio))
