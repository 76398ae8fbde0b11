"""Rotary position embedding, interleaved: channels 2i and 2i+1 are the real and imaginary part of one number.

Angles are float32 products position x frequency, as in the published code, never a table in half precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for i = 0..dim/2-1, float32."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_frequencies(
    dim: int, theta: float, factor: float, original_positions: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """YaRN's frequencies (arXiv 2309.00071, section 3.2), float32 [dim/2]; no magnitude scaling.

    Channels that turn more than ``beta_fast`` times over ``original_positions`` keep their frequency, those that turn
    less than ``beta_slow`` times are slowed by ``factor``, a linear ramp over the channel index lies between.
    """
    freqs = rope_frequencies(dim, theta)

    def channel_that_turns(turns: float) -> float:
        return dim * math.log(original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel_that_turns(beta_fast)), 0)
    high = min(math.ceil(channel_that_turns(beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp_(0, 1)
    return freqs / factor * ramp + freqs * (1 - ramp)


def rope_phases(positions_S: Tensor, freqs: Tensor, channels: int) -> Tensor:
    """exp(i * position * frequency) for the last channels, 1 for those before: complex64 [S, channels / 2].

    positions: integers [S]; freqs: float32 [rope_dim / 2].
    """
    angle = positions_S.to(torch.float32)[:, None] * freqs
    phases = torch.ones(angle.shape[0], channels // 2, dtype=torch.complex64, device=angle.device)
    phases[:, channels // 2 - angle.shape[1] :] = torch.polar(torch.ones_like(angle), angle)
    return phases


def rotate(x: Tensor, phases: Tensor, out: Tensor | None = None) -> Tensor:
    """``x`` turned by ``phases``; conjugate phases turn back.

    x: [..., C], contiguous in its last dim; phases: complex64 [..., C / 2], broadcastable to x's leading dims.
    Computed in float32, returned in x's dtype.  A phase of 1 leaves its two channels exactly as they are.
    out: float32 memory of x's shape for the result, such as a float32 x itself.
    """
    pairs = _pairs(x.float())
    if out is not None:
        torch.mul(pairs, phases, out=_pairs(out))
        return out
    return torch.view_as_real(pairs * phases).flatten(-2).to(x.dtype)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
