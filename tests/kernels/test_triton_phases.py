"""Phases against dsv4_kernels.rope, to the last position."""

import pytest
import torch

from dsv4_kernels.rope import rope_frequencies, rope_phases
from dsv4_kernels.triton.phases import chunk_phases
from support.triton_mode import DEVICE


@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (3, 1), (127, 2), (1000, 300), ((1 << 20) - 513, 513)])
def test_phases(first: int, tokens: int) -> None:
    window, compress = (rope_frequencies(64, theta).to(DEVICE) for theta in (1e4, 1.6e5))
    position = torch.arange(first, first + tokens, device=DEVICE)
    found = chunk_phases(position, window, compress)
    blocks = [(first // ratio + torch.arange(tokens // ratio + 1, device=DEVICE)) * ratio for ratio in (4, 128)]
    wanted = zip((position, position, *blocks), (window, compress, compress, compress), strict=True)
    for got, (places, freqs) in zip(found, wanted, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, rope_phases(places, freqs, 64), rtol=0, atol=2e-7)


@pytest.mark.skipif(DEVICE == "cpu", reason="NumPy computes the ends of an array otherwise than its middle")
def test_a_token_alone_has_the_same_bits() -> None:
    freqs = rope_frequencies(64, 1e4).to(DEVICE)
    position = torch.arange(1000, 1200, device=DEVICE)
    window, compress, by_4, by_128 = chunk_phases(position, freqs, freqs)
    for i in (0, 77, 199):
        alone = chunk_phases(position[i : i + 1], freqs, freqs)
        assert torch.equal(alone[0], window[i : i + 1]) and torch.equal(alone[1], compress[i : i + 1])
        assert torch.equal(alone[2][0], by_4[(1000 + i) // 4 - 250])
        assert torch.equal(alone[3][0], by_128[(1000 + i) // 128 - 7])
