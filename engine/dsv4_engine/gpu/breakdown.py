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
    _BEGINS: "mHC", "_read": "mHC", "_split_low_rank": "projections",
    "_finish_queries": "projections", "linear_": "projections", "widened_": "projections", "_linear": "projections",
    "_expand": "projections", "_round_activations": "projections", "_compress": "compressors", "_pool": "compressors",
    "_finish": "compressors", "_unpack_keys": "indexer", "_scores": "indexer", "score_far": "indexer",
    "rank_units": "indexer", "gather_candidates": "indexer", "rank_candidates": "indexer",
    "place_candidates": "indexer", "select_best": "indexer", "count_better": "indexer", "write_best": "indexer",
    "attention_hopper": "core attention",
    "score_keys": "core attention", "sum_values": "core attention", "_attention": "core attention",
    "_add_chains": "core attention", "_move": "core attention",
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, the GPU's number, and when it ran, in microseconds."""

    name: str
    device: int
    start: float
    microseconds: float

    @property
    def end(self) -> float:
        return self.start + self.microseconds


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
    """Seconds and launches by (part, kind of layer) of whole forward passes, with or without logits behind them.

    A kernel's seconds are those by which it ends behind all that began before it: kernels overlap, on two streams and
    where one is started early to wait for the one in front, and so the seconds of a pass add up to what it took.
    """
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
    begun, ended = 0, 0.0
    for kernel in kernels:
        # Within layers also the time in which nothing ran; between passes the GPU may have had nothing to do.
        since = ended if 0 < begun <= len(sub_layers) else max(ended, kernel.start)
        added, ended = max(0.0, kernel.end - since), max(ended, kernel.end)
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
        yield key, added * 1e-6


@dataclass
class KernelClock:
    """As measure.Stopwatch, for this backend: what the kernels take, not what the host takes between passes."""

    model: Any
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, all that the GPUs run is timed."""
        with profiled() as kernels:
            yield
        self.seconds = {key: seconds for key, (seconds, _) in by_part(kernels, self.model).items()}
