"""The NumPy step of one token against the model's own forward pass, from the same state."""

from pathlib import Path

import pytest
import torch

from dsv4_engine import Engine
from dsv4_engine.state import LayerState, RowFormat, Rows
from dsv4_engine.token_step import TokenStep
from dsv4_engine.token_step_arrays import Growing
from dsv4_kernels import one_token
from support.random_checkpoint import make_checkpoint

TOLERANCE = 2e-5  # of the largest value, as between splits of a prompt
IDS = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(5)).tolist()


def _engine(tmp_path: Path, kv_dtype: str, quantised: bool) -> Engine:
    # Many index heads: with few, scores tie at exactly 0, and rounding decides.
    return Engine.load(
        make_checkpoint(tmp_path / "model", quantised=quantised, index_n_heads=16, seed=3), kv_dtype=kv_dtype, ctx=512
    )


def _tensors(layer: LayerState) -> list[torch.Tensor]:
    found = [layer.window]
    for block, rows in ((layer.block, layer.entries), (layer.index_block, layer.index_keys)):
        if block is not None and rows is not None:
            found += [block.pending, *(block.previous or ()), rows.read(0, len(rows))]
    return found


@pytest.mark.parametrize("start", [0, 1, 3, 127, 250])
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "mixed"])
def test_steps_agree_with_the_model(tmp_path: Path, kv_dtype: str, start: int) -> None:
    engine = _engine(tmp_path, kv_dtype, quantised=False)
    step, errors = TokenStep(engine.model), []
    with torch.inference_mode():
        state = engine.model.new_state()
        if start:
            engine.model.forward(torch.tensor(IDS[:start]), state)
        for token in IDS[start : start + 9]:
            ours, theirs = state.fork(), state.fork()
            got, want = torch.from_numpy(step.forward(token, ours)), engine.model.forward(torch.tensor([token]), theirs)
            errors.append(float((got - want).abs().max() / want.abs().max()))
            assert ours.position == theirs.position
            for a, b in zip(ours.layers, theirs.layers, strict=True):
                for x, y in zip(_tensors(a), _tensors(b), strict=True):
                    assert x.shape == y.shape
            logits, expected = torch.from_numpy(step.logits(want[0].numpy())), engine.model.logits(want)
            assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
            state = theirs
    if kv_dtype == "fp32":
        assert max(errors) <= TOLERANCE
    else:  # a value may cross a rounding boundary (docs/numerics.md)
        assert torch.tensor(errors).median() < 2e-3


