"""From logits to the next token: greedy, temperature, min-p, top-p, and randomness that can be resumed.

Owns the options' ranges and the arithmetic of drawing.  Knows no model, tokenizer or text.

The order is temperature, then min-p, then top-p, as vLLM has it: both cuts look at the distribution that is drawn
from, and top-p counts its mass among what min-p left.

Randomness is counter-based: the n-th token of a generation is drawn with a number that depends on (seed, n) alone.
The sampler's whole state is those two integers, so a generation that was killed after n tokens goes on exactly as it
would have, and it does not matter what else was drawn meanwhile.  All arithmetic is float64 on the CPU, so the choice
depends on the logits only, not on the device or the number of threads; a GPU decides where nothing hangs on rounding
(device_sampling.py).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .device_sampling import Draw
from .errors import InputError
from .strict_json import load_config_json

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63 - 1


class LogitsError(RuntimeError):
    """The model computed NaN or infinite logits: damaged weights or a numeric fault, not wrong input."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.  The defaults are the publisher's recommendation.

    temperature: 0 (greedy: the largest logit, the lowest id on ties) to 2.
    top_p: above 0, up to 1: the fewest, most probable tokens that hold this mass.
    min_p: 0 to 1: drops tokens less probable than this share of the most probable one.
    seed: 0 to 2**63 - 1, or None for one that the sampler picks and tells.
    Raises InputError naming the option and the value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, f"from 0 to {MAX_TEMPERATURE:g}", 0.0, MAX_TEMPERATURE)
        _check("top_p", self.top_p, "above 0 and at most 1", math.ulp(0.0), 1.0)
        _check("min_p", self.min_p, "from 0 to 1", 0.0, 1.0)
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if self.seed is not None and not (whole and 0 <= self.seed <= MAX_SEED):
            raise InputError(f"seed is {self.seed!r:.60}", "Give a whole number from 0 to 2**63 - 1, or none.")

    @classmethod
    def recommended(cls, folder: Path) -> Sampling:
        """What a checkpoint folder's generation_config.json asks for; without that file, the defaults.

        Of the file, temperature, top_p, min_p and do_sample (false: greedy) are read.  Raises InputError when it is not
        JSON or a value is out of range.
        """
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls()
        data = load_config_json(path)
        if not isinstance(data, dict):
            raise InputError(f"{path} is not a JSON object", "Get generation_config.json from its source again.")
        given = {key: data[key] for key in ("temperature", "top_p", "min_p") if data.get(key) is not None}
        if data.get("do_sample") is False:
            given["temperature"] = 0.0
        return cls(**given)


class Sampler:
    """Draws one generation's tokens.  `seed` and `position` (tokens drawn so far) are all of its state."""

    def __init__(self, sampling: Sampling, position: int = 0) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(53) if sampling.seed is None else sampling.seed  # 53 bits survive any JSON reader
        self.position = position

    def next(self, logits_V: Tensor) -> int:
        """The id of the next token, from its logits (see `sample`).  A draw that raises does not count."""
        return self.end(logits_V, self.begin(logits_V))

    def begin(self, logits_V: Tensor) -> Draw | None:
        """Have the next token drawn where the logits lie, which need not be there yet; None on a CPU."""
        return Draw(logits_V, self.sampling, uniform(self.seed, self.position)) if logits_V.is_cuda else None

    def end(self, logits_V: Tensor, begun: Draw | None) -> int:
        """The token, as `next`, from what `begin` returned for the same logits."""
        token_id = begun.result() if begun is not None else None
        if token_id is None:
            token_id = sample(logits_V.cpu(), self.sampling, uniform(self.seed, self.position))
        self.position += 1
        return token_id


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1), of 53 random bits, that draws token `position` of a generation with `seed`."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8, person=b"dsv4-draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from: float64 [V] on the CPU, summing to 1, zero where a token is cut.

    logits_V: floating point [V], any device.  With temperature 0 all mass is on one token.
    Raises LogitsError for NaN or infinite logits.
    """
    logits = _checked(logits_V)
    if sampling.temperature == 0:
        one = np.zeros(len(logits))
        one[logits.argmax()] = 1.0
        return torch.from_numpy(one)
    weights = _weights(logits, sampling)
    return torch.from_numpy(weights / weights.sum())


def sample(logits_V: Tensor, sampling: Sampling, draw: float) -> int:
    """The token that `draw` in [0, 1) picks: the first whose cumulative probability, in order of ids, exceeds it.

    logits_V: floating point [V], any device.  Temperature 0 ignores `draw` and takes the largest logit, the lowest
    id on ties.  Raises LogitsError for NaN or infinite logits.
    """
    if logits_V.is_cuda and (token := Draw(logits_V, sampling, draw).result()) is not None:
        return token
    logits = _checked(logits_V)
    if sampling.temperature == 0:
        return int(logits.argmax())  # documented to be the first of equal maxima
    weights = _weights(logits, sampling)
    cumulative = (weights / weights.sum()).cumsum()
    # Scaled by the real total, which rounding may leave off 1; the largest draw, 1 - 2**-53, never rounds up to it.
    return int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))


def _weights(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities times an unknown factor, after the cuts.  NumPy takes a third of the time that torch takes here,
    and a decoded token waits for it.
    """
    # The largest is subtracted first: dividing by a tiny temperature then goes to -inf, never to inf - inf.
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    if sampling.min_p > 0:
        weights[weights < sampling.min_p] = 0.0  # the largest weight is exactly 1
    if sampling.top_p < 1:
        enough = sampling.top_p * weights.sum()
        best = _best(logits, weights, enough)
        mass_before = weights[best].cumsum() - weights[best]
        kept = np.zeros_like(weights)
        kept[best] = np.where(mass_before < enough, weights[best], 0.0)
        return kept
    return weights


def _best(logits: np.ndarray, weights: np.ndarray, enough: float) -> np.ndarray:
    """The places of the largest logits, largest first and equals by place: as many as weigh ``enough``, or more.

    (Of weights two could be equal by one library's exp and not by another's.)
    """
    count = 256
    while count < len(logits):
        floor = np.partition(logits, -count)[-count]  # the count-th largest
        some = np.flatnonzero(logits >= floor)  # equals included, so that the first of them are chosen
        if weights[some].sum() >= enough:
            return some[np.argsort(-logits[some], kind="stable")]
        count *= 16
    return np.argsort(-logits, kind="stable")


def _checked(logits_V: Tensor) -> np.ndarray:
    assert logits_V.dim() == 1 and len(logits_V) > 0, f"logits of shape {tuple(logits_V.shape)}, not [V]"
    logits_V = logits_V.detach().cpu()
    if logits_V.dtype not in (torch.float32, torch.float64):
        logits_V = logits_V.double()
    logits: np.ndarray = logits_V.numpy()
    if not (np.isfinite(logits.min()) and np.isfinite(logits.max())):  # NaN is both
        wrong = int((~np.isfinite(logits)).sum())
        raise LogitsError(
            f"the model computed {wrong} NaN or infinite logits out of {len(logits)}: "
            "the checkpoint is damaged, or its numbers overflow on this device"
        )
    return logits


def _check(name: str, value: float, span: str, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):  # NaN fails both comparisons
        raise InputError(f"{name} is {value!r:.60}", f"Give a number {span}.")
