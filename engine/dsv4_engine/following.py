"""Keeps the processes of ranks.py in step: rank 0 runs the program, the others compute what it computes.

The leader's model tells the others of each forward pass before it begins: which tokens, on top of which state.  States
have versions; a state the others made themselves is named, any other (one read from the prefix cache, say) is sent.
So sessions, forks, the cache, the command line and evaluations know nothing of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .model import Model, Relay
from .ranks import Ranks
from .source import Source
from .state import BlockState, KvDtype, LayerState, Rows, SequenceState, Version


@dataclass(frozen=True)
class _Load:
    """Load this model; the arguments of Engine.load."""

    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Forward:
    """Run ``token_ids`` after the state ``base`` (None: a state that follows, layer by layer) and call it ``result``.

    gone: versions that nobody holds any more.  position: of the state that follows.
    """

    base: int | None
    result: int
    token_ids: Tensor
    position: int
    gone: tuple[int, ...]


class LeadingModel(Model):
    """A model whose other shares run in the processes that `follow`."""

    def __init__(self, source: Source, config: ModelConfig, kv_dtype: KvDtype) -> None:
        super().__init__(source, config, kv_dtype)
        self._numbers, self._gone = itertools.count(), list[int]()

    def forward(self, token_ids_S: Tensor, state: SequenceState, relay: Relay | None = None) -> Tensor:
        """See Model.forward.  An exception half way leaves the others waiting: the program must end then."""
        gone, self._gone = tuple(self._gone), []
        base, result = state.version, Version(next(self._numbers))
        self.ranks.from_leader(
            _Forward(base.number if base else None, result.number, token_ids_S.cpu(), state.position, gone)
        )
        if base is None:
            for layer in state.layers:
                self.ranks.from_leader(list(_sent(layer)))
        streams = super().forward(token_ids_S, state, relay)
        state.version = result
        weakref.finalize(result, self._gone.append, result.number)
        return streams


def lead(ranks: Ranks, **arguments: Any) -> None:
    """Have the other processes load the model with these arguments of Engine.load."""
    ranks.from_leader(_Load(arguments))


def dismiss(ranks: Ranks) -> None:
    """Let the other processes end."""
    if ranks.count > 1:
        ranks.from_leader(None)


@torch.inference_mode()
def follow(ranks: Ranks) -> None:
    """Compute this process' share of whatever rank 0 computes, until it is dismissed."""
    from .engine import Engine

    model: Model | None = None
    held: dict[int, SequenceState] = {}
    continued: set[int] = set()
    while (message := ranks.from_leader(None)) is not None:
        if isinstance(message, _Load):
            held.clear()
            model = Engine.load(**message.arguments).model
            continue
        assert model is not None
        if message.base is None:
            state = model.new_state()
            state.position = message.position
            for layer in state.layers:
                _receive(layer, ranks.from_leader(None), model.device)
        elif message.base in continued:  # a second way on from there: it must not write behind the first one's rows
            state = held[message.base].fork()
        else:
            continued.add(message.base)
            state = held[message.base].mark()
        model.forward(message.token_ids, state)
        held[message.result] = state
        for number in message.gone:
            held.pop(number, None)
            continued.discard(number)


def _sent(layer: LayerState) -> Iterator[Any]:
    """A layer's state in parts that another process can rebuild it from."""
    yield layer.window.cpu()
    for block in (layer.block, layer.index_block):
        if block is None:
            yield None
        else:
            yield block.pending.cpu(), block.previous and tuple(half.cpu() for half in block.previous)
    for rows in (layer.entries, layer.index_keys):
        yield None if rows is None else (torch.cat(parts).cpu() if (parts := rows.held()) else None, len(rows))


def _receive(layer: LayerState, parts: list[Any], device: torch.device) -> None:
    window, block, index_block, entries, index_keys = parts
    layer.window = window.to(device)
    layer.block, layer.index_block = _block(block, device), _block(index_block, device)
    if layer.entries is not None and entries[0] is not None:
        layer.entries = Rows.known(layer.entries.fmt, entries[0].to(device), entries[1])
    if layer.index_keys is not None and index_keys[0] is not None:
        layer.index_keys = Rows.known(layer.index_keys.fmt, index_keys[0].to(device), index_keys[1])


def _block(parts: Any, device: torch.device) -> BlockState | None:
    if parts is None:
        return None
    pending, previous = parts
    return BlockState(pending.to(device), previous and tuple(t.to(device) for t in previous))
