"""A checkpoint folder of random weights in a configuration's published formats, to time a model that is not there.

Owns the reduction to one layer of each kind and how values are drawn, so that activations keep their size and routing
spreads over the experts.  The folder is loaded like any other: what is timed is the real path.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import InputError
from dsv4_engine.weights import FLOAT32, Form, Published, Spec, scale_shape

_SHARD_BYTES = 1 << 30
CODES_RMS = {"fp4": 2.93, "fp8": 1.46}  # of the codes drawn below, before their scale


def one_layer_of_each_kind(config: ModelConfig) -> ModelConfig:
    """The same model with one layer of each kind that it has, in the order window, CSA, HCA, and no MTP block."""
    ratios = tuple(sorted(set(config.compress_ratios)))
    return replace(
        config,
        num_hidden_layers=len(ratios),
        compress_ratios=ratios,
        num_hash_layers=0,
        num_nextn_predict_layers=0,
        mtp_compress_ratios=(),
        dspark=None,
    )


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model cut after its first layers, without the MTP block.  Raises InputError for more than it has."""
    if not 1 <= layers <= config.num_hidden_layers:
        message = f"{layers} layers cannot be taken of a model that has {config.num_hidden_layers}"
        raise InputError(message, f"Give 1 to {config.num_hidden_layers}.")
    return replace(
        config,
        num_hidden_layers=layers,
        compress_ratios=config.compress_ratios[:layers],
        num_hash_layers=min(config.num_hash_layers, layers),
        num_nextn_predict_layers=0,
        mtp_compress_ratios=(),
        dspark=None,
    )


def random_checkpoint(
    folder: Path, config: ModelConfig, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write config.json and safetensors shards into ``folder``, which must exist; returns it.

    progress(done, total) counts bytes.  Raises InputError when the disk has no room for it.
    """
    published = Published(config)
    specs = published.specs
    total = sum(published.nbytes(name) for name in specs)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise InputError(
            f"random weights take {total / 2**30:.1f} GiB on disk, and {folder} has {free / 2**30:.1f} GiB",
            "Free space, or set TMPDIR to a folder on a larger disk.",
        )
    generator = np.random.Generator(np.random.SFC64(seed))
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    done = held = 0

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, spec in specs.items():
        for part, value in _tensors(name, spec, published.form(name), config, generator):
            shard[part] = value
            held += value.nbytes
        if held >= _SHARD_BYTES:
            write()
            done, held = done + held, 0
            if progress is not None:
                progress(done, total)
    if shard:
        write()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _tensors(
    name: str, spec: Spec, form: Form, config: ModelConfig, generator: np.random.Generator
) -> Iterator[tuple[str, Tensor]]:
    """One tensor under its published name, and its scale where it has one."""
    if spec.role == "ids":  # as many different experts a token as are used
        first = torch.from_numpy(generator.integers(config.n_routed_experts, size=(spec.shape[0], 1)))
        yield name, (first + torch.arange(spec.shape[1])) % config.n_routed_experts
        return
    if form == "plain":
        value = torch.from_numpy(_plain(name, spec, generator))
        yield name, value if any(part in name for part in FLOAT32) else value.to(torch.bfloat16)
        return
    rows, columns = spec.shape
    codes = np.frombuffer(generator.bytes(rows * columns // (2 if form == "fp4" else 1)), np.uint8)
    if form == "fp4":  # any byte is two codes
        yield name, torch.from_numpy(codes.copy()).view(torch.int8).view(rows, columns // 2)
    else:  # sign and mantissa at random, exponent 0: 1 to 1.875 either way, never NaN
        yield name, torch.from_numpy(codes & 0x87 | 0x38).view(torch.float8_e4m3fn).view(rows, columns)
    exponent = round(math.log2(1 / (math.sqrt(columns) * CODES_RMS[form])))
    scale = torch.full(scale_shape(spec.shape, form), 127 + exponent, dtype=torch.uint8)
    yield name.removesuffix(".weight") + ".scale", scale.view(torch.float8_e8m0fnu)


def _plain(name: str, spec: Spec, generator: np.random.Generator) -> np.ndarray:
    """float32; a matrix keeps the size of what it multiplies."""
    if name.endswith(("norm.weight", "_scale")):
        return np.ones(spec.shape, np.float32)
    if len(spec.shape) == 1 or name.endswith(".ape"):
        return np.zeros(spec.shape, np.float32)
    value = generator.standard_normal(spec.shape, np.float32)
    if name != "embed.weight":
        value *= np.float32(1 / math.sqrt(spec.shape[-1]))
    return value
