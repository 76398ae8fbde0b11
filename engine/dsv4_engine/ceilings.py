"""What this machine's memory and arithmetic reach, measured: the ceilings a roofline is drawn with.

Owns two measurements, the best of several runs each: reading (CPU) or copying (GPU) a block of memory far larger than
any cache, and large matrix products.  Takes seconds.  Best rather than median: a ceiling is what nothing passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from dsv4_engine.free_memory import available_memory
from dsv4_engine.roofline import Device

_RUNS = 5
_CPU_BYTES, _CUDA_BYTES = 512 << 20, 2 << 30
_CPU_SIZE, _CUDA_SIZE = 2048, 8192


def measured_device(device: str = "cpu", dtype: str = "float32") -> Device:
    """The ceilings of "cpu" (with torch's present number of threads), "cuda" or "cuda:N", with the free memory.

    dtype: what a CPU multiplies everything in, "float32" or "bfloat16"; a GPU is measured in each type it has.
    Raises DeviceError for an unknown or absent device.
    """
    memory = available_memory(device)
    if device == "cpu":
        precision = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        rates = {precision: _product_rate(device, getattr(torch, dtype), _CPU_SIZE)}
        threads = torch.get_num_threads()
        on = f"{threads} thread{'s' if threads > 1 else ''}"
        source = f"measured on {on}: sum of 512 MiB, {dtype} products of {_CPU_SIZE}x{_CPU_SIZE}"
        return Device(_cpu_name(), memory, _read_rate(), rates, source)
    at = torch.device(device)
    card = torch.cuda.get_device_properties(at)
    rates = {"bf16": _product_rate(device, torch.bfloat16, _CUDA_SIZE)}
    if (card.major, card.minor) >= (8, 9):
        rates["fp8"] = _fp8_rate(device)
    source = f"measured: copy of 2 GiB, products of {_CUDA_SIZE}x{_CUDA_SIZE}"
    return Device(card.name, memory, _copy_rate(device), rates, source)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system than Linux
        return "CPU"


def best_time(run: Callable[[], object], device: str, runs: int = _RUNS, budget_s: float = 10.0) -> float:
    """Seconds of the fastest of ``runs`` calls after one to warm up; fewer runs once ``budget_s`` is spent."""
    best, started = float("inf"), time.perf_counter()
    for turn in range(runs + 1):
        before = now(device)
        run()
        took = now(device) - before
        if turn:
            best = min(best, took)
        if time.perf_counter() - started > budget_s:
            break
    return min(best, took)


def now(device: str) -> float:
    """A clock that waits for what the device, or each of several with commas between them, has been given to do."""
    if device != "cpu":
        for each in device.split(","):
            torch.cuda.synchronize(torch.device(each))
    return time.perf_counter()


def _read_rate() -> float:
    block = torch.ones(_CPU_BYTES // 4)
    return block.nbytes / best_time(block.sum, "cpu")


def _copy_rate(device: str) -> float:
    block = torch.ones(_CUDA_BYTES // 4, device=device)
    target = torch.empty_like(block)
    return 2 * block.nbytes / best_time(lambda: target.copy_(block), device, runs=10)


def _product_rate(device: str, dtype: torch.dtype, size: int) -> float:
    # Random values: a GPU's clock depends on what it multiplies.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / best_time(lambda: torch.mm(a, b, out=out), device)


def _fp8_rate(device: str) -> float:
    size = _CUDA_SIZE
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    run = lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    return 2 * size**3 / best_time(run, device)
