"""Which implementation of the operations runs on a device, chosen once and said by the caller.

A device that is not there, or that this build of torch cannot use, is an error that says why, never a silent fallback.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """What computes the operations: ``name`` for people and reports, ``device`` for tensors."""

    name: str
    device: torch.device


def choose_backend(device: str) -> Backend:
    """The backend for ``device``: cpu, cuda (torch's current one) or cuda:N.

    Choosing a GPU switches TF32 off in this process, because float32 products are to be float32 (docs/numerics.md).
    Raises ValueError, which says why, when the device is unknown, absent, or too old or new for this build of torch.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}") from error
    if parsed.type == "cpu":
        return Backend("torch", torch.device("cpu"))
    if parsed.type != "cuda":
        raise ValueError(f"device {device!r}: dsv4 computes on cpu and cuda")
    if torch.version.cuda is None:
        raise ValueError(f"device {device!r}: this build of torch ({torch.__version__}) has no CUDA")
    if not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch finds no NVIDIA GPU with a working driver")
    index, count = torch.cuda.current_device() if parsed.index is None else parsed.index, torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device {device!r}: this machine's GPUs are cuda:0 to cuda:{count - 1}")
    try:
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:  # this build of torch has no code for the GPU, or another process has it to itself
        why = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} ({torch.cuda.get_device_name(index)}) does not compute: {why}") from error
    torch.set_float32_matmul_precision("highest")
    return Backend("torch", torch.device("cuda", index))
