"""Routed experts read from a checkpoint's files into slots.

Reads with pread into memory of the pool's own, not through a mapping: mapped pages would count as the process's memory
without a bound, while what the system keeps of the files in spare memory makes the second read fast and costs nothing.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv4_engine.checkpoint import DTYPES, TensorInfo
from dsv4_engine.errors import CheckpointError
from dsv4_engine.formats import float32_to_e8m0
from dsv4_engine.offload.layout import MATRICES, ExpertLayout, ExpertPool
from dsv4_engine.weights import Weights

LEAST_EXPONENT = 7  # of a row's largest scale, as its byte: 2^-120
_DAMAGED = "Download the checkpoint again: its contents are damaged."


def expert_layout(weights: Weights) -> ExpertLayout:
    """How this checkpoint's experts lie in a pool.  Raises CheckpointError where they do not all lie alike."""
    config = weights.config
    kinds = {
        (weights.forms[name], weights.places(name)[0].dtype)
        for name, spec in weights.specs.items()
        if spec.role == "expert"
    }
    if len(kinds) != 1:
        found = ", ".join(sorted(f"{form} as {dtype}" for form, dtype in kinds)) or "none"
        raise CheckpointError(
            f"{weights.checkpoint.folder}: experts in one form are needed to hold them apart, found {found}",
            "Use the published checkpoint, or a machine that holds the whole model.",
        )
    ((form, dtype),) = kinds
    return ExpertLayout(form, DTYPES[dtype], config.hidden_size, config.moe_intermediate_size)


def expert_layers(weights: Weights, mtp: bool = True) -> list[str]:
    """The prefixes of all layers with experts, in the order in which they are computed: "layers.0.ffn.", ..."""
    layers = [f"layers.{i}.ffn." for i in range(weights.config.num_hidden_layers)]
    return layers + (["mtp.0.ffn."] if mtp and weights.has_mtp else [])


class ExpertFiles:
    """Reads an expert by its layer's number and its own.  Several threads may read at once.

    binades: the most that a matrix row's scales may span, which is what the GPU's kernels hold exactly; None: any.
    mtp: the MTP block's are among them, where there is one.
    """

    def __init__(self, weights: Weights, binades: int | None = None, mtp: bool = True) -> None:
        self.weights, self.layers, self.binades = weights, expert_layers(weights, mtp), binades
        self.layout = expert_layout(weights)
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._open)

    def read(self, layer: int, expert: int, pool: ExpertPool, slot: int) -> int:
        """Fill a slot; returns the bytes read.  Raises CheckpointError that names the file or the tensor."""
        total = 0
        for matrix in MATRICES:
            name = f"{self.layers[layer]}experts.{expert}.{matrix}.weight"
            data, scale = self.weights.places(name)
            self._fill(data, pool.part(slot, matrix))
            total += data.nbytes
            if scale is not None:
                self._fill_scale(name, scale, pool.part(slot, matrix, scale=True))
                self._check_rows(name, pool.part(slot, matrix), pool.part(slot, matrix, scale=True))
                total += scale.nbytes
        return total

    def _fill_scale(self, name: str, info: TensorInfo, into: Tensor) -> None:
        if info.dtype == "F32":  # the Base checkpoints hold the same powers of two as float32
            values = torch.empty(info.shape)
            self._fill(info, values)
            mantissa, _ = torch.frexp(values)
            bad = not bool(((values >= 2.0**-126) & (values <= 2.0**127) & (mantissa == 0.5)).all())
            into.copy_(float32_to_e8m0(values).view(torch.uint8))
        else:
            self._fill(info, into)
            bad = int(into.max()) == 255
        if bad:
            raise CheckpointError(
                f"{info.file}: the scale of {name} holds NaN or a value that is no power of two", _DAMAGED
            )

    def _check_rows(self, name: str, data: Tensor, scale: Tensor) -> None:
        """As dsv4_kernels.triton.moe.check_pool: groups of zeros may have any scale."""
        if self.binades is None or self.layout.form != "fp4":
            return
        scale_OB = scale.numpy()
        if int(scale_OB.max()) - int(scale_OB.min()) <= self.binades and int(scale_OB.min()) >= LEAST_EXPONENT:
            return  # nearly always
        used_OB = (data.view(torch.uint8).numpy().reshape(*scale_OB.shape, -1) & 0x77).any(-1)
        most, least = scale_OB.max(1).astype(int), np.where(used_OB, scale_OB, 255).min(1).astype(int)
        if ((least < 255) & ((most - least > self.binades) | (most < LEAST_EXPONENT))).any():
            raise CheckpointError(
                f"{name} has rows whose scales span more than {self.binades} binades, which the GPU's kernels do not "
                "hold exactly",
                "Use --dtype float32, which runs on torch's own operations.",
            )

    def _fill(self, info: TensorInfo, into: Tensor) -> None:
        view = memoryview(into.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
        done = 0
        try:
            handle = self._handle(info.file)
            while done < info.nbytes:
                count = os.preadv(handle, [view[done:]], info.start + done)
                if not count:
                    raise CheckpointError(f"{info.file} became shorter while it was read", _DAMAGED)
                done += count
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error.strerror}", "Check the disk.") from error

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._open[file]


def _close(handles: dict[Path, int]) -> None:
    for handle in handles.values():
        os.close(handle)
