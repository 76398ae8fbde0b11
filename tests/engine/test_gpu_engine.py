"""The engine on the Triton kernels: against the CPU engine, and its promise that no chunk boundary shows in any bit.

    python -m pytest -m gpu tests/engine/test_gpu_engine.py [--log-cli-level=INFO]

Both sides compute in bfloat16 and round activations to FP8, so a last bit now and then moves a value by a whole code
(docs/numerics.md).  Layers are therefore compared on equal inputs, and models with how far the CPU's bfloat16 engine is
from its float32 one.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv4_engine import Engine, Session
from dsv4_engine.config import ModelConfig
from dsv4_engine.device_sampling import Draw
from dsv4_engine.generate import Done, generate
from dsv4_engine.gpu.chunk import Chunk
from dsv4_engine.gpu.model import GpuModel
from dsv4_engine.gpu.random_engine import backend_of_published, random_engine
from dsv4_engine.gpu.state import GpuState
from dsv4_engine.measure import measure
from dsv4_engine.prefix_cache.rows import StateCodec
from dsv4_engine.random_weights import one_layer_of_each_kind
from dsv4_engine.roofline import DEVICES
from dsv4_engine.sampling import Sampler, Sampling, sample, uniform
from support.random_checkpoint import make_checkpoint

log = logging.getLogger(__name__)
pytestmark = pytest.mark.gpu
OF_ITSELF = 1.5  # times as far as the CPU's bfloat16 engine is from its float32 engine
TEXT = Path(__file__).resolve().parents[2] / "docs"

# V4-Flash's widths with few experts and tokens, and another shape: no power of two, several windows, small groups.
SHAPES = {
    "flash": {
        "vocab_size": 1024, "hidden_size": 4096, "num_attention_heads": 64, "head_dim": 512, "q_lora_rank": 1024,
        "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128,
        "index_topk": 64, "moe_intermediate_size": 512, "n_routed_experts": 8, "num_experts_per_tok": 6,
        "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "swiglu_limit": 10.0,
    },
    "small": {
        "vocab_size": 512, "hidden_size": 768, "num_attention_heads": 8, "head_dim": 128, "q_lora_rank": 128,
        "o_groups": 4, "o_lora_rank": 128, "sliding_window": 128, "index_n_heads": 16, "index_head_dim": 128,
        "index_topk": 32, "moe_intermediate_size": 256, "n_routed_experts": 40, "num_experts_per_tok": 6,
        "compress_ratios": [0, 128, 4, 4, 128, 0], "num_hash_layers": 1,
    },
}  # fmt: skip


def model_of(engine: Engine) -> GpuModel:
    assert engine.backend.name == "triton", engine.backend.why
    assert isinstance(engine.model, GpuModel)
    return engine.model


def on_gpu(path: str | Path, **more: object) -> Engine:
    return Engine.load(path, device="cuda", dtype="bfloat16", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return on_gpu("tiny")


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model") / request.param
    return make_checkpoint(place, quantised=True, mtp=False, **SHAPES[request.param])


def random_ids(count: int, vocab: int, seed: int = 1) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def text_ids(engine: Engine, count: int) -> list[int]:
    """This project's own pages as tokens, over and over."""
    ids = engine.tokenizer.encode("\n".join(p.read_text() for p in sorted(TEXT.glob("*.md"))), specials=False)
    return (ids * (count // len(ids) + 1))[:count]


def error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Per position, of the largest logit."""
    assert got.isfinite().all()
    return (got - want).abs().amax(-1) / want.abs().max()


def taken(session: Session, ids: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
    """Logits of all ids, fed up to each of ``ends`` in turn."""
    return torch.cat([session.extend(ids[a:b], logits="all") for a, b in zip([0, *ends[:-1]], ends, strict=True)])


# ---- against the CPU -------------------------------------------------------------------------------------------------


def test_the_bundled_model(tiny: Engine) -> None:
    ids = text_ids(tiny, 6000)
    got = tiny.session().extend(ids, logits="all")
    half, full = (Engine.load("tiny", dtype=d).session().extend(ids, logits="all") for d in ("bfloat16", "float32"))
    off, own = error(got, half), error(half, full)
    log.info("medians %.1e, the CPU from itself %.1e", off.median(), own.median())
    assert off.median() < OF_ITSELF * own.median() and off.quantile(0.95) < OF_ITSELF * own.quantile(0.95)
    losses = [float(F.cross_entropy(x[:-1], torch.tensor(ids[1:]))) for x in (got, half, full)]
    log.info("losses %s", losses)
    assert abs(losses[0] - losses[2]) < 0.02


def test_every_layer(folder: Path) -> None:
    assert_layers_agree(folder, on_gpu(folder))


def test_every_layer_of_the_bundled_model(tiny: Engine) -> None:
    assert_layers_agree("tiny", tiny)


def assert_layers_agree(path: str | Path, gpu: Engine) -> None:
    """Every layer on the CPU engine's streams, in chunks that begin and end inside blocks, and single tokens: as close
    to the CPU's bfloat16 engine as that is to its float32 one.
    """
    half, full = (Engine.load(path, dtype=dtype) for dtype in ("bfloat16", "float32"))
    model, ids = model_of(gpu), random_ids(400, half.config.vocab_size)
    states, other, position = [engine.model.new_state() for engine in (half, full)], model.new_state(), 0
    other.reserve(len(ids))
    off: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    own: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    stage = model.stages[0]
    with torch.inference_mode():
        for piece in torch.tensor(ids).split([130, 1, 3, 140, 1, len(ids) - 275]):
            chunk = half.model._chunk(piece, position)
            here = piece.to(model.device)
            theirs = Chunk.at(here, position, stage.freqs)
            if len(piece) == 1:
                theirs = Chunk.step(here, torch.tensor([position], device=model.device), stage.freqs, 2048)
            x = half.model._embedded(piece)[:, None].expand(-1, half.config.hc_mult, -1).contiguous()
            for i, (block, buffers) in enumerate(zip(model.blocks, other.parts[0].buffers, strict=True)):
                want, exact = (
                    engine.model.blocks[i].forward(x.to(engine.model.dtype), chunk, state.layers[i])
                    for engine, state in zip((half, full), states, strict=True)
                )
                got = stage.written(*block.forward(x.to(model.device), None, theirs, buffers, buffers)).cpu()
                off[i].append(distance(got, want))
                own[i].append(distance(want, exact))
                x = want
            position += len(piece)
    for i, parts in enumerate(zip(off, own, strict=True)):
        a, b = (torch.cat(some) for some in parts)
        shown = f"median {a.median():.1e}, 90% {a.quantile(0.9):.1e}; the CPU from itself {b.median():.1e}"
        log.info("layer %d (%d): %s", i, half.config.compress_ratios[i], shown)
        assert a.isfinite().all() and a.median() < b.median() and a.quantile(0.9) < b.quantile(0.9), f"{i}: {shown}"


def distance(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative RMS of each token's streams."""
    difference = (got.float() - want.float()).flatten(1)
    return difference.norm(dim=1) / want.float().flatten(1).norm(dim=1)


# ---- one reduction plan ----------------------------------------------------------------------------------------------


def test_no_split_changes_a_bit(folder: Path) -> None:
    engine = on_gpu(folder)
    ids = random_ids(1500, engine.config.vocab_size)
    whole = engine.session().extend(ids, logits="all")
    assert torch.equal(engine.session().extend(ids, logits="all"), whole)
    ends = [1, 2, 3, 130, 131, 255, 257, 700, 701, 1024, 1499, 1500]
    assert torch.equal(taken(engine.session(), ids, ends), whole)
    session = engine.session()
    assert torch.equal(torch.stack([session.extend([i]) for i in ids[:300]]), whole[:300])


def test_512_decode_steps_are_a_prefill(tiny: Engine) -> None:
    """So nothing can drift, however many steps are taken."""
    ids = text_ids(tiny, 3012)
    whole = tiny.session().extend(ids, logits="all")
    session = tiny.session()
    session.extend(ids[:2500], logits="none")
    assert torch.equal(torch.stack([session.extend([i]) for i in ids[2500:]]), whole[2500:])


def test_512_decode_steps_at_full_width() -> None:
    """V4-Flash's own sizes, all 256 experts, a layer of each kind; random weights made on the GPU."""
    config = one_layer_of_each_kind(ModelConfig.preset("v4-flash"))
    engine = random_engine(config, backend_of_published(config, "cuda"), 16_384)
    ids = random_ids(3000 + 512, config.vocab_size)
    session = engine.session()
    session.extend(ids[:3000], logits="none")
    steps = [session.extend([i]) for i in ids[3000:]]
    other = engine.session()
    other.extend(ids[:3000], logits="none")
    assert torch.equal(torch.stack(steps), other.extend(ids[3000:], logits="all"))


def test_512_decode_steps_do_not_drift(folder: Path) -> None:
    """Away from float32 on torch's own operations: no further than bfloat16 on them, and at the end as at first."""
    engine = on_gpu(folder)
    exact = Engine.load(folder, device="cuda")
    half = Engine.load(folder, device="cuda", dtype="bfloat16", kv_dtype="bf16")
    assert exact.backend.name == half.backend.name == "torch"
    ids = random_ids(1000 + 512, engine.config.vocab_size)
    session = engine.session()
    session.extend(ids[:1000], logits="none")
    got = torch.stack([session.extend([i]) for i in ids[1000:]])
    assert torch.equal(got, engine.session().extend(ids, logits="all")[1000:])
    want, near = (other.session().extend(ids, logits="all")[1000:] for other in (exact, half))
    off, own = distance(got, want), distance(near, want)
    begin, end = off[:128].median(), off[-128:].median()
    log.info("median %.1e, bfloat16 %.1e; first steps %.1e, last %.1e", off.median(), own.median(), begin, end)
    assert off.median() < OF_ITSELF * own.median() and end < OF_ITSELF * begin


def test_a_long_prompt_in_any_chunks(tiny: Engine) -> None:
    ids = text_ids(tiny, 40_000)
    whole = tiny.session()
    want = whole.extend(ids)
    other = tiny.session()
    for start in range(0, len(ids), 5001):
        got = other.extend(ids[start : start + 5001])
    assert torch.equal(got, want)
    codec = StateCodec(tiny.model)
    for session in (whole, other):  # the same rows too
        session.extend(ids[: -40_000 % 128 or 128], logits="none")
    rows = [b"".join(bytes(p) for p in codec.rows(s.state, 0, s.position)) for s in (whole, other)]
    assert rows[0] == rows[1]


def test_recorded_steps_are_the_launched_ones(tiny: Engine) -> None:
    ids, session = text_ids(tiny, 600), tiny.session()
    session.extend(ids[:515], logits="none")
    watched = session.fork_to_watch()
    for token in ids[515:560]:
        assert torch.equal(session.extend([token]), watched.extend([token]))


def test_tokens_drawn_where_the_logits_lie_are_the_hosts(tiny: Engine) -> None:
    """And the logits there are those on the host, while the next step is under way."""
    ids, session = text_ids(tiny, 600), tiny.session()
    session.extend(ids[:500], logits="none")
    other = session.fork()
    there = [session.extend([token], logits="device") for token in ids[500:]]
    here = [other.extend([token]) for token in ids[500:]]
    assert all(a.is_cuda and torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
    for sampling in (Sampling(temperature=0), Sampling(), Sampling(0.6, top_p=0.95), Sampling(min_p=0.01)):
        for n, (a, b) in enumerate(zip(there, here, strict=True)):
            assert sample(a, sampling, uniform(5, n)) == sample(b, sampling, uniform(5, n))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=3), Sampling(0.6, top_p=0.9, seed=4)])
