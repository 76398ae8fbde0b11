"""What the C library does with memory that torch gives back."""

from __future__ import annotations

import ctypes

KEPT = 64 << 20  # bytes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more


def keep_freed_memory() -> None:
    """Let the process keep a layer's tensors' memory for the next layer's: at most `KEPT` bytes.

    glibc otherwise returns megabytes to the system as soon as they are free, and the system hands them out again
    filled with zeros: a twelfth of a small model's prefill on a CPU.  All threads share one pool, as pools of their
    own hold twice as much.  Elsewhere than with glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, KEPT)
