"""What is launched for one layer: attention and experts between their hyper-connections.

Owns the order of the kernels and which weights are stacked.  Knows neither sessions nor how steps are recorded: the
same code runs a prefilled chunk and a decoded token.  Nothing here waits for the device.
Letters: S tokens, J streams, D hidden, H heads, C channels, L q_lora_rank, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv4_kernels.triton.attention import sparse_attention
from dsv4_kernels.triton.compress import Compressing, compress
from dsv4_kernels.triton.hyper_connection import Connected, Connection, Write, connect
from dsv4_kernels.triton.index import choose_entries
from dsv4_kernels.triton.linear import ROUNDED_BY_ALL, fp8_linear, grouped_linear, plain_linear
from dsv4_kernels.triton.moe import check_pool, route, routed_experts, swiglu_round
from dsv4_kernels.triton.move import Block, move_rows
from dsv4_kernels.triton.project import finish_queries, split_low_rank
from dsv4_kernels.triton.rows import EntryRows, WindowRows, row_bytes

from ..config import ModelConfig
from .beside import Beside
from .chunk import WINDOW, Chunk
from .state import WINDOW_RING, LayerBuffers
from .weights import PackedSource

# Called between a layer's routing and its experts with its number, the experts chosen, int32 [S, K], and what asks the
# next layer on the device, if there is one, which experts it would choose for this layer's input.
Likely = Callable[[], Tensor] | None
Chosen = Callable[[int, Tensor, Likely], None]


class GpuIndexer:
    """Which compressed entries a query attends to; tests and evaluations watch `select` from outside."""

    def __init__(self, config: ModelConfig) -> None:
        self.topk = config.index_topk

    def select(self, q_SHC: Tensor, weights_SH: Tensor, chunk: Chunk, buffers: LayerBuffers) -> Tensor:
        """Chosen entries, rising, then -1: int32 [S, K]; q, weights: as dsv4_kernels.triton.index takes them."""
        assert buffers.index_keys is not None
        return choose_entries(q_SHC, weights_SH, chunk.position_S, buffers.index_keys, 4, chunk.most[4], self.topk)


class GpuAttention:
    """Attention of a layer with compress ratio 0 (window), 4 (CSA) or 128 (HCA)."""

    def __init__(self, source: PackedSource, name: str, config: ModelConfig, ratio: int, beside: Beside) -> None:
        self.config, self.ratio, self.beside = config, ratio, beside
        self.wq_a_wkv = source.fp8(f"{name}wq_a", f"{name}wkv")
        inner = f"{name}indexer."
        self.wq_b = source.fp8(f"{name}wq_b", *([f"{inner}wq_b"] if ratio == 4 else []))
        self.wo_a, self.wo_b = source.fp8(f"{name}wo_a"), source.fp8(f"{name}wo_b")
        self.q_norm, self.kv_norm = source.tensor(f"{name}q_norm.weight"), source.tensor(f"{name}kv_norm.weight")
        self.sink = source.tensor(f"{name}attn_sink")
        self.indexer = GpuIndexer(config) if ratio == 4 else None
        self.plain = None
        self.pooling: list[tuple[Tensor, Tensor]] = []  # position bias and norm, of the index keys behind the entries
        if ratio:
            compressors = [f"{name}compressor.", f"{inner}compressor."][: 2 if ratio == 4 else 1]
            plain = [f"{each}{part}" for each in compressors for part in ("wkv", "wgate")]
            self.plain = source.plain(*plain, *([f"{inner}weights_proj"] if ratio == 4 else []))
            self.pooling = [(source.tensor(f"{each}ape"), source.tensor(f"{each}norm.weight")) for each in compressors]

    def forward(self, read: Connected, chunk: Chunk, held: LayerBuffers, written: LayerBuffers) -> Tensor:
        """The sub-layer's result, bfloat16 [S, D].  written: where new rows go: ``held``, or room that nobody reads."""
        with self.beside.work(chunk.start is None):
            projected = self._compress(read, chunk, held, written)
        low_rank = fp8_linear(read.rounded, self.wq_a_wkv)
        window = self._window(chunk, held)
        phases = torch.view_as_real(chunk.phases[self.ratio])
        eps = self.config.rms_norm_eps
        qr = split_low_rank(low_rank, self.q_norm, self.kv_norm, phases, chunk.position_S, window, eps)
        y_SX = fp8_linear(qr, self.wq_b)
        self.beside.join()
        q_SHC, index = self._queries(y_SX, projected, chunk)
        del y_SX, projected, low_rank, qr  # a chunk's are gigabytes
        self._keep(chunk, window, held)
        selected = None
        if self.indexer is not None:
            assert index is not None
            selected = self.indexer.select(*index, chunk, held)
        return self._output(self._attend(q_SHC, selected, chunk, window, held))

    def _window(self, chunk: Chunk, held: LayerBuffers) -> WindowRows:
        """Where the rows of recent positions lie while this chunk is computed."""
        if chunk.start is None:
            return WindowRows(held.window, chunk.base_S, WINDOW_RING)
        channels, device = self.config.head_dim, held.window.device
        rows = torch.empty((WINDOW + chunk.tokens) * row_bytes(channels), dtype=torch.uint8, device=device)
        block = Block(rows, base=WINDOW - chunk.start)
        move_rows(Block(held.window, ring=WINDOW_RING), block, channels, chunk.start - WINDOW, chunk.start)
        return WindowRows(rows, chunk.base_S)

    def _keep(self, chunk: Chunk, window: WindowRows, held: LayerBuffers) -> None:
        """A chunk's last rows into the ring that steps go on with."""
        if chunk.start is None:
            return
        end = chunk.start + chunk.tokens
        block = Block(window.block, base=WINDOW - chunk.start)
        ring = Block(held.window, ring=WINDOW_RING)
        move_rows(block, ring, self.config.head_dim, max(chunk.start, end - WINDOW_RING), end)

    def _compress(self, read: Connected, chunk: Chunk, held: LayerBuffers, written: LayerBuffers) -> Tensor | None:
        """Take the tokens in and write the rows they finish; returns what was projected, float32 [S, ...]."""
        if self.plain is None:
            return None
        projected = plain_linear(read.u, self.plain)
        places = ((held.ring, written.entries), (held.index_ring, written.index_keys))
        lists = [
            Compressing(*pooling, ring, segments)
            for pooling, (ring, segments) in zip(self.pooling, places, strict=False)
            if ring is not None and segments is not None
        ]
        phases = torch.view_as_real(chunk.block_phases[self.ratio])
        compress(projected, self.ratio, chunk.position_S[:1], phases, self.config.rms_norm_eps, *lists)
        return projected

    def _queries(
        self, y_SX: Tensor, projected: Tensor | None, chunk: Chunk
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Queries bfloat16 [S, H, C] and, for CSA, those of the index with their weights."""
        config = self.config
        index_weights = None
        if self.indexer is not None:
            assert projected is not None
            index_weights = projected[:, projected.shape[1] - config.index_n_heads :]
        q_SHC, index_q, weights = finish_queries(
            y_SX,
            config.num_attention_heads,
            config.head_dim,
            torch.view_as_real(chunk.phases[self.ratio]),
            config.rms_norm_eps,
            index_weights,
            config.index_head_dim,
        )
        return q_SHC, None if index_q is None or weights is None else (index_q, weights)

    def _attend(
        self, q_SHC: Tensor, selected: Tensor | None, chunk: Chunk, window: WindowRows, held: LayerBuffers
    ) -> Tensor:
        entries = None
        if held.entries is not None:
            entries = EntryRows(held.entries, self.ratio, chunk.most[self.ratio], selected)
        phases = chunk.phases[self.ratio]
        return sparse_attention(q_SHC, chunk.position_S, window, entries, self.sink, phases, WINDOW)

    def _output(self, o_SHC: Tensor) -> Tensor:
        o_SGI = o_SHC.view(o_SHC.shape[0], self.config.o_groups, -1)
        if o_SGI.shape[0] <= ROUNDED_BY_ALL:
            return fp8_linear(grouped_linear(o_SGI, self.wo_a), self.wo_b)
        return fp8_linear(grouped_linear(o_SGI, self.wo_a, rounded=True), self.wo_b)


class GpuExperts:
    """Routed experts, chosen by score or (hash layers) by token id, and the shared expert."""

    def __init__(self, source: PackedSource, name: str, config: ModelConfig, hashed: bool, beside: Beside) -> None:
        self.config, self.beside = config, beside
        self.gate = source.plain(f"{name}gate")
        self.bias = None if hashed else source.tensor(f"{name}gate.bias")
        self.table = source.raw(f"{name}gate.tid2eid").to(torch.int32) if hashed else None
        self.pool = source.experts(name, config)
        if name not in source.elsewhere:  # those are checked when they are read
            check_pool(self.pool, f"{name}experts")
        self.shared_w13 = source.fp8(f"{name}shared_experts.w1", f"{name}shared_experts.w3")
        self.shared_w2 = source.fp8(f"{name}shared_experts.w2")
        self.following: GpuExperts | None = None  # the next layer's on this device

    def forward(self, read: Connected, chunk: Chunk, chosen: Callable[[Tensor, Likely], None] | None) -> Write:
        """What is added to the streams: every chosen expert's result and the shared one's."""
        config = self.config
        with self.beside.work(chunk.start is None):
            gate_up = fp8_linear(read.rounded, self.shared_w13)
            result = fp8_linear(swiglu_round(gate_up, config.swiglu_limit), self.shared_w2)
        chosen_SK, weights_SK = self.routed(read.u, chunk.token_ids)
        if chosen is not None:
            after = self.following
            chosen(chosen_SK, None if after is None else lambda: after.routed(read.u, chunk.token_ids)[0])
        routed = routed_experts(read.rounded, chosen_SK, weights_SK, self.pool, config.swiglu_limit)
        self.beside.join()
        return Write(result, read.post, read.comb, routed)

    def routed(self, u_SD: Tensor, token_ids_S: Tensor) -> tuple[Tensor, Tensor]:
        """The experts chosen for inputs [S, D], int32 [S, K], and their weights."""
        config = self.config
        return route(
            plain_linear(u_SD, self.gate),
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            config.norm_topk_prob,
            self.bias,
            self.table,
            None if self.table is None else token_ids_S,
        )


class GpuBlock:
    """Attention and experts, each inside its hyper-connection."""

    def __init__(self, source: PackedSource, config: ModelConfig, layer: int, beside: Beside) -> None:
        name, self.config, self.layer = f"layers.{layer}.", config, layer
        self.attn = GpuAttention(source, f"{name}attn.", config, config.compress_ratios[layer], beside)
        self.ffn = GpuExperts(source, f"{name}ffn.", config, layer < config.num_hash_layers, beside)
        self.connections = [
            Connection.of(
                source.tensor(f"{name}hc_{part}_fn"),
                source.tensor(f"{name}hc_{part}_base"),
                source.tensor(f"{name}hc_{part}_scale"),
                source.tensor(f"{name}{part}_norm.weight"),
            )
            for part in ("attn", "ffn")
        ]

    def forward(
        self,
        x_SJD: Tensor,
        before: Write | None,
        chunk: Chunk,
        held: LayerBuffers,
        written: LayerBuffers,
        chosen: Chosen | None = None,
    ) -> tuple[Tensor, Write]:
        """Streams [S, J, D] and what is still to be added to them (None: nothing) -> both behind the layer.

        The streams are written over, unless they are an expanded view.
        """
        read = self._connect(x_SJD, before, 0)
        result = self.attn.forward(read, chunk, held, written)
        read = self._connect(read.streams, Write(result, read.post, read.comb), 1)
        resident = None if chosen is None else partial(chosen, self.layer)
        return read.streams, self.ffn.forward(read, chunk, resident)

    def _connect(self, x_SJD: Tensor, before: Write | None, part: int) -> Connected:
        config = self.config
        return connect(
            x_SJD,
            before,
            self.connections[part],
            iterations=config.hc_sinkhorn_iters,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
            out=x_SJD if before is not None and x_SJD.is_contiguous() else None,
        )
