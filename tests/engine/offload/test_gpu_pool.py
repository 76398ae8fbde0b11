"""A GPU's pool over memory: what the kernels' tables point to is what was chosen.  On the CPU but for the last tests.

python -m pytest -m gpu tests/engine/offload/test_gpu_pool.py
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4[gpu]'")

from dsv4_engine import Engine
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.device_map import DeviceMap, Limits
from dsv4_engine.device_sampling import Draw
from dsv4_engine.errors import CheckpointError, MemoryPlanError
from dsv4_engine.gpu import apart_step
from dsv4_engine.gpu.apart import EXACT_BINADES, GpuPool, Residency
from dsv4_engine.gpu.apart_plan import Machine, apart_plan
from dsv4_engine.gpu.apart_step import StepPool
from dsv4_engine.offload.disk import ExpertFiles
from dsv4_engine.offload.layout import ExpertLayout
from dsv4_engine.offload.policy import Slots
from dsv4_engine.offload.store import ExpertStore
from dsv4_engine.placement import program_bytes
from dsv4_engine.sampling import Sampling
from dsv4_engine.weights import Weights
from support.random_checkpoint import make_checkpoint

EXPERTS, LAYERS = 24, 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["fp4", "fp8"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    more = {"expert_dtype": "fp8"} if request.param == "fp8" else {}
    folder = make_checkpoint(
        tmp_path_factory.mktemp(request.param) / "m",
        quantised=True, mtp=False, n_routed_experts=EXPERTS, hidden_size=128, moe_intermediate_size=128, **more,
    )  # fmt: skip
    return Weights.open(Checkpoint.open(folder), ModelConfig.from_folder(folder))


def store_of(weights: Weights, slots: int) -> ExpertStore:
    return ExpertStore(ExpertFiles(weights, EXACT_BINADES), weights.config, slots)


def check(pool: GpuPool, weights: Weights, layer: int, chosen: torch.Tensor) -> None:
    """Every chosen expert's bytes are where the layer's table says."""
    kernels = pool.kernel_pool(layer)
    for expert in chosen.unique().tolist():
        slot = int(kernels.slot_of_expert[expert])
        assert slot >= 0
        name = f"layers.{layer}.ffn.experts.{expert}."
        w1, w3, w2 = (weights.weight(f"{name}{m}") for m in ("w1", "w3", "w2"))
        for whole, parts in ((kernels.w13, (w1.data, w3.data)), (kernels.w2, (w2.data,))):
            assert torch.equal(whole[slot].view(torch.uint8), torch.cat(parts).view(torch.uint8))
        scales = torch.cat([w.scale.view(torch.uint8) for w in (w1, w3) if w.scale is not None])
        assert torch.equal(kernels.s13[slot], scales)
        assert w2.scale is not None and torch.equal(kernels.s2[slot], w2.scale.view(torch.uint8))


@pytest.mark.parametrize("memory", [9, LAYERS * EXPERTS])
@pytest.mark.parametrize("slots", [EXPERTS, 40, LAYERS * EXPERTS])
def test_tables_point_to_what_was_chosen(weights: Weights, memory: int, slots: int) -> None:
    store = store_of(weights, memory)
    if store.complete:
        store.fill()
    pool = GpuPool(store, CPU, slots)
    residency = Residency(dict.fromkeys(range(LAYERS), pool), {0: np.arange(512).reshape(256, 2) % EXPERTS})
    generator = torch.Generator().manual_seed(slots)
    for tokens in (1, 1, 200, 1, 40, 1, 1):
        residency.begin(torch.randint(256, (tokens,), generator=generator))
        for layer in range(LAYERS):
            chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(6).indices.int()
            residency(layer, chosen)
            check(pool, weights, layer, chosen)
            assert pool.slots.pinned <= slots
    usage = residency.usage
    assert usage.bytes == usage.fetched * store.pool.layout.nbytes
    assert pool.slots.pinned <= EXPERTS + len(pool._early)
    if slots == memory == LAYERS * EXPERTS:
        assert usage.fetched <= LAYERS * EXPERTS


def test_a_prompts_next_layer_comes_early(weights: Weights) -> None:
    store = store_of(weights, LAYERS * EXPERTS)
    store.fill()
    pool = GpuPool(store, CPU, LAYERS * EXPERTS)
    residency = Residency(dict.fromkeys(range(LAYERS), pool), {})
    everyone = torch.arange(EXPERTS, dtype=torch.int32).repeat(8)[:, None]
    for layer in range(LAYERS):
        residency(layer, everyone)
        assert (pool.slots.slot_of[: layer + 2] >= 0).all()
        check(pool, weights, layer, everyone)
    assert (residency.usage.misses, residency.usage.hits) == (EXPERTS, 3 * EXPERTS)


class Interrupted(list[Any]):
    """What Ctrl-C is pressed in, once it is gone through."""

    def __iter__(self) -> Iterator[Any]:
        raise KeyboardInterrupt


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["copies", "copies ahead", "fetches", "between layers", "handing over"])
def test_what_an_interrupted_pass_promised_is_not_believed(
    weights: Weights, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot was given to an expert whose bytes did not come, or the device's table had not come back to the host."""
    store = store_of(weights, LAYERS * EXPERTS)
    store.fill()
    pool = GpuPool(store, CPU, 40)
    hashed = {1: np.arange(12).reshape(2, 6)} if where == "copies ahead" else {}
    residency = Residency(dict.fromkeys(range(LAYERS), pool), hashed)
    generator = torch.Generator().manual_seed(1)

    def some(tokens: int) -> torch.Tensor:
        return torch.rand(tokens, EXPERTS, generator=generator).topk(6).indices.int()

    def run(tokens: int, token: int = 0, layers: int = LAYERS) -> None:
        residency.begin(torch.full((tokens,), token))
        if pool.step is not None:
            assert not pool.step._begun and not pool.step._kept  # nothing is left of an interrupted step
        for layer in range(layers):
            chosen = some(tokens)
            residency(layer, chosen, lambda: some(1))
            check(pool, weights, layer, chosen)
        if layers < LAYERS:
            raise KeyboardInterrupt

    for tokens in (3, 1, 1):
        run(tokens)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where.startswith("copies"):
            patch.setattr(pool, "_parts", Interrupted(pool._parts))
        elif where == "fetches":
            patch.setattr(apart_step, "fetch", interrupted)
        elif where == "handing over":
            patch.setattr(pool.step, "give", interrupted)
        run(1 if where in ("fetches", "between layers") else 3, 1, 2 if where == "between layers" else LAYERS)
    for tokens in (1, 12, 1) if where in ("fetches", "between layers") else (12, 1, 12):
        run(tokens)
    assert pool.slots.pinned <= EXPERTS


