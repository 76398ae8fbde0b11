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
from dsv4_kernels.one_token import Floats, Turns
from dsv4_kernels.tiling import CPU

from .attention import Attention
from .compressor import Compressor
from .formats import CACHE_BLOCK
from .hyper_connection import HyperConnection
from .indexer import Indexer
from .model import Block, Model
from .moe import MixtureOfExperts
from .state import BlockState, LayerState, RowFormat, Rows, SequenceState
from .token_step_arrays import Arena, Growing, Matrix, Phases, SameInput


class _Position:
    """What every layer derives from the position: RoPE phases by compress ratio (complex64 [C / 2])."""

    def __init__(self, token_id: int, position: int, phases: Phases, head_dim: int) -> None:
        self.token_id, self.position, self._phases = token_id, position, phases
        (window, back_window), (compress, back_compress) = phases.of(position, head_dim)
        self.phases = {0: window, 4: compress, 128: compress}
        self.back_phases = {0: back_window, 4: back_compress, 128: back_compress}

    def of_index(self, channels: int) -> Turns:
        """Phases of index queries."""
        return self._phases.of(self.position, channels)[1, 0]

    def of_block(self, ratio: int, channels: int) -> Turns:
        """Phases of the block that this token ends."""
        return self._phases.of(self.position + 1 - ratio, channels)[1, 0]


class _Attention:
    def __init__(self, attention: Attention, arena: Arena) -> None:
        self.whole, self.config, self.ratio = attention, attention.config, attention.ratio
        self.compressor = _Compressor(attention.compressor, arena) if attention.compressor else None
        self.indexer = _Indexer(attention.indexer, arena) if attention.indexer else None
        of_input = [*attention.wq_a_wkv]
        if attention.compressor:
            of_input += attention.compressor.wkv_wgate
        if attention.indexer:
            of_input += [*attention.indexer.compressor.wkv_wgate, attention.indexer.weights_proj]
        self.of_input, self.wq_b = SameInput(arena, *of_input), Matrix(arena, attention.wq_b)
        self.window = Growing(self.config.sliding_window)
        wo_a = arena.copy(attention.wo_a.data)
        self.wo_a_GOI, self.wo_b = wo_a.reshape(self.config.o_groups, -1, wo_a.shape[1]), Matrix(arena, attention.wo_b)
        self.q_norm, self.kv_norm = arena.copy(attention.q_norm), arena.copy(attention.kv_norm)
        self.sink_H = arena.copy(attention.sink)
        # Query heads have norm head_dim^1/2 and scores a factor of head_dim^-1/2; behind them comes the window row.
        self.scales = np.ones(self.config.num_attention_heads + 1, np.float32)
        self.scales[-1] = self.config.head_dim**0.5
        # A row's norm, which is the most that a score can be: head_dim^1/2 times the largest weight of its norm.
        weights = [attention.kv_norm, *([attention.compressor.norm] if attention.compressor else [])]
        largest = 1.1 * self.config.head_dim**0.5 * max(float(weight.abs().max()) for weight in weights)
        self.bounded = max(largest, float(attention.sink.abs().max())) < np1.SAFE_EXPONENT

    def forward(self, u_D: Floats, at: _Position, state: LayerState) -> Floats:
        config, eps = self.config, self.config.rms_norm_eps
        both, *others = self.of_input(u_D)
        qr_L = np1.rms_norm(both[: config.q_lora_rank], self.q_norm, eps)
        rows = np.empty((config.num_attention_heads + 1, config.head_dim), np.float32)  # queries, and the window row
        self.wq_b(qr_L, rows[:-1].reshape(-1))
        rows[-1] = both[config.q_lora_rank :]
        rows *= np1.inverse_norms(rows, eps, self.scales)[:, None]
        rows[-1] *= self.kv_norm
        np1.rotate(rows, at.phases[self.ratio], rows)
        row_C = _rounded(self.whole.fmt, rows[-1:])[0]
        window_RC, state.window = self.window.append(state.window, row_C, config.sliding_window - 1)
        o_HC = self._attend(rows[:-1], [window_RC, *self._entries(qr_L, others, at, state)])
        o_GI = np1.rotate(o_HC, at.back_phases[self.ratio], o_HC).reshape(config.o_groups, 1, -1)
        return self.wo_b(np1.product(self.wo_a_GOI, o_GI).ravel())

    def _attend(self, q_HC: Floats, parts: list[Floats]) -> Floats:
        """One softmax over window, entries and sink."""
        return np1.attend(q_HC, parts, self.sink_H, self.bounded)

    def _entries(self, qr_L: Floats, of_input: list[Floats], at: _Position, state: LayerState) -> list[Floats]:
        """The compressed entries that this token attends to, its own block's included: [N, C] in parts.

        of_input: what the compressor, the indexer's and the index weights project from the layer's input.
        """
        if self.compressor is None:
            return []
        entries = state.entries
        assert entries is not None and state.block is not None
        self.compressor.advance(of_input[0], state.block, entries, at)
        if self.indexer is not None:
            assert state.index_keys is not None and state.index_block is not None
            self.indexer.compressor.advance(of_input[1], state.index_block, state.index_keys, at)
            if len(entries) > self.indexer.topk:
                chosen = self.indexer.select(qr_L, of_input[2], at, state.index_keys)
                parts = entries.stored(0, len(entries))
                if entries.fmt.kind == "fp32" and len(parts) == 1:
                    return [parts[0].numpy().take(chosen, 0)]
                return [entries.gather(torch.from_numpy(chosen)).numpy()]
        return [entries.read(0, len(entries)).numpy()] if len(entries) else []


