"""What `quantize` refuses, with a next step, before it writes anything; and values that stop it on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv4_engine import weights
from dsv4_engine.errors import InputError
from dsv4_engine.quantize import quantize
from support.random_checkpoint import make_checkpoint

from .quantize_common import SMALL, changed, contents, source


def refused(source: Path | str, out: Path, said: str, scheme: str = "published", writes: bool = False) -> InputError:
    before = contents(out) if out.is_dir() else None
    with pytest.raises(InputError, match=said) as caught:
        quantize(source, out, scheme)
    assert caught.value.hint
    if not writes:
        assert (contents(out) if out.is_dir() else None) == before
    assert not (out / "quantize.json").exists()
    return caught.value


def test_unknown_scheme(tmp_path: Path) -> None:
    error = refused(source(tmp_path / "a"), tmp_path / "out", "there is no scheme 'int3'", "int3")
    assert "published" in error.hint and "fp8" in error.hint


@pytest.mark.parametrize("held", ["model.safetensors", "notes.txt", ".hidden", "folder"])
def test_a_folder_that_is_not_empty(tmp_path: Path, held: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / held).mkdir() if held == "folder" else (out / held).write_text("mine")
    refused(source(tmp_path / "a"), out, f"is not empty: it holds {held}")


def test_an_empty_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantize(source(tmp_path / "a"), tmp_path / "out")


def test_a_finished_result_is_not_made_again(tmp_path: Path) -> None:
    quantize(source(tmp_path / "a"), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="finished result of this very job"):
        quantize(tmp_path / "a", tmp_path / "out")
    with pytest.raises(InputError, match="is not empty"):
        quantize(source(tmp_path / "b", seed=1), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_file_as_destination(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(source(tmp_path / "a"), tmp_path / "out", "is not a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_source_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path / "a")
    link, above = tmp_path / "link", tmp_path / "above"
    link.symlink_to(folder)
    above.symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for out in (folder, link, above / "a", Path("a"), tmp_path / "x" / ".." / "a", folder / "."):
        with pytest.raises(InputError, match=r"is the source itself|is not empty"):
            quantize(folder, out)
    for out in (folder, link, above / "a", Path("a")):
        with pytest.raises(InputError, match="is the source itself"):
            quantize(folder, out)
        with pytest.raises(InputError, match="is the source itself"):
            quantize(link, out)
    for out in (folder / "new", link / "new", folder / "encoding" / "x"):
        refused(folder, out, "lies inside the source")
    with pytest.raises(InputError, match="is not empty"):
        quantize(folder, tmp_path)


def test_half_downloaded_sources(tmp_path: Path) -> None:
    folder, out = source(tmp_path / "a"), tmp_path / "out"
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    refused(folder, out, "damaged or truncated")
    shard.write_bytes(whole[:5])
    refused(folder, out, "truncated")
    shard.unlink()
    refused(folder, out, "lacks 1 of 3 shards: model-00002")
    shard.write_bytes(whole)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, out, "holds neither")
    (folder / "config.json").unlink()
    refused(folder, out, "config.json")
    refused(tmp_path / "nowhere", out, "nowhere")
    assert not out.exists()


def test_types_that_no_scheme_takes(tmp_path: Path) -> None:
    half = changed(tmp_path / "half", lambda t: t.update({"embed.weight": t["embed.weight"].half()}))
    refused(half, tmp_path / "out", r"embed.weight is F16 \[64, 64\], expected BF16 or F32")
    name = "layers.0.attn.wq_a.weight"
    double = changed(tmp_path / "double", lambda t: t.update({name: t[name].double()}))
    refused(double, tmp_path / "out", f"{name} is F64")


def test_fp8_wants_fp4(tmp_path: Path) -> None:
    error = refused(
        make_checkpoint(tmp_path / "bf16", dtype="BF16", **SMALL),
        tmp_path / "out",
        r"experts.0.w1.weight is BF16",
        "fp8",
    )
    assert "published" in error.hint


@pytest.mark.parametrize(("expert_dtype", "scheme"), [("fp4", "published"), ("fp8", "fp8")])
def test_nothing_to_do(tmp_path: Path, expert_dtype: str, scheme: str) -> None:
    folder = make_checkpoint(tmp_path / "a", quantised=True, expert_dtype=expert_dtype, **SMALL)
    refused(folder, tmp_path / "out", "every tensor is in its form already", scheme)


def test_sizes_that_fp4_cannot_hold(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a", moe_intermediate_size=48, **SMALL)
    refused(folder, tmp_path / "out", "once quantised: moe_intermediate_size is 48, not a multiple of 32")


@pytest.mark.parametrize("name", ["layers.1.ffn.experts.3.w2.weight", "layers.0.attn.wkv.weight", "embed.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_the_source(tmp_path: Path, name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen beforehand in small tensors, on the way in large ones."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][-1, -1] = bad

    folder, out = changed(tmp_path / "a", poison), tmp_path / "out"
    refused(folder, out, f"{name} holds NaN or infinity")
    assert not out.exists()
    monkeypatch.setattr(weights, "SMALL", 0)
    error = refused(folder, out, f"model.safetensors: {name} holds NaN or infinity, first at", writes=True)
    assert "Get the file again" in error.hint
    assert not (out / "config.json").exists()


def test_damaged_scales_and_ids_are_seen_first(tmp_path: Path) -> None:
    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.ffn.experts.3.w2.scale"].view(torch.uint8)[0, 0] = 255

    folder = changed(tmp_path / "a", scale, quantised=True)
    refused(folder, tmp_path / "out", "w2.scale holds NaN", "fp8")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hash_layers"] == 1
    ids = changed(tmp_path / "b", lambda t: t["layers.0.ffn.gate.tid2eid"].add_(9))
    refused(ids, tmp_path / "other", "tid2eid names expert")
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()


def test_no_workers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 workers"):
        quantize(source(tmp_path / "a"), tmp_path / "out", workers=0)
