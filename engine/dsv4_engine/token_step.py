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
    """What every layer derives from the position: RoPE phases by compress ratio, forwards and back
    (complex64 [C / 2])."""

    def __init__(self, token_id: int, position: int, phases: Phases, head_dim: int) -> None:
        self.token_id, self.position, self._phases = token_id, position, phases
        window, compress = phases.of(position, head_dim)
        turns: tuple[Turns, Turns] = (*compress,)
        self.phases = {0: (*window,), 4: turns, 128: turns}

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
        # Query heads have norm head_dim^1/2 and scores a factor of head_dim^-1/2; behind them comes the window row.
        self.scales = np.ones(self.config.num_attention_heads + 1, np.float32)
        self.scales[-1] = self.config.head_dim**0.5
        # A row's norm, which is the most that a score can be: head_dim^1/2 times the largest weight of its norm.
        weights = [attention.kv_norm, *([attention.compressor.norm] if attention.compressor else [])]
        largest = 1.1 * self.config.head_dim**0.5 * max(float(weight.abs().max()) for weight in weights)
        self.sink = np1.Sink(arena.copy(attention.sink), max(largest, float(attention.sink.abs().max())))

    def forward(self, u_D: Floats, at: _Position, state: LayerState, out_D: Floats) -> None:
        config, eps, (turn, back) = self.config, self.config.rms_norm_eps, at.phases[self.ratio]
        both, *others = self.of_input(u_D)
        qr_L = np1.rms_norm(both[: config.q_lora_rank], self.q_norm, eps)
        rows = np.empty((config.num_attention_heads + 1, config.head_dim), np.float32)  # queries, and the window row
        q_HC, row_1C = rows[:-1], rows[-1:]
        self.wq_b(qr_L, q_HC.reshape(-1))
        row_1C[:] = both[config.q_lora_rank :]
        rows *= np1.inverse_norms(rows, eps, self.scales)[:, None]
        row_1C *= self.kv_norm
        np1.rotate(rows, turn, rows)
        row_1C = _rounded(self.whole.fmt, row_1C)
        window_RC, state.window_rows = self.window.append(state.window_rows, row_1C, config.sliding_window - 1)
        o_HC = self._attend(q_HC, self._rows(window_RC, qr_L, others, at, state))
        o_GI = np1.rotate(o_HC, back, o_HC).reshape(config.o_groups, 1, -1)
        self.wo_b(np1.product(self.wo_a_GOI, o_GI).reshape(-1), out_D)

    def _attend(self, q_HC: Floats, parts: list[Floats]) -> Floats:
        """One softmax over window, entries and sink."""
        return np1.attend(q_HC, parts, self.sink)

    def _rows(
        self, window_RC: Floats, qr_L: Floats, of_input: list[Floats], at: _Position, state: LayerState
    ) -> list[Floats]:
        """What this token attends to, the window and compressed entries, its own block's included: [N, C] in parts.

        of_input: what the compressor, the indexer's and the index weights project from the layer's input.
        """
        if self.compressor is None:
            return [window_RC]
        entries = state.entries
        assert entries is not None and state.block is not None
        self.compressor.advance(of_input[0], state.block, entries, at)
        if self.indexer is not None:
            assert state.index_keys is not None and state.index_block is not None
            self.indexer.compressor.advance(of_input[1], state.index_block, state.index_keys, at)
            if len(entries) > self.indexer.topk:
                chosen = self.indexer.select(qr_L, of_input[2], at, state.index_keys)
                whole_NC = entries.in_place()
                if whole_NC is not None:
                    return [np1.below(window_RC, whole_NC, chosen)]
                return [np.concatenate((window_RC, entries.gather(torch.from_numpy(chosen)).numpy()))]
        return [window_RC, _read(entries, 0, len(entries))] if len(entries) else [window_RC]


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
            np1.index_scores(q_HC, _read(keys, first, min(first + CPU.keys, total)), weights_H)
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
        projected, state.pending_rows = self.pending.append(state.pending_rows, projected_E, self.ratio)
        if projected.shape[0] < self.ratio:
            return
        state.pending_rows = projected[:0]
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