def test_steps_begun_ahead_are_those_taken(tiny: Engine, sampling: Sampling) -> None:
    """An answer, whose steps begin before their tokens are known, against logits on the host, one after the other."""
    ids, session = text_ids(tiny, 8180), tiny.session()  # on over the end of a chunk
    generation = generate(session, ids, tiny.tokenizer, sampling, max_tokens=300, eos_ids=())
    done = list(generation)[-1]
    assert isinstance(done, Done) and len(done.token_ids) == 300
    other, sampler = tiny.session(), Sampler(sampling)
    logits = other.extend(ids)
    for token in done.token_ids:
        assert sampler.next(logits) == token
        logits = other.extend([token])
    assert torch.equal(session.extend([7]), other.extend([7]))


def test_a_step_begun_ahead_and_not_taken(tiny: Engine) -> None:
    """Another token, several, another session's step between, a fork: as if nothing had been begun."""
    ids = text_ids(tiny, 700)
    want, other = tiny.session().extend(ids, logits="all"), tiny.session()
    other.extend(ids[:300])
    for count in (1, 2, 130):
        session = tiny.session()
        session.extend(ids[:500], logits="none")
        draw = Draw(-session.extend(ids[500:501], logits="device"), Sampling(temperature=0), 0.0)  # the least likely
        session.ahead(draw)
        fork = session.fork()
        if count == 2:
            assert torch.equal(other.extend(ids[300:301]), want[300])
        taken, token = ids[501 : 501 + count], draw.result()
        assert taken[0] != token is not None
        assert torch.equal(session.extend(taken, logits="all"), want[501 : 501 + count])
        assert torch.equal(fork.extend(taken, logits="all"), want[501 : 501 + count])
        draw = Draw(session.extend([ids[501 + count]], logits="device"), Sampling(temperature=0), 0.0)
        session.ahead(draw)
        if count == 2:  # the place where its streams lie is another session's by now
            assert torch.equal(other.extend(ids[301:302]), want[301])
        token = draw.result()
        assert token is not None
        assert torch.equal(session.extend([token]), fork.extend([ids[501 + count], token]))


