"""Which implementation of the operations runs on a device, chosen once and said by the caller.

A device that is not there, or that this build of torch cannot use, is an error that says why, never a silent fallback.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEAST_CAPABILITY = (9, 0)  # of the Triton kernels: what they were written for and measured on


@dataclass(frozen=True)
class Backend:
    """What computes the operations: ``name`` for people and reports, ``device`` for tensors.

    name: torch | triton.  devices: all of them, the layers' own where there are several; device: the first.  why: what
    speaks against the Triton kernels on a GPU, "" where nothing does or there is none.
    """

    name: str
    device: torch.device
    devices: tuple[torch.device, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        if not self.devices:
            object.__setattr__(self, "devices", (self.device,))

    def __str__(self) -> str:
        """The devices as they are named on the command line."""
        return ",".join(map(str, self.devices))


def choose_backend(device: str) -> Backend:
    """The backend of torch's own operations for ``device``: cpu, cuda (torch's current one), cuda:N, several of these
    with commas between them, or cuda:all.

    Choosing a GPU switches TF32 off in this process, because float32 products are to be float32 (docs/numerics.md).
    Raises ValueError, which says why, when a device is unknown, absent, or too old or new for this build of torch.
    """
    if device == "cuda:all":
        count = torch.cuda.device_count() if torch.version.cuda is not None and torch.cuda.is_available() else 0
        names = [f"cuda:{index}" for index in range(count)] or ["cuda"]
    else:
        names = device.split(",")
    devices = tuple(_device(name) for name in names)
    if len(devices) > 1 and (devices[0].type == "cpu" or len(set(devices)) < len(devices)):
        raise ValueError(f"device {device!r}: layers can be spread over different GPUs only")
    return Backend("torch", devices[0], devices)


def _device(name: str) -> torch.device:
    try:
        parsed = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}") from error
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise ValueError(f"device {name!r}: dsv4 computes on cpu and cuda")
    if torch.version.cuda is None:
        raise ValueError(f"device {name!r}: this build of torch ({torch.__version__}) has no CUDA")
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no NVIDIA GPU with a working driver")
    index, count = torch.cuda.current_device() if parsed.index is None else parsed.index, torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device {name!r}: this machine's GPUs are cuda:0 to cuda:{count - 1}")
    try:
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()
    except RuntimeError as error:  # this build of torch has no code for the GPU, or another process has it to itself
        why = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} ({torch.cuda.get_device_name(index)}) does not compute: {why}") from error
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", index)


def too_old_for_triton(backend: Backend) -> str:
    """Why the Triton kernels cannot run on these GPUs, or ""."""
    for device in backend.devices:
        if device.type != "cuda":
            return f"there is no GPU on {device}"
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            wanted = ".".join(map(str, LEAST_CAPABILITY))
            found = ".".join(map(str, capability))
            return f"{torch.cuda.get_device_name(device)} has compute capability {found}, below {wanted}"
    return ""
