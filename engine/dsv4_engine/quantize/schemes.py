"""What becomes of each tensor under a scheme, and what the result's config.json says of it.

Owns the two schemes and the published types.  Knows names and forms of tensors, no files and no values.
Source: facts on the published checkpoints (which tensors are F32, which BF16).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4_engine.config import FP8_BLOCK, QuantizationConfig
from dsv4_engine.errors import CheckpointError, InputError
from dsv4_engine.random_weights import FLOAT32
from dsv4_engine.weights import Form, Spec

SCHEMES: Mapping[str, str] = {
    "published": "experts FP4, other matrices of linears FP8, the rest BF16 and F32, as in the published checkpoints",
    "fp8": "FP4 experts as FP8 with the same values, as in the Base checkpoints; nothing else changes",
}
FP8, FP4 = "F8_E4M3", "I8"  # how safetensors names them; FP4 is two codes a byte
PACKED: Mapping[str, Form] = {FP8: "fp8", FP4: "fp4"}


def check_scheme(scheme: str) -> None:
    """Raise InputError for a scheme that does not exist."""
    if scheme not in SCHEMES:
        raise InputError(f"there is no scheme {scheme!r}", f"The schemes are {' and '.join(SCHEMES)}.")


def target(name: str, spec: Spec, form: Form, dtype: str, scheme: str) -> str:
    """The type (as safetensors names it) that a tensor has in the result.

    form, dtype: how the source holds it.  Raises CheckpointError for one that the scheme cannot take.
    """
    if spec.role == "ids":
        return dtype
    if scheme == "fp8":
        if spec.role == "expert" and form == "plain":
            problem = f"{name} is {dtype}; the scheme fp8 rewrites FP4 experts and nothing else"
            raise CheckpointError(problem, "Quantise BF16 and F32 with the scheme published, and that result with fp8.")
        return FP8 if spec.role == "expert" else dtype
    if spec.role == "expert":
        return FP4
    if spec.role == "linear":
        return FP8
    return "F32" if any(part in name for part in FLOAT32) else "BF16"


def config_json(source: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """The result's config.json: the source's with the quantisation as the published files say it."""
    config = dict(source)
    config["expert_dtype"] = "fp8" if scheme == "fp8" else "fp4"
    q = QuantizationConfig()
    config["quantization_config"] = {
        "activation_scheme": q.activation_scheme,
        "fmt": q.fmt,
        "quant_method": q.quant_method,
        "scale_fmt": q.scale_fmt,
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    if scheme == "published":
        config |= {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in config}
    return config
