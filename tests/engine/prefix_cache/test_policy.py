"""Where states are kept and where a session starts from them."""

from __future__ import annotations

import pytest

from dsv4_engine.errors import InputError
from dsv4_engine.prefix_cache.policy import Grid, Policy, Start

TINY = Grid.of(512, 128, 6)


def kept(policy: Policy, prompt: int, grid: Grid = TINY) -> list[int]:
    return [end for end in range(grid.chunk, prompt + 1, grid.chunk) if grid.keeps(policy, end, prompt)]


def test_segments_are_whole_chunks_of_about_2048_tokens() -> None:
    assert [Grid.of(chunk, 128, 6).segment for chunk in (128, 384, 512, 2048)] == [2048, 1920, 2048, 2048]


def test_full_keeps_every_chunk_end_and_zero_none() -> None:
    assert kept(Policy("full"), 2000) == [512, 1024, 1536]
    assert kept(Policy("zero"), 100_000) == []


def test_periodic_keeps_intervals_and_where_the_prompt_ends() -> None:
    assert kept(Policy("periodic", 4096), 11_000) == [4096, 8192, 10240, 10752]
    assert kept(Policy("periodic", 65_536), 11_000) == [10240, 10752]
    assert kept(Policy("periodic", 65_536), 10_240) == [8192, 10240]
    assert kept(Policy("periodic", 65_536), 511) == []


def test_an_interval_is_rounded_to_segments() -> None:
    assert kept(Policy("periodic", 5000), 8704) == [4096, 8192, 8704]
    assert kept(Policy("periodic", 1), 4700) == [2048, 4096, 4608]


def test_only_ends_of_prompts_pass() -> None:
    policy = Policy("periodic", 4096)
    assert [TINY.lasting(policy, end) for end in (4096, 4608, 6144, 8192)] == [True, False, False, True]
    assert TINY.lasting(Policy("full"), 512)


def test_a_state_or_a_replay_whichever_computes_less() -> None:
    assert TINY.start(0, []) == Start(0, 0)
    assert TINY.start(8192, []) == Start(8192, 7168)  # 768 tokens reach back into the chunk before
    assert TINY.start(8192, [4096]) == Start(8192, 7168)
    assert TINY.start(8192, [4096, 7168]) == Start(7168, 7168)
    assert TINY.start(8192, [8704]) == Start(8704, 8704)


def test_a_replay_from_the_very_start_is_none() -> None:
    assert not TINY.start(512, []).replays
    assert TINY.replay(4096).replays


@pytest.mark.parametrize("grid", [TINY, Grid.of(2048, 128, 43), Grid.of(128, 32, 4), Grid.of(384, 128, 61)])
def test_a_replay_starts_at_a_chunk_and_is_long_enough(grid: Grid) -> None:
    for position in range(grid.segment, 50 * grid.segment, grid.segment):
        start = grid.replay(position)
        assert start.computed % grid.chunk == 0
        assert start.computed == 0 or position - start.computed >= grid.reach


@pytest.mark.parametrize("wrong", [("fully", 4096), ("periodic", 0)])
def test_wrong_policies_are_refused(wrong: tuple[str, int]) -> None:
    with pytest.raises(InputError) as caught:
        Policy(*wrong)
    assert caught.value.hint