def _read(rows: Rows, start: int, end: int) -> Floats:
    """Rows.read as an array that must not be written to."""
    whole = rows.in_place()
    return rows.read(start, end).numpy() if whole is None else whole[start:end]


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
        self.first = Matrix(arena, *(weight for expert in every for weight in expert.w13))
        self.second = Matrix(arena, *(expert.w2 for expert in every))
        # Gate above up.  One array for all: a view is made faster than 2 E objects come from memory.
        self.first_EOD = self.first.data_OI.reshape(len(every), -1, self.gate_ED.shape[1])
        self.second_EDI = self.second.data_OI.reshape(len(every), self.gate_ED.shape[1], -1)

    def forward(self, u_D: Floats, token_id: int, out_D: Floats) -> None:
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
        x_D, first_EOD, second_EDI = self.first.input(u_D), self.first_EOD, self.second_EDI
        gate_up = np.empty((len(chosen), first_EOD.shape[1]), np.float32)
        for e, row in zip(chosen, gate_up, strict=True):
            product(first_EOD[e], x_D, row)
        hidden = np1.swiglu(gate_up, config.swiglu_limit)
        if self.second.rounds:  # the weight enters before the rounding
            hidden = self.second.input(hidden * weights_K[:, None])
            weights_K = np.ones_like(weights_K)
        out = np.empty((len(chosen), u_D.size), np.float32)
        for e, x_I, row in zip(chosen, hidden, out, strict=True):
            product(second_EDI[e], x_I, row)
        weights_K.dot(out, out_D)


class _Streams:
    """The hyper-connection around one sub-layer."""

    def __init__(self, streams: HyperConnection, arena: Arena) -> None:
        config = streams.config
        self.fn = arena.copy(streams.fn * streams.scale[:, None])
        self.base, self.norm = arena.copy(streams.base), arena.copy(streams.norm)
        self.iterations, self.hc_eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps

    def read(self, x_JD: Floats) -> tuple[Floats, Floats]:
        """Of the streams and the row of room behind them: the sub-layer's input [D], and what makes the new streams of
        the old ones and the sub-layer's output in that row [J, J + 1]."""
        streams_JD = x_JD[:-1]
        pre_J, write_JK = np1.mixing(
            streams_JD, self.fn, self.base, iterations=self.iterations, hc_eps=self.hc_eps, norm_eps=self.norm_eps
        )
        return np1.rms_norm(pre_J.dot(streams_JD), self.norm, self.norm_eps), write_JK


class _Layer:
    def __init__(self, block: Block, arena: Arena) -> None:
        self.attn, self.ffn = _Attention(block.attn, arena), _Experts(block.ffn, arena)
        self.hc_attn, self.hc_ffn = _Streams(block.hc_attn, arena), _Streams(block.hc_ffn, arena)

    def forward(self, x_JD: Floats, between_JD: Floats, at: _Position, state: LayerState) -> None:
        """x: the streams before and afterwards; both arrays have a row of room behind their streams."""
        u_D, write_JK = self.hc_attn.read(x_JD)
        self.attn.forward(u_D, at, state, x_JD[-1])
        write_JK.dot(x_JD, between_JD[:-1])
        u_D, write_JK = self.hc_ffn.read(between_JD)
        self.ffn.forward(u_D, at.token_id, between_JD[-1])
        write_JK.dot(between_JD, x_JD[:-1])


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

    def forward(self, token_id: int, state: SequenceState) -> Floats:
        """`Model.forward` of one token: advances ``state``, returns streams [J, D]."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # packed rows of the state are too little work to share
        try:
            return self._run(token_id, state)
        finally:
            torch.set_num_threads(threads)

    def _run(self, token_id: int, state: SequenceState) -> Floats:
        at = _Position(token_id, state.position, self._phases, self.config.head_dim)
        x_JD, between_JD = np.empty((2, self.config.hc_mult + 1, self.config.hidden_size), np.float32)
        x_JD[:-1] = np1.widened(self._embed[token_id])
        for layer, layer_state in zip(self._layers, state.layers, strict=True):
            layer.forward(x_JD, between_JD, at, layer_state)
        state.position += 1
        return x_JD[:-1]

    def logits(self, x_JD: Floats) -> Floats:
        """`Model.logits` of one token: streams [J, D] -> [V]."""
        config = self.config
        pre_J = np1.head_mixing(
            x_JD,
            self._head_fn,
            self._head_base,
            hc_eps=config.hc_eps,
            norm_eps=config.rms_norm_eps,
        )
        return self._output(np1.rms_norm(pre_J.dot(x_JD), self._head_norm, config.rms_norm_eps))
