"""Sampling: ranges, greedy, the cuts, and randomness that depends on (seed, position) alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4_engine.device_sampling import Draw
from dsv4_engine.errors import InputError
from dsv4_engine.sampling import LogitsError, Sampler, Sampling, probabilities, sample, uniform

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
STREAM_OF_SEED_0 = [0.848786498280016, 0.07784171920245109, 0.7801371971540718]


def drawn(logits: Tensor, sampling: Sampling, count: int) -> Tensor:
    """Shares of the tokens drawn."""
    sampler = Sampler(sampling)
    ids = torch.tensor([sampler.next(logits) for _ in range(count)])
    return torch.bincount(ids, minlength=len(logits)) / count


# -- options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "1"), ("temperature", None), ("temperature", True),
        ("top_p", 0.0), ("top_p", -1), ("top_p", 1.01), ("top_p", math.nan),
        ("min_p", -0.01), ("min_p", 1.5), ("min_p", math.nan),
        ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", True),
    ],
)  # fmt: skip
def test_out_of_range_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**{option: value})
    assert caught.value.message == f"{option} is {value!r}"
    assert caught.value.hint.startswith("Give a")


def test_the_ends_of_the_ranges_are_allowed() -> None:
    Sampling(temperature=0, top_p=1, min_p=0, seed=0)
    Sampling(temperature=2.0, top_p=1e-9, min_p=1.0, seed=2**63 - 1)


# -- greedy


@pytest.mark.parametrize("size", [2, 7, 4096, 129280])
def test_greedy_takes_the_lowest_id_among_equals(size: int) -> None:
    logits = torch.zeros(size)
    assert sample(logits, Sampling(temperature=0), 0.999) == 0
    logits[size // 2 :] = 1.0
    assert sample(logits, Sampling(temperature=0), 0.0) == size // 2
    assert probabilities(logits, Sampling(temperature=0))[size // 2] == 1.0


def test_greedy_ignores_the_cuts_and_the_seed() -> None:
    for seed in range(5):
        assert Sampler(Sampling(temperature=0, top_p=0.1, min_p=0.9, seed=seed)).next(LOGITS) == 1


def test_a_tiny_temperature_is_greedy() -> None:
    for temperature in (1e-3, 1e-30, 5e-324):
        assert close(probabilities(torch.tensor([1.0, 3.0, 2.9]), Sampling(temperature=temperature)), [0, 1, 0])


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([3e38, -3e38, 3e38])
    assert probabilities(logits, Sampling()).tolist() == [0.5, 0, 0.5]


# -- distributions


def close(actual: Tensor, expected: list[float]) -> bool:
    return torch.allclose(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-7)


def test_temperature() -> None:
    assert close(probabilities(LOGITS, Sampling()), [0.1, 0.4, 0.2, 0.3])
    squares = [0.01, 0.16, 0.04, 0.09]
    assert close(probabilities(LOGITS, Sampling(temperature=0.5)), [p / 0.3 for p in squares])


def test_min_p() -> None:
    assert close(probabilities(LOGITS, Sampling(min_p=0.49)), [0, 4 / 9, 2 / 9, 3 / 9])
    assert close(probabilities(LOGITS, Sampling(min_p=0.51)), [0, 4 / 7, 0, 3 / 7])
    assert close(probabilities(LOGITS, Sampling(min_p=1.0)), [0, 1, 0, 0])


def test_top_p() -> None:
    assert close(probabilities(LOGITS, Sampling(top_p=0.39)), [0, 1, 0, 0])
    assert close(probabilities(LOGITS, Sampling(top_p=0.41)), [0, 4 / 7, 0, 3 / 7])
    assert close(probabilities(LOGITS, Sampling(top_p=0.71)), [0, 4 / 9, 2 / 9, 3 / 9])
    assert close(probabilities(LOGITS, Sampling(top_p=0.91)), [0.1, 0.4, 0.2, 0.3])
    for least in (1e-12, 5e-324):
        assert close(probabilities(LOGITS, Sampling(top_p=least)), [0, 1, 0, 0])


def test_top_p_takes_the_lowest_ids_among_equals() -> None:
    for half in (2, 50, 5000):
        expected = [1 / half] * half + [0.0] * half
        assert close(probabilities(torch.zeros(2 * half), Sampling(top_p=0.5)), expected)


def test_the_cuts_look_at_the_tempered_distribution_min_p_first() -> None:
    # Tempered by 0.5: 1/30, 16/30, 4/30, 9/30.  min_p 0.3 drops those below 4.8/30; of the rest 16/25 is the first.
    assert close(probabilities(LOGITS, Sampling(temperature=0.5, min_p=0.3)), [0, 16 / 25, 0, 9 / 25])
    # 0.6 of the mass: with min-p first the largest (0.64) is enough; top-p on the whole (0.533) would keep two.
    assert close(probabilities(LOGITS, Sampling(temperature=0.5, min_p=0.3, top_p=0.6)), [0, 1, 0, 0])


def test_draws_follow_the_distribution() -> None:
    shares = drawn(LOGITS, Sampling(seed=1), 20_000)
    # Four standard deviations of a share of 20,000 draws are at most 0.0142.
    assert torch.allclose(shares, LOGITS.exp(), atol=0.0142)


def test_cut_tokens_are_never_drawn() -> None:
    shares = drawn(LOGITS, Sampling(seed=2, min_p=0.6), 2_000)
    assert shares[0] == shares[2] == 0
    assert shares[1] > shares[3] > 0


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53]),
    st.floats(0, 2),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
)
def test_every_draw_lands_on_a_possible_token(
    logits: list[float], draw: float, temperature: float, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature, top_p, min_p)
    logits_V = torch.tensor(logits, dtype=torch.float32)
    chances = probabilities(logits_V, sampling)
    assert chances[sample(logits_V, sampling, draw)] > 0
    assert math.isclose(float(chances.sum()), 1)
    assert logits_V.tolist() == logits  # the input is left alone


def test_the_ends_of_the_draw_pick_the_first_and_last_possible_token() -> None:
    logits = torch.tensor([-100.0, 0.0, 0.0, 0.0, -100.0])
    sampling = Sampling(min_p=0.5)
    assert sample(logits, sampling, 0.0) == 1
    assert sample(logits, sampling, 1 - 2**-53) == 3


# -- randomness


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.zeros(1000)
    straight = Sampler(Sampling(seed=5))
    whole = [straight.next(logits) for _ in range(20)]
    torch.manual_seed(0)
    resumed = Sampler(Sampling(seed=5), position=12)
    assert [resumed.next(logits) for _ in range(8)] == whole[12:]
    assert resumed.position == straight.position == 20
    assert [Sampler(Sampling(seed=6)).next(logits) for _ in range(1)] != whole[:1]


def test_the_stream_of_numbers_is_fixed() -> None:
    # Written down once: a change would make old seeds give other texts.
    assert [uniform(0, n) for n in range(3)] == STREAM_OF_SEED_0


def test_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = torch.tensor([[uniform(seed, n) for n in range(300)] for seed in range(100)], dtype=torch.float64)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 4 * (1 / 12 / 30_000) ** 0.5
    for other in (numbers.roll(1, 0), numbers.roll(1, 1)):  # the next seed; the next position
        correlation = torch.corrcoef(torch.stack([numbers.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / 30_000**0.5


def test_without_a_seed_one_is_picked_and_told() -> None:
    first, second = Sampler(Sampling()), Sampler(Sampling())
    assert first.seed != second.seed
    logits = torch.zeros(10_000)
    again = Sampler(Sampling(seed=first.seed))
    assert [first.next(logits) for _ in range(5)] == [again.next(logits) for _ in range(5)]


def test_the_choice_is_the_same_for_any_float_type_that_holds_the_logits() -> None:
    logits = torch.tensor([0.5, 1.5, -2.0, 1.0])
    for kind in (torch.bfloat16, torch.float64):
        for n in range(50):
            assert sample(logits.to(kind), Sampling(), uniform(0, n)) == sample(logits, Sampling(), uniform(0, n))


# -- the model's faults


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_the_models_fault(bad: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature))
    with pytest.raises(LogitsError, match="1 NaN or infinite logits out of 3") as caught:
        sampler.next(torch.tensor([0.0, bad, 1.0]))
    assert not isinstance(caught.value, ValueError)
    assert sampler.position == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, Sampling()),
        ('{"do_sample": true, "temperature": 0.6, "top_p": 0.95}', Sampling(temperature=0.6, top_p=0.95)),
        ('{"do_sample": false, "temperature": 0.6}', Sampling(temperature=0.0)),
        ('{"bos_token_id": 0, "top_p": null}', Sampling()),
    ],
)
def test_a_folder_recommends_its_sampling(text: str | None, wanted: Sampling, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert Sampling.recommended(tmp_path) == wanted


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"temperature": -1}', '{"top_p": 2}'])
def test_a_bad_recommendation_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError):
        Sampling.recommended(tmp_path)


# -- where the logits lie (a GPU's; the arithmetic is the same on a CPU)


def sample_there(logits: Tensor, sampling: Sampling, draw: float) -> int | None:
    begun = Draw(logits, sampling, draw)
    token = begun.result()
    assert token == begun.known and token in (None, int(begun.token))
    return token


def drawn_there_and_here(logits: Tensor, there: Tensor, draws: list[float]) -> int:
    """How many draws were decided there; each has to be the host's."""
    decided = 0
    for sampling in (
        Sampling(temperature=0), Sampling(), Sampling(temperature=1.7), Sampling(top_p=0.9), Sampling(min_p=0.02),
        Sampling(temperature=0.6, top_p=0.95, min_p=0.001), Sampling(temperature=0.01, top_p=0.5), Sampling(min_p=1.0),
    ):  # fmt: skip
        for draw in draws:
            token = sample_there(there, sampling, draw)
            assert token in (None, sample(logits, sampling, draw))
            decided += token is not None
    return decided


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_draws_there_are_the_hosts(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [uniform(3, n) for n in range(40)]
    for size in (3, 1000, 129_280):
        logits = 3 * torch.randn(size, generator=generator)
        some = draws if size < 129_280 or device == "cuda" else draws[:3]
        assert drawn_there_and_here(logits, logits.to(device), some) == 8 * len(some)
        assert drawn_there_and_here(torch.zeros(size), torch.zeros(size, device=device), some) >= 4 * len(some)


def test_neighbours_that_top_p_parts_are_the_hosts() -> None:
    """Logits so near that their weights may be equal by one library's exp and not by another's: the larger stays."""
    for step in range(1, 200):
        smaller, larger = step * 2.0**-54, (step + 1) * 2.0**-54
        logits = torch.tensor([0.3, smaller, larger])
        for draw in (0.2, 0.9):  # of the two that top_p keeps, the first and the second
            token = sample_there(logits, Sampling(top_p=0.55), draw)
            assert token == sample(logits, Sampling(top_p=0.55), draw) == (2 if draw > 0.5 else 0), step


def test_what_hangs_on_rounding_is_left_to_the_host() -> None:
    logits = torch.zeros(8)
    for eighth in range(8):  # a boundary between two tokens, or the beginning
        assert sample_there(logits, Sampling(), eighth / 8) is None
        assert sample_there(logits, Sampling(), eighth / 8 + 1e-14) is None
        assert sample_there(logits, Sampling(), eighth / 8 + 1e-9) == eighth
    assert sample_there(logits, Sampling(top_p=0.5), 0.3) is None  # exactly four tokens
    assert sample_there(logits, Sampling(top_p=0.51), 0.3) == sample(logits, Sampling(top_p=0.51), 0.3) == 1
    near = torch.log(torch.tensor([1.0, 0.25], dtype=torch.float64))
    assert sample_there(near, Sampling(min_p=0.25), 0.5) is None
    assert sample_there(near, Sampling(min_p=0.2), 0.5) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(top_p=0.5, min_p=0.1)])
def test_logits_that_are_not_finite_are_left_to_the_host(bad: float, sampling: Sampling) -> None:
    assert sample_there(torch.tensor([0.0, bad, 1.0]), sampling, 0.5) is None
