"""Answers written by the model in training, many at a time: prompts are read once, then each step adds a token to all.

Owns the caches, as fixed tensors in which a step only changes values, so that on a GPU one captured step serves a
whole run: the window as a ring, the compressed entries, and the rows of open blocks.  The operations and the precision
are the trainer's; a test holds the greedy answers against the engine's.  Knows no rewards and no losses.
Letters: P prompts, G answers to each, B = P*G, S positions, M entries, N tokens, C channels, T tokens written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_engine.config import ModelConfig

from .attention import UNSEEN
from .layers import NEG_INF
from .layout import BLOCK, Layout, turns_at
from .model import Mode, Network, Pass

CSA = 4
LOOK_EVERY = 8  # steps between two looks at whether all answers have ended


@dataclass(frozen=True)
class Written:
    """ids [B, T] int64 (``end`` behind an answer's end), lengths [B] with the end token, and the logarithms of the
    probabilities with which the tokens were drawn, float32 [B, T] (zero behind the end)."""

    ids: Tensor
    lengths: Tensor
    logprobs: Tensor


class Writer(Network):
    """Writes answers to batches of one shape: ``prompts`` times ``answers`` at once, ``room`` positions in each."""

    def __init__(
        self, config: ModelConfig, prompts: int, answers: int, room: int, mode: Mode, device: torch.device
    ) -> None:
        """room: prompt and answer together, a multiple of 128."""
        super().__init__(config)
        self.mode, self._prompts, self._answers, self._room = mode, prompts, answers, room
        self._device = device
        self._prefix = ""
        self._lengths = torch.zeros(prompts, dtype=torch.int64, device=device)
        batch = prompts * answers
        self._row = torch.arange(batch, device=device)
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._position = torch.zeros(batch, dtype=torch.int64, device=device)
        self._logits = torch.zeros(batch, config.vocab_size, device=device)
        self._weights: dict[str, Tensor] = {}
        self._cache: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None

    # Reading -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, weights: dict[str, Tensor], ids_PS: Tensor, lengths_P: Tensor) -> None:
        """The prompts: lengths [P] tokens of ids each; S is a multiple of 128 and at most ``room``.

        weights: from parameters.working_weights.
        """
        for name, value in weights.items():
            self._keep(self._weights, name, value.detach())
        self._lengths.copy_(lengths_P)
        hidden = self.forward(self._weights, ids_PS, self.mode).hidden.unflatten(0, ids_PS.shape)
        last = hidden[torch.arange(self._prompts, device=self._device), self._lengths - 1]
        self._logits.copy_(self._scores(last).repeat_interleave(self._answers, 0))
        self._position.copy_(self._lengths.repeat_interleave(self._answers) - 1)

    def _keep(self, table: dict[str, Tensor], name: str, value: Tensor) -> None:
        """In the same tensor as before: a captured step reads it there."""
        if name in table:
            table[name].copy_(value)
        else:
            table[name] = value.clone()

    def _keep_row(self, name: str, value: Tensor) -> None:
        self._keep(self._cache, f"{self._prefix}.{name}", value.repeat_interleave(self._answers, 0))

    def _ring(self, size: int) -> Tensor:
        """Of each prompt the last position that stands at each of ``size`` places, 0 where there is none: [P, size]."""
        last = self._lengths[:, None] - 1
        return (last - (last - torch.arange(size, device=self._device)) % size).clamp_min(0)

    def _at(self, x_NC: Tensor, positions: Tensor) -> Tensor:
        rows = x_NC.unflatten(0, (self._prompts, -1))
        return rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[-1]))

    def _block_before(self, kv: Tensor, layout: Layout) -> Tensor:
        self._keep_row("window", self._at(kv, self._ring(BLOCK)))
        return super()._block_before(kv, layout)

    def _compress(self, run: Pass, prefix: str, ratio: int, u: Tensor) -> Tensor:
        at = self._ring(self._open(ratio))
        self._keep_row(self._rows_of(prefix), self._projected(run.w, prefix, self._at(u, at), at % ratio))
        return super()._compress(run, prefix, ratio, u)

    def _far(self, q: Tensor, entries: Tensor, ratio: int, layout: Layout, index: Any) -> tuple[Tensor, Tensor]:
        self._keep_row("entries", self._roomy(entries, ratio))
        if index is not None:
            self._keep_row("keys", self._roomy(index[2], ratio))
        return super()._far(q, entries, ratio, layout, index)

    def _roomy(self, entries: Tensor, ratio: int) -> Tensor:
        return F.pad(entries, (0, 0, 0, self._room // ratio - entries.shape[1]))

    @staticmethod
    def _open(ratio: int) -> int:
        """Rows that are kept of a compressor: its open block, and the one before where blocks overlap."""
        return 2 * CSA if ratio == CSA else ratio

    @staticmethod
    def _rows_of(prefix: str) -> str:
        return "key_rows" if ".indexer." in prefix else "rows"

    @staticmethod
    def _projected(w: dict[str, Tensor], prefix: str, u: Tensor, place: Tensor) -> Tensor:
        """Values and gate logits side by side, as they are pooled; place: of the token in its block."""
        h = u.float()
        kv, gate = (F.linear(h, w[f"{prefix}.{name}.weight"]) for name in ("wkv", "wgate"))
        return torch.cat([kv, gate + w[f"{prefix}.ape"][place]], -1)

    # Writing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, tokens: int, end: int, temperature: float, generator: torch.Generator | None = None) -> Written:
        """At most ``tokens`` tokens of every answer; temperature 0 takes the most likely one.

        Raises ValueError when they do not fit in the room.
        """
        longest = int(self._lengths.max())
        if longest + tokens > self._room:
            raise ValueError(f"{tokens} tokens after a prompt of {longest} are more than the room for {self._room}")
        ids = torch.full((len(self._row), tokens), end, device=self._device)
        logprobs = torch.zeros(ids.shape, device=self._device)
        ended = torch.zeros(len(self._row), dtype=torch.bool, device=self._device)
        for n in range(tokens):
            scores = (self._logits / temperature if temperature else self._logits).log_softmax(-1)
            chosen = scores
            if temperature:  # Gumbel's trick: the largest of the noisy scores is a sample
                noise = torch.rand(scores.shape, device=self._device, generator=generator).clamp_min(1e-20)
                chosen = scores - (-noise.log()).log()
            token = torch.where(ended, end, chosen.argmax(-1))
            ids[:, n] = token
            logprobs[:, n] = scores.gather(1, token[:, None]).squeeze(1).masked_fill(ended, 0.0)
            ended |= token == end
            if n + 1 == tokens or ((n + 1) % LOOK_EVERY == 0 and bool(ended.all())):
                break
            self._token.copy_(token)
            self._step()
        lengths = ((ids != end).long().cumprod(1).sum(1) + 1).clamp_max(tokens)
        return Written(ids, lengths, logprobs)

    def _step(self) -> None:
        """The logits after ``_token``."""
        if self._device.type != "cuda":
            self._advance()
        elif self._graph is None:
            self._graph = self._captured()
            self._graph.replay()
        else:
            self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A step as a graph; what warms it up is undone."""
        before = {name: value.clone() for name, value in self._cache.items()}
        position = self._position.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._advance()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        for name, value in before.items():
            self._cache[name].copy_(value)
        self._position.copy_(position)
        return graph

    def _advance(self) -> None:
        config, w, mode = self.config, self._weights, self.mode
        self._position += 1
        # Of the layout only the number of sequences is asked for where _attend stands in for _attention.
        layout = cast(Layout, _One(len(self._row)))
        run = Pass(w, self._token, layout, mode, None, {}, 1)
        x = F.embedding(self._token, w["embed.weight"]).to(mode.dtype)[:, None]
        x = x.expand(-1, config.hc_mult, -1).contiguous()
        for layer, ratio in enumerate(config.compress_ratios):
            x, _ = self._block(run, f"layers.{layer}", ratio, x)
        self._logits.copy_(self._scores(self._head(run, "", x)))

    def _scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._weights["head.weight"]).float()

    def _balance(self, served: Tensor, shares: Tensor, layout: Layout) -> Tensor:
        return served.new_zeros(())

    def _attention(self, run: Pass, prefix: str, ratio: int, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        self._prefix = prefix
        if isinstance(run.layout, Layout):
            return super()._attention(run, prefix, ratio, u)
        return self._attend(run, prefix, ratio, u), None, None

    def _attend(self, run: Pass, prefix: str, ratio: int, u: Tensor) -> Tensor:
        """The sub-layer's result for one more token of every answer."""
        config, w, mode, position = self.config, run.w, self.mode, self._position
        frequencies = self.frequencies(self._device)
        cos, sin = turns_at(position, frequencies.compressed if ratio else frequencies.window)
        names = ("wq_a.weight", "q_norm.weight", "wq_b.weight", "wkv.weight", "kv_norm.weight")
        q, kv, low = self.ops.rows(
            "project", 1, u, *(w[f"{prefix}.{n}"] for n in names), cos, sin, config.num_attention_heads,
            config.rms_norm_eps, mode.quantised,
        )  # fmt: skip
        window = self._cache[f"{prefix}.window"]
        window[self._row, position % BLOCK] = kv
        place = torch.arange(BLOCK, device=self._device)
        held = (position[:, None] - place) % BLOCK <= position[:, None]
        near, near_lse = self._dense(q, window, held)
        far = far_lse = None
        if ratio:
            entries = self._cache[f"{prefix}.entries"]
            entry = self._entry(w, f"{prefix}.compressor", ratio, u)
            entry = self.ops.rows("cache_rounding", 1, entry, config.qk_rope_head_dim, mode.quantised)
            entries[self._row, position // ratio] = entry.to(mode.dtype)
            seen = torch.arange(entries.shape[1], device=self._device) < ((position + 1) // ratio)[:, None]
            if ratio == CSA and mode.sparse and entries.shape[1] > config.index_topk:
                far, far_lse = self._selected(run, prefix, u, low, (cos, sin), q, seen)
            else:
                far, far_lse = self._dense(q, entries, seen)
        out: Tensor = self.ops.rows(
            "merge_and_project", 1, near, near_lse, far, far_lse, w[f"{prefix}.attn_sink"], cos, sin,
            w[f"{prefix}.wo_a.weight"], w[f"{prefix}.wo_b.weight"], config.o_groups, mode.quantised,
        )  # fmt: skip
        return out

    def _dense(self, q_BHC: Tensor, rows_BMC: Tensor, seen_BM: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.zeros(len(self._row), 1, dtype=torch.int64, device=self._device)
        high = torch.full((1,), rows_BMC.shape[1], device=self._device)
        out, lse = self.ops.tile("dense_tile")(q_BHC[:, None], rows_BMC, low, high, seen_BM[:, None])
        return out[:, 0], lse[:, 0]

    def _entry(self, w: dict[str, Tensor], prefix: str, ratio: int, u: Tensor) -> Tensor:
        """The entry [B, C] of the open block as it would be if it ended here: written anew until it is whole, and seen
        only then."""
        rows = self._cache[f"{self._prefix}.{self._rows_of(prefix)}"]
        block, place = self._position // ratio, self._position % ratio
        rows[self._row, self._position % rows.shape[1]] = self._projected(w, prefix, u, place)
        kv, gate = rows.chunk(2, -1)
        earlier: tuple[Tensor | None, Tensor | None] = (None, None)
        if ratio == CSA:
            first = block % 2 == 0
            halves = [torch.where(first[:, None, None], x[:, :CSA], x[:, CSA:]) for x in (kv, gate)]
            channels, opens = kv.shape[-1] // 2, (block == 0)[:, None, None]
            before = [torch.where(first[:, None, None], x[:, CSA:], x[:, :CSA])[..., :channels] for x in (kv, gate)]
            earlier = before[0].masked_fill(opens, 0.0), before[1].masked_fill(opens, NEG_INF)
            kv, gate = halves
        turn = turns_at(block * ratio, self.frequencies(self._device).compressed)
        out: Tensor = self.ops.rows(
            "compress_pool", 1, kv, gate, *earlier, w[f"{prefix}.norm.weight"], *turn, self.config.rms_norm_eps
        )
        return out

    def _selected(
        self, run: Pass, prefix: str, u: Tensor, low: Tensor, turn: tuple[Tensor, Tensor], q: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention over the entries that the indexer picks."""
        config, w, mode, name = self.config, run.w, self.mode, f"{prefix}.indexer"
        index_q, weights = self.ops.rows(
            "index_queries", 1, low, u, w[f"{name}.wq_b.weight"], w[f"{name}.weights_proj.weight"], *turn,
            config.index_n_heads, mode.quantised,
        )  # fmt: skip
        keys, entries = self._cache[f"{prefix}.keys"], self._cache[f"{prefix}.entries"]
        key = self._entry(w, f"{name}.compressor", CSA, u)
        key = self.ops.rows("index_rounding", 1, key, mode.quantised).to(mode.dtype)
        keys[self._row, self._position // CSA] = key
        scores = self.ops.tile("index_scores")(index_q.to(mode.dtype)[:, None], weights[:, None], keys)[:, 0]
        chosen = scores.masked_fill(~seen, UNSEEN).to(keys.dtype).topk(config.index_topk, -1, sorted=False).indices
        rows = entries.gather(1, chosen[..., None].expand(-1, -1, entries.shape[-1]))
        out, lse = self.ops.tile("gathered_tile")(q, rows, seen.gather(1, chosen))
        return out, lse


@dataclass(frozen=True)
class _One:
    """One position of each of ``batch`` sequences."""

    batch: int
