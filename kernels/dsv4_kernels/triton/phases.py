"""RoPE phases of a chunk's tokens and of its blocks' first tokens, all in one launch.

Reference: dsv4_kernels.rope.rope_phases; an angle is the float32 product of position and frequency, as there.
Letters: S tokens, N blocks, P rotated pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _phases(position_ptr, window_ptr, compress_ptr, out_ptr, tokens, blocks, P: tl.constexpr, ROWS: tl.constexpr):
    """Rows: tokens by the window's frequencies, tokens by the compressor's, ``blocks`` of 4, the others of 128."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.load(position_ptr)
    token = tl.load(position_ptr + row % tokens, mask=row < 2 * tokens, other=0)
    by_4 = (first // 4 + (row - 2 * tokens)) * 4
    by_128 = (first // 128 + (row - 2 * tokens - blocks)) * 128
    position = tl.where(row < 2 * tokens, token, tl.where(row < 2 * tokens + blocks, by_4, by_128))
    pair = tl.arange(0, P)[None, :]
    window = (row < tokens)[:, None]
    frequency = tl.where(window, tl.load(window_ptr + pair), tl.load(compress_ptr + pair))
    angle = position.to(tl.float32)[:, None] * frequency
    place = out_ptr + row[:, None] * (2 * P) + 2 * pair
    shown = (row < 2 * tokens + blocks + tokens // 128 + 1)[:, None]
    tl.store(place, tl.cos(angle), mask=shown)
    tl.store(place + 1, tl.sin(angle), mask=shown)


def chunk_phases(position_S: Tensor, window_P: Tensor, compress_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(i position frequency), complex64 [.., P]: of the tokens by both sets of frequencies [S, P]; by the second
    one of the first tokens of blocks of 4 and of 128, from the block that the first token is in, [S // ratio + 1, P].

    position: int64 [S], rising by one; frequencies: float32 [P], P a power of two.
    """
    tokens, pairs = position_S.shape[0], window_P.shape[0]
    sizes = [tokens, tokens, tokens // 4 + 1, tokens // 128 + 1]
    out = torch.empty(sum(sizes), pairs, 2, dtype=torch.float32, device=position_S.device)
    _phases[(triton.cdiv(sum(sizes), _ROWS),)](
        position_S, window_P, compress_P, out, tokens, sizes[2], P=pairs, ROWS=_ROWS, num_warps=4
    )
    window, compress, by_4, by_128 = torch.view_as_complex(out).split(sizes)
    return window, compress, by_4, by_128
