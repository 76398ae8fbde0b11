"""The lightning indexer of CSA layers: which compressed entries a query attends to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from dsv4_kernels.index import select_entries
from dsv4_kernels.linear import linear
from dsv4_kernels.rope import rotate
from dsv4_kernels.tiling import tiling

from .compressor import Compressor
from .config import ModelConfig
from .source import Source
from .state import LayerState

if TYPE_CHECKING:
    from .attention import Chunk


class Indexer:
    """Index queries and keys of one layer, and the choice of its ``index_topk`` best entries."""

    def __init__(self, source: Source, config: ModelConfig, freqs: Tensor) -> None:
        self.heads, self.channels, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = source.linear("wq_b")
        self.weights_proj = source.linear("weights_proj")
        self.compressor = Compressor(source.under("compressor"), 4, self.channels, freqs, config.rms_norm_eps)

    def advance(self, u_SD: Tensor, state: LayerState, position: int) -> None:
        """Append the index keys of the blocks that these tokens (float32 [S, D]) finish."""
        assert state.index_block is not None and state.index_keys is not None
        state.index_keys.append(self.compressor.advance(u_SD, state.index_block, position))

    def select(self, qr_SL: Tensor, u_SD: Tensor, chunk: Chunk, state: LayerState) -> Tensor:
        """Chosen entries: int64 [S, K], -1 for none (see dsv4_kernels.index.select_entries)."""
        keys = state.index_keys
        assert keys is not None
        q_SHC = linear(qr_SL, self.wq_b).float().unflatten(-1, (self.heads, self.channels))
        q_SHC = keys.fmt.queries(rotate(q_SHC, chunk.index_phases, out=q_SHC))
        weights_SH = linear(u_SD, self.weights_proj).float() * (self.channels * self.heads) ** -0.5

        def key_tiles(count: int) -> Iterator[tuple[int, Tensor]]:
            step = tiling(q_SHC.device).keys
            for start in range(0, count, step):
                yield start, keys.read(start, min(start + step, count))

        return select_entries(q_SHC, weights_SH, key_tiles, chunk.visible[4], self.topk)