def test_wide_rows_are_refused_when_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", quantised=True, mtp=False, hidden_size=128, moe_intermediate_size=128)
    weights = Weights.open(Checkpoint.open(folder), ModelConfig.from_folder(folder))
    scale = weights.places("layers.1.ffn.experts.2.w3.weight")[1]
    assert scale is not None
    with scale.file.open("r+b") as file:
        file.seek(scale.start)
        file.write(bytes([100, 120]))
    assert len(list(store_of(weights, 8).use(1, 1, {1: 1}))) == 1
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.2\.w3\.weight .* 14 binades"):
        list(store_of(weights, 8).use(1, 1, {2: 1}))


# ---- on a GPU --------------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 512, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 128, "q_lora_rank": 128,
    "o_groups": 4, "o_lora_rank": 128, "sliding_window": 128, "index_n_heads": 16, "index_head_dim": 128,
    "index_topk": 32, "moe_intermediate_size": 512, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "compress_ratios": [0, 128, 4, 4, 128, 0], "num_hash_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "m", quantised=True, mtp=False, **SHAPE)


def limits_for(engine: Engine, slots: int, memory: int | None = None) -> Limits:
    """Limits that leave room for so many experts on the GPU, and for about ``memory`` of them behind it."""
    config, specs, forms = engine.config, engine.weights.specs, engine.weights.forms
    layers = config.num_hidden_layers
    homes = DeviceMap("cuda:0", ("cuda:0",) * layers, ("cpu",) * layers, "cuda:0")
    room = 1 << 40
    for _ in range(8):  # a smaller room has smaller chunks, which leave more of it
        plan = apart_plan(config, specs, forms.__getitem__, Machine(("cuda:0",), (room,), 1 << 40, 0), 4096, homes)
        room = plan.total("cuda:0") - (plan.gpu_slots[0] - slots) * plan.expert_bytes
    assert plan.gpu_slots == (slots,)
    return Limits(gpu=(room,), cpu=None if memory is None else program_bytes() + memory * plan.expert_bytes)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [None, 220], ids=["memory", "disk"])
