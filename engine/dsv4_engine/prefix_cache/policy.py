"""Where the state of a sequence is kept, and where a new one starts from it.

Owns the report's three policies and the choice of the cheapest start; knows positions only, neither bytes nor tensors.
Source: report, section 3.5.

A session can only go on where a chunk ends (the same chunks give the same bits), so states are kept at chunk ends
alone: the windows of the tokens between them could never be read.  Where no state lies near, the windows are found
again by running the last window x layers tokens over the rows that are known: after so many, nothing comes from where
the windows were empty.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import InputError

PolicyName = Literal["full", "periodic", "zero"]
POLICIES: tuple[str, ...] = get_args(PolicyName)
SEGMENT_TOKENS = 2048
DEFAULT_INTERVAL = 131_072  # benchmarks/prefix_cache.py: from 32K on nothing is gained over running windows again


@dataclass(frozen=True)
class Policy:
    """full: a state at every chunk end.  periodic: every ``interval`` tokens and where a prompt ends.  zero: none.

    Raises InputError for another name or an interval below 1.
    """

    name: str = "periodic"
    interval: int = DEFAULT_INTERVAL

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise InputError(f"cache policy {self.name!r} is not one of {', '.join(POLICIES)}", "Choose one of these.")
        if self.interval < 1:
            raise InputError(f"a cache interval of {self.interval} tokens is too small", "Give 1 or more.")


@dataclass(frozen=True)
class Start:
    """Go on from ``position``, computing from ``computed`` on: the tokens between have known rows but no windows."""

    position: int
    computed: int

    @property
    def replays(self) -> bool:
        return self.computed < self.position


@dataclass(frozen=True)
class Grid:
    """chunk, segment: tokens of each, a segment being whole chunks; reach: tokens after which no empty window shows."""

    chunk: int
    segment: int
    reach: int

    @classmethod
    def of(cls, chunk: int, sliding_window: int, layers: int) -> Grid:
        return cls(chunk, chunk * max(1, SEGMENT_TOKENS // chunk), sliding_window * layers)

    def last_chunk(self, tokens: int) -> int:
        """The last chunk end within so many tokens."""
        return tokens // self.chunk * self.chunk

    def last_segment(self, tokens: int) -> int:
        """The last segment end within so many tokens."""
        return tokens // self.segment * self.segment

    def replay(self, position: int) -> Start:
        """How to start at a segment end without a state."""
        return Start(position, self.last_chunk(max(0, position - self.reach)))

    def keeps(self, policy: Policy, position: int, prompt: int) -> bool:
        """Whether the state at a chunk end is kept, of a prompt whose first ``prompt`` tokens are read in chunks."""
        if policy.name == "zero":
            return False
        return policy.name == "full" or self.lasting(policy, position) or position in self.ends(prompt)

    def lasting(self, policy: Policy, position: int) -> bool:
        """Whether a state belongs to the policy wherever prompts end; the others make room for newer ones."""
        every = max(self.segment, policy.interval // self.segment * self.segment)
        return policy.name == "full" or (policy.name == "periodic" and position % every == 0)

    def ends(self, prompt: int) -> tuple[int, int]:
        """The last chunk end of a prompt, for the same one again, and the last segment end, for another question."""
        last = self.last_chunk(prompt)
        return last, self.last_segment(last - 1) if last else 0

    def start(self, rows: int, states: Collection[int]) -> Start:
        """Where to start with rows known up to the segment end ``rows`` and states at ``states``."""
        best = max(states, default=0)
        other = self.replay(rows)
        return other if other.computed > best else Start(best, best)