class _Indexer:
    def __init__(self, indexer: Indexer, arena: Arena) -> None:
        self.heads, self.channels, self.topk = indexer.heads, indexer.channels, indexer.topk
        self.wq_b = Matrix(arena, indexer.wq_b)
        self.compressor = _Compressor(indexer.compressor, arena)

    def select(self, qr_L: Floats, weights_H: Floats, at: _Position, keys: Rows) -> NDArray[np.intp]:
        """Indexer.select of one token that sees every key: the chosen entries, rising."""
        q_HC = self.wq_b(qr_L).reshape(self.heads, self.channels)
        np1.rotate(q_HC, at.of_index(self.channels), q_HC)
        if keys.fmt.kind == "mixed":
            q_HC = np1.round_fp4(np1.hadamard(q_HC))
        weights_H = weights_H * np.float32((self.channels * self.heads) ** -0.5)
        total = len(keys)
        scores = [
            np1.index_scores(q_HC, keys.read(first, min(first + CPU.keys, total)).numpy(), weights_H)
            for first in range(0, total, CPU.keys)
        ]
        return np1.largest(np.concatenate(scores) if len(scores) > 1 else scores[0], self.topk)


class _Compressor:
    """Compressor.advance of one token."""

    def __init__(self, compressor: Compressor, arena: Arena) -> None:
        self.ratio, self.channels, self.eps = compressor.ratio, compressor.channels, compressor.eps
        self.ape, self.norm = arena.copy(compressor.ape), arena.copy(compressor.norm)
        self.pending = Growing(self.ratio)

    def advance(self, projected_E: Floats, state: BlockState, rows: Rows, at: _Position) -> None:
        """Take the token in; the block that it ends goes to ``rows``."""
        projected, state.pending = self.pending.append(state.pending, projected_E, self.ratio)
        if projected.shape[0] < self.ratio:
            return
        state.pending = state.pending[:0]
        half = projected.shape[1] // 2
        kv_RE, gate_RE = projected[:, :half], projected[:, half:] + self.ape
        if state.previous is not None:
            previous = (kv_RE[:, : self.channels].copy(), gate_RE[:, : self.channels].copy())
            kv_RE = np.concatenate((state.previous[0].numpy(), kv_RE[:, self.channels :]))
            gate_RE = np.concatenate((state.previous[1].numpy(), gate_RE[:, self.channels :]))
            state.previous = (torch.from_numpy(previous[0]), torch.from_numpy(previous[1]))
        entry_C = np1.rms_norm(np1.pool(kv_RE, gate_RE), self.norm, self.eps)
        entry_C = np1.rotate(entry_C, at.of_block(self.ratio, self.channels), entry_C)
        with torch.inference_mode():  # as the rows before were made
            rows.append(torch.from_numpy(entry_C[None]))


def _rounded(fmt: RowFormat, x_NC: Floats) -> Floats:
    """RowFormat.rounded of attention rows."""
    if fmt.kind == "fp32":
        return x_NC
    if fmt.kind == "bf16":
        return np1.round_bf16(x_NC)
    cut = fmt.channels - fmt.rope_dim
    return np.concatenate([np1.round_fp8(x_NC[:, :cut], CACHE_BLOCK), np1.round_bf16(x_NC[:, cut:])], 1)


