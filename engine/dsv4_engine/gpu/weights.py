"""Weights as the Triton kernels want them, made on their device: from a checkpoint's packed tensors, or at random.

Owns which tensors are stacked (those that read the same input) and that nothing is unpacked on the way.  Knows the
forms of weights.py and the kernels' types; what the tensors are for is layer.py's business.
Letters: O outputs, I inputs, E experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsv4_kernels.triton.linear import Fp8Matrix, split_float32
from dsv4_kernels.triton.moe import ExpertPool

from ..config import FP4_BLOCK, FP8_BLOCK, ModelConfig
from ..errors import CheckpointError
from ..random_weights import CODES_RMS, FLOAT32
from ..weights import Form, Spec, Weights, tensor_specs
from .plan import published_form


class PackedSource(ABC):
    """Where the layers of one device take their weights from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elsewhere: dict[str, ExpertPool] = {}  # by layer's prefix: experts that are not this source's (apart.py)

    @property
    @abstractmethod
    def specs(self) -> Mapping[str, Spec]: ...

    @abstractmethod
    def form(self, name: str) -> Form: ...

    @abstractmethod
    def raw(self, name: str) -> Tensor:
        """A float or id tensor in its type on disk, on the device."""

    @abstractmethod
    def packed_into(self, name: str, data: Tensor, scale: Tensor) -> None:
        """The packed matrix ``name`` (without `.weight`) into uint8 [O, bytes] and uint8 scales on the device."""

    def tensor(self, name: str) -> Tensor:
        """A small float tensor in float32."""
        return self.raw(name).float().contiguous()

    def plain(self, *names: str) -> Tensor:
        """Unquantised matrices that read the same input, one below the other: bfloat16 [sum of O, I], or [3, O, I],
        the parts that add up to them, where one is float32 on disk.
        """
        matrices = [self.raw(f"{name}.weight") for name in names]
        if any(matrix.dtype != torch.bfloat16 for matrix in matrices):
            return split_float32(torch.cat([matrix.float() for matrix in matrices]))
        return matrices[0].contiguous() if len(matrices) == 1 else torch.cat(matrices)

    def fp8(self, *names: str) -> Fp8Matrix:
        """FP8 matrices that read the same input, one below the other."""
        shapes = [self.specs[f"{name}.weight"].shape for name in names]
        for name, shape in zip(names, shapes, strict=True):
            if shape[0] % FP8_BLOCK or shape[1] % FP8_BLOCK:
                raise CheckpointError(
                    f"{name} is {shape[0]} x {shape[1]}, and the GPU's kernels take multiples of {FP8_BLOCK}",
                    "Use --dtype float32, which runs on torch's own operations.",
                )
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        data = torch.empty(rows, columns, dtype=torch.uint8, device=self.device)
        scale = torch.empty(rows // FP8_BLOCK, columns // FP8_BLOCK, dtype=torch.uint8, device=self.device)
        first = 0
        for name, shape in zip(names, shapes, strict=True):
            last = first + shape[0]
            self.packed_into(name, data[first:last], scale[first // FP8_BLOCK : last // FP8_BLOCK])
            first = last
        return Fp8Matrix(data.view(torch.float8_e4m3fn), scale)

    def experts(self, prefix: str, config: ModelConfig, slots: int | None = None) -> ExpertPool:
        """All routed experts of a layer in the order of their numbers, or room for ``slots`` of them, not filled."""
        if prefix in self.elsewhere:
            return self.elsewhere[prefix]
        hidden, inner, number = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        held = number if slots is None else slots
        four = self.form(f"{prefix}experts.0.w1.weight") == "fp4"

        def room(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
            bytes_, block = (inputs // 2, FP4_BLOCK) if four else (inputs, FP8_BLOCK)
            scales = (held, outputs if four else outputs // FP8_BLOCK, inputs // block)
            return (
                torch.empty(held, outputs, bytes_, dtype=torch.uint8, device=self.device),
                torch.empty(scales, dtype=torch.uint8, device=self.device),
            )

        w13, s13 = room(2 * inner, hidden)
        w2, s2 = room(hidden, inner)
        slot_of = torch.arange(number, dtype=torch.int32, device=self.device)
        if slots is None:
            cut = s13.shape[1] // 2
            for expert in range(number):
                name = f"{prefix}experts.{expert}."
                self.packed_into(f"{name}w1", w13[expert, :inner], s13[expert, :cut])
                self.packed_into(f"{name}w3", w13[expert, inner:], s13[expert, cut:])
                self.packed_into(f"{name}w2", w2[expert], s2[expert])
        else:
            slot_of.fill_(-1)
        if not four:
            w13, w2 = w13.view(torch.float8_e4m3fn), w2.view(torch.float8_e4m3fn)
        return ExpertPool(w13, s13, w2, s2, slot_of)


class CheckpointSource(PackedSource):
    """A checkpoint's own tensors.  seen(bytes) is called for every tensor taken, with its size on disk."""

    def __init__(self, weights: Weights, device: torch.device, seen: Callable[[int], object] | None = None) -> None:
        super().__init__(device)
        self._weights, self._seen = weights, seen

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._weights.specs

    def form(self, name: str) -> Form:
        return self._weights.forms[name]

    def raw(self, name: str) -> Tensor:
        self._saw(name)
        return self._weights.tensor(name).to(self.device, copy=True)  # aligned, as in the file it need not be

    def packed_into(self, name: str, data: Tensor, scale: Tensor) -> None:
        self._saw(f"{name}.weight")
        weight = self._weights.weight(name)
        assert weight.scale is not None
        data.copy_(weight.data.view(torch.uint8))
        scale.copy_(weight.scale.view(torch.uint8))

    def _saw(self, name: str) -> None:
        if self._seen is not None:
            self._seen(self._weights.nbytes(name))


class RandomSource(PackedSource):
    """Random weights in a configuration's published formats, drawn on the device as random_weights.py draws them."""

    def __init__(self, config: ModelConfig, device: torch.device, seed: int = 0) -> None:
        super().__init__(device)
        self.config, self.seed, self._specs = config, seed, tensor_specs(config, mtp=False)
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self._specs

    def form(self, name: str) -> Form:
        return published_form(self._specs[name], self.config)

    def raw(self, name: str) -> Tensor:
        spec, generator = self._specs[name], self._generator
        if spec.role == "ids":  # as many different experts a token as are used
            first = torch.randint(
                self.config.n_routed_experts, (spec.shape[0], 1), generator=generator, device=self.device
            )
            return (first + torch.arange(spec.shape[1], device=self.device)) % self.config.n_routed_experts
        kind = torch.float32 if any(part in name for part in FLOAT32) else torch.bfloat16
        if name.endswith(("norm.weight", "_scale")):
            return torch.ones(spec.shape, dtype=kind, device=self.device)
        if len(spec.shape) == 1 or name.endswith(".ape"):
            return torch.zeros(spec.shape, dtype=kind, device=self.device)
        value = torch.randn(spec.shape, generator=generator, dtype=kind, device=self.device)
        return value if name == "embed.weight" else value.mul_(1 / math.sqrt(spec.shape[-1]))

    def packed_into(self, name: str, data: Tensor, scale: Tensor) -> None:
        form = self.form(f"{name}.weight")
        data.random_(0, 256, generator=self._generator)
        if form == "fp8":  # sign and mantissa at random, exponent 0: never NaN
            data.bitwise_and_(0x87).bitwise_or_(0x38)
        columns = self._specs[f"{name}.weight"].shape[1]
        scale.fill_(127 + round(math.log2(1 / (math.sqrt(columns) * CODES_RMS[form]))))
