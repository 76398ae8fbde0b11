"""What the GPU's engine decides without one: who runs a model, what lies where, whose a kernel's time is."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import DeviceError, MemoryPlanError
from dsv4_engine.gpu import choice
from dsv4_engine.gpu.plan import gpu_memory_plan, layer_bytes, published_form, split_layers, state_bytes, working_set
from dsv4_engine.weights import Form, tensor_specs
from dsv4_kernels.backend import Backend

FLASH = ModelConfig.preset("v4-flash")
SPECS = tensor_specs(FLASH, mtp=False)
FORMS: dict[str, Form] = {name: published_form(spec, FLASH) for name, spec in SPECS.items()}
GIB = 1 << 30


def gpus(count: int) -> Backend:
    devices = tuple(torch.device("cuda", index) for index in range(count))
    return Backend("torch", devices[0], devices)


# ---- who runs it -----------------------------------------------------------------------------------------------------


def test_published_checkpoints_are_taken() -> None:
    assert choice.refusal(FLASH, FORMS, "bfloat16", "mixed") == ""
    pro = ModelConfig.preset("v4-pro")
    forms = {name: published_form(spec, pro) for name, spec in tensor_specs(pro, mtp=False).items()}
    assert choice.refusal(pro, forms, "bfloat16", "mixed") == ""
    fp8 = {name: "fp8" if form == "fp4" else form for name, form in FORMS.items()}
    assert choice.refusal(FLASH, fp8, "bfloat16", "mixed") == ""  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "changes", "forms", "why"),
    [
        ("float32", "mixed", {}, {}, "bfloat16, not float32"),
        ("bfloat16", "bf16", {}, {}, "mixed cache, not bf16"),
        ("bfloat16", "mixed", {}, {"layers.3.attn.wq_a.weight": "plain"}, "FP4 and FP8 weights only"),
        ("bfloat16", "mixed", {}, {"layers.3.ffn.experts.7.w2.weight": "fp8"}, "FP4 and FP8 weights only"),
        ("bfloat16", "mixed", {"q_lora_rank": 1000}, {}, "q_lora_rank is 1000"),
        ("bfloat16", "mixed", {"sliding_window": 64}, {}, "sliding_window 128, and it is 64"),
        ("bfloat16", "mixed", {"o_lora_rank": 64}, {}, "and these are 4096 and 64"),
    ],
)
def test_what_is_not_taken(dtype: str, kv_dtype: str, changes: dict, forms: dict, why: str) -> None:
    assert why in choice.refusal(replace(FLASH, **changes), {**FORMS, **forms}, dtype, kv_dtype)


def test_the_choice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "too_old_for_triton", lambda backend: "")
    monkeypatch.setattr(choice, "check_triton", lambda: "3.6.0")
    assert choice.with_triton(gpus(2), FLASH, FORMS, "bfloat16", "mixed").name == "triton"
    other = choice.with_triton(gpus(1), FLASH, FORMS, "float32", "mixed")
    assert other.name == "torch" and "bfloat16" in other.why
    with pytest.raises(DeviceError, match="only the Triton kernels spread layers over cuda:0,cuda:1, and they compute"):
        choice.with_triton(gpus(2), FLASH, FORMS, "float32", "mixed")
    monkeypatch.setattr(choice, "too_old_for_triton", lambda backend: "An Old Card has compute capability 8.0")
    assert "8.0" in choice.with_triton(gpus(1), FLASH, FORMS, "bfloat16", "mixed").why
    cpu = Backend("torch", torch.device("cpu"))
    assert choice.with_triton(cpu, FLASH, FORMS, "bfloat16", "mixed") == cpu


def test_a_missing_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise ValueError("GPU kernels need Triton 3.6 to 3.9, found 2.0")

    monkeypatch.setattr(choice, "too_old_for_triton", lambda backend: "")
    monkeypatch.setattr(choice, "check_triton", missing)
    with pytest.raises(DeviceError, match=r"found 2\.0") as error:
        choice.with_triton(gpus(1), FLASH, FORMS, "bfloat16", "mixed")
    assert "--dtype float32" in error.value.hint


# ---- what lies where -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "before", "after", "devices", "want"),
    [
        ([5, 5, 5, 5], 0, 0, 2, [(0, 2), (2, 4)]),
        ([5, 5, 5, 5], 6, 0, 2, [(0, 1), (1, 4)]),
        ([9, 1, 1, 1], 0, 0, 2, [(0, 1), (1, 4)]),
        ([1, 1, 1], 9, 9, 3, [(0, 1), (1, 2), (2, 3)]),
        ([3, 1, 4, 1, 5], 0, 0, 1, [(0, 5)]),
    ],
)
def test_layers_are_split_by_bytes(sizes: list, before: int, after: int, devices: int, want: list) -> None:
    assert split_layers(sizes, before, after, devices) == want


def test_flash_needs_two(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, before, after = layer_bytes(SPECS, FORMS.__getitem__, FLASH.num_hidden_layers)
    assert sum(sizes) + before + after == pytest.approx(156e9, rel=0.01)
    monkeypatch.setattr("dsv4_engine.gpu.plan.available_memory", lambda device: 130 * GIB)
    with pytest.raises(MemoryPlanError, match=r"on cuda:0 \(weights 145") as error:
        gpu_memory_plan(FLASH, SPECS, FORMS.__getitem__, gpus(1), 4096)
    assert "cuda:0,cuda:1" in error.value.hint
    found = gpu_memory_plan(FLASH, SPECS, FORMS.__getitem__, gpus(2), 1 << 20)
    (first, middle), (same, last) = found.ranges
    assert (first, same, last) == (0, middle, 43) and abs(middle - 21.5) < 2
    assert found.plan.chunk == 8192 and found.plan.max_ctx == 1 << 20
    assert found.plan.device_map.ranges == list(found.ranges)
    # The floor of what a million tokens may take beyond the weights.
    assert working_set(FLASH, 8192, 1 << 20) + state_bytes(FLASH, FLASH.compress_ratios, 1 << 20) < 12 * GIB
    with pytest.raises(MemoryPlanError, match="1 layers cannot be spread over 2 GPUs"):
        one = replace(FLASH, num_hidden_layers=1, compress_ratios=(0,), num_hash_layers=1)
        gpu_memory_plan(one, tensor_specs(one, mtp=False), FORMS.__getitem__, gpus(2), 4096)


# ---- what time belongs to whom ---------------------------------------------------------------------------------------


def test_kernels_are_told_apart() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4[gpu]'")
    from dsv4_engine.gpu.breakdown import OUTSIDE, Kernel, by_part

    stage = SimpleNamespace(device=torch.device("cuda", 0), first=1, last=3)
    model = SimpleNamespace(stages=[stage], config=SimpleNamespace(compress_ratios=(0, 4, 128)))
    layer = ["_write_and_project", "_read", "linear_many", "_attention"]
    experts = ["_write_and_project", "_read", "linear_many", "few"]
    once = ["_phases", "embedding", *layer, "_scores", *experts, *layer, *experts, "_write_and_project"]
    head = ["_write_and_project", "_read", "linear_few", "Memcpy DtoH"]
    names = ["Memcpy HtoD", *once, *once, *head, *once]
    kernels = [Kernel(name, 0, float(i), 1.0) for i, name in enumerate(names)]
    found = {key: launches for key, (_, launches) in by_part(kernels, model).items()}  # type: ignore[arg-type]
    assert found == {
        ("mHC", "csa"): 12, ("mHC", "hca"): 12, ("mHC", OUTSIDE): 3, ("projections", "csa"): 3,
        ("projections", "hca"): 3, ("core attention", "csa"): 3, ("core attention", "hca"): 3, ("indexer", "csa"): 3,
        ("experts", "csa"): 6, ("experts", "hca"): 6, ("head", OUTSIDE): 4, ("other", OUTSIDE): 7,
    }  # fmt: skip
    assert sum(found.values()) == len(names)
    with pytest.raises(ValueError, match="of 4 sub-layers ran 2"):
        by_part([*kernels[:9], Kernel("_phases", 0, 9.0, 1.0)], model)  # type: ignore[arg-type]


def test_kernels_that_overlap_are_counted_once() -> None:
    """One that waits for the kernel in front (started early), one beside, and a wait of the whole GPU."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4[gpu]'")
    from dsv4_engine.gpu.breakdown import OUTSIDE, Kernel, by_part

    stage = SimpleNamespace(device=torch.device("cuda", 0), first=0, last=1)
    model = SimpleNamespace(stages=[stage], config=SimpleNamespace(compress_ratios=(4,)))
    begins = "_write_and_project"
    launched = [
        ("_phases", 0.0, 1.0), (begins, 5.0, 2.0), ("_read", 5.5, 4.0), ("_compress", 9.0, 3.0),
        ("linear_few", 9.2, 6.0), (begins, 16.0, 1.0), (begins, 20.0, 1.0), ("_phases", 30.0, 1.0),
    ]  # fmt: skip
    found = by_part([Kernel(name, 0, *when) for name, *when in launched], model)  # type: ignore[arg-type]
    # The second connection ends 1.8 behind linear_few (15.2 to 17), the write behind the layers 4 behind that.
    want = {("mHC", "csa"): 2 + 2.5 + 1.8, ("mHC", OUTSIDE): 4.0, ("compressors", "csa"): 2.5,
            ("projections", "csa"): 3.2, ("other", OUTSIDE): 2.0}  # fmt: skip
    assert {key: round(1e6 * seconds, 6) for key, (seconds, _) in found.items()} == want
