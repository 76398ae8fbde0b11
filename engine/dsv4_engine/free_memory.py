"""How much memory a device has left for this process: the system's word, the control groups' and the limits'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsv4_engine.errors import DeviceError

GPU_SHARE = 0.95  # of what is free: the rest goes to the libraries' own buffers and the allocator's rounding
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be used on a device now.  Raises DeviceError for an unknown or absent device.

    For "cpu" what the system, the control group and the process' own limit leave, pages of files that can be dropped
    counted as free.  For a GPU what no process has taken, and what this one's allocator keeps and does not use.
    """
    if device == "cpu":
        import psutil

        return max(0, min([int(psutil.virtual_memory().available), *_cgroup_free(), *_address_space_free()]))
    if device.split(":")[0] != "cuda":
        raise DeviceError(f"there is no device {device!r}", "Use cpu or cuda.")
    import torch

    index = device.partition(":")[2] or "0"
    if not index.isdecimal() or not torch.cuda.is_available() or int(index) >= torch.cuda.device_count():
        raise DeviceError(f"there is no device {device!r} on this machine", "Use --device cpu, or see `dsv4 doctor`.")
    kept = torch.cuda.memory_reserved(int(index)) - torch.cuda.memory_allocated(int(index))
    return int(GPU_SHARE * (torch.cuda.mem_get_info(int(index))[0] + kept))


def _cgroup_free(root: Path = _CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each limit on this process' control group and its parents leaves, for versions 1 and 2."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return  # no control groups on this system
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers not in ("", "memory"):
            continue
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit_name, usage_name, file_name = names if controllers else ("memory.max", "memory.current", "inactive_file")
        group = base / path.lstrip("/")
        # Inside a container the path may lie outside the mount: then only the root is there to ask.
        for folder in (group, *group.parents):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None:
                yield max(0, limit - max(0, usage - _statistic(folder / "memory.stat", file_name)))
            if folder == base:
                break


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _statistic(path: Path, key: str) -> int:
    try:
        pairs = (line.split() for line in path.read_text().splitlines())
        return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == key), 0)
    except (OSError, ValueError):
        return 0


def _address_space_free() -> Iterator[int]:
    """What `ulimit -v` leaves; files mapped already count against it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        import psutil

        yield limit - int(psutil.Process().memory_info().vms)
