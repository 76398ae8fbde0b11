"""The state of a run on disk: one file, which is either whole or not there.

Written beside its name, flushed, and moved onto it: a run that is killed, or a disk that is full, leaves the state
before it.  Holds tensors by name and a small JSON object; knows no trainer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4_engine.errors import InputError

FORM = "dsv4-training-state-1"


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Raises InputError when there is no room, and leaves what was there."""
    partial = path.with_name(path.name + ".partial")
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(own, partial, metadata={"form": FORM, "facts": json.dumps(facts)})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if no_room(error):
            size = sum(value.numel() * value.element_size() for value in own.values())
            raise InputError(
                f"no room for the run's state at {path}: {size / 1e6:.0f} MB are needed",
                "Free some space and run the same command again: it goes on from the last whole state.",
            ) from error
        raise


def no_room(error: BaseException) -> bool:
    """Whether a full disk or quota is behind it; safetensors reports that in words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in str(error) or "os error 28" in str(error)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Raises InputError for a file that is no whole state."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("form") != FORM:
                raise InputError(f"{path} is no state of a training run", "Choose another folder with --out.")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about["facts"])  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", "Delete it to start this run anew, or choose another --out."
        ) from error
