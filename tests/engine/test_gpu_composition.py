"""What the GPU's engine is composed of, run on a CPU: every layer against the CPU engine's, and chunk boundaries.

Where a GPU is at hand test_gpu_engine.py says the same of the kernels themselves.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine, Session
from dsv4_engine.gpu.chunk import Chunk
from dsv4_engine.gpu.model import GpuModel
from dsv4_engine.gpu.weights import CheckpointSource
from support import gpu_reference
from support.random_checkpoint import make_checkpoint
from support.triton_mode import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="test_gpu_engine.py runs the kernels themselves")
SHAPE = {
    "vocab_size": 256, "hidden_size": 128, "num_attention_heads": 2, "head_dim": 128, "q_lora_rank": 128, "o_groups": 2,
    "o_lora_rank": 128, "sliding_window": 128, "index_n_heads": 2, "index_head_dim": 128, "index_topk": 4,
    "moe_intermediate_size": 128, "n_routed_experts": 6, "num_experts_per_tok": 2, "compress_ratios": [0, 4, 128],
}  # fmt: skip
IDS = torch.randint(256, (140,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m", quantised=True, mtp=False, **SHAPE)


@pytest.fixture(scope="module")
def cpu(folder: Path) -> Engine:
    return Engine.load(folder, dtype="bfloat16")


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def model(cpu: Engine, request: pytest.FixtureRequest) -> Iterator[GpuModel]:
    """On one device, and spread over two."""
    sources = [CheckpointSource(cpu.weights, torch.device("cpu")) for _ in range(request.param)]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        gpu_reference.install(patch)
        yield GpuModel(sources, cpu.config, [(0, 3)] if request.param == 1 else [(0, 1), (1, 3)])


def session(model: GpuModel) -> Session:
    return Session(model, model.new_state(), [], 4096, 128)  # type: ignore[arg-type]


@pytest.mark.parametrize("pieces", [[5, 1, 6], pytest.param([5, 1, 30, 1, 100, 1, 2], marks=pytest.mark.slow)])
def test_every_layer(folder: Path, cpu: Engine, model: GpuModel, pieces: list[int]) -> None:
    """As close to the CPU's bfloat16 engine as that is to its float32 one, on equal inputs."""
    full = Engine.load(folder)
    states, other, position = [engine.model.new_state() for engine in (cpu, full)], model.new_state(), 0
    other.reserve(len(IDS))
    buffers = [mine for part in other.parts for mine in part.buffers]
    off: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    own: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    for piece in torch.tensor(IDS[: sum(pieces)]).split(pieces):
        chunk = cpu.model._chunk(piece, position)
        theirs = Chunk.at(piece, position, model.stages[0].freqs)
        if len(piece) == 1:
            theirs = Chunk.step(piece, torch.tensor([position]), model.stages[0].freqs, 2048)
        x = cpu.model._embedded(piece)[:, None].expand(-1, 4, -1).contiguous()
        for i, block in enumerate(model.blocks):
            want, exact = (
                engine.model.blocks[i].forward(x.to(engine.model.dtype), chunk, state.layers[i])
                for engine, state in zip((cpu, full), states, strict=True)
            )
            got = model.stages[0].written(*block.forward(x.clone(), None, theirs, buffers[i], buffers[i]))
            off[i].append(distance(got, want))
            own[i].append(distance(want, exact))
            x = want
        position += len(piece)
    for i, (mine, theirs_) in enumerate(zip(off, own, strict=True)):
        a, b = torch.cat(mine), torch.cat(theirs_)
        assert a.median() < b.median() and a.quantile(0.9) < b.quantile(0.9), f"layer {i}: {a.median()}, {b.median()}"


def distance(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative RMS of each token's streams."""
    difference = (got.float() - want.float()).flatten(1)
    return difference.norm(dim=1) / want.float().flatten(1).norm(dim=1)


@pytest.mark.slow
def test_chunk_boundaries(model: GpuModel) -> None:
    whole, other = session(model), session(model)
    want = whole.extend(IDS, logits="all")
    got = [other.extend(IDS[a:b], logits="all") for a, b in ((0, 3), (3, 4), (4, 130), (130, 138))]
    got += [other.extend([token])[None] for token in IDS[138:]]
    off = (torch.cat(got) - want).abs().amax(1) / want.abs().max()
    assert (off < 1e-5).float().mean() > 0.95, off  # a rounding may fall the other way now and then
    fork = whole.fork_whole()
    assert fork.position == 128
    assert torch.equal(fork.extend(IDS[128:], logits="all"), want[128:])
    for a, b in zip(whole.state.layers, other.state.layers, strict=True):
        if a.entries is not None and b.entries is not None:
            same = torch.cat(a.entries.held()) == torch.cat(b.entries.held())
            assert same.float().mean() > 0.99
