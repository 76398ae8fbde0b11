"""One layer's attention: projections, the layer kind's view of the past, and the grouped output projection.

Letters: S tokens of this call, D hidden, L q_lora_rank, H heads, C head_dim, N entries, K chosen entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.attention import dense_attention, gathered_attention, window_attention
from dsv4_kernels.linear import grouped_linear, linear, stacked_linear
from dsv4_kernels.norm import inverse_rms, rms_norm
from dsv4_kernels.rope import rope_phases, rotate

from .compressor import Compressor
from .config import ModelConfig
from .indexer import Indexer
from .source import Source
from .state import LayerState, RowFormat


def gathers(entries: int, chosen: int, heads: int) -> bool:
    """Whether fetching each query's ``chosen`` entries beats scoring all ``entries`` and masking the rest.

    Scoring costs in proportion to the heads, fetching hardly does.  The line goes through what benchmarks/csa_paths.py
    measured on two CPU cores: even at about 8 times as many entries as chosen with 4 heads, at 2 to 3 with 16 and 64.
    """
    return entries > (2 + 24 / heads) * chosen


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward pass and what every layer derives from their positions.

    token_ids: int64 [S]; position: of the first; phases, by compress ratio: RoPE phases of head_dim channels
    [S, 1, C/2]; query_phases: the same times C^-0.5, which scales the queries on the way; back_phases: conjugate, for
    outputs; index_phases: for index heads; visible, by compress ratio: finished blocks each token sees, int64 [S] on
    the host, where they bound loops.
    """

    token_ids: Tensor
    position: int
    phases: dict[int, Tensor]
    query_phases: dict[int, Tensor]
    back_phases: dict[int, Tensor]
    index_phases: Tensor
    visible: dict[int, Tensor]

    @classmethod
    def at(cls, token_ids: Tensor, position: int, config: ModelConfig, freqs: dict[int, Tensor]) -> Chunk:
        """freqs: RoPE frequencies by compress ratio."""
        end = position + token_ids.shape[0]
        positions = torch.arange(position, end, device=token_ids.device)
        window = rope_phases(positions, freqs[0], config.head_dim)[:, None]
        compress = rope_phases(positions, freqs[4], config.head_dim)[:, None]
        scale = config.head_dim**-0.5
        same_width = config.index_head_dim == config.head_dim
        return cls(
            token_ids,
            position,
            _by_ratio(window, compress),
            _by_ratio(window * scale, compress * scale),
            _by_ratio(torch.conj_physical(window), torch.conj_physical(compress)),
            compress if same_width else rope_phases(positions, freqs[4], config.index_head_dim)[:, None],
            {ratio: torch.arange(position + 1, end + 1, device="cpu") // ratio for ratio in (4, 128)},
        )


def _by_ratio(window: Tensor, compress: Tensor) -> dict[int, Tensor]:
    return {0: window, 4: compress, 128: compress}


class Attention:
    """Attention of a layer with compress ratio 0 (window), 4 (CSA) or 128 (HCA)."""

    def __init__(self, source: Source, config: ModelConfig, ratio: int, fmt: RowFormat, compress_freqs: Tensor) -> None:
        self.config, self.ratio, self.fmt = config, ratio, fmt
        self.ranks = ranks = source.ranks
        self.groups = slice(*ranks.share(config.o_groups))  # of heads, this process' own
        self.heads = slice(*ranks.share(config.num_attention_heads, config.num_attention_heads // config.o_groups))
        low_rank, channels = config.o_lora_rank, config.head_dim
        self.wq_a_wkv = source.linears("wq_a", "wkv")
        self.wq_b = source.linear("wq_b", rows=(self.heads.start * channels, self.heads.stop * channels))
        self.wo_a = source.linear("wo_a", rows=(self.groups.start * low_rank, self.groups.stop * low_rank))
        self.wo_b = source.linear("wo_b", columns=(self.groups.start * low_rank, self.groups.stop * low_rank))
        self.q_norm, self.kv_norm = source.tensor("q_norm.weight"), source.tensor("kv_norm.weight")
        self.sink = source.tensor("attn_sink")[self.heads]
        self.compressor = self.indexer = None
        if ratio:
            self.compressor = Compressor(
                source.under("compressor"), ratio, config.head_dim, compress_freqs, config.rms_norm_eps
            )
        if ratio == 4:
            self.indexer = Indexer(source.under("indexer"), config, compress_freqs)

    def forward(
        self, u_SD: Tensor, chunk: Chunk, state: LayerState, advanced: Callable[[], None] | None = None
    ) -> Tensor:
        """Attend from the chunk's tokens, u [S, D] in the model's dtype; advances ``state``; returns [S, D].

        advanced is called once ``state`` stands behind the chunk, from when on it is only read.
        """
        config, eps = self.config, self.config.rms_norm_eps
        qr_SL, kv_SC = stacked_linear(u_SD, self.wq_a_wkv).split([config.q_lora_rank, config.head_dim], -1)
        qr_SL = rms_norm(qr_SL, self.q_norm, eps)
        q_SHC = linear(qr_SL, self.wq_b).float().unflatten(-1, (-1, config.head_dim))
        q_SHC *= inverse_rms(q_SHC, eps)  # in place, here and below: the widest tensors of a layer
        q_SHC = rotate(q_SHC, chunk.query_phases[self.ratio], out=q_SHC)
        kv_SC = self.fmt.rounded(rotate(rms_norm(kv_SC.float(), self.kv_norm, eps), chunk.phases[self.ratio][:, 0]))
        window_RC = torch.cat([state.window, kv_SC])
        state.window = window_RC[max(0, window_RC.shape[0] - config.sliding_window + 1) :].clone()
        self._compress(u_SD.float(), chunk, state)
        if advanced is not None:
            advanced()

        o_SHC = self._attend(q_SHC, window_RC, qr_SL, u_SD, chunk, state)
        o_SHC = rotate(o_SHC, chunk.back_phases[self.ratio], out=o_SHC).to(u_SD.dtype)
        o_SGX = o_SHC.reshape(u_SD.shape[0], self.groups.stop - self.groups.start, -1)
        return self.ranks.sum(linear(grouped_linear(o_SGX, self.wo_a), self.wo_b))

    def _compress(self, u_SD: Tensor, chunk: Chunk, state: LayerState) -> None:
        """Append the entries, and index keys, of the blocks that these tokens (float32 [S, D]) finish."""
        if self.compressor is not None:
            assert state.entries is not None and state.block is not None
            state.entries.append(self.compressor.advance(u_SD, state.block, chunk.position))
        if self.indexer is not None:
            self.indexer.advance(u_SD, state, chunk.position)

    def _attend(
        self, q_SHC: Tensor, window_RC: Tensor, qr_SL: Tensor, u_SD: Tensor, chunk: Chunk, state: LayerState
    ) -> Tensor:
        window = self.config.sliding_window
        if self.compressor is None:
            return window_attention(q_SHC, window_RC, self.sink, window)
        entries = state.entries
        assert entries is not None
        tokens, total = u_SD.shape[0], len(entries)
        visible_S = None if tokens == 1 else chunk.visible[self.ratio]  # the last token sees every finished block
        if self.indexer is None or total <= self.indexer.topk:  # all are attended to
            return dense_attention(q_SHC, window_RC, entries.read(0, total), None, self.sink, window, visible_S)
        chosen_SK = self.indexer.select(qr_SL, u_SD, chunk, state)
        if tokens == 1:
            rows = entries.gather(chosen_SK[0])
            return dense_attention(q_SHC, window_RC, rows, None, self.sink, window)
        nobody = chosen_SK.masked_fill(chosen_SK < 0, total)  # -1 -> a row past the last, cut off again below
        if not gathers(total, self.indexer.topk, self.config.num_attention_heads):
            mask = torch.zeros(tokens, total + 1, dtype=torch.bool, device=u_SD.device).scatter_(1, nobody, True)
            rows = entries.read(0, total)
            return dense_attention(q_SHC, window_RC, rows, mask[:, :total], self.sink, window, visible_S)
        if u_SD.device.type != "cpu":  # there decoding them all costs less than waiting for which were chosen
            return gathered_attention(q_SHC, window_RC, entries.read(0, total), chosen_SK, self.sink, window)
        # Rows are decoded once for the whole chunk, only those that any query chose.
        wanted = torch.zeros(total + 1, dtype=torch.bool, device=u_SD.device)
        wanted[nobody] = True
        place = wanted[:total].cumsum(0) - 1
        local_SK = torch.where(chosen_SK < 0, -1, place[chosen_SK])
        rows = entries.gather(wanted[:total].nonzero().squeeze(1))
        return gathered_attention(q_SHC, window_RC, rows, local_SK, self.sink, window)
