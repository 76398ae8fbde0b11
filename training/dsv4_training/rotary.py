"""The turn of rotary positions in real arithmetic, which compilers fuse (they do not fuse complex numbers)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., C] with its last channels (pairs 2i, 2i+1) turned; cos, sin float32, broadcastable to pairs.

    The same as dsv4_kernels.rope.rotate.
    """
    turning = 2 * cos.shape[-1]
    pairs = x[..., -turning:].float().unflatten(-1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)
    return torch.cat([x[..., :-turning], turned.to(x.dtype)], -1)
