"""A checkpoint's tensors as one model's weights: every name, shape and dtype checked before any compute.

Owns which tensors a configuration needs under which published name, and which forms each may have on disk.  Knows
neither the file format (checkpoint.py) nor what the tensors are for (model.py and its neighbours).
Source of names, shapes and dtypes: the published checkpoints (facts on checkpoints).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from dsv4_engine.checkpoint import Checkpoint, TensorInfo
from dsv4_engine.config import FP4_BLOCK, FP8_BLOCK, ModelConfig
from dsv4_engine.errors import CheckpointError
from dsv4_engine.formats import float32_to_e8m0
from dsv4_kernels.linear import Weight

Form = Literal["plain", "fp8", "fp4"]
# What a tensor may be: an expert's matrix, another quantised matrix, any other float tensor, or token-to-expert ids.
Role = Literal["expert", "linear", "float", "ids"]
FORMS: Mapping[Role, tuple[Form, ...]] = {
    "expert": ("fp4", "fp8", "plain"), "linear": ("fp8", "plain"), "float": ("plain",), "ids": ("plain",)
}  # fmt: skip
FLOAT32 = ("hc_", ".ape", ".attn_sink", ".gate.bias")  # in published files; other plain floats are BF16
SMALL = 1 << 20  # elements up to which a float tensor is searched for NaN when opened
_FINGERPRINT_BYTES = 1 << 16
_SHOWN = 5
_HINT = "The folder's config.json and its tensors must come from the same published checkpoint."


@dataclass(frozen=True)
class Spec:
    """One tensor that a configuration needs; a matrix' name ends in `.weight` and its shape is (out, in)."""

    role: Role
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """A model's weights.  `specs` holds what is used under its published name, `forms` how each lies on disk.

    unused: names that are legal here and never read (a DSpark drafter).  has_mtp: whether the MTP block is there.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    specs: Mapping[str, Spec]
    forms: Mapping[str, Form]
    unused: tuple[str, ...]
    has_mtp: bool
    fingerprint: str
    _names: Mapping[str, str]

    @classmethod
    def open(cls, checkpoint: Checkpoint, config: ModelConfig, *, values: bool = True) -> Weights:
        """Match every tensor with the configuration: nothing missing, nothing left over, shapes, dtypes, scales.

        values: check_values as well.  Raises CheckpointError naming the tensors, the first few where there are many.
        """
        names = _published_names(checkpoint)
        unused = tuple(sorted(n for n in names if n.startswith("mtp."))) if config.dspark else ()
        left = names.keys() - set(unused)
        has_mtp = config.dspark is None and config.num_nextn_predict_layers > 0
        has_mtp = has_mtp and any(n.startswith("mtp.") for n in left)
        _check_expert_count(left, config)
        specs = dict(_specs(config, has_mtp))

        problems: list[str] = []
        forms: dict[str, Form] = {}
        scales: dict[str, str] = {}
        for name, spec in specs.items():
            info = checkpoint.names.get(names.get(name, ""))
            if info is None:
                problems.append(f"{name} is missing")
                continue
            form = _form_of(spec, info)
            if form is None:
                problems.append(f"{name} is {info.dtype} {list(info.shape)}, expected {_expected(spec)}")
            else:
                forms[name] = form
            scale_name = name.removesuffix(".weight") + ".scale"
            if form in ("fp8", "fp4"):
                scale = checkpoint.names.get(names.get(scale_name, ""))
                problem = f"{scale_name} is missing" if scale is None else _scale_problem(scale, spec.shape, form)
                if problem:
                    problems.append(problem if scale is None else f"{scale_name} {problem}")
            if form != "plain":
                scales[scale_name] = name
        over = left - specs.keys() - scales.keys()
        problems += [f"{name} is left over" for name in sorted(over)]
        _raise(checkpoint, problems, _hint(over, config))
        weights = cls(
            checkpoint,
            config,
            MappingProxyType(specs),
            MappingProxyType(forms),
            unused,
            has_mtp,
            _fingerprint(checkpoint, config, names, specs),
            MappingProxyType(names),
        )
        if values:
            weights.check_values()
        return weights

    def check_values(
        self, seen: Callable[[int], object] | None = None, apart: Collection[int] = (), read: bool = False
    ) -> None:
        """Refuse NaN in scales and small tensors, and expert ids out of range, with a CheckpointError.

        Reads one part in 17 of an FP4 checkpoint, so it can take a while where that is large: plan memory first.
        seen(bytes) is called for every tensor with its size on disk.  apart: layers whose experts are checked when they
        are read (offload/disk.py); the MTP block's are too, where there are such layers.  read: those are seen then.
        """
        hint = "Download the checkpoint again: its contents are damaged."
        later = tuple(f"layers.{layer}.ffn.experts." for layer in apart) + (("mtp.0.ffn.experts.",) if apart else ())
        _raise(self.checkpoint, list(self._bad_values(seen, later, read)), hint)

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of all tensors in `specs`, their scales included."""
        return sum(self.nbytes(name) for name in self.specs)

    def tensor(self, name: str) -> Tensor:
        """A float or id tensor under its published name, as it lies on disk (read-only).  KeyError when unknown."""
        assert self.forms[name] == "plain", f"{name} is packed; use weight()"
        return self.checkpoint.tensor(self._names[name])

    def weight(self, name: str) -> Weight:
        """The matrix `NAME.weight`, by its name without `.weight`, with its scale, as it lies on disk (read-only).

        Quantised matrices ask for rounded activations, except wo_a, which is FP8 on disk and used in BF16.
        """
        form = self.forms[name + ".weight"]
        data = self.checkpoint.tensor(self._names[name + ".weight"])
        if form == "plain":
            return Weight(data)
        return Weight(data, self._scale(name), form, round_activations=not name.endswith(".wo_a"))

    def _scale(self, name: str) -> Tensor:
        scale = self.checkpoint.tensor(self._names[name + ".scale"])
        if scale.dtype == torch.float32:  # the Base checkpoints hold the same powers of two as float32
            scale = float32_to_e8m0(scale).view(torch.float8_e8m0fnu)
        return scale

    def form(self, name: str) -> Form:
        """How a tensor in `specs` lies on disk."""
        return self.forms[name]

    def places(self, name: str) -> tuple[TensorInfo, TensorInfo | None]:
        """Where a tensor in `specs` and its scale (None without one) lie in the files."""
        info = self.checkpoint.names[self._names[name]]
        if self.forms[name] == "plain":
            return info, None
        return info, self.checkpoint.names[self._names[name.removesuffix(".weight") + ".scale"]]

    def nbytes(self, name: str) -> int:
        """Bytes on disk of a tensor in `specs`, its scale included."""
        data, scale = self.places(name)
        return data.nbytes + (0 if scale is None else scale.nbytes)

    def _bad_values(self, seen: Callable[[int], object] | None, later: tuple[str, ...], read: bool) -> Iterator[str]:
        for name in self.specs:
            if seen is not None:
                seen(self.nbytes(name))
            if later and name.startswith(later):
                if seen is not None and not read:
                    seen(self.nbytes(name))  # it stays where it is
                continue
            form = self.forms[name]
            if form != "plain":
                scale_name = name.removesuffix(".weight") + ".scale"
                yield from _bad_scale(scale_name, self.checkpoint.copy(self._names[scale_name]))
            elif self.specs[name].role == "ids":
                low, high = (int(v) for v in torch.aminmax(self.checkpoint.copy(self._names[name])))
                if low < 0 or high >= self.config.n_routed_experts:
                    bad = low if low < 0 else high
                    yield f"{name} names expert {bad}, but there are {self.config.n_routed_experts}"
            elif prod(self.specs[name].shape) <= SMALL:
                values = self.checkpoint.copy(self._names[name])
                if not bool(torch.isfinite(values).all()):
                    yield f"{name} holds NaN or infinity"