def test_sessions_take_turns(tiny: Engine) -> None:
    ids = text_ids(tiny, 900)
    want = tiny.session().extend(ids, logits="all")
    sessions = [tiny.session() for _ in range(3)]
    got: list[list[torch.Tensor]] = [[], [], []]
    for step in range(40):
        for session, found, start in zip(sessions, got, (0, 1, 2), strict=True):
            if (step + start) % 3:
                found.append(session.extend([ids[session.position]])[None])
            else:
                end = session.position + 7
                found.append(session.extend(ids[session.position : end], logits="all"))
    for session, found in zip(sessions, got, strict=True):
        assert torch.equal(torch.cat(found), want[: session.position])


def test_forks_share_the_past_and_grow_apart(tiny: Engine) -> None:
    ids = text_ids(tiny, 9000)
    parent = tiny.session()
    parent.extend(ids[:8500], logits="none")
    left, right = parent.fork(), parent.fork()
    got = left.extend(ids[8500:], logits="all")
    other = torch.stack([right.extend([i]) for i in ids[:50]])
    assert torch.equal(parent.fork().extend(ids[:50], logits="all"), other)
    assert torch.equal(parent.extend(ids[8500:], logits="all"), got)
    assert left.kv_bytes == parent.kv_bytes
    again = parent.fork_whole()
    assert again.position == 8192
    assert torch.equal(again.extend(ids[8192:], logits="all")[8500 - 8192 :], got)


