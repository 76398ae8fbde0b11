"""Triton kernels for NVIDIA GPUs, one file an operation; the torch reference of each lies in the file of the same name
one folder up.  Nothing outside a module that was chosen for a GPU imports this package: it needs triton.

Some are written in Gluon, Triton's lower-level dialect, and run on compute capability 9.0 only, attention_hopper.py and
attention_few.py for instance.  Triton's interpreter does not know Gluon: on a CPU they can be compiled but not run.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST, NEWEST = (3, 6), (3, 9)


def check_triton() -> str:
    """The installed Triton's version.  Raises ValueError where it is missing or the kernels were not written for it."""
    wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    try:
        found = version("triton")
    except PackageNotFoundError as error:
        raise ValueError(f"GPU kernels need Triton {wanted}; pip install 'dsv4[gpu]', or use device='cpu'") from error
    major, minor = (int(part) for part in found.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        raise ValueError(
            f"GPU kernels need Triton {wanted}, found {found}; pip install 'dsv4[gpu]', or use device='cpu'"
        )
    return found
