"""The dense kernels of the GPU's engine as plain torch, so that a CPU runs what is composed of them in seconds.

What reads and writes the state (rows, rings, segments) stays as it is, in Triton's interpreter.  Products are summed in
float64, so a row's result hardly ever depends on its neighbours.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from dsv4_engine.formats import pack_rows, unpack_rows
from dsv4_engine.gpu import layer, stage
from dsv4_engine.gpu.state import ring_rows
from dsv4_kernels import moe
from dsv4_kernels.hyper_connection import _projected, read_streams, sinkhorn
from dsv4_kernels.hyper_connection import write_streams as reference_write
from dsv4_kernels.linear import Weight
from dsv4_kernels.norm import rms_norm
from dsv4_kernels.rope import rotate
from dsv4_kernels.rounding import hadamard, round_fp4
from dsv4_kernels.triton.hyper_connection import Connected, Connection, Write
from dsv4_kernels.triton.index import fold_queries
from dsv4_kernels.triton.linear import Fp8Matrix
from dsv4_kernels.triton.moe import ExpertPool
from dsv4_kernels.triton.rounded import Rounded
from dsv4_kernels.triton.rows import SEGMENT_ROWS, EntryRows, WindowRows, from_block, row_bytes

HALF = torch.bfloat16


def install(patch: pytest.MonkeyPatch) -> None:
    """For as long as ``patch`` lasts."""
    for function in (connect, fp8_linear, grouped_linear, plain_linear, split_low_rank, finish_queries, route,
                     routed_experts, sparse_attention, swiglu_round):  # fmt: skip
        patch.setattr(layer, function.__name__, function)
    for function in (head_read, write_streams, plain_linear):
        patch.setattr(stage, function.__name__, function)


def rounded(x: Tensor) -> Rounded:
    blocks = x.float().unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(-1).clamp_min(1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax.double() / 448))).float()
    return Rounded((blocks / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale)


def product(x: Tensor, w: Tensor) -> Tensor:
    return x.double() @ w.double().t()


def values(w: Fp8Matrix) -> Tensor:
    return Weight(w.data, w.scale, "fp8").dequantised(torch.float32)


def fp8_linear(x: Rounded | Tensor, w: Fp8Matrix) -> Tensor:
    inputs = x if isinstance(x, Rounded) else rounded(x)
    return product(inputs.values(), values(w)).to(HALF)


def plain_linear(x: Tensor, w: Tensor) -> Tensor:
    return product(x, w if w.dim() == 2 else w.double().sum(0)).float()


def grouped_linear(x_SGI: Tensor, w: Fp8Matrix, rounded: bool = False) -> Rounded | Tensor:
    parts = [product(x, part) for x, part in zip(x_SGI.unbind(1), values(w).chunk(x_SGI.shape[1]), strict=True)]
    out = torch.cat(parts, -1).to(HALF)
    return globals()["rounded"](out) if rounded else out


def _fn(weights: Connection) -> Tensor:
    """The checkpoint's fn [M, J*D] out of its parts, [D / RANGE, 3, M, J * RANGE]."""
    whole = weights.parts.double().sum(1).unflatten(2, (4, -1))  # [D / RANGE, M, J, RANGE]
    return whole.permute(1, 2, 0, 3).flatten(1).float()


def connect(
    x: Tensor, before: Write | None, weights: Connection, *, iterations: int, hc_eps: float, norm_eps: float,
    out: Tensor | None = None,
) -> Connected:  # fmt: skip
    streams = x if before is None else write_streams(x, before, out)
    m = _projected(streams.double(), _fn(weights), weights.scale, weights.base, norm_eps).float()
    gates = torch.sigmoid(m[:, :8])
    comb = m[:, 8:].unflatten(1, (4, 4)).softmax(2) + hc_eps
    comb = sinkhorn(torch.cat([comb, comb]), iterations, hc_eps)[: len(comb)].contiguous()  # one alone goes another way
    u = rms_norm(read_streams(streams, gates[:, :4] + hc_eps), weights.norm, norm_eps)
    return Connected(streams, u, rounded(u), 2 * gates[:, 4:], comb)


def write_streams(x: Tensor, before: Write, out: Tensor | None = None) -> Tensor:
    added = before.result.float()
    if before.routed is not None:
        added = before.routed.float().sum(1) + added
    new = reference_write(x, added.to(HALF), before.post, before.comb)
    return new if out is None else out.copy_(new)


def head_read(
    x: Tensor, before: Write | None, weights: Connection, *, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor]:
    assert before is None
    pre = torch.sigmoid(_projected(x, _fn(weights), weights.scale, weights.base, norm_eps)) + hc_eps
    return x, rms_norm(read_streams(x, pre), weights.norm, norm_eps).float()


