"""The model: embedding, blocks, head and the MTP block, over one sequence's state.

Knows neither files nor sessions: weights come from a Source, the past from a SequenceState.
Letters: S tokens, J residual streams, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_kernels.linear import linear
from dsv4_kernels.norm import rms_norm
from dsv4_kernels.rope import rope_frequencies, yarn_frequencies

from .attention import Attention, Chunk
from .config import ModelConfig
from .device_sampling import Draw
from .hyper_connection import HyperConnection, StreamsHead
from .moe import MixtureOfExperts
from .source import Source
from .state import KvDtype, LayerState, SequenceState, new_layer_state, row_formats


def window_frequencies(config: ModelConfig) -> Tensor:
    """RoPE frequencies of layers without a compressor."""
    return rope_frequencies(config.qk_rope_head_dim, config.rope_theta)


def compress_frequencies(config: ModelConfig) -> Tensor:
    """RoPE frequencies of everything in layers with a compressor."""
    scaling = config.rope_scaling
    if scaling is None:
        return rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta)
    return yarn_frequencies(
        config.qk_rope_head_dim,
        config.compress_rope_theta,
        scaling.factor,
        scaling.original_max_position_embeddings,
        scaling.beta_fast,
        scaling.beta_slow,
    )


class Block:
    """Attention and experts, each inside its hyper-connection."""

    def __init__(self, source: Source, config: ModelConfig, ratio: int, hashed: bool, kv_dtype: KvDtype) -> None:
        fmt, freqs = row_formats(config, kv_dtype)[0], compress_frequencies(config).to(source.device)
        self.attn = Attention(source.under("attn"), config, ratio, fmt, freqs)
        self.ffn = MixtureOfExperts(source.under("ffn"), config, hashed)
        self.hc_attn = HyperConnection(source, config, "attn")
        self.hc_ffn = HyperConnection(source, config, "ffn")

    def forward(
        self, x_SJD: Tensor, chunk: Chunk, state: LayerState, advanced: Callable[[], None] | None = None
    ) -> Tensor:
        """Streams [S, J, D] -> [S, J, D]; advances ``state`` (see Attention.forward)."""
        x_SJD = self.hc_attn.around(x_SJD, lambda u: self.attn.forward(u, chunk, state, advanced))
        return self.hc_ffn.around(x_SJD, lambda u: self.ffn.forward(u, chunk.token_ids))


class MtpBlock:
    """Multi-token prediction, depth 1: from the streams at t and the embedding of token t+1, token t+2."""

    def __init__(self, source: Source, config: ModelConfig, kv_dtype: KvDtype) -> None:
        self.eps = config.rms_norm_eps
        ratio = config.mtp_compress_ratios[0] if config.mtp_compress_ratios else 0
        self.e_proj, self.h_proj = source.linear("e_proj"), source.linear("h_proj")
        self.enorm, self.hnorm = source.tensor("enorm.weight"), source.tensor("hnorm.weight")
        self.block = Block(source, config, ratio, hashed=False, kv_dtype=kv_dtype)
        self.head = StreamsHead(source, config)

    def forward(self, embedded_SD: Tensor, x_SJD: Tensor, chunk: Chunk, state: LayerState) -> Tensor:
        """What the shared output head reads: [S, D].  ``chunk`` holds tokens t+1 at the positions t."""
        token = linear(rms_norm(embedded_SD, self.enorm, self.eps), self.e_proj)
        streams = linear(rms_norm(x_SJD, self.hnorm, self.eps), self.h_proj)
        return self.head.forward(self.block.forward(token[:, None] + streams, chunk, state))


class Relay(Protocol):
    """Where the layers' states come from, and where they are wanted next."""

    def take(self, layer: int) -> LayerState:
        """The state of this layer, before it is entered."""

    def hand_on(self) -> None:
        """The state taken last stands behind the chunk now."""


