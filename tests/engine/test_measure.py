"""What is measured: the cache's line against the analytic one, the stopwatch's parts, and random weights."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsv4_engine import Engine, measure
from dsv4_engine.ceilings import measured_device
from dsv4_engine.checkpoint import Checkpoint
from dsv4_engine.config import ModelConfig
from dsv4_engine.costs import decode_costs, stored_bytes
from dsv4_engine.errors import InputError
from dsv4_engine.measure import OPERATIONS_OF, Stopwatch, allocated_bytes, fit_cache
from dsv4_engine.random_weights import one_layer_of_each_kind, random_checkpoint
from dsv4_engine.roofline import Device
from dsv4_engine.session import Session
from dsv4_engine.weights import Weights
from support.random_checkpoint import make_checkpoint, small_config

CEILINGS = Device("test", 10**9, 1e10, {"fp32": 1e11}, "made up")
KV_DTYPES = ("mixed", "bf16", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), quantised=True)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_measured_cache_bytes_agree_with_the_analytic_slope(folder: Path, kv_dtype: str) -> None:
    found = measure.measure(Engine.load(folder, kv_dtype=kv_dtype), 2048, CEILINGS).cache
    assert found.lengths == (512, 1024, 1536, 2048)
    assert abs(found.difference) < 0.02
    assert 0 < found.intercept <= found.analytic_state
    for held, entries, allocated in zip(found.held, found.analytic_entries, found.allocated, strict=True):
        assert entries < held <= entries + found.analytic_state
        assert held <= allocated < 4 * held


def test_the_bundled_model_agrees_too() -> None:
    found = measure.measure(Engine.load("tiny"), 1024, CEILINGS)
    assert abs(found.cache.difference) < 0.02
    # Its single tokens take another way through the code, which is timed as well.
    for phase in (found.prefill, found.decode):
        assert {part.part for part in phase.parts if part.seconds > 0} == set(OPERATIONS_OF)


def test_one_long_sequence_is_held_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is planned for one, also where the quarters cut no chunk and the cache is measured in a second reading."""
    engine, begun, held = Engine.load(folder), list[weakref.ref[Session]](), list[list[int]]()

    def session(self: Engine) -> Session:
        found = Session(self.model, self.model.new_state(), [], self.ctx, self.chunk)
        begun.append(weakref.ref(found))
        return found

    def note(one: Session) -> int:
        held.append([each.position for ref in begun if (each := ref()) is not None and each.position > 512])
        return allocated_bytes(one)

    monkeypatch.setattr(Engine, "session", session)
    monkeypatch.setattr(measure, "allocated_bytes", note)
    for ctx in (2048, 1100):
        assert (ctx // 4 // 128 * 128 % engine.chunk == 0) == (ctx == 2048)
        measure.measure(engine, ctx, CEILINGS)
    assert len(held) == 8 and max(len(each) for each in held) == 1


@pytest.mark.parametrize("hc_mult", [4, 3], ids=["one token in NumPy", "one token in torch"])
def test_parts_add_up_to_the_whole(tmp_path: Path, hc_mult: int) -> None:
    engine = Engine.load(make_checkpoint(tmp_path, hc_mult=hc_mult))
    found = measure.measure(engine, 1024, CEILINGS)
    for phase, whole in ((found.prefill, found.prefill.seconds), (found.decode, None)):
        times = {(part.part, part.kind): part.seconds for part in phase.parts}
        assert {kind for _, kind in times} == {"window", "csa", "hca", "outside layers"}
        assert all(times[part, kind] > 0 for part in ("projections", "experts", "mHC") for kind in ("window", "hca"))
        assert times["indexer", "csa"] > 0 and ("indexer", "hca") not in times
        if whole is not None:
            assert 0.8 * whole < sum(times.values()) <= whole
    assert not found.scaled


def test_parts_carry_what_is_counted_for_them(folder: Path) -> None:
    engine = Engine.load(folder)
    found = measure.measure(engine, 1024, CEILINGS).decode
    counted = decode_costs(engine.config, found.ctx, held="float32")
    assert sum(part.flops for part in found.parts) == sum(c.flops for c in counted)
    assert sum(part.bytes for part in found.parts) == pytest.approx(sum(c.bytes for c in counted))
    assert found.ctx > 1024
    assert 0 < found.least_s <= sum(part.least_s for part in found.parts) * 1.0001
    named = [operation for operations in OPERATIONS_OF.values() for operation in operations]
    assert len(named) == len(set(named)) and {c.operation for c in counted} == set(named)


def test_nothing_is_watched_afterwards(folder: Path) -> None:
    engine, clock = Engine.load(folder), Stopwatch("cpu")
    before = [owner.__dict__[name] for owner, name, _ in measure._watched()]
    session = engine.session()
    with pytest.raises(KeyError), clock.watching():
        session.extend([1, 2, 3])
        raise KeyError
    assert clock.seconds
    assert [owner.__dict__[name] for owner, name, _ in measure._watched()] == before
    seen = dict(clock.seconds)
    session.extend([4])
    assert clock.seconds == seen


def test_watching_changes_no_result(folder: Path) -> None:
    engine = Engine.load(folder)
    plain = engine.session().extend(list(range(200)), logits="all")
    with Stopwatch("cpu").watching():
        watched = engine.session().extend(list(range(200)), logits="all")
    assert torch.equal(plain, watched)


def test_a_short_context_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="512 tokens are too few to measure"):
        measure.measure(Engine.load(folder), 512, CEILINGS)