def _turned(x: Tensor, phases: Tensor) -> Tensor:
    """The last 64 channels, by phases float32 [S, 32, 2]."""
    turn = torch.view_as_complex(phases.contiguous())
    turn = turn if x.dim() == 2 else turn[:, None]
    return torch.cat([x[..., :-64], rotate(x[..., -64:].contiguous(), turn)], -1)


def split_low_rank(
    y: Tensor, q_norm: Tensor, kv_norm: Tensor, phases: Tensor, position: Tensor, rows: WindowRows, eps: float
) -> Rounded:
    qr, kv = y.split([q_norm.shape[0], kv_norm.shape[0]], -1)
    packed = pack_rows(_turned(rms_norm(kv.float(), kv_norm, eps), phases), 64)
    place = rows.base_S + (position % rows.ring if rows.ring else position)
    block, scales = ring_rows(rows.block, kv_norm.shape[0])
    block[place], scales[place] = packed[:, : block.shape[1]], packed[:, block.shape[1] :]
    return rounded(rms_norm(qr, q_norm, eps))


def finish_queries(
    y: Tensor, heads: int, channels: int, phases: Tensor, eps: float, index_weights: Tensor | None, index: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    q = _turned(rms_norm(y[:, : heads * channels].float().unflatten(-1, (heads, -1)), None, eps), phases).to(HALF)
    if index_weights is None:
        return q, None, None
    keys = y[:, heads * channels :].float().unflatten(-1, (-1, index))
    folded = fold_queries(round_fp4(hadamard(_turned(keys, phases))), index_weights * keys[0].numel() ** -0.5)
    return q, *folded


def sparse_attention(
    q: Tensor, position: Tensor, near: WindowRows, entries: EntryRows | None, sink: Tensor, phases: Tensor, window: int
) -> Tensor:
    """One query after another, its keys gathered from wherever they lie."""
    channels, out = q.shape[2], torch.empty_like(q)
    window_rows = from_block(near.block, channels)
    far = torch.empty(0, window_rows.shape[1], dtype=torch.uint8)
    count = 0 if entries is None else (int(position.max()) + 1) // entries.ratio
    if entries is not None and count:
        assert count <= entries.most
        size = SEGMENT_ROWS * row_bytes(channels)
        addresses = entries.segments[0, : -(-count // SEGMENT_ROWS)].tolist()
        far = torch.cat([from_block(at(address, size), channels) for address in addresses])
    for t, place in enumerate(position.tolist()):
        seen = torch.arange(max(0, place - window + 1), place + 1)
        keys = [window_rows[int(near.base_S[t]) + (seen % near.ring if near.ring else seen)]]
        if entries is not None:
            chosen = torch.arange((place + 1) // entries.ratio)
            if entries.selected_SK is not None:
                chosen = entries.selected_SK[t][entries.selected_SK[t] >= 0]
            keys.append(far[chosen])
        k = unpack_rows(torch.cat(keys), channels, 64).double()
        logits = torch.cat([q[t].double() @ k.t() * channels**-0.5, sink.double()[:, None]], 1)
        o = logits.softmax(1)[:, :-1] @ k
        out[t] = _turned(o.float()[None], torch.view_as_real(phases[t : t + 1].conj().resolve_conj()))[0].to(HALF)
    return out


def at(address: int, size: int) -> Tensor:
    """The bytes there, which somebody keeps alive."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def route(
    logits: Tensor, topk: int, scaling: float, normalise: bool, bias: Tensor | None = None,
    table: Tensor | None = None, token_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chosen = None if table is None or token_ids is None else table[token_ids].long()
    identity = torch.eye(logits.shape[1])
    found, weights = moe.route(
        logits, identity, topk=topk, scaling=scaling, normalise=normalise, bias_E=bias, chosen_SK=chosen
    )
    return found.to(torch.int32), weights


def routed_experts(x: Rounded, chosen: Tensor, weights: Tensor, pool: ExpertPool, limit: float) -> Tensor:
    def matrix(data: Tensor, scale: Tensor) -> Tensor:
        return Weight(data.view(torch.int8), scale, "fp4").dequantised(torch.float32)

    out = torch.empty(*chosen.shape, pool.inputs, dtype=HALF)
    for t, experts in enumerate(chosen.tolist()):
        for k, expert in enumerate(experts):
            slot = int(pool.slot_of_expert[expert])
            gate_up = product(x.values()[t : t + 1], matrix(pool.w13[slot], pool.s13[slot]))
            hidden = rounded(moe.swiglu(gate_up, limit) * weights[t, k])
            out[t, k] = product(hidden.values(), matrix(pool.w2[slot], pool.s2[slot]))[0].to(HALF)
    return out


def swiglu_round(y: Tensor, limit: float) -> Rounded:
    return rounded(moe.swiglu(y, limit))
