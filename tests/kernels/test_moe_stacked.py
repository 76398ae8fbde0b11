"""The mixture over stacked experts against the one that takes expert by expert."""

import pytest
import torch

from dsv4_kernels import moe_stacked as kernel
from dsv4_kernels.linear import Weight, stack
from dsv4_kernels.moe import Expert, mixture
from dsv4_kernels.moe_stacked import BLOCK_ROWS, StackedExperts, _blocks, stacked_mixture

RELATIVE_RMS = 2e-6
HIDDEN, INNER = 256, 128  # whole blocks of activations, so that a rounding never sees a neighbour


def made(count: int, rounds: bool, dtype: torch.dtype = torch.float32) -> list[Expert]:
    def matrix(rows: int, columns: int) -> Weight:
        return Weight((torch.randn(rows, columns) * 3 / columns**0.5).to(dtype), round_activations=rounds)

    return [Expert(stack([matrix(INNER, HIDDEN), matrix(INNER, HIDDEN)]), matrix(HIDDEN, INNER)) for _ in range(count)]


def routed(tokens: int, topk: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(tokens, experts).argsort(1)[:, :topk], torch.rand(tokens, topk)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 5, 2), (2, 12, 3), (63, 3, 3), (300, 5, 2), (1000, 4, 1)])
def test_equals_expert_by_expert(tokens: int, experts: int, topk: int, rounds: bool) -> None:
    torch.manual_seed(tokens)
    parts, u = made(experts, rounds), torch.randn(tokens, HIDDEN)
    stacked = StackedExperts.of(parts)
    assert stacked is not None
    chosen, weights = routed(tokens, topk, experts)
    want = mixture(u, parts, chosen, weights, 10.0)
    got = stacked_mixture(u, stacked, chosen, weights, 10.0)
    assert got.dtype == torch.float32 and got.shape == want.shape
    # With rounding the second product's inputs may differ by one code where the first one's sums differ in a bit.
    allowed = 2e-3 if rounds else RELATIVE_RMS
    assert ((got - want).norm() / want.norm()).item() < allowed
    assert ((mixture(u, stacked.views(), chosen, weights, 10.0) - want).norm() / want.norm()).item() < allowed


def test_half_precision_matrices() -> None:
    parts, u = made(4, True, torch.bfloat16), torch.randn(50, HIDDEN, dtype=torch.bfloat16)
    chosen, weights = routed(50, 2, 4)
    want = mixture(u, parts, chosen, weights, 10.0)
    got = stacked_mixture(u, StackedExperts.of(parts), chosen, weights, 10.0)
    assert ((got - want).norm() / want.norm()).item() < 1e-2


def test_a_token_does_not_see_its_neighbours() -> None:
    stacked, u = StackedExperts.of(made(6, True)), torch.randn(400, HIDDEN)
    chosen, weights = routed(400, 2, 6)
    first = stacked_mixture(u, stacked, chosen, weights, 10.0)
    others, other_weights = routed(400, 2, 6)
    others[7], other_weights[7] = chosen[7], weights[7]
    moved = torch.randn_like(u)
    moved[7] = u[7]
    assert torch.equal(stacked_mixture(moved, stacked, others, other_weights, 10.0)[7], first[7])


@pytest.mark.parametrize("pairs", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("skewed", [False, True])
def test_every_pair_has_its_own_row_in_a_block_of_its_expert(pairs: int, skewed: bool) -> None:
    experts = 7
    expert = torch.full((pairs,), 3) if skewed else torch.randint(0, experts, (pairs,))
    slot, of_block = _blocks(expert, experts)
    assert slot.unique().numel() == pairs
    assert torch.equal(of_block[slot // BLOCK_ROWS], expert)
    assert of_block.numel() == -(-pairs // BLOCK_ROWS) + experts


def test_no_tokens() -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    got = stacked_mixture(torch.empty(0, HIDDEN), StackedExperts.of(made(3, True)), none, torch.empty(0, 2), 10.0)
    assert got.shape == (0, HIDDEN)


def test_what_cannot_be_stacked() -> None:
    assert StackedExperts.of([]) is None
    packed = Weight(torch.zeros(8, 16, dtype=torch.int8), torch.zeros(8, 1, dtype=torch.uint8), "fp4", True)
    assert StackedExperts.of([Expert((packed, packed), packed)]) is None


def test_bytes_are_those_of_the_matrices_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = StackedExperts.of(made(3, False))
    seen = []
    bmm = torch.bmm
    monkeypatch.setattr(kernel.torch, "bmm", lambda a, b: seen.append(b.nbytes) or bmm(a, b))
    for tokens in (1, 500):
        seen.clear()
        stacked_mixture(torch.randn(tokens, HIDDEN), stacked, *routed(tokens, 2, 3), 10.0)
        assert sum(seen) == stacked.bytes_read(tokens, 2)
