"""An engine whose experts stay on disk: the same logits, within its plan, and refused where limits are too small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_engine import Engine, placement
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.device_map import Limits
from dsv4_engine.errors import CheckpointError, InputError, MemoryPlanError
from dsv4_engine.weights import Weights
from support.random_checkpoint import make_checkpoint

MIB = 1 << 20
IDS = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts are most of it: 40 of 200 KiB in each of four layers and the MTP block."""
    return make_checkpoint(
        tmp_path_factory.mktemp("apart") / "m",
        quantised=True, n_routed_experts=40, moe_intermediate_size=512, hidden_size=256, index_n_heads=16,
    )  # fmt: skip


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> int:
    """What the program takes is fixed, so that limits mean the model."""
    monkeypatch.setattr(placement, "program_bytes", lambda: 300 * MIB)
    return 300 * MIB


@pytest.fixture
def packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The same weights, all held, packed."""
    monkeypatch.setattr(placement, "EXPAND_SHARE", 0.0)
    return Engine.load(folder)


def limited(folder: Path, program: int, size: int, **more: Any) -> Engine:
    return Engine.load(folder, limits=Limits(cpu=program + size), ctx=512, **more)


def least(folder: Path, program: int) -> int:
    """Bytes below which it refuses, the program's left out."""
    with pytest.raises(MemoryPlanError) as caught:
        limited(folder, program, MIB)
    return round(float(str(caught.value).split("needs ")[1].split(" MiB")[0]) * MIB) - program


@pytest.mark.parametrize("experts", [6, 60])
def test_logits_are_those_of_all_experts_held(folder: Path, packed: Engine, program: int, experts: int) -> None:
    size = packed.plan.expert_bytes
    given = least(folder, program) + experts * size
    apart = limited(folder, program, given)
    assert 4 < apart.plan.slots < 200 and not apart.plan.expand
    assert program + given - size < apart.plan.total("cpu") <= program + given
    store = apart.model.blocks[0].ffn.apart.store  # type: ignore[union-attr]
    # In the same chunks: less memory means shorter ones, which may round otherwise.
    a, b = replace(packed, chunk=apart.chunk).session(), apart.session()
    assert torch.equal(a.extend(IDS, logits="all"), b.extend(IDS, logits="all"))
    for token in IDS[:8]:
        assert torch.equal(a.extend([token]), b.extend([token]))
    assert store.usage.bytes == store.usage.fetched * size and store.pool.nbytes == apart.plan.slots * size


def test_a_map_says_which_layers_stay_on_disk(folder: Path, packed: Engine, tmp_path: Path) -> None:
    where = tmp_path / "map.json"
    where.write_text('{"": "cpu", "layers.1.ffn.experts": "disk", "layers.3": "cpu", "layers.3.ffn.experts": "disk"}')
    apart = Engine.load(folder, device_map=where, ctx=512)
    assert [block.ffn.apart is not None for block in apart.model.blocks] == [False, True, False, True]
    assert [len(block.ffn.experts) for block in apart.model.blocks] == [40, 0, 40, 0]
    assert apart.plan.slots == apart.plan.experts == 120  # the MTP block's are apart too; there is room for all
    a, b = packed.session().extend(IDS[:100]), apart.session().extend(IDS[:100])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_next_layers_experts_are_fetched_meanwhile(folder: Path, tmp_path: Path) -> None:
    """Of single tokens: hash layers' are known, others guessed; a wrong guess changes nothing."""
    apart = Engine.load(folder, device_map=_map(tmp_path))
    store = apart.model.blocks[0].ffn.apart.store  # type: ignore[union-attr]
    expected: list[int] = []
    inner = store.expect
    store.expect = lambda layer, experts: (expected.append(layer), inner(layer, experts))  # type: ignore[method-assign]
    session = apart.session()
    session.extend(IDS[:1])
    assert expected == [0, 1, 2, 3]
    session.extend(IDS[:200])
    assert expected == [0, 1, 2, 3, 0]


def test_too_little_memory_says_what_is_needed(folder: Path, program: int) -> None:
    with pytest.raises(
        MemoryPlanError, match=r"with its routed experts on disk, needs .* 4 experts at a time"
    ) as caught:
        limited(folder, program, 10 * MIB)
    assert "310.0 MiB are available" in str(caught.value) and "the program 300.0 MiB" in str(caught.value)
    assert limited(folder, program, least(folder, program) + MIB // 10).plan.slots == 4


def test_damage_is_found_when_the_expert_is_read(folder: Path, program: int, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = Weights.open(Checkpoint.open(copy), ModelConfig.from_folder(copy), values=False)
    for expert in range(40):
        scale = weights.places(f"layers.2.ffn.experts.{expert}.w2.weight")[1]
        assert scale is not None
        with scale.file.open("r+b") as file:
            file.seek(scale.start)
            file.write(b"\xff")
    engine = Engine.load(copy, device_map=_map(tmp_path))
    session = engine.session()
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.experts\.\d+\.w2\.weight holds NaN"):
        session.extend(IDS[:10])
    assert session.position == 0


def _map(folder: Path) -> Path:
    where = folder / "all.json"
    where.write_text('{"": "cpu", "layers.*.ffn.experts": "disk"}')
    return where


def test_progress_counts_what_stays_on_disk(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    Engine.load(folder, device_map=_map(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]


BAD = {
    "[]": "no JSON object", "{": "is not JSON", '{"": "cuda:3"}': "not there", '{"": "tpu"}': "not there",
    '{"layers.9": "cpu", "": "cpu"}': r"no module 'layers\.9'", '{"layer.0": "cpu"}': "no module 'layer.0'",
    '{"embed": "cpu"}': "no device is named for head", '{"": "disk"}': "embed cannot be on disk",
    '{"": "cpu", "layers.0": "disk"}': r"layers\.0 cannot be on disk", '{"": 0}': "not there",
    '{"": "cpu", "": "disk"}': "is not JSON",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_maps_that_cannot_be_followed(folder: Path, tmp_path: Path, text: str) -> None:
    where = tmp_path / "map.json"
    where.write_text(text)
    with pytest.raises(InputError, match=BAD[text]) as caught:
        Engine.load(folder, device_map=where)
    assert caught.value.hint


def test_a_map_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Engine.load(folder, device_map="atuo")
