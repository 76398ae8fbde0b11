"""What a launch has to know of its GPU.  Asked for at every launch, so the driver is asked once."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels for compute capability 9.0 run there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@lru_cache(maxsize=16)
def processors_of(device: torch.device) -> int:
    """Multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count
