"""What the GPU's engine is composed of, run on a CPU: every layer against the CPU engine's, and chunk boundaries.

Where a GPU is at hand test_gpu_engine.py says the same of the kernels themselves.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from dsv4_engine import Engine, Session
from dsv4_engine.device_sampling import Draw
from dsv4_engine.gpu.chunk import Chunk
from dsv4_engine.gpu.decode import Steps, _Recorded
from dsv4_engine.gpu.model import GpuModel
from dsv4_engine.gpu.state import GpuState
from dsv4_engine.gpu.weights import CheckpointSource
from dsv4_engine.sampling import Sampling
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


def recorded_by_hand(steps: Steps, state: GpuState, ctx: int) -> list[_Recorded]:
    """In the place of CUDA graphs: the same launches over the same memory at every replay."""

    def piece(number: int, recorded: _Recorded) -> None:
        assert recorded.out is not None
        x = steps._streams[number].clone() if number else None
        owner = steps._owner() if steps._owner is not None else None
        assert owner is not None
        recorded.out.copy_(steps._stage(number, x, owner, ctx, None))

    found = []
    for number in range(len(steps._stages)):
        recorded = _Recorded(out=torch.empty_like(steps._streams[number]))
        recorded.pieces.append(partial(piece, number, recorded))
        found.append(recorded)
    return found


def test_steps_begun_ahead(model: GpuModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken when their token comes next, and else as if they had never been begun: another token, several, another
    session's step in the same place.
    """
    monkeypatch.setattr(Steps, "_record", recorded_by_hand)
    steps = Steps(model.stages)
    steps._recording = True
    monkeypatch.setattr(model, "_steps", steps)
    run, other, likely = session(model), session(model), Sampling(temperature=0)
    replays: list[int] = []
    monkeypatch.setattr(steps, "_replay", lambda *a: replays.append(1) or Steps._replay(steps, *a))
    for each in (run, other):
        each.extend(IDS[:5], logits="none")
        each.extend(IDS[5:6])
    draw = Draw(run.extend(IDS[6:7], logits="device"), likely, 0.0)
    token = draw.result()
    assert token is not None
    want = run.fork().extend([token])

    run.ahead(draw)
    before = len(replays)
    assert torch.equal(run.extend([token]), want) and len(replays) == before  # nothing was left to do
    assert run.position == 8 == run.state.position

    want = run.fork().extend(IDS[8:9]), run.fork().extend(IDS[8:11])
    draw = Draw(-run.fork().extend([3]), likely, 0.0)
    for taken, wanted in zip((IDS[8:9], IDS[8:11]), want, strict=True):
        fork = run.fork()
        fork.ahead(draw)
        assert draw.result() not in taken[:1]
        assert torch.equal(fork.extend(taken), wanted)

    token = draw.result()
    assert token is not None
    want, others = run.fork().extend([token]), other.fork().extend(IDS[6:7])
    run.ahead(draw)
    assert torch.equal(other.extend(IDS[6:7]), others)  # writes over the streams that were begun
    assert torch.equal(run.extend([token]), want)


class Sequence:
    """A state's parts; getting at ``interrupted``, a part's number, is interrupted once."""

    def __init__(self, value: float) -> None:
        self.flats, self.interrupted = [torch.full((4,), value) for _ in range(2)], -1
        self.parts = [self.Part(self, number) for number in range(2)]

    class Part:
        def __init__(self, whole: "Sequence", number: int) -> None:
            self.whole, self.number = whole, number

        @property
        def flat(self) -> torch.Tensor:
            if self.whole.interrupted == self.number:
                self.whole.interrupted = -1
                raise KeyboardInterrupt
            return self.whole.flats[self.number]

        @flat.setter
        def flat(self, flat: torch.Tensor) -> None:
            self.whole.flats[self.number] = flat


@pytest.mark.parametrize("again", [0, 1])
@pytest.mark.parametrize(("who", "part"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_sequence_that_was_interrupted_moving_in(who: int, part: int, again: int) -> None:
    """Whoever steps next lies whole where steps work, and nobody else there."""
    stage = SimpleNamespace(device=torch.device("cpu"), layout=SimpleNamespace(empty=lambda: torch.zeros(4)))
    stage.config = SimpleNamespace(hc_mult=4, hidden_size=8)
    steps, both = Steps([stage, stage]), (Sequence(1.0), Sequence(2.0))  # type: ignore[list-item]
    steps._take(both[0])  # type: ignore[arg-type]
    both[who].interrupted = part
    with pytest.raises(KeyboardInterrupt):
        steps._take(both[1])  # type: ignore[arg-type]
    for number in (again, 1 - again):
        steps._take(both[number])  # type: ignore[arg-type]
        assert all(flat is there for flat, there in zip(both[number].flats, steps._flats, strict=True))
        for value, each in enumerate(both, start=1):
            assert all((flat == value).all() for flat in each.flats)


def test_a_recording_that_is_interrupted_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the stream, and torch's memory, would wait for its end for good; that it is not whole is no news."""
    cuda = MagicMock()
    cuda.CUDAGraph.return_value.capture_end.side_effect = RuntimeError("unjoined work")
    steps = Steps([SimpleNamespace(device=torch.device("cpu"), beside=None)])  # type: ignore[list-item]
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(steps, "_stage", MagicMock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        steps._record(MagicMock(), 2048)
    assert cuda.CUDAGraph.return_value.capture_begin.call_count == 1
    assert cuda.CUDAGraph.return_value.capture_end.call_count == 1


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