@pytest.mark.parametrize("start", [0, 3, 127, 250])
def test_steps_leave_the_same_state_behind(tmp_path: Path, start: int) -> None:
    engine = _engine(tmp_path, "fp32", quantised=False)
    step = TokenStep(engine.model)
    with torch.inference_mode():
        ours = engine.model.new_state()
        if start:
            engine.model.forward(torch.tensor(IDS[:start]), ours)
        theirs = ours.fork()
        for token in IDS[start : start + 9]:
            step.forward(token, ours)
            engine.model.forward(torch.tensor([token]), theirs)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for x, y in zip(_tensors(a), _tensors(b), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_rounded_activations_agree_in_the_median(tmp_path: Path) -> None:
    engine = _engine(tmp_path, "mixed", quantised=True)
    step, errors = TokenStep(engine.model), []
    with torch.inference_mode():
        state = engine.model.new_state()
        engine.model.forward(torch.tensor(IDS[:140]), state)
        for token in IDS[140:200]:
            ours = state.fork()
            got, want = torch.from_numpy(step.forward(token, ours)), engine.model.forward(torch.tensor([token]), state)
            errors.append(float((got - want).abs().max() / want.abs().max()))
    assert torch.tensor(errors).median() < 2e-3  # docs/numerics.md: what rounding of inputs allows


def test_small_models_on_a_cpu_use_it_and_only_for_single_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = _engine(tmp_path, "fp32", quantised=False), []
    forward = TokenStep.forward
    monkeypatch.setattr(TokenStep, "forward", lambda *a: (seen.append(a[1]), forward(*a))[1])
    session = engine.session()
    session.extend(IDS[:20])
    session.extend([7])
    session.fork().extend([9])
    assert seen == [7, 9]


@pytest.mark.parametrize("start", [5, 120, 255])
def test_forks_that_grow_in_turn_do_not_touch_each_other(tmp_path: Path, start: int) -> None:
    engine = _engine(tmp_path, "fp32", quantised=False)
    first = engine.session()
    first.extend(IDS[:start])
    alone, second = first.fork(), first.fork()
    expected = [alone.extend([token]) for token in IDS[start : start + 12]]
    got = []
    for token in IDS[start : start + 12]:
        got.append(first.extend([token]))
        second.extend([token ^ 1])
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_half_precision_models_do_not(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    assert not TokenStep.possible(Engine.load(folder, dtype="bfloat16").model)


def test_an_interrupted_step_leaves_the_session_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine(tmp_path, "fp32", quantised=False)
    session = engine.session()
    session.extend(IDS[:130])
    expected = session.fork().extend([7])
    last = engine._step._layers[-1]  # type: ignore[union-attr]

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.extend([7])
    assert session.position == 130
    assert torch.equal(session.extend([7]), expected)


def test_rows_in_place_are_the_rows() -> None:
    rows = Rows(RowFormat("fp32", 128, 64))
    for count in (3, 70, 1):
        rows.append(torch.randn(count, 128))
        assert torch.equal(torch.from_numpy(rows.in_place()), rows.read(0, len(rows)))
    before, read = rows.__copy__(), rows.read(0, len(rows)).clone()
    rows.append(torch.randn(5, 128))
    assert torch.equal(torch.from_numpy(before.in_place()), read)
    rows.freeze()
    rows.append(torch.randn(5, 128))
    assert rows.in_place() is None  # two pieces
    packed = Rows(RowFormat("mixed", 128, 64))
    packed.append(torch.randn(5, 128))
    assert packed.in_place() is None


@pytest.mark.parametrize("start", [130, 260])  # entries of ratio 4: all read, and 40 chosen
def test_where_rows_are_stored_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    monkeypatch.setattr(one_token, "MATRIX_PRODUCT", 1 << 13)  # several tiles, as of longer sequences
    folder = make_checkpoint(tmp_path / "model", index_n_heads=16, index_topk=40)
    engine = Engine.load(folder, kv_dtype="fp32", ctx=512)
    session = engine.session()
    session.extend(IDS[:start])
    in_place = [session.extend([token]) for token in IDS[start : start + 9]]
    apart = engine.session()
    apart.extend(IDS[:start])
    apart.fork()  # whose rows it shares from now on: two pieces
    for token, expected in zip(IDS[start : start + 9], in_place, strict=True):
        assert torch.equal(apart.extend([token]), expected)


@pytest.mark.parametrize("kv_dtype", ["fp32", "mixed"])
def test_a_step_shares_nothing_among_threads_and_leaves_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    engine, seen = _engine(tmp_path, kv_dtype, quantised=False), []
    session, append = engine.session(), Growing.append
    session.extend(IDS[:64])
    monkeypatch.setattr(Growing, "append", lambda *a: (seen.append(torch.get_num_threads()), append(*a))[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        session.extend([7])
        assert torch.get_num_threads() == 2 and set(seen) == {1}
    finally:
        torch.set_num_threads(threads)


def test_a_chunk_goes_on_from_what_a_step_left_and_a_step_from_a_chunk(tmp_path: Path) -> None:
    engine = _engine(tmp_path, "fp32", quantised=False)
    whole, split = engine.session(), engine.session()
    expected = whole.extend(IDS[:260], logits="all")
    parts = [
        split.extend(IDS[a:b], logits="all") for a, b in ((0, 130), (130, 131), (131, 200), (200, 201), (201, 260))
    ]
    assert (torch.cat(parts) - expected).abs().max() <= TOLERANCE * expected.abs().max()
