"""Queries, window rows and index queries against float64 and the engine's bytes; interpreted where there is no GPU."""

import pytest
import torch

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.rounding import round_fp8
from dsv4_kernels.triton import project
from dsv4_kernels.triton.project import finish_queries, split_low_rank
from dsv4_kernels.triton.rows import WindowRows, from_block, row_bytes
from support.streams_case import (
    EPS,
    between,
    in_bf16,
    index_queries,
    index_queries_hold,
    normed,
    poisoned,
    queries,
    random_phases,
    rows_hold,
    window_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values


def bf16(*shape: int, device: str = DEVICE) -> torch.Tensor:
    """Values of very different sizes, so that scales differ."""
    x = torch.randn(*shape, device=device) * torch.randint(-6, 6, (*shape[:-1], 1), device=device).float().exp2()
    return (x * (1 + 30 * (torch.rand(shape, device=device) < 0.01))).to(torch.bfloat16)


def check_split(tokens: int, low: int, channels: int, ring: int) -> None:
    y, phases = bf16(tokens, low + channels), random_phases(tokens, DEVICE)
    q_norm, kv_norm = torch.rand(low, device=DEVICE) + 0.5, torch.rand(channels, device=DEVICE) + 0.5
    position = torch.arange(1000, 1000 + tokens, device=DEVICE)
    rows = ring or tokens + 9
    base = torch.full((tokens,), 0 if ring else 9 - 1000, device=DEVICE)
    block = torch.full((rows * row_bytes(channels),), 0xFF, dtype=torch.uint8, device=DEVICE)
    with poisoned():
        got = split_low_rank(y, q_norm, kv_norm, phases, position, WindowRows(block, base, ring), EPS)
    want = normed(y[:, :low].double(), q_norm)
    assert between(got.values(), want, want, lambda x: round_fp8(in_bf16(x), 128))
    written = base + (position % ring if ring else position)
    stored = from_block(block, channels)
    assert rows_hold(stored[written], window_rows(y[:, low:], kv_norm, phases))
    stored[written] = 0xFF
    assert (stored == 0xFF).all()  # nothing else


def check_queries(tokens: int, heads: int, channels: int, index_heads: int, index_channels: int) -> None:
    y = bf16(tokens, heads * channels + index_heads * index_channels)
    phases = random_phases(tokens, DEVICE)
    weights = torch.randn(tokens, index_heads + 3, device=DEVICE)[:, 3:] if index_heads else None
    with poisoned():
        q, index_q, folded = finish_queries(y, heads, channels, phases, EPS, weights, index_channels)
    want = queries(y[:, : heads * channels].unflatten(1, (heads, channels)), phases)
    assert between(q, want, want)
    if weights is None:
        assert index_q is None and folded is None
        return
    assert index_q is not None and folded is not None
    assert index_q.shape == (tokens, index_heads, index_channels)
    want = index_queries(y[:, heads * channels :].unflatten(1, (index_heads, index_channels)), phases)
    assert index_queries_hold(index_q, folded, weights, want)


@pytest.mark.parametrize(
    ("tokens", "low", "channels", "ring"), [(5, 128, 128, 0), (3, 384, 192, 2048), (2, 256, 512, 256), (0, 128, 128, 0)]
)
def test_split_low_rank(tokens: int, low: int, channels: int, ring: int) -> None:
    check_split(tokens, low, channels, ring)


@pytest.mark.parametrize(
    ("tokens", "heads", "channels", "index_heads", "index_channels"),
    [(3, 4, 128, 2, 128), (2, 9, 192, 33, 64), (1, 3, 512, 0, 0), (0, 4, 128, 2, 128)],
)
def test_finish_queries(tokens: int, heads: int, channels: int, index_heads: int, index_channels: int) -> None:
    check_queries(tokens, heads, channels, index_heads, index_channels)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    tokens = 5 if DEVICE == "cpu" else 3000
    y, phases = bf16(tokens, 8 * 512 + 4 * 128), random_phases(tokens, DEVICE)
    weights = torch.randn(tokens, 4, device=DEVICE)
    together = finish_queries(y, 8, 512, phases, EPS, weights, 128)
    for t in (0, tokens // 2, tokens - 1):
        part = slice(t, t + 1)
        alone = finish_queries(y[part], 8, 512, phases[part], EPS, weights[part], 128)
        for one, all_of_them in zip(alone, together, strict=True):
            assert one is not None and all_of_them is not None
            assert torch.equal(one.view(torch.uint8), all_of_them[part].view(torch.uint8))


def test_infinite_values_show() -> None:
    y = bf16(1, 128 + 128)
    y[0, 130] = torch.inf
    block = torch.zeros(row_bytes(128), dtype=torch.uint8, device=DEVICE)
    base, position = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    one = torch.ones(128, device=DEVICE)
    split_low_rank(y, one, one, random_phases(1, DEVICE), position, WindowRows(block, base), EPS)
    assert (block.view(torch.float8_e4m3fn)[:64].float().isnan()).any()


def test_refusals_name_the_alternative() -> None:
    with pytest.raises(ValueError, match="device='cpu'"):
        finish_queries(bf16(1, 64), 1, 64, random_phases(1, DEVICE), EPS)
    with pytest.raises(ValueError, match="phases"):
        finish_queries(bf16(1, 128), 1, 128, torch.zeros(1, 64), EPS)


def test_rows_do_not_depend_on_who_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs a token, or one."""
    tokens, low, channels = (4, 256, 128) if DEVICE == "cpu" else (1100, 1024, 512)
    y, phases = bf16(tokens, low + channels), random_phases(tokens, DEVICE)
    q_norm, kv_norm = torch.rand(low, device=DEVICE) + 0.5, torch.rand(channels, device=DEVICE) + 0.5
    position = torch.arange(tokens, device=DEVICE)
    made = []
    for few in (0, 1 << 20):
        monkeypatch.setattr(project, "FEW", few)
        block = torch.zeros(tokens * row_bytes(channels), dtype=torch.uint8, device=DEVICE)
        got = split_low_rank(y, q_norm, kv_norm, phases, position, WindowRows(block, torch.zeros_like(position)), EPS)
        made.append((got.data.view(torch.uint8), got.scale, block))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(("heads", "low"), [(64, 1024), (128, 1536)])
def test_flash_and_pro(tokens: int, heads: int, low: int) -> None:
    check_split(tokens, low, 512, 0)
    check_split(min(tokens, 256), low, 512, 256)
    check_queries(tokens, heads, 512, 64, 128)
    check_queries(tokens, heads, 512, 0, 0)
