"""Every tensor of a forward pass is made on the model's device: held on the CPU, where no GPU is at hand.

torch's default device is set to "meta" while a CPU engine computes.  A tensor made without naming its device then has
no data, and any operation that mixes it with the model's tensors fails.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine
from dsv4_engine.device_map import everything_on
from dsv4_engine.errors import DeviceError
from dsv4_engine.free_memory import GPU_SHARE, available_memory
from dsv4_engine.placement import gpu_bytes_per_token, memory_plan
from dsv4_kernels.tiling import GPU
from support.random_checkpoint import make_checkpoint

GIB = 1 << 30
IDS = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "quantised"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m", quantised=request.param)


@pytest.fixture
def no_default_device() -> Iterator[None]:
    with torch.device("meta"):
        yield


def test_the_check_sees_what_it_looks_for(no_default_device: None) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        (torch.ones(3, device="cpu") + torch.ones(3)).tolist()


@pytest.fixture(autouse=True)
def no_step_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes a token in NumPy is not what decodes it on a GPU."""
    monkeypatch.setattr("dsv4_engine.token_step.TokenStep.possible", staticmethod(lambda model: False))


@pytest.mark.parametrize("kv_dtype", ["mixed", "bf16", "fp32"])
def test_prefill_decode_and_forks(folder: Path, kv_dtype: str) -> None:
    engine = Engine.load(folder, kv_dtype=kv_dtype)
    want = engine.session().extend(IDS, logits="all")
    with torch.device("meta"):
        session = engine.session()
        got = session.extend(IDS[:600], logits="all")
        fork = session.fork()
        last = torch.stack([fork.extend([token]) for token in IDS[600:610]])
    assert got.device == last.device == torch.device("cpu")
    error = (torch.cat([got, last]) - want[:610]).abs().amax(-1) / want.abs().max()
    assert error.median() < 2e-3


def test_weights_that_stay_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_engine.placement.EXPAND_SHARE", 0.0)
    engine = Engine.load(make_checkpoint(tmp_path / "m", quantised=True))
    assert not engine.plan.expand
    with torch.device("meta"):
        session = engine.session()
        assert session.extend(IDS).isfinite().all()
        assert session.extend([3]).isfinite().all()


def test_multi_token_prediction(folder: Path) -> None:
    model = Engine.load(folder).model
    ids = torch.tensor(IDS[:200])
    with torch.device("meta"), torch.inference_mode():
        streams = model.forward(ids, model.new_state())
        assert model.mtp_logits(ids[1:], streams[:-1], 0, model.new_mtp_state()).isfinite().all()


def test_what_cannot_be_used_is_refused_with_the_alternative(folder: Path) -> None:
    for device in ("cuda:99", "mps", "abacus"):
        with pytest.raises(DeviceError, match=device) as caught:
            Engine.load(folder, device=device)
        assert "--device cpu" in caught.value.hint


# ---- the plan for a GPU ----------------------------------------------------------------------------------------------


def plan(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int, ctx: int, device: str = "cuda:0"):
    weights = Engine.load(folder).weights
    monkeypatch.setattr("dsv4_engine.placement.available_memory", lambda device: size)
    return memory_plan(weights.config, weights, device, "float32", "mixed", ctx)


def test_a_gpu_plan_counts_tiles_activations_and_unpacked_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = plan(folder, monkeypatch, 8 * GIB, 4096)
    long = plan(folder, monkeypatch, 8 * GIB, 65_536)
    head_dim, per_token = 96, gpu_bytes_per_token(Engine.load(folder).config)
    assert long.working_set - short.working_set == (65_536 - 4096) // 4 * head_dim * 4
    assert short.working_set == GPU.working_set + 8192 * per_token + 4096 // 4 * head_dim * 4
    assert short.needed == short.weights + short.kv + short.working_set


def test_a_small_gpu_takes_smaller_chunks_of_a_wide_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(folder, monkeypatch, 6 * GIB, 4096).chunk == 8192
    assert plan(folder, monkeypatch, 6 * GIB, 4096, "cpu").chunk == 512
    monkeypatch.setattr("dsv4_engine.placement.gpu_bytes_per_token", lambda config: 1 << 20)
    assert plan(folder, monkeypatch, 6 * GIB, 4096).chunk == 512
    assert plan(folder, monkeypatch, 96 * GIB, 4096).chunk == 8192


def test_the_longest_context_fits_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = plan(folder, monkeypatch, 4 * GIB, 4096).needed + (4 << 20)
    limit = plan(folder, monkeypatch, size, 4096).max_ctx
    assert 4096 < limit < 65_536
    assert plan(folder, monkeypatch, size, limit).needed <= size


def test_free_gpu_memory_counts_what_this_process_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 1 * GIB)
    assert available_memory("cuda") == available_memory("cuda:0") == int(GPU_SHARE * 12 * GIB)


def test_experts_apart_need_the_triton_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Engine.load(folder).weights
    monkeypatch.setattr("dsv4_engine.placement.available_memory", lambda device: 8 * GIB)
    where = everything_on("cuda:0", weights.config.num_hidden_layers, "cpu")
    with pytest.raises(DeviceError, match="Triton"):
        memory_plan(weights.config, weights, "cuda:0", device_map=where)
