"""Costs against the published figures, derived here a second time from the raw config.json alone.

`Derived` shares no code with the package: it reads the JSON files itself, writes every matrix out layer by layer, and
adds up attention position by position.  Published figures: report, figure 1 and section 2.3.4.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

import dsv4_engine
from dsv4_engine import Engine
from dsv4_engine.accounting import bytes_on_disk, parameters
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import BaselineConfig, ModelConfig
from dsv4_engine.costs import (
    PART_OF,
    WEIGHTS,
    Cost,
    cache_bytes,
    costs,
    decode_costs,
    gqa8_bytes,
    prefill_costs,
    request_cost,
    stored_bytes,
    total,
)
from dsv4_engine.errors import InputError
from dsv4_engine.weights import Weights
from support.random_checkpoint import make_checkpoint, small_config

MILLION = 1_048_576
PRESETS = Path(dsv4_engine.__file__).parent / "presets"
CONFIGS = {
    "v3.2": BaselineConfig.preset(),
    "v4-pro": ModelConfig.preset("v4-pro"),
    "v4-flash": ModelConfig.preset("v4-flash"),
}
FLASH, PRO, V32 = CONFIGS["v4-flash"], CONFIGS["v4-pro"], CONFIGS["v3.2"]


# ---- a second derivation ---------------------------------------------------------------------------------------------


@dataclass
class Derived:
    """FLOPs of one decoded token and cache bytes at n tokens, from a config.json's contents."""

    linears: float = 0.0
    indexer: float = 0.0
    core: float = 0.0
    weighted: float = 0.0
    active: int = 0
    kv: float = 0.0

    def weight(self, rows: int, columns: int, factor: float, times: int = 1) -> None:
        """A matrix that a token is multiplied with ``times`` times; factor: of FP8."""
        self.active += rows * columns * times
        self.linears += 2 * rows * columns * times
        self.weighted += 2 * rows * columns * times * factor

    def score(self, flops: float, factor: float) -> None:
        self.indexer += flops
        self.weighted += flops * factor

    def attend(self, flops: float) -> None:
        self.core += flops
        self.weighted += 2 * flops

    @property
    def raw(self) -> float:
        return self.linears + self.indexer + self.core


def derive(name: str, n: int) -> Derived:
    raw = json.loads((PRESETS / f"{'v32-baseline' if name == 'v3.2' else name}.json").read_text())
    return (_derive_v32 if name == "v3.2" else _derive_v4)(raw, n)


