"""Whether the Triton kernels run a model, and if not why: said once, and then torch's own operations do.

Imports nothing that needs triton, so that it can be asked anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dsv4_kernels.backend import Backend, too_old_for_triton
from dsv4_kernels.triton import check_triton

from ..config import ModelConfig
from ..errors import DeviceError
from ..weights import Form


def with_triton(backend: Backend, config: ModelConfig, forms: Mapping[str, Form], dtype: str, kv_dtype: str) -> Backend:
    """``backend`` with the Triton kernels where they can run this model, else with the reason in ``why``.

    Raises DeviceError where only Triton itself is missing or too old or new, and for several GPUs without it.
    """
    if backend.device.type == "cpu":
        return backend
    why = refusal(config, forms, dtype, kv_dtype) or too_old_for_triton(backend)
    if not why:
        try:
            check_triton()
        except ValueError as error:
            hint = "Install that Triton, or use --dtype float32, which runs on torch's own operations."
            raise DeviceError(str(error), hint) from error
        return replace(backend, name="triton")
    if len(backend.devices) > 1:
        raise DeviceError(f"only the Triton kernels spread layers over {backend}, and {why}", "Name one GPU.")
    return replace(backend, why=why)


def refusal(config: ModelConfig, forms: Mapping[str, Form], dtype: str, kv_dtype: str) -> str:
    """What about the model or the arguments the Triton kernels do not take, or ""."""
    if dtype != "bfloat16":
        return f"they compute in bfloat16, not {dtype}"
    if kv_dtype != "mixed":
        return f"they read the mixed cache, not {kv_dtype}"
    experts = {form for name, form in forms.items() if ".experts." in name}
    layers = (name for name in forms if name.startswith("layers.") and ".compressor." not in name)
    others = {forms[name] for name in layers if name.endswith(_FP8) and ".experts." not in name}
    if experts - {"fp4", "fp8"} or len(experts) > 1 or others != {"fp8"}:
        return "they read the published FP4 and FP8 weights only"
    for key in ("hidden_size", "moe_intermediate_size", "q_lora_rank", "head_dim", "index_head_dim"):
        if getattr(config, key) % 128:
            return f"they take sizes that 128 divides, and {key} is {getattr(config, key)}"
    group = config.num_attention_heads * config.head_dim // config.o_groups
    if group % 128 or config.o_lora_rank % 128:
        return f"they take groups of outputs that 128 divides, and these are {group} and {config.o_lora_rank}"
    fixed = {"hc_mult": 4, "qk_rope_head_dim": 64, "sliding_window": 128}
    for key, value in fixed.items():
        if getattr(config, key) != value:
            return f"they take {key} {value}, and it is {getattr(config, key)}"
    return ""


_FP8 = tuple(f".{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3"))
