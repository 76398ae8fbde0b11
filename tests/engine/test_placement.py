"""The memory plan: what is counted, when weights are expanded, and the refusal of what cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_engine import free_memory, placement
from dsv4_engine.accounting import kv_bytes, sequence_state_bytes
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import DeviceError, MemoryPlanError
from dsv4_engine.free_memory import available_memory
from dsv4_engine.placement import PROGRAM, memory_plan, working_bytes_per_token
from dsv4_engine.weights import Weights
from dsv4_kernels.tiling import CPU
from dsv4_kernels.unpacked import unpacked_bytes
from support.random_checkpoint import make_checkpoint

GIB = 1 << 30


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = make_checkpoint(tmp_path_factory.mktemp("packed"), quantised=True)
    return Weights.open(Checkpoint.open(folder), ModelConfig.from_folder(folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = make_checkpoint(tmp_path_factory.mktemp("plain"))
    return Weights.open(Checkpoint.open(folder), ModelConfig.from_folder(folder))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets how much memory there seems to be."""
    return lambda size: monkeypatch.setattr(placement, "available_memory", lambda device: size)


def test_a_plan_adds_up(packed: Weights, memory: Any) -> None:
    memory(4 * GIB)
    plan = memory_plan(packed.config, packed, "cpu", "float32", "mixed", 10_000)
    assert plan.kv == kv_bytes(packed.config, "mixed", 10_000) + sequence_state_bytes(packed.config)
    assert plan.needed == plan.weights + plan.unpacked + plan.kv + plan.working_set
    assert plan.weights_on_disk == packed.checkpoint.total_bytes
    chosen = 4 * 96 * min(10_000 // 4, plan.chunk * 8)  # rows that a chunk's queries chose, in float32
    scores = min(3 * 4 * 64 * 4 * (2 * 32 + 10_000 // 4), CPU.working_set)  # of a tile of 64 queries of 4 heads
    assert plan.working_set == plan.chunk * working_bytes_per_token(packed.config) + scores + chosen
    assert (plan.available, plan.ctx, plan.device) == (4 * GIB - PROGRAM, 10_000, "cpu")
    assert sum(row.bytes for row in plan.rows) == plan.needed + plan.program == plan.total("cpu")
    assert plan.max_ctx == packed.config.max_position_embeddings


def test_small_models_are_expanded(packed: Weights, memory: Any) -> None:
    memory(4 * GIB)
    float32 = memory_plan(packed.config, packed, dtype="float32")
    bfloat16 = memory_plan(packed.config, packed, dtype="bfloat16")
    assert float32.expand and bfloat16.expand and float32.unpacked == 0
    assert float32.weights_on_disk < bfloat16.weights < float32.weights
    # What float32 takes is what the source of the weights makes of each tensor.
    made = 0
    for name, spec in packed.specs.items():
        if spec.role == "ids" or name == "embed.weight":
            made += packed.tensor(name).nbytes
        elif spec.role != "float" or name.endswith((".wkv.weight", ".wgate.weight", "head.weight", "_proj.weight")):
            made += packed.weight(name.removesuffix(".weight")).expanded(torch.float32).nbytes
        else:
            made += packed.tensor(name).float().nbytes
    assert float32.weights == made


def test_large_models_stay_packed(packed: Weights, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(4 * GIB)
    expanded = memory_plan(packed.config, packed).weights
    monkeypatch.setattr(placement, "EXPAND_SHARE", (expanded - 1) / (4 * GIB - PROGRAM))
    plan = memory_plan(packed.config, packed)
    assert not plan.expand
    assert plan.weights < expanded
    assert plan.unpacked == unpacked_bytes(widest(packed), torch.get_num_threads())


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_plain_float32_weights_take_what_they_take_on_disk(
    share: float, plain: Weights, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(4 * GIB)
    monkeypatch.setattr(placement, "EXPAND_SHARE", share)
    plan = memory_plan(plain.config, plain)
    assert plan.expand == (share > 0)  # a large one is used where it lies in the file
    assert plan.weights == plan.weights_on_disk == plain.checkpoint.total_bytes


def widest(weights: Weights) -> int:
    return max(spec.shape[1] for spec in weights.specs.values() if len(spec.shape) == 2)


def test_chunks_are_of_what_there_is(packed: Weights, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "working_bytes_per_token", lambda config: 1 << 20)
    for size, chunk in ((GIB, 128), (4 * GIB, 128), (8 * GIB, 384), (1000 * GIB, 512)):
        memory(size)
        plan = memory_plan(packed.config, packed)
        assert plan.chunk == chunk and plan.working_set >= chunk << 20


def test_a_short_context_needs_no_whole_chunk(packed: Weights, memory: Any) -> None:
    memory(4 * GIB)
    short, whole = (memory_plan(packed.config, packed, ctx=ctx) for ctx in (100, 512))
    assert short.chunk == whole.chunk == 512
    assert whole.working_set - short.working_set > 412 * working_bytes_per_token(packed.config)


def test_no_memory_for_the_weights(packed: Weights, memory: Any) -> None:
    memory(1 << 20)
    with pytest.raises(MemoryPlanError) as caught:
        memory_plan(packed.config, packed, ctx=4096)
    message = str(caught.value)
    assert "with its routed experts on disk, needs" in message and "MiB of memory on cpu" in message
    assert "but 0 B are available" in message and "4 experts at a time" in message
    assert "(weights " in message and "cache of 4,096 tokens" in message
    assert "free memory" in caught.value.hint


def test_no_memory_for_the_context(packed: Weights, memory: Any) -> None:
    memory(PROGRAM + (70 << 20))
    with pytest.raises(MemoryPlanError) as caught:
        memory_plan(packed.config, packed, kv_dtype="fp32", ctx=65_536)
    assert "cache of 65,536 tokens" in str(caught.value)
    limit = int(caught.value.hint.split("at most ")[1].split(" tokens")[0].replace(",", ""))
    assert "--ctx" in caught.value.hint and "mixed" in caught.value.hint
    assert memory_plan(packed.config, packed, kv_dtype="fp32", ctx=limit).needed <= 70 << 20
    with pytest.raises(MemoryPlanError):
        memory_plan(packed.config, packed, kv_dtype="fp32", ctx=limit + 1024)


def test_a_longer_context_needs_more(packed: Weights, memory: Any) -> None:
    memory(4 * GIB)
    sizes = [memory_plan(packed.config, packed, kv_dtype=d, ctx=c).kv for d in ("mixed", "fp32") for c in (1000, 9000)]
    assert sizes[0] < sizes[1] and sizes[2] < sizes[3] and sizes[0] < sizes[2]


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99", "", "gpu"])
def test_unknown_devices(packed: Weights, device: str) -> None:
    with pytest.raises(DeviceError, match="there is no device"):
        memory_plan(packed.config, packed, device)


def test_available_memory_is_what_the_system_says() -> None:
    import psutil

    assert 0 < available_memory("cpu") <= psutil.virtual_memory().total


# ---- control groups --------------------------------------------------------------------------------------------------


def group(folder: Path, version: int, limit: str, usage: int, reclaimable: int) -> None:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    limit_name, usage_name, file_name = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(limit + "\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{file_name} {reclaimable}\n")


def free(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "membership").write_text(membership)
    return list(free_memory._cgroup_free(tmp_path / "fs", tmp_path / "membership"))


def test_limits_of_version_2_and_its_parents(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "a" / "b", 2, "max", 10, 0)
    group(tmp_path / "fs" / "a", 2, "1000", 700, 200)
    assert free(tmp_path, "0::/a/b\n") == [500]


def test_limits_of_version_1(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "memory" / "a", 1, "1000", 700, 200)
    group(tmp_path / "fs" / "memory", 1, "9000", 8000, 0)
    assert free(tmp_path, "8:pids:/\n4:memory:/a\n0::/\n") == [500, 1000]


def test_inside_a_container_only_the_root_is_there(tmp_path: Path) -> None:
    group(tmp_path / "fs", 2, "1000", 100, 0)
    assert free(tmp_path, "0::/not/mounted/here\n") == [900]


def test_odd_files_are_no_limit(tmp_path: Path) -> None:
    assert free(tmp_path, "0::/\njunk\n") == []
    group(tmp_path / "fs", 2, "many", 1, 0)
    assert free(tmp_path, "0::/\n") == []
    group(tmp_path / "fs", 2, "100", 300, 0)
    assert free(tmp_path, "0::/\n") == [0]
    (tmp_path / "fs" / "memory.stat").write_text("inactive_file many\n")
    assert free(tmp_path, "0::/\n") == [0]
    assert list(free_memory._cgroup_free(tmp_path, tmp_path / "absent")) == []


def test_a_process_limit_counts() -> None:
    resource = pytest.importorskip("resource")
    import psutil

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(psutil.Process().memory_info().vms) + (512 << 20)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        assert available_memory("cpu") <= 512 << 20
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
