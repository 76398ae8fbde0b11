"""The engine on one NVIDIA GPU against the engine on the CPU, and its promises there.

    python -m pytest -m gpu [--log-cli-level=INFO]

float32 products are summed in another order there, so logits differ in their last bits.  Where the cache or the
activations are rounded, such a bit now and then moves a value by one code, or another entry is picked, and everything
behind it moves too.  Those models are compared layer by layer on equal inputs, where most positions must be nearly
equal, and as a whole with how far the CPU engine is from itself after a change of half a part in a million.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv4_engine import Engine, Session
from dsv4_engine.generate import Done, generate
from dsv4_engine.sampling import Sampling
from dsv4_kernels import linear as linear_kernel
from dsv4_kernels.index import select_entries
from dsv4_kernels.rounding import round_fp4, round_fp8
from support.random_checkpoint import make_checkpoint

log = logging.getLogger(__name__)
pytestmark = pytest.mark.gpu
TOLERANCE = 2e-5  # of the largest logit, where nothing is rounded
OF_ITSELF = 2.0  # times as far as the CPU engine is from itself after a tiny change, where something is rounded
LAYER_RMS, LAYER_SHARE = 1e-4, 0.9  # one layer on the same input: relative RMS that this share of positions keeps
GPU = torch.device("cuda")
TEXT = Path(__file__).resolve().parents[2] / "docs"


def error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Per position, of the largest logit."""
    assert got.device == want.device == torch.device("cpu") and got.isfinite().all()
    return (got - want).abs().amax(-1) / want.abs().max()


def spread(off: torch.Tensor) -> str:
    return f"median {off.median():.1e}, 95% {off.quantile(0.95):.1e}, largest {off.max():.1e}"


def assert_equal_but_for_rounding(got: torch.Tensor, want: torch.Tensor) -> None:
    off = error(got, want)
    log.info(spread(off))
    assert off.max() < TOLERANCE, spread(off)


def assert_as_close_as_to_itself(off: torch.Tensor, own: Sequence[torch.Tensor]) -> None:
    """``off``: errors of the GPU's logits; ``own``: those `from_itself`."""
    median, most = (max(float(each.quantile(share)) for each in own) for share in (0.5, 0.95))
    shown = f"{spread(off)}; the CPU from itself median {median:.1e}, 95% {most:.1e}"
    log.info(shown)
    assert off.median() < OF_ITSELF * median + TOLERANCE, shown
    assert off.quantile(0.95) < OF_ITSELF * most + TOLERANCE, shown


def from_itself(cpu: Engine, ids: Sequence[int], start: int = 0) -> list[torch.Tensor]:
    """Errors of the CPU engine's logits from ``start`` on, `slightly_moved` in three ways."""
    want, found = cpu.session().extend(ids, logits="all")[start:], []
    for seed in range(3):
        with slightly_moved(seed):
            found.append(error(cpu.session().extend(ids, logits="all")[start:], want))
    return found


@contextmanager
def slightly_moved(seed: int) -> Iterator[None]:
    """Every output of a linear layer is moved by some float32 spacings, which is what another order of sums does."""
    generator = torch.Generator().manual_seed(seed)

    class Moved:
        def __getattr__(self, name: str) -> object:
            return getattr(F, name)

        def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            out = F.linear(x, weight)
            return out * (1 + 5e-7 * torch.randn(out.shape, generator=generator))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_kernel, "F", Moved())
        yield


