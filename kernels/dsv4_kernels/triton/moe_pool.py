"""Packed experts on the GPU: one layer's matrices as a checkpoint holds them, in slots, and whether FP8 can hold them.

Knows nothing of routing or products.  Letters: E experts, D hidden, I expert hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .index import _code_values

SPAN = 14  # binades within which e4m3 holds every non-zero e2m1 code times a power of two


@dataclass(frozen=True)
class ExpertPool:
    """Experts' matrices as a checkpoint holds them, in slots; gate (w1) rows stand before up (w3) rows in w13.

    FP4: w13 uint8 [slots, 2I, D/2], s13 uint8 (e8m0) [slots, 2I, D/32], w2 [slots, D, I/2], s2 [slots, D, I/32].
    FP8: w13 e4m3 [slots, 2I, D], s13 uint8 [slots, 2I/128, D/128], w2 [slots, D, I], s2 [slots, D/128, I/128].
    slot_of_expert: int32 [E] on the device, read by every launch, so it may change between launches.
    All contiguous.  Raises ValueError where shapes or dtypes do not fit together.
    """

    w13: Tensor
    s13: Tensor
    w2: Tensor
    s2: Tensor
    slot_of_expert: Tensor

    def __post_init__(self) -> None:
        slots, inputs, hidden = self.w13.shape[0], self.inputs, self.hidden
        if self.fp8:
            wanted = {
                "w13": (slots, 2 * hidden, inputs),
                "s13": (slots, 2 * hidden // 128, inputs // 128),
                "w2": (slots, inputs, hidden),
                "s2": (slots, inputs // 128, hidden // 128),
            }
        else:
            wanted = {
                "w13": (slots, 2 * hidden, inputs // 2),
                "s13": (slots, 2 * hidden, inputs // 32),
                "w2": (slots, inputs, hidden // 2),
                "s2": (slots, inputs, hidden // 32),
            }
        if inputs % 128 or hidden % 128:
            raise ValueError(
                f"experts on the GPU need sizes that 128 divides, got {inputs} x {hidden}; use device='cpu'"
            )
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            dtype = torch.float8_e4m3fn if self.fp8 and name[0] == "w" else torch.uint8
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"experts' {name} must be contiguous {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
                )
        if self.slot_of_expert.dtype != torch.int32 or self.slot_of_expert.dim() != 1:
            raise ValueError(f"slot_of_expert must be int32 [experts], got {self.slot_of_expert.dtype}")
        _code_values(self.w13.device)  # kept from here on, because it cannot be made while a graph is captured

    @property
    def fp8(self) -> bool:
        return self.w13.dtype == torch.float8_e4m3fn

    @property
    def inputs(self) -> int:
        return self.w2.shape[1]

    @property
    def hidden(self) -> int:
        return self.w13.shape[1] // 2

    @property
    def experts(self) -> int:
        return self.slot_of_expert.shape[0]


def check_pool(pool: ExpertPool, name: str) -> None:
    """Raises ValueError, which names the tensor, where FP4 codes of one row do not fit e4m3 under one scale.

    A row's scales other than those of all-zero groups must lie within 2^14 of its largest, which must be at least
    2^-120.  To be called once after loading; waits for the device.  FP8 experts always fit.
    """
    if pool.fp8:
        return
    for part, codes, scales in (("w1/w3", pool.w13, pool.s13), ("w2", pool.w2, pool.s2)):
        wrong = torch.zeros(codes.shape[0], dtype=torch.bool, device=codes.device)
        for slot in range(codes.shape[0]):
            used = (codes[slot].unflatten(-1, (-1, 16)) & 0x77).amax(-1) > 0
            exponent = scales[slot].to(torch.int16)
            least = exponent.masked_fill(~used, 255).amin(-1)
            most = exponent.amax(-1)
            wrong[slot] = ((least < 255) & ((most - least > SPAN) | (most < 7)) | (most == 255)).any()
        if wrong.any():
            slot = int(wrong.int().argmax())
            raise ValueError(
                f"{name}, expert in slot {slot}, {part}: scales within a row lie more than 2^{SPAN} apart, which the "
                f"GPU's FP8 products cannot hold exactly; use device='cpu'"
            )
