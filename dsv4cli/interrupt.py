"""Ctrl-C that stops between two tokens, so that the session behind the answer stays whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Ctrl-C, obeyed at a place where everything is whole.  hint: how to go on."""

    hint = ""


@dataclass
class Stop:
    """Whether Ctrl-C was pressed."""

    requested: bool = False
    then: Callable[[], None] | None = None  # also told of it, from within the signal handler

    def check(self) -> None:
        """Raise Stopped here, at a place of our choosing."""
        if self.requested:
            raise Stopped


@contextmanager
def stop_on_ctrl_c() -> Iterator[Stop]:
    """The first Ctrl-C sets ``requested``; a second one, when a step takes too long, interrupts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield stop
        return

    def pressed(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        if stop.then is not None:
            stop.then()

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