def test_an_interrupted_chunk_leaves_the_sequence_as_it_was(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, session, other = text_ids(tiny, 700), tiny.session(), tiny.session()
    for each in (session, other):
        each.extend(ids[:130])
        each.extend(ids[130:131])

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_of(tiny).blocks[-1].ffn, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.extend(ids[131:600])
    assert session.position == 131
    assert torch.equal(session.extend(ids[131:]), other.extend(ids[131:]))


# ---- state and memory ------------------------------------------------------------------------------------------------


def test_a_state_through_bytes(tiny: Engine) -> None:
    """What the prefix cache writes and reads: the session goes on bit for bit, by chunks and by steps."""
    ids, session, codec = text_ids(tiny, 9000), tiny.session(), StateCodec(tiny.model)
    session.extend(ids[:8192], logits="none")
    state = codec.blank(8192)
    codec.fill(state, memoryview(b"".join(bytes(part) for part in codec.position(session.state))))
    room = codec.room(8192)
    room.put(memoryview(b"".join(bytes(part) for part in codec.rows(session.state, 0, 8192))), 0, 8192)
    room.give(state, 8192)
    other = tiny.session().holding(ids[:8192], tiny.model.adopted(state))
    assert torch.equal(other.extend(ids[8192:8200]), session.extend(ids[8192:8200]))
    for token in ids[8200:8230]:
        assert torch.equal(other.extend([token]), session.extend([token]))


def test_windows_are_found_again_from_rows(tiny: Engine) -> None:
    ids, session, codec = text_ids(tiny, 25_000), tiny.session(), StateCodec(tiny.model)
    session.extend(ids[:24_576], logits="none")
    room = codec.room(24_576)
    room.put(memoryview(b"".join(bytes(part) for part in codec.rows(session.state, 0, 24_576))), 0, 24_576)
    state = codec.blank(16_384)
    room.give(state, 24_576)
    other = tiny.session().holding(ids[:16_384], tiny.model.adopted(state))
    other.extend(ids[16_384:24_576], logits="none")
    assert torch.equal(other.extend(ids[24_576:], logits="all"), session.extend(ids[24_576:], logits="all"))


def test_the_plan_holds(folder: Path) -> None:
    engine = on_gpu(folder, ctx=65_536)
    session = engine.session()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    session.extend(random_ids(65_000, engine.config.vocab_size), logits="none")
    session.extend([1])
    peak = torch.cuda.max_memory_allocated() - before
    log.info("peak %d MiB of %d MiB", peak >> 20, (engine.plan.working_set + engine.plan.kv) >> 20)
    assert peak < engine.plan.working_set + engine.plan.kv


def test_a_step_asks_for_no_memory(tiny: Engine) -> None:
    session = tiny.session()
    session.extend(text_ids(tiny, 300), logits="none")
    for token in range(4):
        session.extend([token])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for token in range(64):
        session.extend([token])
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_the_kernels_time_is_told_apart(tiny: Engine) -> None:
    found = measure(tiny, 2048, DEVICES["h200"])
    for phase in (found.prefill, found.decode):
        seconds = {(part.part, part.kind): part.seconds for part in phase.parts}
        for kind in ("window", "csa", "hca"):
            assert all(seconds[part, kind] > 0 for part in ("mHC", "projections", "core attention", "experts"))
        assert seconds["indexer", "csa"] > 0 and ("compressors", "hca") in seconds  # which others may hide
    assert found.cache.held[-1] > found.cache.held[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_bits_of_one(tiny: Engine) -> None:
    both = Engine.load("tiny", device="cuda:0,cuda:1", dtype="bfloat16")
    assert len(model_of(both).stages) == 2
    ids = text_ids(tiny, 20_000)
    one, two = tiny.session(), both.session()
    assert torch.equal(one.extend(ids), two.extend(ids))
    for token in ids[:40]:
        assert torch.equal(one.extend([token]), two.extend([token]))
    assert torch.equal(one.fork().extend(ids[:300], logits="all"), two.fork().extend(ids[:300], logits="all"))


def test_states_of_this_engine(tiny: Engine) -> None:
    assert isinstance(tiny.session().state, GpuState)
