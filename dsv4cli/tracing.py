"""What the indexers choose while an answer is drawn, watched from outside.

Stands between generation and a session; knows the engine's indexers by their `select` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from dsv4_evals.model import LayerChoice, Trace

if TYPE_CHECKING:
    from torch import Tensor

    from dsv4_engine import Session
    from dsv4_engine.config import ModelConfig
    from dsv4_engine.device_sampling import Draw
    from dsv4_engine.indexer import Indexer

Progress = Callable[[int, int], None]


class Tracer:
    """Stands before a session while an answer is drawn and notes what the indexers choose at each of its steps."""

    def __init__(self, session: Session, indexers: Mapping[int, Indexer], steps: int) -> None:
        self._session, self._indexers, self._left = session, indexers, steps
        self._found: dict[int, list[frozenset[int] | None]] = {layer: [] for layer in indexers}
        self._chosen: dict[int, Tensor] = {}

    @classmethod
    @contextmanager
    def over(cls, session: Session, indexers: Mapping[int, Indexer], steps: int) -> Iterator[Tracer]:
        """Watches a model's indexers (by layer), which all its sessions share, until the block is left."""
        tracer = cls(session, indexers, steps)
        try:
            for layer, indexer in indexers.items():
                vars(indexer)["select"] = tracer._watching(layer, indexer)
            yield tracer
        finally:
            for indexer in indexers.values():
                vars(indexer).pop("select", None)

    def _watching(self, layer: int, indexer: Indexer) -> Any:
        select = indexer.select

        def watched(*arguments: Any, **named: Any) -> Tensor:
            chosen_SK = select(*arguments, **named)
            self._chosen[layer] = chosen_SK[-1]
            return chosen_SK

        return watched

    @property
    def position(self) -> int:
        return self._session.position

    @property
    def ctx(self) -> int:
        return self._session.ctx

    def extend(
        self,
        token_ids: Sequence[int],
        logits: Literal["last", "none", "device"] = "last",
        progress: Progress | None = None,
    ) -> Tensor:
        """The session's, and a note of what its last token chose."""
        self._chosen.clear()
        result = self._session.extend(token_ids, logits=logits, progress=progress)
        if self._left:
            self._left -= 1
            for layer, indexer in self._indexers.items():
                self._found[layer].append(self._choice(layer, indexer))
        return result

    def ahead(self, draw: Draw) -> None:
        """Steps that are watched are not begun before their token is known."""

    def _choice(self, layer: int, indexer: Indexer) -> frozenset[int] | None:
        if layer in self._chosen:
            return frozenset(entry for entry in self._chosen[layer].tolist() if entry >= 0)
        entries = self._session.state.layers[layer].entries
        assert entries is not None and len(entries) <= indexer.topk, "an indexer chose unseen"
        return None

    def trace(self, first: int, config: ModelConfig) -> Trace:
        """What was noted; ``first``: the position of the prompt's last token."""
        layers = (
            LayerChoice(layer, config.compress_ratios[layer], config.compress_ratios[layer] == 4, tuple(steps))
            for layer, steps in self._found.items()
        )
        return Trace(first, config.sliding_window, tuple(layers))