class _Experts:
    def __init__(self, experts: MixtureOfExperts, arena: Arena) -> None:
        self.config = experts.config
        self.bias_E = None if experts.bias is None else arena.copy(experts.bias)
        self.tid2eid = None if experts.tid2eid is None else experts.tid2eid.numpy()
        self.gate_ED = arena.copy(experts.gate)
        # The shared expert is one more, of weight 1.
        self.shared = [] if experts.shared is None else [len(experts.experts)]
        every = [*experts.experts, *([] if experts.shared is None else [experts.shared])]
        first, second = [Matrix(arena, *x.w13) for x in every], [Matrix(arena, x.w2) for x in every]
        self.first = [matrix.data_OI.reshape(2, -1, matrix.data_OI.shape[1]) for matrix in first]  # [gate and up, I, D]
        self.second = [matrix.data_OI for matrix in second]
        self.first_input, self.second_input, self.rounds = first[0].input, second[0].input, second[0].rounds

    def forward(self, u_D: Floats, token_id: int) -> Floats:
        config, product = self.config, np1.product
        scores_E = np1.router_scores(product(self.gate_ED, u_D))
        if self.tid2eid is not None:
            chosen = self.tid2eid[token_id].tolist()
        else:
            chosen = np1.best(scores_E if self.bias_E is None else scores_E + self.bias_E, config.num_experts_per_tok)
        scores = scores_E.take(chosen).tolist()
        share = config.routed_scaling_factor / (sum(scores) + 1e-20 if config.norm_topk_prob else 1.0)
        weights_K = np.array([score * share for score in scores] + [1.0] * len(self.shared), np.float32)
        chosen += self.shared
        x_D = self.first_input(u_D)
        gate_up = np.empty((2, len(chosen), self.first[0].shape[1]), np.float32)
        for i, e in enumerate(chosen):
            product(self.first[e], x_D, gate_up[:, i])
        hidden = np1.swiglu(gate_up, config.swiglu_limit)
        if self.rounds:  # the weight enters before the rounding
            hidden = self.second_input(hidden * weights_K[:, None])
            weights_K = np.ones_like(weights_K)
        out = np.empty((len(chosen), u_D.size), np.float32)
        for i, e in enumerate(chosen):
            product(self.second[e], hidden[i], out[i])
        return weights_K.dot(out)


class _Streams:
    """The hyper-connection around one sub-layer."""

    def __init__(self, streams: HyperConnection, arena: Arena) -> None:
        self.config = streams.config
        self.fn = arena.copy(streams.fn * streams.scale[:, None])
        self.base, self.norm = arena.copy(streams.base), arena.copy(streams.norm)

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
        return np1.rms_norm(pre.dot(x_JD), self.norm, config.rms_norm_eps), post, comb

    @staticmethod
    def write(x_JD: Floats, f_D: Floats, post_J1: Floats, comb_JJ: Floats) -> Floats:
        written = comb_JJ.dot(x_JD)
        written += post_J1.dot(f_D[None])
        return written


class _Layer:
    def __init__(self, block: Block, arena: Arena) -> None:
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
        self.config, arena = model.config, Arena()
        self._layers = [_Layer(block, arena) for block in model.blocks]
        embed = model.embed
        bits = embed.dtype == torch.bfloat16  # which NumPy does not know
        self._embed = embed.view(torch.uint16).numpy() if bits else embed.float().numpy()
        self._output = Matrix(arena, model.output)
        head = model.head
        self._head_fn, self._head_base = arena.copy(head.fn * head.scale), arena.copy(head.base)
        self._head_norm = arena.copy(head.norm)
        freqs_2R = np.stack([model.freqs[0].numpy(), model.freqs[4].numpy()])
        self._phases = Phases(freqs_2R, (self.config.head_dim, self.config.index_head_dim))

    @staticmethod
    def possible(model: Model) -> bool:
        """Whether the model's matrices are all plain float32 in the CPU's memory."""
        attention = model.blocks[0].attn
        plain = attention.wq_b.fmt == "plain" and attention.wq_b.data.dtype == torch.float32
        return plain and attention.wq_b.data.device.type == "cpu" and model.config.hc_mult == 4

    def forward(self, token_id: int, state: SequenceState) -> Tensor:
        """`Model.forward` of one token: advances ``state``, returns streams float32 [1, J, D]."""
        at = _Position(token_id, state.position, self._phases, self.config.head_dim)
        x_JD = np.empty((self.config.hc_mult, self.config.hidden_size), np.float32)
        x_JD[:] = np1.widened(self._embed[token_id])
        for layer, layer_state in zip(self._layers, state.layers, strict=True):
            x_JD = layer.forward(x_JD, at, layer_state)
        state.position += 1
        return torch.from_numpy(x_JD[None])

    def logits(self, x_1JD: Tensor) -> Tensor:
        """`Model.logits` of one token: streams [1, J, D] -> float32 [1, V]."""
        config, x_JD = self.config, x_1JD.numpy()[0]
        pre_J = np1.head_mixing(
            x_JD,
            self._head_fn,
            self._head_base,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        h_D = np1.rms_norm(pre_J.dot(x_JD), self._head_norm, config.rms_norm_eps)
        return torch.from_numpy(self._output(h_D)[None])
