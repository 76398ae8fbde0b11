"""How one routed expert lies in a slot of a pool, packed as in the files.

A pool is four tensors, [slots, ...] each, in the layout that the GPU kernels read: w13 (gate above up) and w2, and the
scales of both.  Knows sizes and views; reads no file.  Letters: N slots, D hidden, I expert hidden.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from dsv4_engine.accounting import readable_bytes
from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import MemoryPlanError
from dsv4_engine.weights import Form, scale_shape
from dsv4_kernels.linear import Weight
from dsv4_kernels.moe import Expert

MATRICES = ("w1", "w3", "w2")
_PIECE = 1 << 30  # bytes that are got at once, in which Ctrl-C is not heard


@dataclass(frozen=True)
class ExpertLayout:
    """form: "fp4" | "fp8" | "plain"; dtype: of the data.  fp4: int8 [O, I/2]; scales e8m0 (formats.py)."""

    form: Form
    dtype: torch.dtype
    hidden: int
    inner: int

    @classmethod
    def published(cls, config: ModelConfig) -> ExpertLayout:
        """As the configuration says that the experts were published."""
        form: Form = "plain"
        if config.quantization is not None:
            form = "fp4" if config.expert_dtype == "fp4" else "fp8"
        dtype = {"plain": torch.bfloat16, "fp4": torch.int8, "fp8": torch.float8_e4m3fn}[form]
        return cls(form, dtype, config.hidden_size, config.moe_intermediate_size)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Shapes of one slot's tensors: w13, w2, and with a packed form s13, s2."""
        up, down = (self.inner, self.hidden), (self.hidden, self.inner)
        pack = 2 if self.form == "fp4" else 1
        shapes = {"w13": (2 * up[0], up[1] // pack), "w2": (down[0], down[1] // pack)}
        if self.form != "plain":
            rows, columns = scale_shape(up, self.form)
            shapes |= {"s13": (2 * rows, columns), "s2": scale_shape(down, self.form)}
        return shapes

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(prod(shape) * self._dtype(name).itemsize for name, shape in self.shapes.items())

    def _dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name.startswith("s") else self.dtype

    def pool(self, slots: int, device: torch.device | str = "cpu", pinned: bool = False) -> ExpertPool:
        """Memory for ``slots`` experts, zeros.  pinned: page-locked, for copies to a GPU."""
        tensors = {}
        for name, shape in self.shapes.items():
            whole, dtype = (slots, *shape), self._dtype(name)
            if torch.device(device).type == "cpu":
                tensors[name] = _memory(prod(whole) * dtype.itemsize).view(dtype).view(whole)
            else:
                tensors[name] = torch.zeros(whole, dtype=dtype, device=device)
        pool = ExpertPool(self, tensors)
        if pinned:
            _lock(pool)
        return pool


def _memory(size: int) -> Tensor:
    """uint8 [size] of zeros in pages of the system's own, large ones where it has them."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages uses small ones
            block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


def _lock(pool: ExpertPool) -> None:
    """Lock the pool's pages as long as it lives.  (What torch allocates locked it rounds up to a power of two.)"""
    runtime = torch.cuda.cudart()
    for tensor in pool.tensors.values():
        for piece in tensor.view(torch.uint8).flatten().split(_PIECE):
            piece.zero_()  # so that all cores have a part in getting the pages
        if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
            raise MemoryPlanError(
                f"the system does not lock {readable_bytes(tensor.nbytes)} of memory, which copies to a GPU need",
                "Give less memory (--cpu-mem), or raise the limit on locked memory (ulimit -l).",
            )
        weakref.finalize(pool, runtime.cudaHostUnregister, tensor.data_ptr()).atexit = False


@dataclass(frozen=True)
class ExpertPool:
    """Slots for experts.  tensors: by the names of `ExpertLayout.shapes`, [N, ...] each; scales as their bytes."""

    layout: ExpertLayout
    tensors: Mapping[str, Tensor]

    @property
    def slots(self) -> int:
        return self.tensors["w13"].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def part(self, slot: int, matrix: str, scale: bool = False) -> Tensor:
        """One matrix of a slot, or its scale: a view."""
        if matrix == "w2":
            return self.tensors["s2" if scale else "w2"][slot]
        both = self.tensors["s13" if scale else "w13"][slot]
        half = both.shape[0] // 2
        return both[:half] if matrix == "w1" else both[half:]

    def expert(self, slot: int) -> Expert:
        """The expert in a slot, over the pool's memory."""
        w1, w3, w2 = (self._weight(slot, matrix) for matrix in MATRICES)
        return Expert((w1, w3), w2)

    def _weight(self, slot: int, matrix: str) -> Weight:
        data = self.part(slot, matrix)
        if self.layout.form == "plain":
            return Weight(data)
        scale = self.part(slot, matrix, scale=True).view(torch.float8_e8m0fnu)
        return Weight(data, scale, self.layout.form, round_activations=True)
