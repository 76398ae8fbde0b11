"""Where the time of the GPUs' kernels goes, by part and kind of layer, from torch's profiler.

Knows the kernels by name and the layers by their order: each begins with its hyper-connection's kernel, on each device.
Parts are those of measure.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType

from .model import GpuModel

OUTSIDE = "outside layers"
_STARTS = "_phases"  # the first kernel of a pass on each device
_BEGINS = "_write_and_project"  # the first kernel of every sub-layer, of the write behind a stage and of the head
_KIND = {0: "window", 4: "csa", 128: "hca"}
# In attention; all of the experts' sub-layer but its hyper-connection is "experts".  The products of one layer have one
# kernel, so those of the compressors count as projections.
_PARTS = {
    "_read": "mHC", _BEGINS: "mHC", "_split_low_rank": "projections", "_finish_queries": "projections",
    "linear_": "projections", "widened_": "projections", "_linear": "projections", "_expand": "projections",
    "_round_activations": "projections", "_compress": "compressors", "_keep": "compressors", "_unpack_keys": "indexer",
    "_scores": "indexer", "select_best": "indexer", "attention_hopper": "core attention",
    "_attention": "core attention", "_add_chains": "core attention", "_move": "core attention",
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, the GPU's number, and when it ran, in microseconds."""

    name: str
    device: int
    start: float
    microseconds: float


@contextmanager
def profiled() -> Iterator[list[Kernel]]:
    """Every kernel and copy that GPUs do meanwhile, in the order of their starts; the list is filled at the end."""
    found: list[Kernel] = []
    _wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        yield found
        _wait()
    found += [
        Kernel(event.name, event.device_index, event.time_range.start, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    found.sort(key=lambda kernel: kernel.start)


def _wait() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def by_part(kernels: Sequence[Kernel], model: GpuModel) -> dict[tuple[str, str], tuple[float, int]]:
    """Seconds and launches by (part, kind of layer) of whole forward passes, with or without logits behind them."""
    found: dict[tuple[str, str], tuple[float, int]] = {}
    for stage in model.stages:
        mine = [kernel for kernel in kernels if kernel.device == (stage.device.index or 0)]
        for key, seconds in _placed(mine, model.config.compress_ratios[stage.first : stage.last]):
            total, launches = found.get(key, (0.0, 0))
            found[key] = total + seconds, launches + 1
    return found


def _placed(kernels: Sequence[Kernel], ratios: Sequence[int]) -> Iterator[tuple[tuple[str, str], float]]:
    """A pass begins with its positions' phases; behind its last layer the streams are written, and the head may read
    them.  Raises ValueError for kernels in another order.
    """
    sub_layers = [(kind, part) for kind in (_KIND[ratio] for ratio in ratios) for part in ("attention", "experts")]
    begun = 0
    for kernel in kernels:
        named = next((part for prefix, part in _PARTS.items() if kernel.name.startswith(prefix)), "other")
        if kernel.name == _STARTS:
            if begun not in (0, len(sub_layers) + 1, len(sub_layers) + 2):
                raise ValueError(f"a pass of {len(sub_layers)} sub-layers ran {begun} hyper-connections")
            begun = 0
        begun += kernel.name == _BEGINS
        if 0 < begun <= len(sub_layers):
            kind, part = sub_layers[begun - 1]
            key = (named if named == "mHC" or part == "attention" else "experts", kind)
        elif begun == len(sub_layers) + 1 and kernel.name == _BEGINS:
            key = ("mHC", OUTSIDE)
        else:
            key = ("head" if begun == len(sub_layers) + 2 else "other", OUTSIDE)
        yield key, kernel.microseconds * 1e-6


@dataclass
class KernelClock:
    """As measure.Stopwatch, for this backend: what the kernels take, not what lies between them."""

    model: Any
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, all that the GPUs run is timed."""
        with profiled() as kernels:
            yield
        self.seconds = {key: seconds for key, (seconds, _) in by_part(kernels, self.model).items()}
