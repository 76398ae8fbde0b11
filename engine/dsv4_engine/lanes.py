"""Consecutive chunks of one sequence side by side, each on a thread of its own.

For models so small that an operation is too little work to share among threads: handing its parts over, to cores that
may not even share a cache, takes a quarter of the time.  Chunks walk through the layers one behind the other: one
enters a layer when the one before it has brought the layer's state behind its own tokens, which it does before it
attends.  So every layer sees them in order, and every result has the bits it has when they come one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Condition

import torch
from torch import Tensor

from .allocator import keep_freed_memory
from .model import Model
from .state import LayerState, SequenceState


class Lanes:
    """``count`` chunks at a time, which share torch's threads."""

    def __init__(self, model: Model, count: int) -> None:
        self._model, self._count = model, count
        keep_freed_memory()

    def run(self, parts: Iterable[Tensor], state: SequenceState) -> Generator[Tensor]:
        """Token ids [S] of consecutive chunks -> their streams [S, J, D], in order; after each, ``state`` stands there.

        A chunk has its share of the threads also when it is alone: what a product rounds to depends on their number.
        Close the iterator to stop early.  However it ends, ``state`` is the one after the last chunk that came out,
        and nothing runs any more that could touch it.
        """
        way, walks = _Way(self._model), deque[tuple[_Walk, Future[Tensor]]]()
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self._count, "lane", torch.set_num_threads, (max(1, threads // self._count),))
        left, ended = iter(parts), False
        start, last = state.position, None
        layers = state.layers

        def begin(number: int) -> None:
            nonlocal start, last, layers
            for part in islice(left, number):
                last = _Walk(way, part, SequenceState([], start), last, layers)
                layers = last.state.layers
                walks.append((last, pool.submit(last.run)))
                start += part.shape[0]

        try:
            begin(self._count + 1)  # one more than run, so that no thread waits for this one
            while walks:
                walk, streams = walks.popleft()
                result = streams.result()
                # Marks: a fork of them must not end the piece of memory that the next chunks' rows go on in.
                state.layers = [layer.mark() for layer in walk.state.layers]
                state.position = walk.state.position
                begin(1)
                yield result
            ended = True
        finally:
            with way.moved:
                way.stopped = not ended
                way.moved.notify_all()
            if not ended:  # a walk that is under way writes behind the rows it shares with this state
                state.layers = [layer.fork() for layer in state.layers]
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # also for threads to come, which begin with what was set last


class _Way:
    """What the walks of a run share.  moved: told whenever one has handed a layer's state on."""

    def __init__(self, model: Model) -> None:
        self.model, self.moved, self.stopped = model, Condition(), False


class _Stopped(Exception):
    """This chunk is not wanted any more, or the one before it failed."""


class _Walk:
    """One chunk's way through the layers.  state: of the layers it entered, with its own tokens at the end.

    layers: the states that this one goes on from; before: the walk in front, if any, which is still filling them.
    """

    def __init__(
        self, way: _Way, part: Tensor, state: SequenceState, before: _Walk | None, layers: list[LayerState]
    ) -> None:
        self._way, self._part, self._before, self._layers = way, part, before, layers
        self.state, self.handed_on, self.failed = state, 0, False

    @torch.inference_mode()
    def run(self) -> Tensor:
        way = self._way
        try:
            return way.model.forward(self._part, self.state, self)
        except BaseException:
            self.failed = True
            raise
        finally:
            self._before, self._layers = None, []  # else every chunk would be kept by the next
            with way.moved:
                way.moved.notify_all()

    def take(self, layer: int) -> LayerState:
        way, before = self._way, self._before
        if before is not None:
            with way.moved:
                way.moved.wait_for(lambda: way.stopped or before.failed or before.handed_on > layer)
                if way.stopped or before.handed_on <= layer:
                    raise _Stopped
        self.state.layers.append(self._layers[layer].mark())
        return self.state.layers[-1]

    def hand_on(self) -> None:
        with self._way.moved:
            self.handed_on += 1
            self._way.moved.notify_all()
