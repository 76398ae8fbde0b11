"""Two processes that compute one model: the logits of one, whatever the sessions do, and refusals.

python -m pytest -m gpu tests/engine/test_ranks.py   # on two GPUs, through NCCL
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_engine import Engine
from dsv4_engine.errors import DeviceError
from dsv4_engine.model import Model
from dsv4_engine.part import Part
from dsv4_engine.ranks import ALONE, Ranks, launched
from dsv4_engine.source import Source
from support.random_checkpoint import make_checkpoint, small_config

log = logging.getLogger(__name__)
TOLERANCE = 2e-5  # of the largest logit, float32 without cache rounding
# V4-Flash's widths with few experts and tokens.
FLASH = {
    "vocab_size": 1024, "hidden_size": 4096, "num_attention_heads": 64, "head_dim": 512, "q_lora_rank": 1024,
    "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128,
    "index_topk": 64, "moe_intermediate_size": 512, "n_routed_experts": 8, "num_experts_per_tok": 6,
    "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "swiglu_limit": 10.0,
}  # fmt: skip

PROGRAM = """
import sys, torch
from dsv4_engine import Engine
from dsv4_engine.following import dismiss, follow
from dsv4_engine.ranks import join, launched, leave

torch.set_num_threads(1)
ranks = launched()
folder, kv_dtype, out, device, experts = sys.argv[1:]
if ranks.rank:
    join(ranks)
    follow(ranks)
else:
    engine = Engine.load(folder, kv_dtype=kv_dtype, ctx=2048, device=device, device_map=experts)
    assert ranks.count == 1 or engine.model.blocks[0].attn.wq_b.shape[0] * ranks.count == (
        engine.config.num_attention_heads * engine.config.head_dim
    )
    held = len(engine.model.blocks[0].ffn.experts)
    assert engine.plan.slots or held * ranks.count == engine.config.n_routed_experts
    ids = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    session = engine.session()
    logits = [session.extend(ids[:200], logits="all")]
    fork = session.fork()
    logits += [session.extend(ids[200:260], logits="all"), fork.extend(ids[100:110], logits="all")]
    logits += [fork.extend([token])[None] for token in ids[:6]]
    logits += [session.extend(ids[260:], logits="all")]
    moved = engine.session()
    moved._state, moved.tokens = fork.state.fork(), list(fork.tokens)
    moved._state.version = None  # as a state from the prefix cache: the others do not have it
    logits += [moved.extend(ids[:9], logits="all")]
    torch.save(torch.cat([each.cpu() for each in logits]), out)
    dismiss(ranks)
leave()
"""


def run(
    count: int, folder: str | Path, kv_dtype: str, out: Path, *, device: str = "cpu", experts: str | Path = "auto"
) -> Tensor:
    """What PROGRAM's sessions give in ``count`` processes."""
    port = 20_000 + os.getpid() % 20_000
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), kv_dtype, str(out), device, str(experts)],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert all(code == 0 for _, code in ends), ends
    return torch.load(out)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_logits_of_one(tmp_path: Path, count: int) -> None:
    folder = make_checkpoint(tmp_path / "model", index_n_heads=16, num_attention_heads=8, o_groups=4)
    one, several = run(1, folder, "fp32", tmp_path / "one"), run(count, folder, "fp32", tmp_path / "several")
    assert one.shape == several.shape and not torch.equal(one, torch.zeros_like(one))
    assert (one - several).abs().max() < TOLERANCE * one.abs().max()


def test_a_published_model_is_divided_between_its_scale_blocks(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "q_lora_rank": 128, "o_lora_rank": 128, "head_dim": 128, "moe_intermediate_size": 256}
    folder = make_checkpoint(tmp_path / "model", quantised=True, **sizes)
    one, two = run(1, folder, "mixed", tmp_path / "one"), run(2, folder, "mixed", tmp_path / "two")
    # A sum in another order moves a value over a rounding boundary now and then (docs/numerics.md).
    off = (one - two).abs().amax(-1) / one.abs().max()
    assert off.median() < 2e-3 and off.quantile(0.95) < 3e-2


