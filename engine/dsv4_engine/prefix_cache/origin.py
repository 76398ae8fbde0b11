"""What must be equal for kept state to be usable: the model, and everything that decides the bits of its arithmetic.

Owns the two texts that every key begins with.  They err towards "different": a miss costs time, a wrong hit is wrong.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch

from ..engine import Engine
from .keys import Origin
from .policy import Grid

# Raised when the arithmetic or the order of bytes in rows.py changes: what was kept before is then no longer found.
ARITHMETIC = 3
_READ_WHOLE = 64 << 20


def grid_of(engine: Engine) -> Grid:
    """Where the sessions of ``engine`` can be entered."""
    return Grid.of(engine.chunk, engine.config.sliding_window, engine.config.num_hidden_layers)


def origin_of(engine: Engine) -> Origin:
    """The origin of what ``engine`` computes."""
    grid = grid_of(engine)
    parts = {
        "arithmetic": ARITHMETIC,
        "kv": engine.kv_dtype,
        "dtype": engine.dtype,
        "expanded": engine.plan.expand,
        "chunk": grid.chunk,
        "lanes": engine.plan.lanes,
        "segment": grid.segment,
        "backend": engine.backend.name,
        "torch": torch.__version__,
        "machine": _machine(engine.backend.device),
    }
    return Origin(_model(engine), " ".join(f"{name}={value}" for name, value in parts.items()), engine.name)


def _model(engine: Engine) -> str:
    """Digest of a small checkpoint's tensors; of a large one the fingerprint and when and how large its files are.

    The fingerprint holds the small tensors only, which merging an adapter leaves as they were.
    """
    weights = engine.weights
    digest = hashlib.blake2b(weights.fingerprint.encode(), digest_size=32)
    if weights.total_bytes <= _READ_WHOLE:
        for name in sorted(weights.checkpoint.names):
            tensor = weights.checkpoint.tensor(name).contiguous().flatten()
            digest.update(name.encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    else:
        for file in sorted({info.file for info in weights.checkpoint.names.values()}):
            about = file.stat()
            digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()


def _machine(device: torch.device) -> str:
    """What libraries choose their instructions by, without spaces.  On a CPU the number of threads is part of it: it
    decides how a product is split, and rows at the edge of a part are rounded differently."""
    if device.type != "cpu":
        return "-".join(torch.cuda.get_device_name(device).split())
    capability = torch.backends.cpu.get_cpu_capability()
    about = f"{platform.machine()} {_cpu_name()} {capability} {torch.get_num_threads()} threads"
    return "-".join(about.split())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