def _derive_v4(j: dict[str, Any], n: int) -> Derived:
    out, d, c, heads = Derived(), j["hidden_size"], j["head_dim"], j["num_attention_heads"]
    fp8, bf16, fp4 = 1.0, 2.0, 0.5
    for ratio in j["compress_ratios"][: j["num_hidden_layers"]]:
        out.weight(j["q_lora_rank"], d, fp8)
        out.weight(heads * c, j["q_lora_rank"], fp8)
        out.weight(c, d, fp8)
        out.weight(j["o_groups"] * j["o_lora_rank"], heads * c // j["o_groups"], bf16)
        out.weight(d, j["o_groups"] * j["o_lora_rank"], fp8)
        for _ in range(j["num_experts_per_tok"] + j["n_shared_experts"]):
            for _ in ("gate", "up", "down"):
                out.weight(j["moe_intermediate_size"], d, fp8)
        out.weight(j["n_routed_experts"], d, bf16)
        for _ in ("attention", "experts"):  # pre, post and comb coefficients of the four streams
            out.weight(4 + 4 + 16, 4 * d, bf16)
        seen = min(n, j["sliding_window"])
        if ratio == 4:
            for _ in ("kv", "gate"):
                out.weight(2 * c, d, bf16)
                out.weight(2 * j["index_head_dim"], d, bf16)
            out.weight(j["index_n_heads"] * j["index_head_dim"], j["q_lora_rank"], fp8)
            out.weight(j["index_n_heads"], d, bf16)
            out.score(2 * j["index_n_heads"] * j["index_head_dim"] * (n // 4), fp4)
            seen += min(n // 4, j["index_topk"])
            # e4m3, bf16 and a scale for each 64 with one byte of padding; FP4 keys with a scale for each 32
            out.kv += (n // 4) * ((c - 64) + 2 * 64 + (c - 64) // 64 + 1 + j["index_head_dim"] // 2 + 4)
        if ratio == 128:
            for _ in ("kv", "gate"):
                out.weight(c, d, bf16)
            seen += n // 128
            out.kv += (n // 128) * ((c - 64) + 2 * 64 + (c - 64) // 64 + 1)
        out.attend(seen * heads * (2 * c + 2 * c))
    out.weight(4, 4 * d, bf16)
    out.weight(j["vocab_size"], d, bf16)
    return out


def _derive_v32(j: dict[str, Any], n: int) -> Derived:
    out, d, heads = Derived(), j["hidden_size"], j["num_attention_heads"]
    latent, rope, nope, value = (j[k] for k in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    for layer in range(j["num_hidden_layers"]):
        out.weight(j["q_lora_rank"], d, 1)
        out.weight(heads * (nope + rope), j["q_lora_rank"], 1)
        out.weight(latent + rope, d, 1)
        out.weight(heads * nope, latent, 2)  # absorbed into the query
        out.weight(heads * value, latent, 2)  # absorbed into the output
        out.weight(d, heads * value, 1)
        out.weight(j["index_n_heads"] * j["index_head_dim"], j["q_lora_rank"], 1)
        out.weight(j["index_head_dim"], d, 1)
        out.weight(j["index_n_heads"], d, 2)
        if layer < j["first_k_dense_replace"]:
            out.weight(j["intermediate_size"], d, 1, times=3)
        else:
            out.weight(j["moe_intermediate_size"], d, 1, times=3 * (j["num_experts_per_tok"] + j["n_shared_experts"]))
            out.weight(j["n_routed_experts"], d, 2)
        out.score(2 * j["index_n_heads"] * j["index_head_dim"] * n, 1)
        out.attend(2 * heads * (latent + rope + latent) * min(n, j["index_topk"]))
        out.kv += n * (latent + 4 * latent // 128 + 2 * rope + j["index_head_dim"] + 4)
    out.weight(j["vocab_size"], d, 2)
    return out


def _raw(found: tuple[Cost, ...]) -> int:
    return sum(c.flops for c in found)


def _weighted(found: tuple[Cost, ...]) -> float:
    return sum(c.weighted for c in found)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n", [1, 127, 4096, 131_072, MILLION])
def test_costs_are_what_a_second_derivation_gives(name: str, n: int) -> None:
    second, found = derive(name, n), decode_costs(CONFIGS[name], n)
    by = total(found, lambda c: c.group)
    assert by["weights"]["flops"] == second.linears
    assert by["indexer"]["flops"] == second.indexer
    assert by["core attention"]["flops"] == second.core
    assert _weighted(found) == pytest.approx(second.weighted, rel=1e-12)
    assert cache_bytes(CONFIGS[name], n) == second.kv


@pytest.mark.parametrize(
    ("name", "active", "linears", "indexer", "core", "raw"),
    [
        ("v3.2", 37.5, 75.0, 1048, 34.8, 1158),
        ("v4-pro", 48.9, 97.7, 128.8, 76.7, 303),
        ("v4-flash", 13.3, 26.5, 90.2, 23.6, 140),
    ],
)
def test_published_flops_to_three_digits(
    name: str, active: float, linears: float, indexer: float, core: float, raw: float
) -> None:
    found = decode_costs(CONFIGS[name], MILLION)
    by = {group: row["flops"] for group, row in total(found, lambda c: c.group).items()}
    for mine, published in zip(
        (parameters(CONFIGS[name]).active, by["weights"], by["indexer"], by["core attention"], _raw(found)),
        (active, linears, indexer, core, raw),
        strict=True,
    ):
        assert f"{mine / 1e9:.3g}" == f"{published:.3g}"


@pytest.mark.parametrize(
    ("name", "raw", "weighted", "cache", "of_gqa8"),
    [("v4-pro", 0.262, 0.274, 0.105, 0.0201), ("v4-flash", 0.121, 0.103, 0.0731, 0.0200)],
)
def test_published_ratios(name: str, raw: float, weighted: float, cache: float, of_gqa8: float) -> None:
    mine, base = decode_costs(CONFIGS[name], MILLION), decode_costs(V32, MILLION)
    assert f"{_raw(mine) / _raw(base):.3g}" == f"{raw:.3g}"
    assert f"{_weighted(mine) / _weighted(base):.3g}" == f"{weighted:.3g}"
    assert f"{cache_bytes(CONFIGS[name], MILLION) / cache_bytes(V32, MILLION):.3g}" == f"{cache:.3g}"
    gqa8 = 4096 * MILLION * {"v4-pro": 61, "v4-flash": 43}[name]  # 8 heads, keys and values, 128 channels, 2 bytes
    assert gqa8_bytes(CONFIGS[name], MILLION) == gqa8
    assert f"{cache_bytes(CONFIGS[name], MILLION) / gqa8:.3g}" == f"{of_gqa8:.3g}"


# ---- sums over positions ---------------------------------------------------------------------------------------------

SMALL = ModelConfig.from_dict(small_config(quantised=True, index_topk=8))


@pytest.mark.parametrize("config", [SMALL, FLASH, V32], ids=["small", "flash", "v3.2"])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 300), (5, 122), (127, 2), (31, 260)])
def test_a_stretch_costs_what_its_tokens_cost(config: ModelConfig | BaselineConfig, start: int, tokens: int) -> None:
    together = costs(config, start, tokens, logits=tokens)
    apart = [c for i in range(tokens) for c in costs(config, start + i, 1)]
    for by in (lambda c: c.operation, lambda c: c.kind, lambda c: c.precision):
        mine, sums = total(together, by), total(apart, by)
        assert {key: row["flops"] for key, row in mine.items()} == {key: row["flops"] for key, row in sums.items()}


def test_a_prefill_computes_logits_once_and_reads_weights_once_a_chunk() -> None:
    whole, halves = prefill_costs(FLASH, 4096, chunk=4096), prefill_costs(FLASH, 4096, chunk=2048)
    assert _raw(whole) == _raw(halves)
    head = total(whole, lambda c: c.part)["head"]
    assert head["flops"] == 2 * (129_280 * 4096 + 4 * 4 * 4096)
    linears = [total(found, lambda c: c.part)["linears"]["weight_bytes"] for found in (whole, halves)]
    assert linears[1] == pytest.approx(2 * linears[0])
    assert total(halves, lambda c: c.part)["head"]["weight_bytes"] == head["weight_bytes"]


def test_the_prefill_of_the_report() -> None:
    """GFLOP a token at 1M, as estimated for the roofline of one H200."""
    by = {
        part: row["flops"] / MILLION / 1e9
        for part, row in total(prefill_costs(FLASH, MILLION), lambda c: c.part).items()
    }
    assert by["linears"] + by["experts"] + by["mHC"] == pytest.approx(25.5, abs=0.05)
    assert [round(by[part], 1) for part in ("window", "csa", "hca", "indexer")] == [0.7, 1.4, 10.7, 45.1]


def test_every_token_routes_to_few_experts_and_a_chunk_to_nearly_all() -> None:
    def expert_bytes(tokens: int) -> float:
        found = costs(FLASH, 0, tokens, logits=0)
        return sum(c.weight_bytes for c in found if c.operation == "routed experts")

    one = 43 * 6 * 3 * 4096 * 2048 * (1 / 2 + 1 / 32)
    assert expert_bytes(1) == pytest.approx(one)
    assert expert_bytes(2) == pytest.approx(one * (2 - 6 / 256))
    assert expert_bytes(8192) == pytest.approx(one * 256 / 6, rel=1e-6)


# ---- against the files and the running model -------------------------------------------------------------------------


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_bytes_are_those_of_the_files(tmp_path: Path, expert_dtype: str) -> None:
    folder = make_checkpoint(tmp_path, quantised=True, mtp=False, expert_dtype=expert_dtype)
    config = ModelConfig.from_folder(folder)
    weights = Weights.open(Checkpoint.open(folder), config)
    matrices = [n for n, s in weights.specs.items() if len(s.shape) == 2 and s.role != "ids" and not n.endswith(".ape")]
    assert stored_bytes(config) == sum(weights.nbytes(name) for name in matrices)
    assert stored_bytes(config) > 0.9 * sum(bytes_on_disk(weights).values())
    read = sum(c.weight_bytes for c in decode_costs(config, 100))
    idle = sum(weights.nbytes(n) for n in matrices if ".experts." in n) * (1 - 2 / 8)
    assert read == pytest.approx(stored_bytes(config) - weights.nbytes("embed.weight") - idle)


def test_weights_held_expanded() -> None:
    dense = sum(c.flops for c in decode_costs(SMALL, 1) if c.group == "weights")
    read = {held: sum(c.weight_bytes for c in decode_costs(SMALL, 1, held=held)) for held in ("float32", "bfloat16")}
    assert read["float32"] == 2 * dense  # 2 FLOP and 4 bytes a value
    assert dense < read["bfloat16"] < read["float32"]


@pytest.mark.parametrize("tokens", [40, 300])
def test_the_model_multiplies_what_is_counted(tmp_path: Path, tokens: int) -> None:
    """Every matrix product that torch sees while the real model computes a token, to the last multiplication."""
    folder = make_checkpoint(tmp_path, mtp=False, hc_mult=3)  # three streams: no hand-written path for one token
    engine = Engine.load(folder, kv_dtype="fp32")
    c = engine.config
    session = engine.session()
    session.extend([i % c.vocab_size for i in range(tokens - 1)], logits="none")
    with FlopCounterMode(display=False) as counter:
        session.extend([1])
    mine = _raw(decode_costs(c, tokens, kv_dtype="fp32"))
    # Beyond what is counted: weighting the index heads, reading and writing the residual streams, and the rows of zeros
    # behind the window's, of which one is the sink's.
    streams = c.num_hidden_layers * 2 * 2 * c.hidden_size * (c.hc_mult + c.hc_mult**2) + 2 * c.hc_mult * c.hidden_size
    scored = 2 * (tokens // 4) * c.compress_ratios.count(4) if tokens // 4 > c.index_topk else 0
    idle = 0 if scored else sum(x.flops for x in decode_costs(c, tokens) if x.operation.startswith("index"))
    seen = min(tokens, c.sliding_window)
    zeros = c.num_hidden_layers * 2 * 2 * c.num_attention_heads * c.head_dim * (-(-(seen + 1) // 16) * 16 - seen)
    assert counter.get_total_flops() == mine + streams + zeros + scored * c.index_n_heads - idle


# ---- requests --------------------------------------------------------------------------------------------------------


def test_a_request_is_its_prefill_and_its_decoded_tokens() -> None:
    found = request_cost(FLASH, 5000, 3)
    mine = [prefill_costs(FLASH, 5000), decode_costs(FLASH, 5001), decode_costs(FLASH, 5002)]
    assert found.flops_raw == sum(_raw(part) for part in mine)
    assert found.flops_weighted == pytest.approx(sum(_weighted(part) for part in mine), rel=1e-12)
    assert (found.kv_bytes, found.v32_kv_bytes) == (cache_bytes(FLASH, 5002), cache_bytes(V32, 5002))
    assert found.flops_ratio == found.flops_weighted / found.v32_flops_weighted
    assert found.flops_ratio_raw == found.flops_raw / found.v32_flops_raw
    assert found.kv_ratio == pytest.approx(0.0731, abs=2e-4)


def test_cached_tokens_cost_nothing() -> None:
    whole, cached = request_cost(FLASH, 5000, 1), request_cost(FLASH, 5000, 1, cached_tokens=4000)
    prefix = costs(FLASH, 0, 4000, logits=0)
    assert whole.flops_raw - cached.flops_raw == _raw(prefix)
    assert request_cost(FLASH, 5000, 1, cached_tokens=5000).flops_raw == 0
    assert whole.kv_bytes == cached.kv_bytes


@pytest.mark.parametrize(
    "call",
    [
        lambda: costs(FLASH, -1, 1),
        lambda: costs(FLASH, 0, 0),
        lambda: costs(FLASH, 0, 1, logits=2),
        lambda: decode_costs(FLASH, 0),
        lambda: request_cost(FLASH, 0, 1),
        lambda: request_cost(FLASH, 1, -1),
        lambda: request_cost(FLASH, 1, 1, cached_tokens=2),
    ],
)
def test_impossible_counts_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="cannot be counted"):
        call()


def test_unquantised_models_compute_in_bf16() -> None:
    plain = ModelConfig.from_dict(small_config())
    assert {c.precision for c in decode_costs(plain, 300, kv_dtype="bf16")} == {"bf16"}
    assert {c.precision for c in decode_costs(SMALL, 300)} == set(WEIGHTS)
    assert {c.operation for c in decode_costs(SMALL, 300)} | {"dense MLP", "dsa attention"} == set(PART_OF)