class Model:
    """All layers.  ``forward`` advances a state by one chunk and returns the streams; ``logits`` reads them.

    row_invariant: a token's results have the same bits whatever other tokens are computed beside it.
    """

    row_invariant = False

    def __init__(self, source: Source, config: ModelConfig, kv_dtype: KvDtype) -> None:
        self.config, self.kv_dtype, self.dtype, self.device = config, kv_dtype, source.dtype, source.device
        self.ranks = source.ranks
        self.embed = source.raw("embed.weight")
        self.output = source.linear("head", float32=True)
        self.blocks = [
            Block(source.under(f"layers.{i}"), config, ratio, i < config.num_hash_layers, kv_dtype)
            for i, ratio in enumerate(config.compress_ratios)
        ]
        for block, following in pairwise(self.blocks):
            block.ffn.following = following.ffn
        self.head = StreamsHead(source, config)
        alone = self.ranks.count == 1  # several processes leave the MTP block out: nothing drafts with it there
        self.mtp = MtpBlock(source.under("mtp.0"), config, kv_dtype) if source.weights.has_mtp and alone else None
        compress = compress_frequencies(config).to(self.device)
        self.freqs = {0: window_frequencies(config).to(self.device), 4: compress, 128: compress}

    def new_state(self) -> SequenceState:
        """The state before the first token."""
        return SequenceState(
            [new_layer_state(self.config, ratio, self.kv_dtype, self.device) for ratio in self.config.compress_ratios]
        )

    def blank_state(self) -> SequenceState:
        """A state before the first token that is built up from outside; `adopted` makes it one of this model's."""
        return self.new_state()

    def adopted(self, state: SequenceState) -> SequenceState:
        """A state that was built outside, on a multiple of 128 tokens, as this model continues it."""
        return state

    def new_mtp_state(self) -> LayerState:
        """The MTP block's own state before the first token."""
        ratios = self.config.mtp_compress_ratios
        return new_layer_state(self.config, ratios[0] if ratios else 0, self.kv_dtype, self.device)

    def forward(self, token_ids_S: Tensor, state: SequenceState, relay: Relay | None = None) -> Tensor:
        """Run int64 ids [S] after ``state.position`` tokens; advances the state; returns streams [S, J, D].

        The ids may lie on the host; on a GPU this returns before the work is done (see `wait`).
        relay: gives the layers' states, in place of ``state`` (see lanes.py).
        """
        token_ids_S = token_ids_S.to(self.device)
        for block in self.blocks:
            block.ffn.expect(token_ids_S)
        chunk = self._chunk(token_ids_S, state.position)
        # Repeated in memory: torch multiplies batches of matrices that overlap one by one.
        x_SJD = self._embedded(token_ids_S)[:, None].repeat(1, self.config.hc_mult, 1)
        for i, block in enumerate(self.blocks):
            if relay is None:
                x_SJD = block.forward(x_SJD, chunk, state.layers[i])
            else:
                x_SJD = block.forward(x_SJD, chunk, relay.take(i), relay.hand_on)
        state.position += token_ids_S.shape[0]
        return x_SJD

    def logits(self, x_SJD: Tensor) -> Tensor:
        """Streams [S, J, D] -> float32 [S, V]."""
        return self._project(self.head.forward(x_SJD))

    def mtp_logits(self, next_ids_S: Tensor, x_SJD: Tensor, position: int, state: LayerState) -> Tensor:
        """Logits of tokens t+2, float32 [S, V], from the ids of tokens t+1 [S] and the streams at t [S, J, D].

        t runs from ``position``.
        """
        if self.mtp is None:
            raise ValueError("this checkpoint has no MTP block")
        next_ids_S = next_ids_S.to(self.device)
        chunk = self._chunk(next_ids_S, position)
        return self._project(self.mtp.forward(self._embedded(next_ids_S), x_SJD, chunk, state))

    def ahead(self, draw: Draw, state: SequenceState) -> None:
        """Begin what `forward` does with the token that is being drawn; where there is no GPU to keep busy, nothing."""

    def wait(self, last: bool = True) -> None:
        """Return once all work handed to the device so far is done.  last: no other chunk follows at once."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _embedded(self, token_ids_S: Tensor) -> Tensor:
        return F.embedding(token_ids_S, self.embed).to(self.dtype)

    def _project(self, h_SD: Tensor) -> Tensor:
        return linear(h_SD.float(), self.output)

    def _chunk(self, token_ids_S: Tensor, position: int) -> Chunk:
        return Chunk.at(token_ids_S, position, self.config, self.freqs)
