"""The model against Transformers' deepseek_v4, an independent implementation, on random checkpoints.

Plain float32 weights and no cache rounding: there the two compute the same function.  Where the indexer's k-th and
next score tie, either choice is right; such positions are counted, and with the index heads used here stay rare.
"""

from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine
from support.expanded_checkpoint import expand_checkpoint
from support.random_checkpoint import make_checkpoint

transformers = pytest.importorskip("transformers", reason="Transformers is the oracle here: pip install -e .[dev]")

TOLERANCE = 2e-4  # of the largest logit: the project's promise; what is measured is about 2e-6
TIED_SHARE = 0.001

CASES = {
    # name: (tokens, overrides of the small default model)
    "all kinds": (700, {"index_n_heads": 16}),
    "window only": (150, {"compress_ratios": [0, 0], "num_hash_layers": 2}),
    "csa only, top-k larger than the entries": (300, {"compress_ratios": [4, 4], "index_topk": 512}),
    "csa only, top-k smaller": (600, {"compress_ratios": [4, 4], "index_n_heads": 16, "index_topk": 16}),
    "hca only": (700, {"compress_ratios": [128, 128, 128], "num_hash_layers": 0}),
    "shorter than any block": (3, {}),
    "one token": (1, {}),
    "other sizes": (
        420,
        {
            "compress_ratios": [128, 4, 0, 4, 128],
            "index_n_heads": 24,
            "index_head_dim": 64,
            "head_dim": 128,
            "num_attention_heads": 6,
            "o_groups": 3,
            "hidden_size": 96,
            "n_routed_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 128,
            "num_hash_layers": 3,
            "hc_sinkhorn_iters": 7,
            "routed_scaling_factor": 2.5,
        },
    ),
    "no yarn": (500, {"rope_scaling": None, "index_n_heads": 16}),
}


def oracle_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(ids[None]).logits[0]


def relative_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Largest error of each position, relative to the largest logit of all."""
    return (got - want).abs().amax(-1) / want.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    tokens, overrides = CASES[case]
    folder = make_checkpoint(tmp_path / "model", mtp=False, seed=len(case), **overrides)
    # Seeded: among fresh ids two index scores tie within rounding now and then, and 600 positions allow for none.
    ids = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(len(case)))
    got = Engine.load(folder, kv_dtype="fp32").session().extend(ids.tolist(), logits="all")
    off = relative_errors(got, oracle_logits(folder, ids)) > TOLERANCE
    assert off.sum() <= TIED_SHARE * tokens, (
        f"{int(off.sum())} of {tokens} positions, first {off.nonzero()[:5].tolist()}"
    )


def test_long_context_takes_the_gathering_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_engine import attention

    calls = []
    gathered = attention.gathered_attention
    monkeypatch.setattr(attention, "gathered_attention", lambda *a: calls.append(1) or gathered(*a))
    overrides = {"compress_ratios": [4, 128, 4], "index_n_heads": 16, "index_topk": 4}
    folder = make_checkpoint(tmp_path / "model", mtp=False, **overrides)
    ids = torch.randint(0, 256, (600,))
    got = Engine.load(folder, kv_dtype="fp32").session().extend(ids.tolist(), logits="all")
    assert calls
    assert (relative_errors(got, oracle_logits(folder, ids)) > TOLERANCE).sum() <= 1


def test_published_formats_stay_near_their_unrounded_values(tmp_path: Path) -> None:
    """FP4 experts and FP8 linears against the same matrices expanded into a plain checkpoint.

    The difference is the rounding of activations, cache and index alone: a few percent of the largest logit.
    """
    packed = make_checkpoint(tmp_path / "packed", quantised=True, mtp=False, index_n_heads=16, index_topk=64)
    plain = expand_checkpoint(packed, tmp_path / "plain")
    ids = torch.randint(0, 256, (400,))
    rounded = Engine.load(packed, kv_dtype="mixed").session().extend(ids.tolist(), logits="all")
    exact = Engine.load(plain, kv_dtype="fp32").session().extend(ids.tolist(), logits="all")
    torch.testing.assert_close(exact, oracle_logits(plain, ids), atol=1e-3, rtol=1e-3)
    error = (rounded - exact).abs().median() / exact.abs().max()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("kv_dtype", ["mixed", "bf16", "fp32"])
def test_expanded_and_packed_weights_give_the_same_logits(
    kv_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4_engine import placement

    folder = make_checkpoint(tmp_path / "model", quantised=True)
    ids = torch.randint(0, 256, (200,)).tolist()
    expanded = Engine.load(folder, kv_dtype=kv_dtype)
    monkeypatch.setattr(placement, "EXPAND_SHARE", 0.0)
    packed = Engine.load(folder, kv_dtype=kv_dtype)
    assert expanded.plan.expand and not packed.plan.expand
    a, b = (e.session().extend(ids, logits="all") for e in (expanded, packed))
    assert relative_errors(a, b).quantile(0.9) < 1e-4


def test_bfloat16_compute_is_near_float32(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", quantised=True)
    ids = torch.randint(0, 256, (100,)).tolist()
    a = Engine.load(folder, dtype="float32").session().extend(ids, logits="all")
    b = Engine.load(folder, dtype="bfloat16").session().extend(ids, logits="all")
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().median() / a.abs().max() < 0.05


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_weights_that_are_not_expanded_stay_in_the_file(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a large plain checkpoint must not copy it: matrices are views of the mapped file."""
    from dsv4_engine import placement

    monkeypatch.setattr(placement, "EXPAND_SHARE", 0.0)
    engine = Engine.load(make_checkpoint(tmp_path / "model", dtype=dtype))
    assert not engine.plan.expand
    for i, block in enumerate(engine.model.blocks):
        for e, expert in enumerate(block.ffn.experts):
            on_disk = engine.weights.weight(f"layers.{i}.ffn.experts.{e}.w1").data
            assert expert.w13[0].data.data_ptr() == on_disk.data_ptr()
    assert engine.session().extend([1, 2, 3]).isfinite().all()
