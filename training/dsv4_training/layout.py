"""Where documents lie in a batch of sequences, and what follows from it: rotary tables, windows' starts, visible
entries.

A sequence holds whole documents, each beginning at a multiple of 128, so that no compressed entry mixes two; a document
sees itself only.  Positions may jump forward between two blocks of a document (to train far positions on short texts);
compressed entries and queries then stand at the later positions, while the window goes on as if there were no jump.
Letters: B sequences, S positions, A = S/128 blocks, N = B*S, P rotary pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_engine.config import ModelConfig
from dsv4_kernels.rope import rope_frequencies, yarn_frequencies

BLOCK = 128
Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Frequencies:
    """Radians a token of the rotary pairs, float32 [P]: of window layers, and YaRN's of layers with a compressor."""

    window: Tensor
    compressed: Tensor

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device) -> Frequencies:
        dim, scaling = config.qk_rope_head_dim, config.rope_scaling
        slow = rope_frequencies(dim, config.compress_rope_theta)
        if scaling is not None:
            slow = yarn_frequencies(
                dim, config.compress_rope_theta, scaling.factor, scaling.original_max_position_embeddings,
                scaling.beta_fast, scaling.beta_slow,
            )  # fmt: skip
        return cls(rope_frequencies(dim, config.rope_theta).to(device), slow.to(device))


@dataclass(frozen=True)
class Layout:
    """Made anew for every batch, on its device.

    window, compressed: cos and sin [N, P] at the tokens' positions; entries: at the entries' positions, by ratio;
    opens: bool [B*A], blocks that open a document; first_entry: bool [N/4], likewise of CSA's entries; jump: cos and
    sin [B*A, P] of the jumps before blocks; still: those of none; low [ratio]: first visible entry [B, S]; high
    [ratio]: [S].
    """

    batch: int
    length: int
    window: Turn
    compressed: Turn
    entries: dict[int, Turn]
    opens: Tensor
    first_entry: Tensor
    jump: Turn
    still: Turn
    low: dict[int, Tensor]
    high: dict[int, Tensor]

    @classmethod
    def of(cls, start_BA: Tensor, place_BA: Tensor, frequencies: Frequencies) -> Layout:
        """start: the block in which a block's document begins; place: a block's position / 128 (int64, both)."""
        batch, blocks = start_BA.shape
        device, length = start_BA.device, blocks * BLOCK
        offset = torch.arange(BLOCK, device=device)
        block = torch.arange(blocks, device=device)
        near = ((block - start_BA)[..., None] * BLOCK + offset).view(-1)
        far = (place_BA[..., None] * BLOCK + offset).view(-1)
        opens = (start_BA == block).view(-1)
        by = (place_BA - place_BA.roll(1, 1) - 1).view(-1).masked_fill(opens, 0) * BLOCK
        # A jump is one large angle; in float32 a million radians are off by a tenth.
        angle = by[:, None].double() * frequencies.compressed.double()
        jump = (angle.cos().float(), angle.sin().float())
        t = torch.arange(length, device=device)
        every4 = torch.arange(0, batch * length, 4, device=device)
        return cls(
            batch,
            length,
            turns_at(near, frequencies.window),
            turns_at(far, frequencies.compressed),
            {ratio: turns_at(far[::ratio], frequencies.compressed) for ratio in (4, BLOCK)},
            opens,
            opens[every4 // BLOCK] & (every4 % BLOCK == 0),
            jump,
            (torch.ones_like(jump[0]), torch.zeros_like(jump[1])),
            {r: start_BA.repeat_interleave(BLOCK, 1) * (BLOCK // r) for r in (4, BLOCK)},
            {r: (t + 1) // r for r in (4, BLOCK)},
        )

    @classmethod
    def whole(cls, batch: int, length: int, frequencies: Frequencies) -> Layout:
        """Sequences of one document each."""
        device = frequencies.window.device
        place = torch.arange(length // BLOCK, device=device).expand(batch, -1).contiguous()
        return cls.of(torch.zeros_like(place), place, frequencies)


def turns_at(position_N: Tensor, frequencies: Tensor) -> Turn:
    angle = position_N.float()[:, None] * frequencies
    return angle.cos(), angle.sin()