def test_allocated_memory_is_counted_once_where_forks_share_it(folder: Path) -> None:
    session = Engine.load(folder).session()
    session.extend(list(range(256)) * 4, logits="none")
    alone = allocated_bytes(session)
    assert alone >= session.kv_bytes
    fork = session.fork()
    assert allocated_bytes(fork) <= alone
    session.extend([1])  # leaves arrays behind
    assert allocated_bytes(session) >= session.kv_bytes


def test_the_line_is_the_least_squares_line() -> None:
    config = ModelConfig.from_dict(small_config())
    fit = fit_cache(config, "mixed", [128, 256, 384], [1000, 2000, 3300], [0, 0, 0])
    assert fit.slope == pytest.approx((3300 - 1000) / 256)
    assert fit.intercept == pytest.approx(6300 / 3 - fit.slope * 256)
    windows = fit_cache(ModelConfig.from_dict(small_config(compress_ratios=[0])), "mixed", [128, 256], [9, 9], [9, 9])
    assert (windows.slope, windows.difference) == (0, 0)


@pytest.mark.gpu
def test_on_a_gpu(folder: Path) -> None:
    ceilings = measured_device("cuda")
    assert 1e11 < ceilings.bandwidth < 1e14 and 1e13 < ceilings.rates["bf16"] < 1e16
    found = measure.measure(Engine.load(folder, device="cuda"), 1024, ceilings)
    assert abs(found.cache.difference) < 0.02
    assert {part.part for part in found.prefill.parts if part.seconds > 0} == set(OPERATIONS_OF)


# ---- random weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"quantised": True}, {"quantised": True, "expert_dtype": "fp8"}, {}], ids=["fp4", "fp8", "plain"]
)
def test_random_weights_have_the_published_forms_and_give_finite_logits(tmp_path: Path, settings: dict) -> None:
    whole = ModelConfig.from_dict(small_config(num_hidden_layers=8, **settings))
    config = one_layer_of_each_kind(whole)
    assert (config.compress_ratios, config.num_hash_layers, config.num_nextn_predict_layers) == ((0, 4, 128), 0, 0)
    assert replace(config, num_hidden_layers=8, compress_ratios=whole.compress_ratios, num_hash_layers=1,
                   num_nextn_predict_layers=1, mtp_compress_ratios=(0,)) == whole  # fmt: skip
    seen: list[tuple[int, int]] = []
    random_checkpoint(tmp_path, config, progress=lambda done, total: seen.append((done, total)))
    assert ModelConfig.from_folder(tmp_path) == config
    weights = Weights.open(Checkpoint.open(tmp_path), config)
    matrices = [n for n, s in weights.specs.items() if len(s.shape) == 2 and s.role != "ids" and not n.endswith(".ape")]
    assert sum(weights.nbytes(name) for name in matrices) == stored_bytes(config)
    logits = Engine.load(tmp_path).session().extend([3, 1, 4] * 100, logits="all")
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


def test_routing_spreads_over_random_experts(tmp_path: Path) -> None:
    config = one_layer_of_each_kind(ModelConfig.from_dict(small_config(quantised=True, n_routed_experts=16)))
    engine = Engine.load(random_checkpoint(tmp_path, config))
    u = torch.randn(200, config.hidden_size, generator=torch.Generator().manual_seed(0))
    chosen = torch.nn.functional.linear(u, engine.model.blocks[1].ffn.gate).topk(2).indices
    assert torch.bincount(chosen.flatten(), minlength=16).min() > 0


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    config = one_layer_of_each_kind(ModelConfig.from_dict(small_config(quantised=True)))
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append((random_checkpoint(tmp_path / name, config) / "model-00001.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_full_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    config = one_layer_of_each_kind(ModelConfig.preset("v4-flash"))
    with pytest.raises(InputError, match=r"random weights take 1\d\.\d GiB on disk, and .* has 1\.0 GiB"):
        random_checkpoint(tmp_path, config)
    assert list(tmp_path.iterdir()) == []


def test_one_layer_of_each_kind_stands_for_all_of_them(tmp_path: Path) -> None:
    whole = ModelConfig.from_dict(small_config(compress_ratios=[0, 0, 0, 4, 128, 128]))
    engine = Engine.load(random_checkpoint(tmp_path, one_layer_of_each_kind(whole)))
    found = measure.measure(engine, 1024, CEILINGS, whole)
    assert found.scaled
    assert sum(part.flops for part in found.decode.parts) == sum(c.flops for c in decode_costs(whole, found.decode.ctx))
    timed = {("indexer", "csa"): 2.0, ("experts", "window"): 1.0, ("experts", "hca"): 4.0}
    timed["head", measure.OUTSIDE] = 0.5
    phase = measure._phase(1, 1024, 15.0, timed, [], CEILINGS, engine.config, whole)
    assert [part.seconds for part in phase.parts] == [2.0, 3.0, 8.0, 0.5]  # 1 csa layer, 3 window, 2 hca
    assert phase.seconds == 15.0 * 13.5 / 7.5
    assert measure._number_of("window", engine.config, whole) == 3
    assert measure._number_of("outside layers", engine.config, whole) == 1
