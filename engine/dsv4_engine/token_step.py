"""One token through all layers of a small model on a CPU: `Model.forward` for S = 1, in NumPy.

Such a step is hundreds of operations on a few hundred numbers, and their number is what it costs (see
dsv4_kernels.one_token).  Owns copies of the model's float32 matrices, laid out to be streamed; reads and writes the
same SequenceState as the model.  Each class here is one of the model's modules for S = 1.
Letters: J streams, D hidden, L q_lora_rank, H heads, C channels, R window rows, N entries, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_kernels import one_token as np1
from dsv4_kernels.linear import ACTIVATION_BLOCK, Weight
from dsv4_kernels.moe import Expert
from dsv4_kernels.one_token import Floats
from dsv4_kernels.tiling import CPU

from .attention import Attention
from .compressor import Compressor
from .config import ModelConfig
from .formats import CACHE_BLOCK
from .hyper_connection import HyperConnection
from .indexer import Indexer
from .model import Block, Model
from .moe import MixtureOfExperts
from .state import BlockState, LayerState, RowFormat, Rows, SequenceState


class _Arena:
    """Copies of matrices in a few large arrays: those lie in huge pages, which reads 10 to 15% faster."""

    BLOCK = 4 << 20

    def __init__(self) -> None:
        self._free: Floats = np.empty(0, np.float32)

    def copy(self, data: Tensor) -> Floats:
        if self._free.size < data.numel():
            self._free = np.empty(max(self.BLOCK, data.numel()), np.float32)
        taken, self._free = self._free[: data.numel()].reshape(data.shape), self._free[data.numel() :]
        taken[:] = data.numpy()
        return taken


class _Matrix:
    """A plain weight and whether its input is rounded first."""

    def __init__(self, arena: _Arena, *weights: Weight) -> None:
        (weight,) = weights  # matrices with the same input are joined where they are held expanded
        self.data_OI = arena.copy(weight.data)
        self.rounds = weight.round_activations

    def __call__(self, x_I: Floats) -> Floats:
        return np1.product(self.data_OI, self.input(x_I))

    def input(self, x: Floats) -> Floats:
        return np1.round_fp8(x, ACTIVATION_BLOCK) if self.rounds else x


class _Position:
    """What every layer derives from the position: RoPE phases by compress ratio (complex64 [C / 2])."""

    def __init__(self, token_id: int, position: int, config: ModelConfig, freqs: dict[int, Floats]) -> None:
        self.token_id, self.position = token_id, position
        window = np1.rope_phases(position, freqs[0], config.head_dim)
        compress = np1.rope_phases(position, freqs[4], config.head_dim)
        scale = np.float32(config.head_dim**-0.5)
        self.phases = {0: window, 4: compress, 128: compress}
        self.query_phases = {0: window * scale, 4: compress * scale, 128: compress * scale}
        self.back_phases = {0: window.conj(), 4: compress.conj(), 128: compress.conj()}
        self.index_phases = np1.rope_phases(position, freqs[4], config.index_head_dim)


class _Attention:
    def __init__(self, attention: Attention, arena: _Arena) -> None:
        self.whole, self.config, self.ratio = attention, attention.config, attention.ratio
        self.wq_a_wkv, self.wq_b = _Matrix(arena, *attention.wq_a_wkv), _Matrix(arena, attention.wq_b)
        wo_a = arena.copy(attention.wo_a.data)
        self.wo_a_GOI, self.wo_b = wo_a.reshape(self.config.o_groups, -1, wo_a.shape[1]), _Matrix(arena, attention.wo_b)
        self.q_norm, self.kv_norm = attention.q_norm.numpy(), attention.kv_norm.numpy()
        self.compressor = _Compressor(attention.compressor, arena) if attention.compressor else None
        self.indexer = _Indexer(attention.indexer, arena) if attention.indexer else None
        self.sink_H = attention.sink.numpy()

    def forward(self, u_D: Floats, at: _Position, state: LayerState) -> Floats:
        config, eps = self.config, self.config.rms_norm_eps
        both = self.wq_a_wkv(u_D)
        qr_L = np1.rms_norm(both[: config.q_lora_rank], self.q_norm, eps)
        kv_C = np1.rotate(np1.rms_norm(both[config.q_lora_rank :], self.kv_norm, eps), at.phases[self.ratio])
        q_HC = np1.rms_norm_heads(self.wq_b(qr_L).reshape(config.num_attention_heads, config.head_dim), eps)
        q_HC = np1.rotate(q_HC, at.query_phases[self.ratio])
        window_RC = np.concatenate((state.window.numpy(), _rounded(self.whole.fmt, kv_C)[None]))
        state.window = torch.from_numpy(window_RC[max(0, window_RC.shape[0] - config.sliding_window + 1) :])
        o_HC = self._attend(q_HC, window_RC, self._entries(qr_L, u_D, at, state))
        o_GI = np1.rotate(o_HC, at.back_phases[self.ratio]).reshape(config.o_groups, 1, -1)
        return self.wo_b(np1.product(self.wo_a_GOI, o_GI).reshape(-1))

    def _attend(self, q_HC: Floats, window_RC: Floats, entries_NC: Tensor | None) -> Floats:
        """One softmax over window, entries and sink.  These products are large enough for tensor operations."""
        q, window = torch.from_numpy(q_HC), torch.from_numpy(window_RC)
        rows, entries = window_RC.shape[0], 0 if entries_NC is None else entries_NC.shape[0]
        logits = np.empty((q_HC.shape[0], rows + entries + 1), np.float32)
        logits[:, :rows] = torch.mm(q, window.t()).numpy()
        if entries_NC is not None:
            logits[:, rows:-1] = torch.mm(q, entries_NC.t()).numpy()
        logits[:, -1] = self.sink_H  # the sink's value adds nothing
        weights = torch.from_numpy(np1.softmax(logits))
        out_HC = torch.mm(weights[:, :rows], window)
        if entries_NC is not None:
            out_HC = torch.addmm(out_HC, weights[:, rows:-1], entries_NC)
        return out_HC.numpy()

    def _entries(self, qr_L: Floats, u_D: Floats, at: _Position, state: LayerState) -> Tensor | None:
        """The compressed entries that this token attends to, its own block's included: float32 [N, C]."""
        if self.compressor is None:
            return None
        assert state.entries is not None and state.block is not None
        self.compressor.advance(u_D, state.block, state.entries, at.position)
        if self.indexer is not None:
            assert state.index_keys is not None and state.index_block is not None
            self.indexer.compressor.advance(u_D, state.index_block, state.index_keys, at.position)
            if len(state.entries) > self.indexer.topk:
                return state.entries.gather(torch.from_numpy(self.indexer.select(qr_L, u_D, at, state.index_keys)))
        return state.entries.read(0, len(state.entries))


