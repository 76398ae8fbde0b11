"""Sparse attention on the GPU at V4-Flash's shapes: prefill and decoding, against FlashMLA where it is installed.

    python -m benchmarks.kernels_attention

Random data.  Outputs are compared first, on sampled queries with float64; where the peer takes the same inputs, with
the peer too.  Medians of graph replays; rates count the products of the keys that are seen; share: of 813 TFLOP/s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import BF16_CEILING, HEADER, Row, peer, replay_ms, report
from dsv4_engine.formats import unpack_rows
from dsv4_kernels.rope import rotate
from dsv4_kernels.triton.attention import sparse_attention
from dsv4_kernels.triton.rows import ROPE, from_block
from tests.support.sparse_case import SparseCase, decode_case, prefill_case

TOLERANCE = 2e-3  # relative RMS; rounding the outputs to bf16 alone gives 1.7e-3
PEER_TOLERANCE = 5e-3  # the peer also rounds its weights to bf16
SAMPLES = 6


def run(case: SparseCase, out: Tensor) -> Tensor:
    return sparse_attention(
        case.q, case.position, case.window_rows, case.entries, case.sink, case.phases, case.window, out
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def keys_seen(case: SparseCase) -> int:
    near = (case.position + 1).clamp_max(case.window)
    far = torch.zeros_like(near)
    if case.entries is not None:
        far = (case.position + 1) // case.entries.ratio
        if case.entries.selected_SK is not None:
            far = far.clamp_max(case.entries.selected_SK.shape[1])
    return int((near + far).sum())


def peer_prefill(case: SparseCase) -> Callable[[], Tensor] | None:
    """FlashMLA's sparse prefill on the same keys, unpacked to bf16 beforehand."""
    flash_mla = peer("flash_mla")
    if flash_mla is None or case.entries is None:
        return None
    near = unpack_rows(from_block(case.window_rows.block, 512), 512, ROPE)
    first = int(case.window_rows.base_S[0])
    steps = torch.arange(case.window, device="cuda") - case.window + 1
    index = [case.position[:, None] + first + steps]
    if case.entries.selected_SK is not None:
        index.append(case.entries.selected_SK.long() + near.shape[0])
    else:
        index.append(torch.arange(case.entries.most, device="cuda").expand(len(case.position), -1) + near.shape[0])
        hidden = torch.arange(case.entries.most, device="cuda") >= ((case.position + 1) // case.entries.ratio)[:, None]
        index[1] = index[1].masked_fill(hidden, -1)
    width = sum(i.shape[1] for i in index)
    index.append(torch.full((len(case.position), -width % 128), -1, device="cuda"))
    kv = torch.cat([near, unpack_rows(case.rows(0), 512, ROPE)]).to(torch.bfloat16)[:, None]
    idx = torch.cat(index, 1).to(torch.int32)[:, None]
    return lambda: flash_mla.flash_mla_sparse_fwd(
        case.q, kv, idx, 512**-0.5, 512, attn_sink=case.sink, use_legacy=True
    )[0]


def paged(rows: Tensor) -> Tensor:
    """Packed rows as FlashMLA's pages of 64: the rows' values, then their scales; pages a multiple of 576 bytes."""
    pages = rows.view(-1, 64, 584)
    size = -(-64 * 584 // 576) * 576
    out = torch.zeros(pages.shape[0], size, dtype=torch.uint8, device=rows.device)
    out[:, : 64 * 576] = pages[..., :576].flatten(1)
    out[:, 64 * 576 : 64 * 584] = pages[..., 576:].flatten(1)
    return out[:, : 64 * 584].as_strided((pages.shape[0], 64, 1, 584), (size, 584, 584, 1)).view(torch.float8_e4m3fn)


def peer_decoding(case: SparseCase) -> Callable[[], Tensor] | None:
    """FlashMLA's sparse decoding on the same packed rows, in its pages."""
    flash_mla = peer("flash_mla")
    if flash_mla is None or case.entries is None or case.entries.selected_SK is None:
        return None
    queries = len(case.position)
    stored, starts, total = [], [], 0
    for sequence in range(queries):
        rows = case.rows(sequence)
        starts.append(total)
        stored.append(rows)
        total += rows.shape[0]
    far, near = paged(torch.cat(stored)), paged(from_block(case.window_rows.block, 512))
    near_index = (case.window_rows.base_S[:, None] + torch.arange(128, device="cuda")).to(torch.int32)[:, None]
    far_index = case.entries.selected_SK + torch.tensor(starts, device="cuda", dtype=torch.int32)[:, None]
    far_index = far_index[:, None].contiguous()
    meta, _ = flash_mla.get_mla_metadata()
    q = case.q[:, None]
    return lambda: flash_mla.flash_mla_with_kvcache(
        q, near, None, None, 512, meta, None, 512**-0.5, False, True, near_index, attn_sink=case.sink,
        extra_k_cache=far, extra_indices_in_kvcache=far_index, use_legacy=True,
    )[0].view(queries, 64, 512)  # fmt: skip


def measure(what: str, shape: str, case: SparseCase, other: Callable[[], Tensor] | None) -> Row:
    out = torch.full(case.q.shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    run(case, out)
    queries = range(0, len(case.position), max(1, len(case.position) // SAMPLES))
    worst = max(error(out[t], case.reference(t)) for t in queries)
    if not worst < TOLERANCE or out.isnan().any():
        raise SystemExit(f"{what}, {shape}: off by {worst:.1e}")
    peer_ms = None
    if other is not None:
        back = torch.ones(len(case.position), 1, 256, dtype=torch.complex64, device="cuda")
        back[:, 0, -ROPE // 2 :] = case.phases.conj()
        apart = error(out, rotate(other(), back))
        if not apart < PEER_TOLERANCE:
            raise SystemExit(f"{what}, {shape}: the peer differs by {apart:.1e}")
        peer_ms = replay_ms(other)
    ms = replay_ms(lambda: run(case, out))
    rate = 4 * 64 * 512 * keys_seen(case) / ms * 1e3
    row = Row(what, shape, ms, f"{rate / 1e12:.0f} TFLOP/s", rate / BF16_CEILING, worst, peer_ms)
    print(row.line(), flush=True)
    return row


@torch.inference_mode()
def main() -> int:
    print(HEADER)
    rows = []
    for queries, last in ((4096, 131_072), (8192, 1_048_576)):
        case = prefill_case(last - queries, queries, 64, 512, 4, 512, "cuda")
        shape = f"{queries} queries, window 128 + 512 of {last // 4:,}"
        rows.append(measure("CSA prefill", shape, case, peer_prefill(case)))
    for queries, last in ((4096, 131_072), (4096, 1_048_576)):
        case = prefill_case(last - queries, queries, 64, 512, 128, None, "cuda")
        shape = f"{queries} queries, window 128 + {last // 128:,}"
        rows.append(measure("HCA prefill", shape, case, peer_prefill(case)))
    case = prefill_case(131_072, 8192, 64, 512, 0, None, "cuda")
    rows.append(measure("window prefill", "8192 queries, window 128", case, None))
    for batch, context in ((1, 1_048_576), (32, 262_144), (128, 65_536)):
        case = decode_case([context - 1 - 7 * i for i in range(batch)], 64, 512, 4, 512, "cuda")
        shape = f"batch {batch}, window 128 + 512 of {context // 4:,}"
        rows.append(measure("CSA decoding", shape, case, peer_decoding(case)))
    for batch, context in ((1, 131_072), (1, 1_048_576), (32, 262_144)):
        case = decode_case([context - 1 - 7 * i for i in range(batch)], 64, 512, 128, None, "cuda")
        rows.append(measure("HCA decoding", f"batch {batch}, window 128 + {context // 128:,}", case, None))
    report(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
