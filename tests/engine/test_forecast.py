"""What a plan is expected to reach: bytes over rates, by hand."""

from __future__ import annotations

import pytest

from dsv4_engine.config import ModelConfig
from dsv4_engine.costs import decode_costs
from dsv4_engine.device_map import Limits
from dsv4_engine.errors import MemoryPlanError
from dsv4_engine.forecast import Rates, forecast, rates_for
from dsv4_engine.gpu.apart_plan import Machine, apart_plan
from dsv4_engine.placement import MemoryPlan, memory_plan
from dsv4_engine.roofline import DEVICES, bound
from dsv4_engine.weights import Published

GIB = 1 << 30
FLASH = ModelConfig.preset("v4-flash")
TENSORS = Published(FLASH)
UNPACK = {"expert": 1e-9, "fp8": 2e-9, "plain": 3e-9, "held": 1e-10}


def plan(gpu: int, memory: int, ctx: int = 131_072) -> MemoryPlan:
    machine = Machine(("cuda:0",), (gpu * GIB,), memory * GIB, GIB)
    return apart_plan(FLASH, TENSORS.specs, TENSORS.form, machine, ctx)


def rates(**more: float) -> Rates:
    return Rates(DEVICES["h200"], more.get("link", 50e9), more.get("disk", 2e9), UNPACK, 1e11, ())


@pytest.mark.parametrize("gpu", [24, 48, 80])
def test_missed_experts_go_over_the_link(gpu: int) -> None:
    found = plan(gpu, 200)
    size = found.expert_bytes
    assert size == 3 * 2048 * 4096 * 17 // 32
    missed = 1 - found.gpu_slots[0] / (43 * 256)
    expected = forecast(FLASH, found, rates())
    computing = bound(decode_costs(FLASH, 131_072), DEVICES["h200"]).seconds
    assert 1 / expected.decode_tok_s == pytest.approx(missed * 43 * 6 * size / 50e9 + computing)
    assert expected.decode_bound == expected.prefill_bound == "the link"
    assert expected.prefill_tok_s == pytest.approx(8192 * 50e9 / (missed * 43 * 256 * size), rel=1e-3)
    assert expected.expert_copy_s == size / 50e9 and expected.expert_cpu_s == pytest.approx(size * 1e-9)


def test_the_disk_is_slower() -> None:
    found = plan(24, 64)
    on_disk, missed = 1 - found.slots / found.experts, 1 - found.cached_share
    expected = forecast(FLASH, found, rates())
    assert expected.decode_bound == "the disk"
    assert expected.decode_tok_s == pytest.approx(2e9 / (on_disk * missed * 43 * 6 * found.expert_bytes))


def test_a_fast_link_leaves_computing() -> None:
    found = plan(80, 200)
    expected = forecast(FLASH, found, rates(link=1e18))
    seconds = bound(decode_costs(FLASH, 131_072), DEVICES["h200"]).seconds
    assert expected.decode_bound == "computing" and expected.decode_tok_s == pytest.approx(1 / seconds)


def test_the_cpu_unpacks() -> None:
    found = memory_plan(FLASH, TENSORS, ctx=4096, limits=Limits(cpu=16 * GIB))
    expected = forecast(FLASH, found, Rates(None, 1e9, 1e12, UNPACK, 1e15, ()))
    costs = decode_costs(FLASH, 4096)
    experts = sum(cost.weight_bytes for cost in costs if cost.operation == "routed experts")
    assert experts == pytest.approx(43 * 6 * found.expert_bytes)
    least, most = experts * 1e-9, sum(cost.weight_bytes for cost in costs) * 3e-9
    assert least < 1 / expected.decode_tok_s < most and expected.decode_bound == "computing"
    slow = forecast(FLASH, found, Rates(None, 1e9, 1e6, UNPACK, 1e15, ()))
    assert slow.decode_bound == "the disk" and slow.decode_tok_s < expected.decode_tok_s / 10


def test_rates_of_this_machine() -> None:
    found = rates_for(memory_plan(FLASH, TENSORS, ctx=4096, limits=Limits(cpu=16 * GIB)), None)
    assert found.gpu is None and found.disk > 0 and found.product > 1e8
    assert all(0 < value < 1e-3 for value in found.unpack.values())
    assert rates_for(plan(24, 200), None).gpu == DEVICES["h100"]  # the smallest the kernels run on


# ---- plans with experts apart ----------------------------------------------------------------------------------------


def test_everything_fits_large_gpus() -> None:
    machine = Machine(("cuda:0", "cuda:1"), (139 * GIB, 139 * GIB), 10 * GIB, GIB)
    found = apart_plan(FLASH, TENSORS.specs, TENSORS.form, machine, 1 << 20)
    assert not found.gpu_slots and found.cached_share == 1 and found.max_ctx == 1 << 20
    assert all(found.total(device) <= 139 * GIB for device in machine.devices)


@pytest.mark.parametrize("ctx", [4096, 1 << 20])
def test_two_small_gpus_share_the_pools(ctx: int) -> None:
    machine = Machine(("cuda:0", "cuda:1"), (24 * GIB, 20 * GIB), 200 * GIB, GIB)
    found = apart_plan(FLASH, TENSORS.specs, TENSORS.form, machine, ctx)
    assert len(found.gpu_slots) == 2 and all(slots >= 256 for slots in found.gpu_slots)
    for device, room in zip(machine.devices, machine.rooms, strict=True):
        assert room - found.expert_bytes < found.total(device) <= room


@pytest.mark.parametrize(("gpu", "memory", "words"), [(12, 200, "one layer's 256 experts"), (6, 200, "everything but"),
                                                      (24, 2, "one layer's 256 experts need")])  # fmt: skip
def test_refusals(gpu: int, memory: int, words: str) -> None:
    with pytest.raises(MemoryPlanError, match=words) as caught:
        plan(gpu, memory)
    assert "GiB" in str(caught.value) and caught.value.hint
