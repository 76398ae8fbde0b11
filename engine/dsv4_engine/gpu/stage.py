"""Consecutive layers on one device: their weights, the embedding before the first and the head behind the last.

Owns what crosses from one device to the next: the streams alone.  Knows neither sessions nor how steps are recorded.
Letters: S tokens, J streams, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_kernels.triton.hyper_connection import Connection, Write, head_read, write_streams
from dsv4_kernels.triton.linear import plain_linear

from ..config import ModelConfig
from ..model import compress_frequencies, window_frequencies
from .beside import Beside
from .chunk import Chunk
from .layer import Chosen, GpuBlock
from .state import LayerBuffers, Layout
from .weights import PackedSource


class Stage:
    """Layers ``first`` to ``last`` - 1."""

    def __init__(self, source: PackedSource, config: ModelConfig, first: int, last: int) -> None:
        self.config, self.device, self.first, self.last = config, source.device, first, last
        self.embed = source.raw("embed.weight") if first == 0 else None
        self.beside = Beside(source.device)
        self.blocks = [GpuBlock(source, config, layer, self.beside) for layer in range(first, last)]
        for block, following in pairwise(self.blocks):
            block.ffn.following = following.ffn
        self.output = self.head = None
        if last == config.num_hidden_layers:
            self.output = source.plain("head")
            fn, base, scale = (source.tensor(f"hc_head_{part}") for part in ("fn", "base", "scale"))
            self.head = Connection.of(fn, base, scale, source.tensor("norm.weight"))
        self.layout = Layout(config, config.compress_ratios[first:last], self.device)
        compress = compress_frequencies(config).to(self.device)
        self.freqs = {0: window_frequencies(config).to(self.device), 4: compress, 128: compress}

    def forward(
        self,
        x_SJD: Tensor | None,
        chunk: Chunk,
        held: Sequence[LayerBuffers],
        written: Sequence[LayerBuffers],
        chosen: Chosen | None = None,
    ) -> Tensor:
        """Streams [S, J, D], or None before the first layer, to the streams behind the last one.

        The given streams are written over.  written: where new rows go, see GpuAttention.forward.
        """
        if x_SJD is None:
            assert self.embed is not None
            embedded = F.embedding(chunk.token_ids, self.embed).to(torch.bfloat16)
            x_SJD = embedded[:, None].expand(-1, self.config.hc_mult, -1)
        before: Write | None = None
        for block, mine, new in zip(self.blocks, held, written, strict=True):
            x_SJD, before = block.forward(x_SJD, before, chunk, mine, new, chosen)
        assert before is not None
        return self.written(x_SJD, before)

    @staticmethod
    def written(x_SJD: Tensor, before: Write) -> Tensor:
        """The streams with what is still to be added to them, in their place."""
        return write_streams(x_SJD, before, out=x_SJD)

    def logits(self, x_SJD: Tensor) -> Tensor:
        """Streams [S, J, D] behind the last layer -> float32 [S, V]."""
        assert self.head is not None and self.output is not None
        config = self.config
        _, h_SD = head_read(x_SJD, None, self.head, hc_eps=config.hc_eps, norm_eps=config.rms_norm_eps)
        return plain_linear(h_SD.to(torch.bfloat16), self.output)  # its values are those of bfloat16


class on:
    """The current device, where it is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._inner = torch.cuda.device(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._inner is not None:
            self._inner.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self._inner is not None:
            self._inner.__exit__(*exception)