def random_ids(count: int, vocab: int, seed: int = 1) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def text_ids(engine: Engine, count: int) -> list[int]:
    """This project's own pages as tokens, over and over."""
    ids = engine.tokenizer.encode("\n".join(p.read_text() for p in sorted(TEXT.glob("*.md"))), specials=False)
    return (ids * (count // len(ids) + 1))[:count]


@pytest.fixture(scope="module")
def tiny() -> tuple[Engine, Engine]:
    """On the CPU, on the GPU."""
    return Engine.load("tiny"), Engine.load("tiny", device="cuda")


# Shapes that differ in what they exercise: several o_groups, other widths, many experts, layers in other orders.
SHAPES = {
    "plain": {"index_n_heads": 16},
    "wide": {
        "index_n_heads": 16, "hidden_size": 128, "num_attention_heads": 8, "head_dim": 128, "o_groups": 4,
        "n_routed_experts": 40, "num_experts_per_tok": 6, "compress_ratios": [0, 128, 4, 4, 128, 0], "index_topk": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("quantised", [False, True])
def test_random_checkpoints(shape: str, kv_dtype: str, quantised: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", quantised=quantised, **SHAPES[shape])
    cpu, gpu = Engine.load(folder, kv_dtype=kv_dtype), Engine.load(folder, kv_dtype=kv_dtype, device="cuda")
    ids = random_ids(1500, 256)
    want, got = (engine.session().extend(ids, logits="all") for engine in (cpu, gpu))
    if not quantised and kv_dtype == "fp32":
        assert_equal_but_for_rounding(got, want)
        return
    assert_as_close_as_to_itself(error(got, want), from_itself(cpu, ids))
    assert_layers_agree(cpu, gpu, ids)


def assert_layers_agree(cpu: Engine, gpu: Engine, ids: Sequence[int], rms: float = LAYER_RMS) -> None:
    """Every layer on the CPU engine's streams, in chunks that begin and end inside blocks, and one token alone."""
    state, other, position = cpu.model.new_state(), gpu.model.new_state(), 0
    off: list[list[torch.Tensor]] = [[] for _ in cpu.model.blocks]
    pieces = torch.tensor(ids).split([130, 1, 3, 510, len(ids) - 644])
    with torch.inference_mode():
        for piece in pieces:
            chunks = [engine.model._chunk(piece.to(engine.device), position) for engine in (cpu, gpu)]
            x = cpu.model._embedded(piece)[:, None].expand(-1, cpu.config.hc_mult, -1)
            for i, (a, b) in enumerate(zip(cpu.model.blocks, gpu.model.blocks, strict=True)):
                want = a.forward(x, chunks[0], state.layers[i])
                got = b.forward(x.to(GPU), chunks[1], other.layers[i]).cpu()
                difference, whole = (got.float() - want.float()).flatten(1), want.float().flatten(1)
                off[i].append(difference.norm(dim=1) / whole.norm(dim=1))
                x = want
            position += len(piece)
    for i, parts in enumerate(off):
        each = torch.cat(parts)
        ratio, shown = cpu.config.compress_ratios[i], f"90% {each.quantile(LAYER_SHARE):.1e}, {spread(each)}"
        log.info("layer %d (%d): %s", i, ratio, shown)
        assert each.isfinite().all() and each.quantile(LAYER_SHARE) < rms, f"layer {i}: {shown}"


def test_half_precision_compute(tmp_path: Path) -> None:
    """Everything that passes between operations is rounded to 8 bits: a layer keeps about as many."""
    folder = make_checkpoint(tmp_path / "m", quantised=True, index_n_heads=16)
    cpu, gpu = (Engine.load(folder, dtype="bfloat16", device=device) for device in ("cpu", "cuda"))
    assert_layers_agree(cpu, gpu, random_ids(1000, 256), rms=2**-6)


@pytest.mark.parametrize("packed", [False, True])
def test_packed_and_expanded_weights(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed:
        monkeypatch.setattr("dsv4_engine.placement.EXPAND_SHARE", 0.0)
    folder = make_checkpoint(tmp_path / "m", quantised=True, index_n_heads=16)
    engine = Engine.load(folder, device="cuda", kv_dtype="fp32")
    assert engine.plan.expand == (not packed)
    assert (engine.model.blocks[0].ffn.stacked is None) == packed
    assert_layers_agree(Engine.load(folder, kv_dtype="fp32"), engine, random_ids(900, 256))


def test_multi_token_prediction(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", index_n_heads=16)
    ids, logits = torch.tensor(random_ids(300, 256)), []
    for device in ("cpu", "cuda"):
        model = Engine.load(folder, device=device, kv_dtype="fp32").model
        with torch.inference_mode():
            streams = model.forward(ids, model.new_state())
            logits.append(model.mtp_logits(ids[1:], streams[:-1], 0, model.new_mtp_state()).cpu())
    assert_equal_but_for_rounding(logits[1], logits[0])


# ---- the bundled model -----------------------------------------------------------------------------------------------


def test_the_bundled_model(tiny: tuple[Engine, Engine]) -> None:
    cpu, gpu = tiny
    ids = text_ids(cpu, 6000)
    want, got = (engine.session().extend(ids, logits="all") for engine in (cpu, gpu))
    assert_as_close_as_to_itself(error(got, want), from_itself(cpu, ids))
    # What the roundings do to single tokens is noise: the loss over the text stays.
    loss, same = (float(F.cross_entropy(x[:-1], torch.tensor(ids[1:]))) for x in (want, got))
    log.info("loss %.4f on the CPU, %.4f on the GPU", loss, same)
    assert abs(same - loss) < 0.02
    assert_layers_agree(cpu, gpu, ids[:3000])


def test_the_same_answer(tiny: tuple[Engine, Engine]) -> None:
    answers = []
    for engine in tiny:
        ids = engine.tokenizer.encode("The special magic number for bold-river is: 4829173. Repeat: The special magic")
        *_, done = generate(engine.session(), ids, engine.tokenizer, Sampling(temperature=0), max_tokens=24)
        assert isinstance(done, Done)
        answers.append(done.token_ids)
    assert answers[0] == answers[1]


def taken(session: Session, ids: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
    """Logits of all ids, fed up to each of ``ends`` in turn."""
    return torch.cat([session.extend(ids[a:b], logits="all") for a, b in zip([0, *ends[:-1]], ends, strict=True)])


def test_splits_on_the_grid_change_no_bit(tiny: tuple[Engine, Engine]) -> None:
    engine, chunk = tiny[1], tiny[1].chunk
    assert chunk == 8192
    ids = text_ids(engine, 3 * chunk + 100)
    whole = taken(engine.session(), ids, [len(ids)])
    assert torch.equal(taken(engine.session(), ids, [len(ids)]), whole)  # and so does nothing at all
    assert torch.equal(taken(engine.session(), ids, [chunk, 3 * chunk, len(ids)]), whole)


def test_other_splits_change_rounding_only(tiny: tuple[Engine, Engine]) -> None:
    cpu, gpu = tiny
    ids = text_ids(gpu, 3000)
    whole = gpu.session().extend(ids, logits="all")
    got = taken(gpu.session(), ids, [1, 2, 130, 131, 700, 2100, 2999, 3000])
    assert_as_close_as_to_itself(error(got, whole), from_itself(cpu, ids))


def test_any_split_of_an_unrounded_model(tmp_path: Path) -> None:
    engine = Engine.load(make_checkpoint(tmp_path / "m", index_n_heads=16), device="cuda", kv_dtype="fp32")
    ids = random_ids(900, 256)
    whole = engine.session().extend(ids, logits="all")
    assert_equal_but_for_rounding(taken(engine.session(), ids, [1, 3, 4, 131, 259, 260, 512, 777, 900]), whole)
    one_by_one = engine.session()
    assert_equal_but_for_rounding(torch.stack([one_by_one.extend([i]) for i in ids[:300]]), whole[:300])


def test_forks_share_the_past_and_grow_apart(tiny: tuple[Engine, Engine]) -> None:
    engine = tiny[1]
    ids = text_ids(engine, 9000)
    parent = engine.session()
    parent.extend(ids[:8500], logits="none")
    left, right = parent.fork(), parent.fork()
    got = left.extend(ids[8500:], logits="all")
    other = right.extend(ids[:500], logits="all")
    assert torch.equal(parent.fork().extend(ids[:500], logits="all"), other)
    assert torch.equal(parent.extend(ids[8500:], logits="all"), got)
    assert left.kv_bytes == parent.kv_bytes


def test_an_interrupted_chunk_leaves_the_sequence_as_it_was(
    tiny: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny[1]
    ids, session, other = text_ids(engine, 700), engine.session(), engine.session()
    for each in (session, other):
        each.extend(ids[:130])
    last = engine.model.blocks[-1]

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(last.ffn, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.extend(ids[130:600])
    assert session.position == 130
    assert torch.equal(session.extend(ids[130:]), other.extend(ids[130:]))


@pytest.mark.parametrize("model", ["bundled", "plain"])
def test_512_decode_steps_do_not_drift(model: str, tiny: tuple[Engine, Engine], tmp_path: Path) -> None:
    """The same tokens one by one on both devices: the last steps agree as the first do."""
    if model == "bundled":
        engines, before = tiny, 1000
        ids = text_ids(tiny[0], before + 512)
    else:
        folder = make_checkpoint(tmp_path / "m", index_n_heads=16)
        engines = (Engine.load(folder, kv_dtype="fp32"), Engine.load(folder, device="cuda", kv_dtype="fp32"))
        before, ids = 100, random_ids(612, 256)

    def decoded(engine: Engine) -> torch.Tensor:
        session = engine.session()
        session.extend(ids[:before], logits="none")
        return torch.stack([session.extend([i]) for i in ids[before:]])

    want, got = (decoded(engine) for engine in engines)
    if model == "plain":
        assert_equal_but_for_rounding(got, want)
        first, last = error(got, want)[:128], error(got, want)[384:]
        assert last.median() <= 4 * first.median()
        return
    own = from_itself(engines[0], ids, before)
    for part in (slice(0, 128), slice(384, 512)):
        assert_as_close_as_to_itself(error(got, want)[part], [each[part] for each in own])


def test_a_long_prompt_in_bounded_memory(tiny: tuple[Engine, Engine]) -> None:
    engine = tiny[1]
    ids, session = text_ids(engine, 524_288), engine.session()
    assert engine.ctx == 1 << 20
    peaks, caches = [], []
    for start, end in ((0, 8192), (131_072, 262_144), (262_144, 524_288)):
        if start > session.position:
            session.extend(ids[session.position : start], logits="none")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - session.kv_bytes
        session.extend(ids[start:end], logits="none")
        peaks.append(torch.cuda.max_memory_allocated() - before)
        caches.append(session.kv_bytes)
        assert peaks[-1] < engine.plan.working_set + session.kv_bytes
    log.info("peaks %s MiB, caches %s MiB", [p >> 20 for p in peaks], [c >> 20 for c in caches])
    # Once a tile is full, only the cache grows, and one layer's rows while they are unpacked (twice, at the seam).
    rows = (524_288 - 262_144) // 4 * engine.config.head_dim * 4
    assert peaks[2] - peaks[1] < 2 * (caches[2] - caches[1]) + 2 * rows
    assert session.extend([5]).isfinite().all()


def test_the_working_set_holds_for_other_proportions(tmp_path: Path) -> None:
    """V4-Flash's proportions: many heads and experts for its width, and an indexer with many heads."""
    folder = make_checkpoint(
        tmp_path / "m", vocab_size=2048, hidden_size=256, compress_ratios=[0, 4, 128], num_attention_heads=16,
        head_dim=128, q_lora_rank=64, o_groups=2, o_lora_rank=64, sliding_window=128, index_n_heads=16, index_topk=512,
        moe_intermediate_size=128, n_routed_experts=32, num_experts_per_tok=6,
    )  # fmt: skip
    engine = Engine.load(folder, device="cuda", ctx=65_536)
    session = engine.session()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    session.extend(random_ids(65_000, 2048), logits="none")
    peak = torch.cuda.max_memory_allocated() - before
    log.info("peak %d MiB of %d MiB", peak >> 20, engine.plan.working_set >> 20)
    assert peak < engine.plan.working_set + session.kv_bytes


def test_memory_is_planned_and_given_back(tiny: tuple[Engine, Engine]) -> None:
    plan = tiny[1].plan
    assert plan.device.startswith("cuda:") and plan.needed <= plan.available
    for first in (True, False):  # torch's libraries keep what their first products take
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        engine = Engine.load("tiny", device="cuda")
        held = torch.cuda.memory_allocated() - before
        session = engine.session()
        session.extend(text_ids(engine, 20_000), logits="none")
        del session, engine
        if not first:
            assert held < plan.weights * 1.1 + (1 << 20)
            assert torch.cuda.memory_allocated() - before < 1 << 20


# ---- operations ------------------------------------------------------------------------------------------------------


def test_roundings_are_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 256) * torch.logspace(-6, 6, 300)[:, None]
    for rounded in (lambda v: round_fp8(v, 128), lambda v: round_fp8(v, 64), round_fp4):
        assert torch.equal(rounded(x.to(GPU)).cpu(), rounded(x))


@pytest.mark.parametrize("keys", [1000, 200_000])
def test_the_index_choice_is_the_same(keys: int) -> None:
    """Small integers: scores are exact whatever the order of sums, and tie often."""
    torch.manual_seed(0)
    queries, topk = 300, 128
    q, w = torch.randint(-2, 3, (queries, 2, 16)).float(), torch.randint(-1, 2, (queries, 2)).float()
    k = torch.randint(-2, 3, (keys, 16)).float()
    visible = torch.arange(4 * keys - queries + 1, 4 * keys + 1) // 4

    def chosen(device: torch.device) -> torch.Tensor:
        def tiles(count: int):
            step = 8192 if device.type == "cpu" else 65_536
            return ((s, k[s : min(s + step, count)].to(device)) for s in range(0, count, step))

        return select_entries(q.to(device), w.to(device), tiles, visible, topk).cpu()

    assert torch.equal(chosen(GPU), chosen(torch.device("cpu")))
