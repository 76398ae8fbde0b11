"""`quantize` from end to end: what the result holds, who can read it, and that workers show nowhere in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsv4_engine import Engine
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.quantize import finished_report, job, quantize, run
from dsv4_engine.quantize.folder import Folder
from dsv4_engine.quantize.job import plan_job
from dsv4_engine.weights import Weights
from support.expanded_checkpoint import expand_checkpoint
from support.random_checkpoint import make_checkpoint, random_tensors, write_tensors

from .quantize_common import SMALL, changed, contents, same_tensors, small_units, source

IDS = torch.randint(0, 64, (90,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((job, "UNIT_VALUES"), (run, "STEP_VALUES"), (run, "SAVE_BYTES")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    small_units()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("mtp", [False, True])
def test_published_is_what_the_formats_say(tmp_path: Path, shards: int, mtp: bool) -> None:
    """Every tensor as if it had been rounded when the checkpoint was made, in files of the same names."""
    plain = source(tmp_path / "plain", shards=shards, mtp=mtp)
    report = quantize(plain, tmp_path / "out")
    want = make_checkpoint(tmp_path / "want", shards=shards, quantised=True, **SMALL | {"mtp": mtp})
    same_tensors(tmp_path / "out", want)
    names = {p.name for p in plain.glob("*.safetensors*")}
    beside = {"config.json", "quantize.json", "tokenizer.json", "README.md", "encoding/rules.md"}
    assert contents(tmp_path / "out").keys() == names | beside
    config = ModelConfig.from_folder(tmp_path / "out")
    assert config == ModelConfig.from_folder(want)
    assert report.bytes_after == Checkpoint.open(tmp_path / "out").total_bytes
    assert report.bytes_before == Checkpoint.open(plain).total_bytes
    assert report.lossless is None


def test_config_says_the_quantisation_as_published(tmp_path: Path) -> None:
    plain = source(tmp_path / "plain", torch_dtype="float32")
    quantize(plain, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published = json.loads((Path(__file__).parents[3] / "engine/dsv4_engine/presets/v4-flash.json").read_text())
    for key in ("quantization_config", "expert_dtype", "torch_dtype"):
        assert config[key] == published[key]
    other = json.loads((plain / "config.json").read_text())
    changed_keys = ("quantization_config", "expert_dtype", "torch_dtype")
    assert {k: v for k, v in config.items() if k not in changed_keys} == {
        k: v for k, v in other.items() if k not in changed_keys
    }


def test_bfloat16_gives_what_its_values_give(tmp_path: Path) -> None:
    """F32 tensors of the published form are widened, the rest is rounded from the same values."""
    bf16 = make_checkpoint(tmp_path / "bf16", dtype="BF16", **SMALL)
    widened = changed(
        tmp_path / "f32", lambda t: t.update({n: v.bfloat16().float() for n, v in t.items() if v.is_floating_point()})
    )
    for folder in (bf16, widened):
        quantize(folder, tmp_path / f"{folder.name}-out")
    same_tensors(tmp_path / "bf16-out", tmp_path / "f32-out")


@pytest.mark.parametrize("scheme", ["published", "fp8"])
def test_workers_and_units_change_no_byte(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "source", quantised=scheme == "fp8")
    results = []
    for workers in (1, 3, 7):
        quantize(folder, tmp_path / str(workers), scheme, workers=workers)
        results.append(contents(tmp_path / str(workers)))
    assert results[1:] == results[:1] * 2
    # Units and steps of another size: only the report's sums may differ, in their last digits, and its job.
    monkeypatch.setattr(job, "UNIT_VALUES", 1 << 20)
    monkeypatch.setattr(run, "STEP_VALUES", 1 << 19)
    quantize(folder, tmp_path / "large", scheme)
    large = contents(tmp_path / "large")
    assert [name for name, data in large.items() if data != results[0][name]] == ["quantize.json"]


def test_torchs_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        quantize(source(tmp_path / "source"), tmp_path / "out", workers=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_source_is_only_read(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    before = contents(folder), {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    quantize(folder, tmp_path / "out")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert (contents(folder), {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}) == before
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o200  # and the result is not as locked as the source


def test_fp4_becomes_fp8_without_loss(tmp_path: Path) -> None:
    packed = source(tmp_path / "packed", quantised=True)
    report = quantize(packed, tmp_path / "out", "fp8")
    assert report.lossless is True and report.inexact == ()
    before, after = (Weights.open(Checkpoint.open(p), ModelConfig.from_folder(p)) for p in (packed, tmp_path / "out"))
    assert ModelConfig.from_folder(tmp_path / "out").expert_dtype == "fp8"
    for name, spec in before.specs.items():
        if spec.role == "expert":
            assert after.forms[name] == "fp8"
            matrix = name.removesuffix(".weight")
            values = (w.weight(matrix).dequantised(torch.float32) for w in (before, after))
            assert torch.equal(*values), name
        else:
            assert after.forms[name] == before.forms[name]
    a, b = (Engine.load(p).session().extend(IDS.tolist(), logits="all") for p in (packed, tmp_path / "out"))
    assert torch.equal(a, b)


def test_scales_may_lie_in_another_file(tmp_path: Path) -> None:
    """A file that held nothing but scales has no counterpart in the result."""
    folder = make_checkpoint(tmp_path / "apart", shards=2, quantised=True, **SMALL)
    tensors = random_tensors(ModelConfig.from_folder(folder), quantised=True, mtp=False)
    files = {"a": {n: t for n, t in tensors.items() if ".scale" not in n}}
    files["b"] = {n: t for n, t in tensors.items() if n not in files["a"]}
    for name, part in files.items():
        save_file(part, folder / f"{name}.safetensors")
    index = {"weight_map": {n: f"{name}.safetensors" for name, part in files.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantize(folder, tmp_path / "out", "fp8")
    quantize(make_checkpoint(tmp_path / "one", quantised=True, **SMALL), tmp_path / "same", "fp8")
    same_tensors(tmp_path / "out", tmp_path / "same")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["a.safetensors"]


def test_what_is_not_lossless_is_named(tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.2.w1"

    def stretch(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{name}.scale"].view(torch.uint8)
        scale[3, 1] = scale.max() - 20
        tensors[f"{name}.weight"][3, 16:32] = 0x33

    packed = changed(tmp_path / "packed", stretch, quantised=True)
    report = quantize(packed, tmp_path / "out", "fp8")
    assert report.lossless is False
    (tensor,) = report.inexact
    assert (tensor.tensor, tensor.blocks, tensor.changed) == (f"{name}.weight", 1, 32)
    assert (tensor.shown[0].row, tensor.shown[0].column, tensor.shown[0].span) == (0, 0, 20)
    assert 0 < tensor.error < 1e-5
    said = json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert said == json.loads(json.dumps(report.to_dict())) and said["lossless"] is False
    Engine.load(tmp_path / "out")


def test_base_checkpoints_go_to_fp4(tmp_path: Path) -> None:
    """FP8 experts, scales in float32: the experts are rounded, the scales of the rest become e8m0."""

    base = make_checkpoint(tmp_path / "fp8", quantised=True, expert_dtype="fp8", **SMALL)
    folder = make_checkpoint(tmp_path / "base", quantised=True, expert_dtype="fp8", **SMALL)
    tensors = random_tensors(ModelConfig.from_folder(folder), quantised=True, mtp=False)
    scales = {name: value.float() for name, value in tensors.items() if name.endswith(".scale")}
    write_tensors(folder, tensors | scales)
    report = quantize(folder, tmp_path / "out")
    quantize(base, tmp_path / "same")
    same_tensors(tmp_path / "out", tmp_path / "same")
    kinds = {(row.part, row.before, row.after) for row in report.rows}
    assert ("experts", "FP8", "FP4") in kinds and ("attention", "FP8", "FP8") in kinds
    types = {info.dtype for name, info in Checkpoint.open(tmp_path / "out").names.items() if name.endswith(".scale")}
    assert types == {"F8_E8M0"}


def test_a_prefix_is_dropped(tmp_path: Path) -> None:
    def prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if not n.startswith("head.")]:
            tensors[f"model.{name}"] = tensors.pop(name)

    quantize(changed(tmp_path / "prefixed", prefix), tmp_path / "a")
    quantize(make_checkpoint(tmp_path / "plain", **SMALL), tmp_path / "b")
    same_tensors(tmp_path / "a", tmp_path / "b")


def test_a_drafter_is_passed_on(tmp_path: Path) -> None:
    settings = {"dspark_block_size": 5, "dspark_noise_token_id": 9, "dspark_target_layer_ids": [0, 1]}
    folder = make_checkpoint(tmp_path / "a", **SMALL | settings | {"dspark_markov_rank": 8, "compress_ratios": [0, 4]})
    tensors = random_tensors(ModelConfig.from_folder(folder), mtp=False)
    drafter = {"mtp.1.markov.weight": torch.randn(6, 6).half(), "mtp.0.x.weight": torch.ones(3, 5, dtype=torch.int8)}
    write_tensors(folder, tensors | drafter)
    report = quantize(folder, tmp_path / "out")
    result = Checkpoint.open(tmp_path / "out")
    for name, value in drafter.items():
        assert result.tensor(name).dtype == value.dtype and torch.equal(result.tensor(name), value)
    assert {row.part for row in report.rows} >= {"unused"}


def test_the_report_says_how_far_values_moved(tmp_path: Path) -> None:
    report = quantize(source(tmp_path / "plain"), tmp_path / "out")
    rows = {(row.part, row.before, row.after): row for row in report.rows}
    experts, attention, mhc = (
        rows["experts", "F32", "FP4"],
        rows["attention", "F32", "FP8"],
        rows["mHC", "F32", "F32"],
    )
    assert 0.08 < experts.tally.relative_error < 0.15 and 0.02 < attention.tally.relative_error < 0.035
    assert mhc.tally.relative_error == 0 and mhc.worst is None
    assert experts.bytes_before == 4 * experts.tally.values
    assert experts.bytes_after == experts.tally.values // 2 + experts.tally.values // 32
    assert experts.tensors == 2 * 4 * 3 and experts.tally.saturated == 0 < experts.tally.zeroed
    assert experts.worst is not None and ".experts." in experts.worst[0]
    assert experts.worst[1] >= experts.tally.relative_error
    assert finished_report(tmp_path / "plain", tmp_path / "out", "published") == json.loads(
        json.dumps(report.to_dict())
    )


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache holds a folder of links."""
    folder = source(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (linked / path.name).symlink_to(path)
    quantize(linked, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    quantize(folder, tmp_path / "direct")
    same_tensors(tmp_path / "out", tmp_path / "direct")


def test_the_result_loads_here(tmp_path: Path) -> None:
    plain = source(tmp_path / "plain")
    quantize(plain, tmp_path / "out")
    a, b = (Engine.load(p).session().extend(IDS.tolist(), logits="all") for p in (plain, tmp_path / "out"))
    assert 1e-3 < float((a - b).abs().median() / a.abs().max()) < 0.3


@pytest.mark.parametrize("scheme", ["published", "fp8"])
def test_the_result_loads_in_transformers(tmp_path: Path, scheme: str) -> None:
    """Unpacked there to BF16, which holds FP4 and FP8 values exactly; the same values as a plain checkpoint here."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    quantize(source(tmp_path / "source", quantised=scheme == "fp8"), out, scheme)

    def logits(folder: Path) -> torch.Tensor:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.inference_mode():
            return model.eval().float()(IDS[None]).logits[0]

    torch.testing.assert_close(logits(out), logits(expand_checkpoint(out, tmp_path / "plain")), atol=1e-5, rtol=1e-5)


def test_huge_tensors_are_cut_into_units(tmp_path: Path) -> None:
    planned = plan_job(source(tmp_path / "source"), "published")
    units = [unit for shard in planned.shards for unit in shard.units()]
    embedding = [unit for unit in units if unit.piece.name == "embed.weight"]
    assert len(embedding) == 1 and len(units) > len({u.piece.number for u in units})
    for piece in {u.piece.number: u.piece for u in units}.values():
        mine = [u for u in units if u.piece.number == piece.number]
        assert [u.first for u in mine] == [0, *(u.last for u in mine[:-1])] and mine[-1].last == piece.rows
        assert all(u.first % 128 == 0 for u in mine)
    assert sum(u.source_bytes for u in units) == Checkpoint.open(planned.folder).total_bytes


def test_progress_counts_the_sources_bytes(tmp_path: Path) -> None:
    folder, told = source(tmp_path / "source"), list[tuple[int, int]]()
    quantize(folder, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    total = Checkpoint.open(folder).total_bytes
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    with (
        Folder.open(tmp_path / "out", plan_job(folder, "published")),
        pytest.raises(ValueError, match="being written by another run"),
    ):
        quantize(folder, tmp_path / "out")
    quantize(folder, tmp_path / "out")