class _Indexer:
    def __init__(self, indexer: Indexer, arena: _Arena) -> None:
        self.heads, self.channels, self.topk = indexer.heads, indexer.channels, indexer.topk
        self.wq_b, self.weights_proj = _Matrix(arena, indexer.wq_b), _Matrix(arena, indexer.weights_proj)
        self.compressor = _Compressor(indexer.compressor, arena)

    def select(self, qr_L: Floats, u_D: Floats, at: _Position, keys: Rows) -> NDArray[np.intp]:
        """Indexer.select of one token that sees every key: the chosen entries, rising."""
        q_HC = np1.rotate(self.wq_b(qr_L).reshape(self.heads, self.channels), at.index_phases)
        if keys.fmt.kind == "mixed":
            q_HC = np1.round_fp4(np1.hadamard(q_HC))
        weights_1H = torch.from_numpy(self.weights_proj(u_D) * np.float32((self.channels * self.heads) ** -0.5))[None]
        total, q = len(keys), torch.from_numpy(q_HC)
        tiles = [keys.read(first, min(first + CPU.keys, total)) for first in range(0, total, CPU.keys)]
        scores = torch.cat([torch.mm(weights_1H, torch.mm(q, tile.t()).relu_())[0] for tile in tiles])
        return np1.largest(scores.numpy(), self.topk)