def test_each_process_reads_its_own_experts_from_disk(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "q_lora_rank": 128, "o_lora_rank": 128, "head_dim": 128, "moe_intermediate_size": 256}
    folder = make_checkpoint(tmp_path / "model", quantised=True, **sizes)
    where = tmp_path / "map.json"
    where.write_text('{"": "cpu", "layers.*.ffn.experts": "disk"}')
    memory, disk = (run(2, folder, "mixed", tmp_path / f"{m}", experts=m) for m in ("auto", where))
    assert torch.equal(memory, disk)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("model", ["plain", "bundled", "flash"])
def test_two_gpus_give_the_logits_of_one(tmp_path: Path, model: str) -> None:
    folder: str | Path = "tiny"
    if model == "plain":
        folder = make_checkpoint(tmp_path / "model", index_n_heads=16, num_attention_heads=8, o_groups=4)
    if model == "flash":
        folder = make_checkpoint(tmp_path / "model", mtp=False, **FLASH)
    kv_dtype = "mixed" if model == "bundled" else "fp32"
    one, two = (run(count, folder, kv_dtype, tmp_path / f"{count}", device="cuda") for count in (1, 2))
    off = (one - two).abs().amax(-1) / one.abs().max()
    log.info("%s: half of the tokens within %.1e of the largest logit, all within %.1e", model, off.median(), off.max())
    if kv_dtype == "fp32":
        assert off.max() < TOLERANCE
    else:
        assert off.median() < 2e-3 and off.quantile(0.95) < 3e-2  # as on the CPU above


def test_a_count_that_does_not_divide_the_heads_is_refused(tmp_path: Path) -> None:
    engine = Engine.load(make_checkpoint(tmp_path / "model", mtp=False))
    with pytest.raises(DeviceError, match="3 processes cannot share 2 groups"):
        Ranks(0, 3).check(engine.config, quantised=False)
    with pytest.raises(DeviceError, match="o_lora_rank=32"):
        Ranks(0, 2).check(engine.config, quantised=True)
    assert small_config()["o_groups"] == 2


def test_the_plan_of_a_part_counts_what_the_modules_hold(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "q_lora_rank": 128, "o_lora_rank": 128, "head_dim": 128, "moe_intermediate_size": 384}
    folder = make_checkpoint(tmp_path / "model", quantised=True, mtp=False, **sizes)
    whole = Engine.load(folder)
    for rank in range(2):
        ranks = Ranks(rank, 2)
        part = Part(whole.weights, whole.config, ranks)
        source = Source(whole.weights, torch.float32, expand=False, ranks=ranks)
        for i, block in enumerate(Model(source, whole.config, "mixed").blocks):
            held = {f"attn.{name}": getattr(block.attn, name) for name in ("wq_b", "wo_a", "wo_b")}
            held |= {"ffn.shared_experts.w2": block.ffn.shared.w2, "ffn.shared_experts.w1": block.ffn.shared.w13[0]}
            held |= {f"ffn.experts.{e}.w2": x.w2 for e, x in zip(block.ffn.own, block.ffn.experts, strict=True)}
            assert {n: w.shape for n, w in held.items()} == {
                n: part.specs[f"layers.{i}.{n}.weight"].shape for n in held
            }
            assert all(part.nbytes(f"layers.{i}.{n}.weight") == w.nbytes for n, w in held.items())
            there = {name for name in part.specs if name.startswith(f"layers.{i}.ffn.experts.")}
            assert len(there) == 3 * len(block.ffn.own) == 12


def test_shares_cover_everything_once() -> None:
    for total, step, count in ((256, 1, 3), (2048, 128, 4), (128, 128, 2), (6, 2, 5)):
        shares = [Ranks(rank, count).share(total, step) for rank in range(count)]
        assert [i for start, end in shares for i in range(start, end)] == list(range(total))


def test_half_an_environment_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == ALONE
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched() == Ranks(2, 4, 2)
