"""The trainer's forward pass of DeepSeek-V4: a batch of equally long sequences of documents, differentiable, no state.

Owns how the layers are strung together; the operations are in layers.py and attention.py, where documents lie in
layout.py, the parameters in parameters.py.  The engine computes the same function one growing sequence at a time; a
test holds the two together.
Letters: B sequences, S positions, N = B*S tokens, D hidden, J streams, H heads, C channels, M entries, Q queries, K
experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv4_engine.config import ModelConfig

from . import attention, layers
from .layout import Frequencies, Layout
from .operations import Operations, pieces_of
from .sinkhorn import sinkhorn

# From so many entries for each chosen one on, gathering the chosen moves less than masking all.
GATHER_FROM = 16


@dataclass(frozen=True)
class Mode:
    """What a forward pass emulates: ``quantised`` storage and activations, ``sparse`` selection of entries.

    early: layers whose outcome is read as the last one's would be.
    """

    quantised: bool = False
    sparse: bool = False
    mtp: bool = False
    recompute: bool = False
    dtype: torch.dtype = torch.bfloat16
    early: tuple[int, ...] = ()


@dataclass
class Output:
    """hidden [N, D] before the head; the MTP block's [N, D] or None; those behind the layers ``mode.early``;
    the mean of the indexers' losses.

    recall: [of the true top k, of the attention's mass], mean over the indexers (1 where none was asked for); balance:
    mean of the sequence balance losses; loads [E] (share of tokens), chosen [N, K]: by block.
    """

    hidden: Tensor
    mtp_hidden: Tensor | None
    early: list[Tensor]
    index_loss: Tensor
    recall: Tensor
    balance: Tensor
    loads: dict[str, Tensor] = field(default_factory=dict)
    chosen: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Pass:
    """What one forward pass hands to its blocks, and what they leave behind."""

    w: dict[str, Tensor]
    ids: Tensor
    layout: Layout
    mode: Mode
    index_rows: Tensor | None
    routes: Mapping[str, Tensor]
    pieces: int


class Network:
    """The forward pass for one configuration; parameters come with every call."""

    def __init__(self, config: ModelConfig, compiled: bool = False) -> None:
        self.config = config
        self.ops = Operations(compiled)
        self._frequencies: dict[torch.device, Frequencies] = {}

    def frequencies(self, device: torch.device) -> Frequencies:
        if device not in self._frequencies:
            self._frequencies[device] = Frequencies.of(self.config, device)
        return self._frequencies[device]

    def forward(
        self,
        w: dict[str, Tensor],
        ids_BS: Tensor,
        mode: Mode,
        index_rows_BQ: Tensor | None = None,
        layout: Layout | None = None,
        routes: Mapping[str, Tensor] | None = None,
    ) -> Output:
        """w: from parameters.working_weights.  S must be a multiple of 128.

        index_rows: positions on which the indexers' loss is taken (int64); None leaves that loss zero.  layout: None
        for one document a sequence.  routes: the experts' choice [N, K] by block, where it was made with other
        parameters.
        """
        config = self.config
        batch, length = ids_BS.shape
        if length % layers.BLOCK:
            raise ValueError(f"a training sequence is a multiple of {layers.BLOCK} long, got {length}")
        ids = ids_BS.flatten()
        if layout is None:
            layout = Layout.whole(batch, length, self.frequencies(ids.device))
        run = Pass(w, ids, layout, mode, index_rows_BQ, routes or {}, pieces_of(batch, length))
        x = F.embedding(ids, w["embed.weight"]).to(mode.dtype)[:, None].expand(-1, config.hc_mult, -1).contiguous()
        blocks, early = [], []
        for layer, ratio in enumerate(config.compress_ratios):
            x, left = self._block(run, f"layers.{layer}", ratio, x)
            blocks.append((f"layers.{layer}", left))
            if layer in mode.early:
                early.append(self._head(run, "", x))
        hidden = self._head(run, "", x)
        mtp_hidden = None
        if mode.mtp and config.num_nextn_predict_layers:
            following = self._next_tokens(ids_BS).flatten()
            e = F.embedding(following, w["embed.weight"]).to(mode.dtype)
            names = ("enorm.weight", "hnorm.weight", "e_proj.weight", "h_proj.weight")
            x = self.ops.rows(
                "mtp_input", run.pieces, e, x, *(w[f"mtp.0.{n}"] for n in names), config.rms_norm_eps, mode.quantised
            )
            x, left = self._block(run, "mtp.0", 0, x)
            blocks.append(("mtp.0", left))
            mtp_hidden = self._head(run, "mtp.0.", x)
        indexed = [left for _, left in blocks if left[3] is not None]
        zero = hidden.new_zeros((), dtype=torch.float32)
        return Output(
            hidden,
            mtp_hidden,
            early,
            torch.stack([left[3] for left in indexed]).mean() if indexed else zero,
            torch.stack([left[4] for left in indexed]).mean(0) if indexed else zero.new_ones(2),
            torch.stack([left[2] for _, left in blocks]).mean(),
            {name: left[0] for name, left in blocks},
            {name: left[1] for name, left in blocks},
        )

    def logits(self, w: dict[str, Tensor], ids_BS: Tensor, mode: Mode, layout: Layout | None = None) -> Tensor:
        """float32 [B, S, vocabulary]."""
        hidden = self.forward(w, ids_BS, mode, layout=layout).hidden
        return F.linear(hidden, w["head.weight"]).float().unflatten(0, ids_BS.shape)

    def _head(self, run: Pass, prefix: str, x: Tensor) -> Tensor:
        config = self.config
        weights = (run.w[prefix + n] for n in ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight"))
        out: Tensor = self.ops.rows("read_head", run.pieces, x, *weights, config.hc_eps, config.rms_norm_eps)
        return out

    def _block(self, run: Pass, prefix: str, ratio: int, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The streams after a block, and (load, choice, balance, index loss or None, recall or None)."""

        def block(x: Tensor) -> tuple[Any, ...]:
            u, post, comb = self._read(run, prefix, "attn", x)
            out, index_loss, recall = self._attention(run, prefix + ".attn", ratio, u)
            x = self.ops.rows("write_residual", run.pieces, x, out, post, comb)
            u, post, comb = self._read(run, prefix, "ffn", x)
            f, load, chosen, balance = self._experts(run, prefix, u)
            x = self.ops.rows("write_residual", run.pieces, x, f, post, comb)
            return x, load, chosen, balance, index_loss, recall

        if run.mode.recompute and torch.is_grad_enabled():
            x, *left = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x, *left = block(x)
        return x, tuple(left)

    def _read(self, run: Pass, prefix: str, site: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, w = self.config, run.w
        weights = [w[f"{prefix}.hc_{site}_{part}"] for part in ("fn", "base", "scale")] + [
            w[f"{prefix}.{site}_norm.weight"]
        ]
        u, post, logits = self.ops.rows("read_residual", run.pieces, x, *weights, config.hc_eps, config.rms_norm_eps)
        return u, post, sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)

    def _experts(self, run: Pass, prefix: str, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config, w, ffn = self.config, run.w, f"{prefix}.ffn"
        table = w.get(f"{ffn}.gate.tid2eid")
        stacked = [
            torch.cat([w[f"{ffn}.experts.{n}"], _split_shared(w[f"{ffn}.shared_experts.{n}.weight"], n, config)])
            for n in ("w1", "w2", "w3")
        ]
        chosen = run.routes.get(prefix) if table is None else table[run.ids]
        topk, sequences = config.num_experts_per_tok, run.layout.batch
        f, chosen, served, shares = self.ops.rows(
            "experts", run.pieces, u, w[f"{ffn}.gate.weight"], w.get(f"{ffn}.gate.bias"), chosen, *stacked, topk,
            config.routed_scaling_factor, config.norm_topk_prob, config.swiglu_limit, run.mode.quantised,
            max(1, sequences // run.pieces),
        )  # fmt: skip
        return f, self._load(served, run.layout), chosen, self._balance(served, shares, run.layout)

    def _attention(self, run: Pass, prefix: str, ratio: int, u: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config, ops, w, layout, mode = self.config, self.ops, run.w, run.layout, run.mode
        cos, sin = layout.compressed if ratio else layout.window
        names = ("wq_a.weight", "q_norm.weight", "wq_b.weight", "wkv.weight", "kv_norm.weight")
        q, kv, low = ops.rows(
            "project", run.pieces, u, *(w[f"{prefix}.{n}"] for n in names), cos, sin, config.num_attention_heads,
            config.rms_norm_eps, mode.quantised,
        )  # fmt: skip
        sink = w[f"{prefix}.attn_sink"]
        turn = layout.jump if ratio else layout.still
        near, near_lse = ops.rows(
            "window_attention", run.pieces, q, kv, self._block_before(kv, layout), layout.opens, *turn
        )
        far = far_lse = index_loss = recall = None
        if ratio:
            shape = (layout.batch, layout.length)
            entries = self._compress(run, prefix + ".compressor", ratio, u)
            entries = ops.rows("cache_rounding", run.pieces, entries, config.qk_rope_head_dim, mode.quantised)
            entries = self._everywhere(entries.to(mode.dtype).unflatten(0, (layout.batch, -1)), ratio, layout)
            index = None
            if ratio == 4 and (mode.sparse or run.index_rows is not None):
                index = self._indexer(run, prefix + ".indexer", u.detach(), low.detach())
            far, far_lse = self._far(q.unflatten(0, shape), entries, ratio, layout, index if mode.sparse else None)
            far, far_lse = far.flatten(0, 1), far_lse.flatten(0, 1)
            if index is not None and run.index_rows is not None:
                base = torch.logaddexp(near_lse, sink.expand_as(near_lse)).unflatten(0, shape)
                index_loss, recall = self._teach(
                    run.index_rows, q.detach().unflatten(0, shape), base.detach(), entries.detach(), index, layout
                )
        out: Tensor = ops.rows(
            "merge_and_project", run.pieces, near, near_lse, far, far_lse, sink, cos, sin, w[f"{prefix}.wo_a.weight"],
            w[f"{prefix}.wo_b.weight"], config.o_groups, mode.quantised,
        )  # fmt: skip
        return out, index_loss, recall

    def _far(
        self,
        q: Tensor,
        entries: Tensor,
        ratio: int,
        layout: Layout,
        index: tuple[Tensor, Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over entries: all visible ones, or the indexer's choice where it leaves any out."""
        tile, topk, count = self.ops.tile, self.config.index_topk, entries.shape[1]
        low, high = layout.low[ratio], layout.high[ratio]
        dense = (tile("dense_tile"), tile("dense_tile_backward"))
        if index is None or count <= topk:
            out, lse = attention.DenseAttention.apply(q, entries, low, high, None, *dense)
            return out, lse
        index_q, weights, keys = (x.detach() for x in index)
        chosen = attention.select_entries(index_q, weights, keys, low, high, topk, tile("masked_scores"))
        if count >= GATHER_FROM * topk:
            gathered = (tile("gathered_tile"), tile("gathered_tile_backward"))
            out, lse = attention.GatheredAttention.apply(q, entries, low, high, chosen, *gathered)
            return out, lse
        mask = torch.zeros(*q.shape[:2], count, dtype=torch.bool, device=q.device).scatter_(-1, chosen, True)
        out, lse = attention.DenseAttention.apply(q, entries, low, high, mask, *dense)
        return out, lse

    def _teach(
        self,
        rows_BQ: Tensor,
        q: Tensor,
        base: Tensor,
        entries: Tensor,
        index: tuple[Tensor, Tensor, Tensor],
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        """The indexer's loss and recall on some queries, against the attention to every entry they see."""

        def chosen(x: Tensor) -> Tensor:
            picked = rows_BQ.view(*rows_BQ.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            return x.gather(1, picked)

        index_q, index_w, keys = index
        scores = self.ops.tile("index_scores")(chosen(index_q), chosen(index_w), keys)
        entry = torch.arange(entries.shape[1], device=q.device)
        shown = (entry >= chosen(layout.low[4])[..., None]) & (entry < layout.high[4][rows_BQ][..., None])
        summed, mass, recall = self.ops.tile("index_loss")(
            chosen(q), chosen(base), entries, scores, shown, self.config.index_topk
        )
        return summed / self.total(mass).clamp_min(1.0), recall

    def _compress(self, run: Pass, prefix: str, ratio: int, u: Tensor) -> Tensor:
        weights = [run.w[f"{prefix}.{n}"] for n in ("wkv.weight", "wgate.weight", "ape", "norm.weight")]
        kv, gate = self.ops.rows("compress_project", run.pieces, u, *weights[:3])
        earlier: tuple[Tensor | None, Tensor | None] = (None, None)
        if ratio == 4:
            earlier = self._earlier_halves(kv, gate, run.layout)
        out: Tensor = self.ops.rows(
            "compress_pool", run.pieces, kv, gate, *earlier, weights[3], *run.layout.entries[ratio],
            self.config.rms_norm_eps,
        )  # fmt: skip
        return out

    def _indexer(self, run: Pass, prefix: str, u: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [B, S, H, C], head weights [B, S, H], keys [B, M, C]; u and low carry no gradient."""
        layout, mode = run.layout, run.mode
        q, weights = self.ops.rows(
            "index_queries", run.pieces, low, u, run.w[f"{prefix}.wq_b.weight"], run.w[f"{prefix}.weights_proj.weight"],
            *layout.compressed, self.config.index_n_heads, mode.quantised,
        )  # fmt: skip
        keys = self._compress(run, prefix + ".compressor", 4, u)
        keys = self.ops.rows("index_rounding", run.pieces, keys, mode.quantised)
        q, keys = q.to(mode.dtype), keys.to(mode.dtype)  # exact where they are rounded to FP4
        shape = (layout.batch, layout.length)
        keys = self._everywhere(keys.unflatten(0, (layout.batch, -1)), 4, layout)
        return q.unflatten(0, shape), weights.unflatten(0, shape), keys

    # What a sequence that is spread over processes, or a cache, does otherwise ---------------------------------------

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes of what each has a part of; carries no gradient."""
        return x.detach()

    def _block_before(self, kv: Tensor, layout: Layout) -> Tensor:
        """kv [N, C] moved on by a block; a sequence's first block opens a document and sees nothing before it."""
        return kv.roll(layers.BLOCK, 0)

    def _earlier_halves(self, kv: Tensor, gate: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        return layers.earlier_halves(kv, gate, layout.first_entry)

    def _everywhere(self, entries_BMC: Tensor, ratio: int, layout: Layout) -> Tensor:
        """All entries (or index keys) that these positions may see, from those of these positions."""
        return entries_BMC

    def _next_tokens(self, ids_BS: Tensor) -> Tensor:
        """Zero behind the end; no loss is taken there."""
        return F.pad(ids_BS[:, 1:], (0, 1))

    def _balance(self, served: Tensor, shares: Tensor, layout: Layout) -> Tensor:
        return layers.balance(served, shares, layout.batch, self.config.num_experts_per_tok)

    def _load(self, served: Tensor, layout: Layout) -> Tensor:
        return served.mean(0)


def _split_shared(weight: Tensor, name: str, config: ModelConfig) -> Tensor:
    """The shared expert's matrix as n_shared_experts matrices of a routed expert's shape."""
    if name == "w2":
        return weight.unflatten(1, (config.n_shared_experts, -1)).transpose(0, 1)
    return weight.unflatten(0, (config.n_shared_experts, -1))