class _Compressor:
    """Compressor.advance of one token."""

    def __init__(self, compressor: Compressor, arena: _Arena) -> None:
        self.ratio, self.channels, self.eps = compressor.ratio, compressor.channels, compressor.eps
        self.wkv_wgate = _Matrix(arena, *compressor.wkv_wgate)
        self.ape, self.norm, self.freqs = compressor.ape.numpy(), compressor.norm.numpy(), compressor.freqs.numpy()

    def advance(self, u_D: Floats, state: BlockState, rows: Rows, position: int) -> None:
        """Take the token in; the block that it ends goes to ``rows``."""
        projected = np.concatenate((state.pending.numpy(), self.wkv_wgate(u_D)[None]))
        if projected.shape[0] < self.ratio:
            state.pending = torch.from_numpy(projected)
            return
        state.pending = torch.from_numpy(projected[:0])
        half = projected.shape[1] // 2
        kv_RE, gate_RE = projected[:, :half], projected[:, half:] + self.ape
        if state.previous is not None:
            previous = (kv_RE[:, : self.channels].copy(), gate_RE[:, : self.channels].copy())
            kv_RE = np.concatenate((state.previous[0].numpy(), kv_RE[:, self.channels :]))
            gate_RE = np.concatenate((state.previous[1].numpy(), gate_RE[:, self.channels :]))
            state.previous = (torch.from_numpy(previous[0]), torch.from_numpy(previous[1]))
        entry_C = np1.rms_norm(np1.pool(kv_RE, gate_RE), self.norm, self.eps)
        start = position + 1 - self.ratio
        rows.append(torch.from_numpy(np1.rotate(entry_C, np1.rope_phases(start, self.freqs, self.channels)))[None])


def _rounded(fmt: RowFormat, x_C: Floats) -> Floats:
    """RowFormat.rounded of one attention row."""
    if fmt.kind == "fp32":
        return x_C
    if fmt.kind == "bf16":
        return np1.round_bf16(x_C)
    cut = fmt.channels - fmt.rope_dim
    return np.concatenate([np1.round_fp8(x_C[:cut], CACHE_BLOCK), np1.round_bf16(x_C[cut:])])


class _Expert:
    def __init__(self, expert: Expert, arena: _Arena) -> None:
        self.w13, self.w2 = _Matrix(arena, *expert.w13), _Matrix(arena, expert.w2)


class _Experts:
    def __init__(self, experts: MixtureOfExperts, arena: _Arena) -> None:
        self.config = experts.config
        self.gate_ED = experts.gate.numpy()
        self.bias_E = None if experts.bias is None else experts.bias.numpy()
        self.tid2eid = None if experts.tid2eid is None else experts.tid2eid.numpy()
        self.experts = [_Expert(expert, arena) for expert in experts.experts]
        self.shared = None if experts.shared is None else _Expert(experts.shared, arena)

    def forward(self, u_D: Floats, token_id: int) -> Floats:
        config = self.config
        scores_E = np1.router_scores(np1.product(self.gate_ED, u_D))
        if self.tid2eid is not None:
            chosen = self.tid2eid[token_id].tolist()
        else:
            chosen = np1.best(scores_E if self.bias_E is None else scores_E + self.bias_E, config.num_experts_per_tok)
        weights = scores_E[chosen].tolist()
        share = config.routed_scaling_factor / (sum(weights) + 1e-20 if config.norm_topk_prob else 1.0)
        weights = [weight * share for weight in weights]
        picked = [self.experts[e] for e in chosen]
        if self.shared is not None:  # one more expert, of weight 1
            picked.append(self.shared)
            weights.append(1.0)
        x_D = picked[0].w13.input(u_D)
        gate_up = np.empty((len(picked), picked[0].w13.data_OI.shape[0]), np.float32)
        for expert, row in zip(picked, gate_up, strict=True):
            np1.product(expert.w13.data_OI, x_D, row)
        hidden = np1.swiglu(gate_up, config.swiglu_limit)
        hidden *= np.array(weights, np.float32)[:, None]
        hidden = picked[0].w2.input(hidden)
        out = np.empty((len(picked), u_D.size), np.float32)
        for expert, x_I, row in zip(picked, hidden, out, strict=True):
            np1.product(expert.w2.data_OI, x_I, row)
        return out.sum(0)


