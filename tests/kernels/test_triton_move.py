"""Window rows between rings and blocks: bytes, at every edge."""

import pytest
import torch

from dsv4_kernels.triton.move import Block, move_rows
from dsv4_kernels.triton.rows import from_block, row_bytes, to_block
from support.triton_mode import DEVICE


@pytest.mark.parametrize("channels", [128, 512])
@pytest.mark.parametrize(("first", "last"), [(-128, 0), (-5, 3), (250, 262), (1000, 1000), (511, 640)])
def test_rows_go_to_a_block_and_back(channels: int, first: int, last: int) -> None:
    size = row_bytes(channels)
    rows = torch.randint(256, (256, size), dtype=torch.uint8, device=DEVICE)
    ring = to_block(rows, channels)
    block = torch.full((max(last - first, 1) * size,), 7, dtype=torch.uint8, device=DEVICE)
    move_rows(Block(ring, ring=256), Block(block, base=-first), channels, first, last)
    moved = from_block(block, channels)
    for position in range(first, last):
        want = rows[position % 256] if position >= 0 else torch.full_like(rows[0], 7)
        assert torch.equal(moved[position - first], want)
    other = torch.full_like(ring, 9)
    move_rows(Block(block, base=-first), Block(other, ring=256), channels, first, last)
    back = from_block(other, channels)
    kept = {position % 256 for position in range(max(first, 0), last)}
    for slot in range(256):
        assert torch.equal(back[slot], rows[slot] if slot in kept else torch.full_like(rows[0], 9))
