"""A second stream, for what a decoded token's layer can compute beside the rest: alone, neither fills the device.

What runs there is forked from the current stream and joined to it, in a recording too (there it becomes a branch of the
graph).  Every join comes before the next fork, so memory that either side lets go is not taken too early.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """The second stream of a device; on a CPU the same work in its place."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forked = False

    @contextmanager
    def work(self, pays: bool = True) -> Iterator[None]:
        """What is launched meanwhile runs beside what follows, until `join`; with ``pays`` false, before it."""
        if self._stream is None or not pays:
            yield
            return
        self._forked = True
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What follows waits for the work, where there is any."""
        if self._stream is not None and self._forked:
            self._forked = False
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
