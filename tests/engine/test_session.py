"""Sessions: any split, forks, interruption, limits, memory."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_engine import Engine
from dsv4_engine.errors import DeviceError, InputError, PromptError
from support.random_checkpoint import make_checkpoint

TOLERANCE = 2e-5  # of the largest logit
TOKENS = 420
VOCAB = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "plain", index_n_heads=16)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, kv_dtype="fp32", ctx=2048)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def whole(engine: Engine, ids: list[int]) -> torch.Tensor:
    return engine.session().extend(ids, logits="all")


def off(got: torch.Tensor, want: torch.Tensor) -> int:
    return int(((got - want).abs().amax(-1) > TOLERANCE * want.abs().max()).sum())


@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_pieces_agree_with_one_call(
    engine: Engine, ids: list[int], whole: torch.Tensor, rng: random.Random
) -> None:
    session, parts, start = engine.session(), [], 0
    while start < TOKENS:
        count = rng.choice([1, 1, 2, 3, 4, 5, 17, 127, 128, 200])
        parts.append(session.extend(ids[start : start + count], logits="all"))
        start += count
    assert session.tokens == ids
    assert off(torch.cat(parts), whole) == 0


def test_token_by_token_agrees_with_one_call(engine: Engine, ids: list[int], whole: torch.Tensor) -> None:
    session = engine.session()
    got = torch.stack([session.extend([token]) for token in ids])
    assert off(got, whole) == 0


def test_small_prefill_chunks_agree(engine: Engine, ids: list[int], whole: torch.Tensor) -> None:
    session = engine.session()
    session._chunk = 128
    assert off(session.extend(ids, logits="all"), whole) == 0


@pytest.mark.parametrize("kv_dtype", ["mixed", "bf16"])
def test_rounded_caches_do_not_depend_on_the_split(kv_dtype: str, tmp_path: Path, ids: list[int]) -> None:
    """A rounding may fall either way after a 1e-6 change, and an index pick with it: compare by quantiles."""
    engine = Engine.load(make_checkpoint(tmp_path / "m", quantised=True, index_n_heads=16), kv_dtype=kv_dtype)
    whole = engine.session().extend(ids, logits="all")
    session = engine.session()
    pieces = torch.cat([session.extend(ids[i : i + 37], logits="all") for i in range(0, TOKENS, 37)])
    error = (pieces - whole).abs().amax(-1) / whole.abs().max()
    assert error.median() < 2e-3
    assert error.quantile(0.95) < 3e-2


def test_last_and_none_logits(engine: Engine, ids: list[int], whole: torch.Tensor) -> None:
    session = engine.session()
    assert session.extend(ids[:100], logits="none").numel() == 0
    assert off(session.extend(ids[100:])[None], whole[-1:]) == 0


def test_forks_share_the_past_and_do_not_touch_each_other(engine: Engine, ids: list[int]) -> None:
    other = [(t * 7 + 3) % VOCAB for t in ids]
    parent = engine.session()
    parent.extend(ids[:301])
    left, right = parent.fork(), parent.fork()
    second = left.fork()
    got_left = left.extend(ids[301:], logits="all")
    got_right = right.extend(other[301:], logits="all")
    got_second = second.extend(other[301:], logits="all")
    got_parent = parent.extend(ids[301:], logits="all")
    fresh_left, fresh_right = engine.session(), engine.session()
    want_left = fresh_left.extend(ids, logits="all")[301:]
    want_right = fresh_right.extend(ids[:301] + other[301:], logits="all")[301:]
    assert off(got_left, want_left) == 0
    assert torch.equal(got_left, got_parent)
    assert torch.equal(got_right, got_second)
    assert off(got_right, want_right) == 0
    assert left.tokens == parent.tokens == ids
    assert right.tokens == ids[:301] + other[301:]


def test_a_fork_copies_no_rows(engine: Engine, ids: list[int]) -> None:
    session = engine.session()
    session.extend(ids)
    fork = session.fork()
    for a, b in zip(session._state.layers, fork._state.layers, strict=True):
        if a.entries is not None and b.entries is not None:
            assert [t.data_ptr() for t in a.entries._full] == [t.data_ptr() for t in b.entries._full]
            assert len(a.entries) == len(b.entries) > 0
    assert fork.kv_bytes == session.kv_bytes


def test_an_interrupted_chunk_leaves_the_sequence_as_it_was(
    engine: Engine, ids: list[int], whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.session()
    session.extend(ids[:130])
    last = engine.model.blocks[-1]
    forward = last.ffn.forward

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(last.ffn, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.extend(ids[130:300])
    assert session.position == 130
    monkeypatch.setattr(last.ffn, "forward", forward)
    assert off(session.extend(ids[130:], logits="all"), whole[130:]) == 0


def test_progress_counts_tokens(engine: Engine, ids: list[int]) -> None:
    session, seen = engine.session(), []
    session._chunk = 128
    session.extend(ids[:100])
    session.extend(ids[100:400], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(28, 300), (156, 300), (284, 300), (300, 300)]


def test_kv_bytes_grow_by_the_analytic_slope(folder: Path, engine: Engine) -> None:
    from dsv4_engine.accounting import kv_bytes_per_token

    session = engine.session()
    session.extend([1] * 512)
    before = session.kv_bytes
    session.extend([1] * 512)
    assert session.kv_bytes - before == kv_bytes_per_token(engine.config, "fp32") * 512


@pytest.mark.parametrize(("bad", "named"), [([-1], "-1"), ([3, VOCAB], str(VOCAB)), ([], "no tokens")])
def test_bad_tokens_are_refused(engine: Engine, bad: list[int], named: str) -> None:
    session = engine.session()
    session.extend([1, 2])
    with pytest.raises(PromptError, match=named):
        session.extend(bad)
    assert session.tokens == [1, 2]


def test_more_than_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    session = engine.session()
    session.extend([1] * 2000)
    with pytest.raises(PromptError, match=r"2,049 .* 2,048"):
        session.extend([1] * 49)
    assert session.position == 2000
    session.extend([1] * 48)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"dtype": "float16"}, InputError, "float16"),
        ({"kv_dtype": "fp8"}, InputError, "fp8"),
        ({"device": "cuda:99"}, DeviceError, "cuda:99"),
        ({"device": "no such"}, DeviceError, "no such"),
        ({"ctx": 0}, InputError, "0"),
        ({"ctx": 1 << 30}, InputError, "1,073,741,824"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, arguments: dict, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named) as caught:
        Engine.load(folder, **arguments)
    assert caught.value.hint


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("nonsense", str(tmp_path / "empty"), str(tmp_path / "file"), str(tmp_path / "absent"), "owner/absent"):
        with pytest.raises(InputError) as caught:
            Engine.load(name)
        assert caught.value.hint


def test_a_folder_without_tokenizer_works_on_ids(engine: Engine) -> None:
    from dsv4_engine.errors import TokenizerError

    assert engine.session().extend([5]).shape == (VOCAB,)
    with pytest.raises(TokenizerError):
        _ = engine.tokenizer


def test_loading_reports_bytes_up_to_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    engine = Engine.load(folder, progress=lambda done, total: seen.append((done, total)))
    dones = [done for done, _ in seen]
    assert dones == sorted(dones)
    assert seen[-1] == (engine.weights.total_bytes, engine.weights.total_bytes)


def test_the_number_of_threads_is_left_as_it_was(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    seen = []
    forward = engine.model.blocks[0].ffn.forward
    monkeypatch.setattr(
        engine.model.blocks[0].ffn, "forward", lambda *a: seen.append(torch.get_num_threads()) or forward(*a)
    )
    session = engine.session()
    session.extend([1] * 64)
    session.extend([1, 1])
    assert seen == [threads, 1]
    assert torch.get_num_threads() == threads
