"""Rooflines: the bound of an operation, what fits, and V4-Flash's rates on one H200 as estimated by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4_engine.ceilings import best_time, measured_device
from dsv4_engine.config import BaselineConfig, ModelConfig
from dsv4_engine.costs import Cost, cache_bytes, stored_bytes
from dsv4_engine.errors import DeviceError
from dsv4_engine.placement import MAX_WORKING_SET
from dsv4_engine.roofline import DEVICES, Device, bound, expected
from support.random_checkpoint import small_config

FLASH, PRO, V32 = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4-pro"), BaselineConfig.preset()
DEVICE = Device("test", 10**9, bandwidth=100.0, rates={"bf16": 10.0, "fp8": 20.0}, source="made up")
MILLION = 1_048_576


def test_an_operation_takes_the_longer_of_its_bytes_and_its_flops() -> None:
    found = bound(
        [
            Cost("head", "outside layers", "bf16", flops=50, weight_bytes=100),  # 5 s of arithmetic, 1 s of memory
            Cost("projections", "csa", "fp8", flops=20, weight_bytes=300),  # 1 s, 3 s
            Cost("projections", "csa", "bf16", flops=10, weight_bytes=100),  # 1 s, 1 s: shares the pass of the former
        ],
        DEVICE,
    )
    assert found.seconds == 5 + 4
    assert found.memory_s == 4
    assert found.by_part == {"head": 5, "linears": 4}
    assert (found.limit, found.slowest) == ("compute", "head")


def test_a_type_that_is_not_there_computes_in_the_next_wider_one() -> None:
    assert [DEVICE.rate(p) for p in ("fp4", "fp8", "bf16")] == [20.0, 20.0, 10.0]
    assert DEVICES["a100"].rate("fp8") == DEVICES["a100"].rate("bf16")
    assert replace(DEVICE, rates={"fp32": 1.0}).rate("fp4") == 1.0


def test_flash_on_one_h200_at_measured_ceilings() -> None:
    """By hand: about 380 tok/s at 4K to 128K, 360 at 1M; prefill about 16K tok/s at 1M."""
    h200 = replace(DEVICES["h200"], bandwidth=4.26e12, rates={"fp8": 1302e12, "bf16": 813e12})
    assert expected(FLASH, h200, 4096).decode_tok_s == pytest.approx(380, rel=0.02)
    assert expected(FLASH, h200, 131_072).decode_tok_s == pytest.approx(380, rel=0.02)
    at_a_million = expected(FLASH, h200, MILLION)
    assert at_a_million.decode_tok_s == pytest.approx(360, rel=0.02)
    assert at_a_million.decode.limit == "memory"
    assert at_a_million.prefill_tok_s == pytest.approx(15_000, rel=0.1)
    assert (at_a_million.prefill.limit, at_a_million.prefill.slowest) == ("compute", "indexer")


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("config", [FLASH, PRO, V32], ids=["flash", "pro", "v3.2"])
def test_what_fits(name: str, config: ModelConfig | BaselineConfig) -> None:
    device = DEVICES[name]
    found = expected(config, device, MILLION)
    assert found.weights == stored_bytes(config)
    assert cache_bytes(config, MILLION) <= found.cache < cache_bytes(config, MILLION) + (100 << 20)
    assert found.needed <= found.devices * device.memory
    assert found.needed - MAX_WORKING_SET > (found.devices - 1) * device.memory - MAX_WORKING_SET * found.devices
    assert found.sequences >= 1
    assert found.max_ctx == MILLION


def test_flash_needs_two_h200_and_a_small_model_fits_many_times() -> None:
    assert expected(FLASH, DEVICES["h200"], 4096).devices == 2
    small = ModelConfig.from_dict(small_config(quantised=True))
    found = expected(small, DEVICES["rtx4090"], 4096)
    assert (found.devices, found.max_ctx) == (1, 65_536)
    assert found.sequences > 1000
    windows = ModelConfig.from_dict(small_config(compress_ratios=[0, 0]))
    assert expected(windows, DEVICES["rtx4090"], 4096).max_ctx == 65_536


def test_a_longer_context_does_not_fit_beside_the_weights() -> None:
    weights = stored_bytes(FLASH)
    room = replace(DEVICES["h200"], memory=weights + MAX_WORKING_SET + (1 << 30))
    found = expected(FLASH, room, 4096)
    assert found.devices == 1
    assert cache_bytes(FLASH, found.max_ctx) < 1 << 30 < cache_bytes(FLASH, found.max_ctx + 20_000)


def test_expanded_weights_take_longer_to_read() -> None:
    packed, plain = (expected(FLASH, DEVICES["h200"], 4096, held=held) for held in ("published", "float32"))  # type: ignore[arg-type]
    assert 4 < plain.decode.seconds / packed.decode.seconds < 8


def test_the_ceilings_of_this_cpu_are_sane() -> None:
    found = measured_device("cpu")
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.rate("fp8") == found.rates["fp32"] < 1e15
    assert found.memory > 0
    assert "measured on" in found.source
    with pytest.raises(DeviceError, match="there is no device 'tpu'"):
        measured_device("tpu")


def test_the_best_of_several_runs_counts() -> None:
    turns: list[int] = []
    seconds = best_time(lambda: turns.append(1), "cpu", runs=3)
    assert len(turns) == 4
    assert 0 < seconds < 1
