"""What the tests of `quantize` share: small jobs of many units, folders compared byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.quantize import job, run
from support.random_checkpoint import make_checkpoint, random_tensors, write_tensors

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "compress_ratios": [0, 4], "n_routed_experts": 4, "mtp": False}


def small_units() -> None:
    """Many units, steps and entries in the journal, though the checkpoint is small."""
    job.UNIT_VALUES, run.STEP_VALUES, run.SAVE_BYTES = 1 << 13, 1 << 11, 1 << 16


def source(folder: Path, *, shards: int = 3, quantised: bool = False, **settings: object) -> Path:
    """A checkpoint with a tokenizer's file, a model card, a folder beside them, and what must stay behind."""
    make_checkpoint(folder, shards=shards, quantised=quantised, **SMALL | settings)  # type: ignore[arg-type]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("# A model\n")
    (folder / "encoding").mkdir()
    (folder / "encoding" / "rules.md").write_text("Rules\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    return folder


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object], *, quantised: bool = False) -> Path:
    """A source whose tensors went through ``change`` before they were written."""
    make_checkpoint(folder, quantised=quantised, **SMALL)  # type: ignore[arg-type]
    tensors = random_tensors(ModelConfig.from_folder(folder), quantised=quantised, mtp=False)
    change(tensors)
    write_tensors(folder, tensors)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_tensors(a: Path, b: Path) -> None:
    """Both checkpoints hold the same names, types, shapes and bytes."""
    first, second = Checkpoint.open(a), Checkpoint.open(b)
    assert first.names.keys() == second.names.keys()
    for name, info in first.names.items():
        other = second.names[name]
        assert (info.dtype, info.shape) == (other.dtype, other.shape), name
        bits = (c.tensor(name).contiguous().view(torch.uint8) for c in (first, second))
        assert torch.equal(*bits), name
