"""Trained parameters to a folder in the published checkpoint format, and back for further training.

Owns the split of stacked experts and which tensor is packed how (parameters.stored_format); the byte formats are the
engine's.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import InputError
from dsv4_engine.formats import quantise_fp4, quantise_fp8_blocks
from dsv4_engine.weights import Weights

from .parameters import stored_format
from .state import no_room


def published_tensors(parameters: dict[str, Tensor], quantised: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name, packed as published; quantised=False: all floats in float32, no scales."""
    for name, stacked in parameters.items():
        form = stored_format(name)
        value = stacked.detach().cpu()
        if form == "i64":
            yield name, value
        elif form == "fp4":
            prefix, matrix = name.rsplit(".", 1)
            for expert, weight in enumerate(value):
                yield from _packed(f"{prefix}.{expert}.{matrix}", weight, form if quantised else "f32")
        elif form == "fp8":
            yield from _packed(name.removesuffix(".weight"), value, form if quantised else "f32")
        else:
            yield name, value.to(torch.bfloat16 if form == "bf16" and quantised else torch.float32)


def _packed(name: str, weight: Tensor, form: str) -> Iterator[tuple[str, Tensor]]:
    if form == "f32":
        yield f"{name}.weight", weight.clone()
        return
    data, scale = quantise_fp4(weight) if form == "fp4" else quantise_fp8_blocks(weight)
    yield f"{name}.weight", data
    yield f"{name}.scale", scale


def load_parameters(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the parameters (float32, requiring a gradient) that `save_checkpoint` wrote.

    What was packed comes back as its rounded values.  Raises ConfigError or CheckpointError for what is no checkpoint.
    """
    config = ModelConfig.from_folder(folder)
    weights = Weights.open(Checkpoint.open(folder), config)
    parameters: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, spec in weights.specs.items():
        if spec.role == "ids":
            parameters[name] = weights.tensor(name).clone()
        elif spec.role == "expert":  # in ascending order of experts
            prefix, _, matrix = name.removesuffix(".weight").rsplit(".", 2)
            stacks.setdefault(f"{prefix}.{matrix}", []).append(
                weights.weight(name.removesuffix(".weight")).dequantised(torch.float32)
            )
        elif spec.role == "linear":
            parameters[name] = weights.weight(name.removesuffix(".weight")).dequantised(torch.float32).clone()
        else:
            parameters[name] = weights.tensor(name).to(torch.float32, copy=True)
    parameters |= {name: torch.stack(parts) for name, parts in stacks.items()}
    return config, {n: t if t.dtype == torch.int64 else t.requires_grad_() for n, t in parameters.items()}


def fp4_as_fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """FP4-rounded values as e4m3 with one power-of-two scale a 128x128 block, as DeepSeek computes with them.

    Returns (data float8_e4m3fn [O, I], scale float32 [O/128, I/128]).  Every FP4 value is an e4m3 value, so this is
    exact as long as the FP4 scales of a block span at most 2^6.  Raises ValueError where a value would change.
    """
    data, scale = quantise_fp8_blocks(weight_OI)
    wide = scale.to(torch.float32).repeat_interleave(128, 0).repeat_interleave(128, 1)
    lost = int(((data.to(torch.float32) * wide) != weight_OI).sum())
    if lost:
        raise ValueError(
            f"{lost} of {weight_OI.numel()} FP4 values are none of FP8: the scales of a block span too much"
        )
    return data, scale.to(torch.float32)


def save_checkpoint(
    folder: Path, config: ModelConfig, parameters: dict[str, Tensor], tokenizer: str, quantised: bool = True
) -> int:
    """Writes config.json, model.safetensors and tokenizer.json; returns the bytes written.

    Without config.json a folder is no checkpoint, and it is written last: what is cut off half-way is never taken for a
    whole one.  Raises InputError when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in published_tensors(parameters, quantised)}
    data = config.to_dict()
    if not quantised:
        data.pop("quantization_config", None)
        data.pop("expert_dtype", None)
    texts = {
        "tokenizer.json": tokenizer,
        # So small a model is at its best when it takes the most likely token.
        "generation_config.json": '{\n "do_sample": false\n}\n',
        "config.json": json.dumps(data, indent=1) + "\n",
    }
    partial = {name: folder / f"{name}.partial" for name in ("model.safetensors", *texts)}
    try:
        save_file(tensors, partial["model.safetensors"], metadata={"format": "pt"})
        for name, text in texts.items():
            partial[name].write_text(text, encoding="utf-8")
        (folder / "config.json").unlink(missing_ok=True)
        for name, path in partial.items():
            os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if no_room(error):
            raise InputError(f"no room for the checkpoint in {folder}", "Free some space and run it again.") from error
        raise
    return sum((folder / name).stat().st_size for name in partial)