class _Streams:
    """The hyper-connection around one sub-layer."""

    def __init__(self, streams: HyperConnection, arena: _Arena) -> None:
        self.config = streams.config
        self.fn = arena.copy(streams.fn * streams.scale[:, None])
        self.base = streams.base.numpy()
        self.norm = streams.norm.numpy()

    def read(self, x_JD: Floats) -> tuple[Floats, Floats, Floats]:
        """The sub-layer's input [D], and post [J, 1] and comb [J, J] for `write`."""
        config = self.config
        pre, post, comb = np1.mixing(
            x_JD,
            self.fn,
            self.base,
            iterations=config.hc_sinkhorn_iters,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        return np1.rms_norm(pre @ x_JD, self.norm, config.rms_norm_eps), post, comb

    @staticmethod
    def write(x_JD: Floats, f_D: Floats, post_J1: Floats, comb_JJ: Floats) -> Floats:
        return comb_JJ @ x_JD + post_J1 * f_D


class _Layer:
    def __init__(self, block: Block, arena: _Arena) -> None:
        self.attn, self.ffn = _Attention(block.attn, arena), _Experts(block.ffn, arena)
        self.hc_attn, self.hc_ffn = _Streams(block.hc_attn, arena), _Streams(block.hc_ffn, arena)

    def forward(self, x_JD: Floats, at: _Position, state: LayerState) -> Floats:
        u_D, post, comb = self.hc_attn.read(x_JD)
        x_JD = self.hc_attn.write(x_JD, self.attn.forward(u_D, at, state), post, comb)
        u_D, post, comb = self.hc_ffn.read(x_JD)
        return self.hc_ffn.write(x_JD, self.ffn.forward(u_D, at.token_id), post, comb)


class TokenStep:
    """Made over a model for which `possible` holds."""

    def __init__(self, model: Model) -> None:
        self.config, arena = model.config, _Arena()
        self._layers = [_Layer(block, arena) for block in model.blocks]
        self._embed, self._output = model.embed, _Matrix(arena, model.output)
        head = model.head
        self._head_fn, self._head_base = arena.copy(head.fn * head.scale), head.base.numpy()
        self._head_norm = head.norm.numpy()
        self._freqs = {ratio: freqs.numpy() for ratio, freqs in model.freqs.items()}

    @staticmethod
    def possible(model: Model) -> bool:
        """Whether the model's matrices are all plain float32 in the CPU's memory."""
        attention = model.blocks[0].attn
        plain = attention.wq_b.fmt == "plain" and attention.wq_b.data.dtype == torch.float32
        return plain and attention.wq_b.data.device.type == "cpu" and model.config.hc_mult == 4

    def forward(self, token_id: int, state: SequenceState) -> Tensor:
        """`Model.forward` of one token: advances ``state``, returns streams float32 [1, J, D]."""
        at = _Position(token_id, state.position, self.config, self._freqs)
        x_JD = np.tile(self._embed[token_id].float().numpy(), (self.config.hc_mult, 1))
        with np.errstate(over="ignore"):  # exp of a large number is inf, and 1 / inf the right 0
            for layer, layer_state in zip(self._layers, state.layers, strict=True):
                x_JD = layer.forward(x_JD, at, layer_state)
        state.position += 1
        return torch.from_numpy(x_JD)[None]

    def logits(self, x_1JD: Tensor) -> Tensor:
        """`Model.logits` of one token: streams [1, J, D] -> float32 [1, V]."""
        config, x_JD = self.config, x_1JD[0].numpy()
        pre_J = np1.head_mixing(
            x_JD,
            self._head_fn,
            self._head_base,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        return torch.from_numpy(self._output(np1.rms_norm(pre_J @ x_JD, self._head_norm, config.rms_norm_eps)))[None]