def _bad_scale(name: str, scale: Tensor) -> Iterator[str]:
    if scale.dtype != torch.float32:
        if int(scale.view(torch.uint8).max()) == 255:
            yield f"{name} holds NaN"
        return
    mantissa, _ = torch.frexp(scale)
    if not bool(((scale >= 2.0**-126) & (scale <= 2.0**127) & (mantissa == 0.5)).all()):
        yield f"{name} holds NaN or a value that is no power of two"


# ---- a published model that is not there -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """What `Weights` knows of sizes, from a configuration alone: the tensors as they are published, without MTP."""

    config: ModelConfig

    @cached_property
    def specs(self) -> Mapping[str, Spec]:
        return MappingProxyType(tensor_specs(self.config, mtp=False))

    def form(self, name: str) -> Form:
        spec = self.specs[name]
        if self.config.quantization is None or spec.role not in ("expert", "linear"):
            return "plain"
        return "fp4" if spec.role == "expert" and self.config.expert_dtype == "fp4" else "fp8"

    def nbytes(self, name: str) -> int:
        """Bytes on disk of a tensor, its scale included."""
        spec, form = self.specs[name], self.form(name)
        size = prod(spec.shape)
        if form != "plain":
            return (size // 2 if form == "fp4" else size) + prod(scale_shape(spec.shape, form))
        return size * (8 if spec.role == "ids" else 4 if any(part in name for part in FLOAT32) else 2)


# ---- the table of names ----------------------------------------------------------------------------------------------


def tensor_specs(config: ModelConfig, mtp: bool) -> dict[str, Spec]:
    """Every tensor of a published checkpoint without its scales, by name, with or without the MTP block."""
    return dict(_specs(config, mtp))


def _specs(c: ModelConfig, mtp: bool) -> Iterator[tuple[str, Spec]]:
    yield "embed.weight", Spec("float", (c.vocab_size, c.hidden_size))
    yield "head.weight", Spec("float", (c.vocab_size, c.hidden_size))
    yield from _final(c, "")
    for i, ratio in enumerate(c.compress_ratios):
        yield from _block(c, f"layers.{i}.", ratio, hashed=i < c.num_hash_layers)
    if mtp:
        yield from _block(c, "mtp.0.", 0, hashed=False)
        yield from _final(c, "mtp.0.")
        for name in ("enorm", "hnorm"):
            yield f"mtp.0.{name}.weight", Spec("float", (c.hidden_size,))
        for name in ("e_proj", "h_proj"):
            yield f"mtp.0.{name}.weight", Spec("linear", (c.hidden_size, c.hidden_size))


def _final(c: ModelConfig, prefix: str) -> Iterator[tuple[str, Spec]]:
    yield f"{prefix}norm.weight", Spec("float", (c.hidden_size,))
    yield f"{prefix}hc_head_fn", Spec("float", (c.hc_mult, c.hc_mult * c.hidden_size))
    yield f"{prefix}hc_head_base", Spec("float", (c.hc_mult,))
    yield f"{prefix}hc_head_scale", Spec("float", (1,))


def _block(c: ModelConfig, prefix: str, ratio: int, hashed: bool) -> Iterator[tuple[str, Spec]]:
    mixes = c.hc_mult * (c.hc_mult + 2)
    for part in ("attn", "ffn"):
        yield f"{prefix}{part}_norm.weight", Spec("float", (c.hidden_size,))
        yield f"{prefix}hc_{part}_fn", Spec("float", (mixes, c.hc_mult * c.hidden_size))
        yield f"{prefix}hc_{part}_base", Spec("float", (mixes,))
        yield f"{prefix}hc_{part}_scale", Spec("float", (3,))
    yield from _attention(c, f"{prefix}attn.", ratio)
    yield f"{prefix}ffn.gate.weight", Spec("float", (c.n_routed_experts, c.hidden_size))
    if hashed:
        yield f"{prefix}ffn.gate.tid2eid", Spec("ids", (c.vocab_size, c.num_experts_per_tok))
    else:
        yield f"{prefix}ffn.gate.bias", Spec("float", (c.n_routed_experts,))
    up, down = (c.moe_intermediate_size, c.hidden_size), (c.hidden_size, c.moe_intermediate_size)
    for expert in range(c.n_routed_experts):
        for name, shape in (("w1", up), ("w2", down), ("w3", up)):
            yield f"{prefix}ffn.experts.{expert}.{name}.weight", Spec("expert", shape)
    for name, shape in (("w1", up), ("w2", down), ("w3", up)):
        yield f"{prefix}ffn.shared_experts.{name}.weight", Spec("linear", shape)


def _attention(c: ModelConfig, prefix: str, ratio: int) -> Iterator[tuple[str, Spec]]:
    heads = c.num_attention_heads * c.head_dim
    yield f"{prefix}wq_a.weight", Spec("linear", (c.q_lora_rank, c.hidden_size))
    yield f"{prefix}q_norm.weight", Spec("float", (c.q_lora_rank,))
    yield f"{prefix}wq_b.weight", Spec("linear", (heads, c.q_lora_rank))
    yield f"{prefix}wkv.weight", Spec("linear", (c.head_dim, c.hidden_size))
    yield f"{prefix}kv_norm.weight", Spec("float", (c.head_dim,))
    yield f"{prefix}wo_a.weight", Spec("linear", (c.o_groups * c.o_lora_rank, heads // c.o_groups))
    yield f"{prefix}wo_b.weight", Spec("linear", (c.hidden_size, c.o_groups * c.o_lora_rank))
    yield f"{prefix}attn_sink", Spec("float", (c.num_attention_heads,))
    if ratio:
        yield from _compressor(c, f"{prefix}compressor.", ratio, c.head_dim)
    if ratio == 4:
        yield f"{prefix}indexer.wq_b.weight", Spec("linear", (c.index_n_heads * c.index_head_dim, c.q_lora_rank))
        yield f"{prefix}indexer.weights_proj.weight", Spec("float", (c.index_n_heads, c.hidden_size))
        yield from _compressor(c, f"{prefix}indexer.compressor.", ratio, c.index_head_dim)


def _compressor(c: ModelConfig, prefix: str, ratio: int, channels: int) -> Iterator[tuple[str, Spec]]:
    width = 2 * channels if ratio == 4 else channels  # ratio 4 overlaps: two halves of channels
    yield f"{prefix}wkv.weight", Spec("float", (width, c.hidden_size))
    yield f"{prefix}wgate.weight", Spec("float", (width, c.hidden_size))
    yield f"{prefix}ape", Spec("float", (ratio, width))
    yield f"{prefix}norm.weight", Spec("float", (channels,))


# ---- matching --------------------------------------------------------------------------------------------------------


def scale_shape(shape: tuple[int, ...], form: Form) -> tuple[int, int]:
    """The scale's shape for a matrix of this (out, in) shape."""
    rows, columns = shape
    return (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)) if form == "fp8" else (rows, columns // FP4_BLOCK)


def _published_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Published name -> name in the files, which may open with `model.`."""
    names: dict[str, str] = {}
    for name in checkpoint.names:
        bare = name.removeprefix("model.")
        if bare in names:
            raise CheckpointError(f"{checkpoint.folder} holds both {names[bare]} and {name}", _HINT)
        names[bare] = name
    return names


def _form_of(spec: Spec, info: TensorInfo) -> Form | None:
    """The legal form that the tensor on disk has, or None."""
    for form in FORMS[spec.role]:
        dtypes = {"fp8": ("F8_E4M3",), "fp4": ("I8",), "plain": ("I64",) if spec.role == "ids" else ("BF16", "F32")}
        shape = spec.shape
        if form == "fp4":
            if shape[1] % FP4_BLOCK:
                continue
            shape = (shape[0], shape[1] // 2)
        if info.dtype in dtypes[form] and info.shape == shape:
            return form
    return None


def _expected(spec: Spec) -> str:
    shape = list(spec.shape)
    if spec.role == "ids":
        return f"I64 {shape}"
    packed = f"I8 {[shape[0], shape[1] // 2]}, " if spec.role == "expert" else ""
    return packed + ("F8_E4M3, " if spec.role in ("expert", "linear") else "") + f"BF16 or F32 {shape}"


def _scale_problem(scale: TensorInfo, shape: tuple[int, ...], form: Form) -> str:
    wanted = scale_shape(shape, form)
    dtypes = ("F8_E8M0", "F32") if form == "fp8" else ("F8_E8M0",)
    if scale.shape == wanted and scale.dtype in dtypes:
        return ""
    return f"is {scale.dtype} {list(scale.shape)}, expected F8_E8M0 {list(wanted)}"


def _check_expert_count(names: set[str], config: ModelConfig) -> None:
    """A config with absurdly many experts must not make us list them all before it is refused."""
    if config.n_routed_experts * config.num_hidden_layers > max(4 * len(names), 1 << 16):
        problem = f"n_routed_experts is {config.n_routed_experts}, but the files hold {len(names)} tensors in all"
        raise CheckpointError(problem, _HINT)


def _hint(left_over: set[str], config: ModelConfig) -> str:
    if any(part in name for name in left_over for part in (".self_attn.", "embed_tokens", ".mlp.", "lm_head")):
        return "These are Transformers' names; use the published checkpoint, or save it under the published names."
    if any(name.startswith("mtp.") for name in left_over) and not config.num_nextn_predict_layers:
        return "config.json says num_nextn_predict_layers 0, so the files may hold no mtp.* tensors."
    if any(name.startswith("mtp.1.") or ".markov" in name for name in left_over):
        return "This looks like a DSpark drafter; its config.json must have the dspark_* keys."
    return _HINT


def _raise(checkpoint: Checkpoint, problems: list[str], hint: str) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more problems" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{checkpoint.folder}: " + "; ".join(problems[:_SHOWN]) + more, hint)


def _fingerprint(
    checkpoint: Checkpoint, config: ModelConfig, names: Mapping[str, str], specs: Mapping[str, Spec]
) -> str:
    """SHA-256 over the configuration, every tensor's description, and the contents of the small ones.

    Norms, sinks and biases move in any training, so that two models of one shape differ without reading their files
    whole; how the tensors are spread over shards does not matter.
    """
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name in sorted(specs):
        info = checkpoint.names[names[name]]
        digest.update(f"\n{name} {info.dtype} {info.shape}".encode())
        if info.nbytes <= _FINGERPRINT_BYTES:
            digest.update(checkpoint.tensor(names[name]).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