def test_logits_have_the_same_bits(folder: Path, memory: int | None, tmp_path: Path) -> None:
    where = tmp_path / "map.json"
    where.write_text('{"": 0, "layers.*.ffn.experts": "disk"}')
    whole = Engine.load(folder, device="cuda", dtype="bfloat16", ctx=4096)
    limits = limits_for(whole, 150, memory)
    apart = Engine.load(folder, device="cuda", dtype="bfloat16", ctx=4096, device_map=where, limits=limits)
    assert apart.plan.gpu_slots == (150,)
    assert (apart.plan.slots == 6 * 64) == (memory is None)
    ids = torch.randint(512, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    a, b = whole.session(), apart.session()
    assert torch.equal(a.extend(ids, logits="all").cpu(), b.extend(ids, logits="all").cpu())
    for token in ids[:40]:
        assert torch.equal(a.extend([token]).cpu(), b.extend([token]).cpu())
    assert torch.equal(a.extend(ids[:300], logits="all").cpu(), b.extend(ids[:300], logits="all").cpu())
    for token in ids[40:60]:
        assert torch.equal(a.extend([token]).cpu(), b.extend([token]).cpu())


@pytest.mark.gpu
def test_steps_begun_ahead_have_the_same_bits(folder: Path) -> None:
    """Taken, or another token comes next, or several, which the host serves."""
    whole = Engine.load(folder, device="cuda", dtype="bfloat16", ctx=4096)
    limits = limits_for(whole, 100)
    apart = Engine.load(folder, device="cuda", dtype="bfloat16", ctx=4096, limits=limits)
    ids = torch.randint(512, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    a, b = whole.session(), apart.session()
    taken, begun = ids[:500], 0
    for turn in range(60):
        logits = b.extend(taken, logits="device")
        assert torch.equal(a.extend(taken), logits.cpu())
        draw = Draw(logits, Sampling(temperature=0), 0.0)
        b.ahead(draw)
        begun += b._model._steps._begun is not None  # type: ignore[attr-defined]
        token = draw.result()
        assert token is not None
        taken = [[token], [token], ids[turn : turn + 1], ids[turn : turn + 20]][turn % 4]
    assert begun == 59


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_begun_ahead_may_come_or_end_at_any_moment(device: str) -> None:
    """While it copies, before it begins, after it has ended; right guesses and wrong ones, one layer after another."""
    layers, experts, number, there = 4, 12, 16, device == "cuda"
    layout = ExpertLayout("fp4", torch.int8, *((4096, 2048) if there else (128, 128)))
    memory, pool = layout.pool(layers * experts, pinned=there), layout.pool(number, device)
    everything = {name: torch.empty_like(tensor, device=device) for name, tensor in memory.tensors.items()}
    for name, tensor in everything.items():
        tensor.view(torch.uint8).random_(0, 256)
        memory.tensors[name].copy_(tensor)
    whole = Slots(layers, experts, layers * experts)
    whole.slot_of[:] = np.arange(layers * experts).reshape(layers, experts)
    store: Any = SimpleNamespace(pool=memory, slots=whole)
    step, generator = StepPool(store, pool, Slots(layers, experts, number)), torch.Generator().manual_seed(0)

    def some() -> torch.Tensor:
        return torch.randperm(experts, generator=generator)[:6].int()[None].to(device)

    def wait() -> None:
        """Up to 0.5 ms; an expert takes 0.27."""
        cycles = int(torch.randint(800_000, (1,), generator=generator))
        if there:
            torch.cuda._sleep(cycles)

    def asked(likely: torch.Tensor, late: bool) -> torch.Tensor:
        if late:
            wait()
        return likely

    chosen, turns = some(), 400 if there else 60
    for turn in range(turns):
        layer, likely = turn % layers, some()
        step.resident(layer, chosen, partial(asked, likely, turn % 5 == 0) if layer + 1 < layers else None)
        slots = step.held.slot_of[layer, chosen[0].long()].long()
        assert bool((slots >= 0).all())
        for name, tensor in pool.tensors.items():
            right = everything[name].view(torch.uint8)[layer * experts + chosen[0].long()]
            assert torch.equal(tensor.view(torch.uint8)[slots], right), (turn, name)
        chosen = likely if turn % 3 else some()
        wait()
    step.settle()
    who = step.held.held.long()
    for name, tensor in pool.tensors.items():
        assert torch.equal(tensor.view(torch.uint8)[who >= 0], everything[name].view(torch.uint8)[who[who >= 0]]), name
    begun, known = step.held.usage[2:].tolist()
    assert known > turns / 3 and begun - known > turns / 20


@pytest.mark.gpu
def test_a_gpu_limit_is_kept_to(folder: Path) -> None:
    limits = limits_for(Engine.load(folder, device="cuda", dtype="bfloat16", ctx=4096), 100)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = Engine.load(folder, device="cuda", dtype="bfloat16", ctx=4096, limits=limits)
    session = engine.session()
    session.extend(list(range(500)) * 4)
    for token in range(20):
        session.extend([token])
    assert torch.cuda.max_memory_allocated() - before <= limits.gpu[0]
    with pytest.raises(MemoryPlanError, match=r"one layer's 64 experts"):
        Engine.load(folder, device="cuda", dtype="bfloat16", ctx=4096, limits=Limits(gpu=(1 << 20,)))
