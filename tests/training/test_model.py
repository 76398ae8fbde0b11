"""The trainer's forward pass against the engine's, through an exported checkpoint; documents kept apart; rounding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_engine import Engine
from dsv4_kernels import rounding
from dsv4_training import layers, operations, sinkhorn
from dsv4_training.export import fp4_as_fp8, load_parameters, save_checkpoint
from dsv4_training.layout import Frequencies, Layout
from dsv4_training.model import Mode, Network
from dsv4_training.parameters import initial_parameters, working_weights
from training.common import lively_parameters, small_config

LENGTH = 384
PLAIN = Mode(sparse=True, dtype=torch.float32)


def both(tmp_path: Path, quantised: bool, topk: int) -> tuple[Tensor, Tensor]:
    """Logits [S, V] of the engine and of the trainer for the same parameters and tokens."""
    config = small_config(index_topk=topk)
    parameters = lively_parameters(config)
    save_checkpoint(tmp_path, config, parameters, "{}", quantised)
    ids = torch.randint(2, config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    engine = Engine.load(str(tmp_path), kv_dtype="mixed" if quantised else "fp32")
    theirs = engine.session().extend(ids[0].tolist(), logits="all")
    with torch.no_grad():
        weights = working_weights(parameters, quantised, torch.float32)
        mode = Mode(quantised=quantised, sparse=True, dtype=torch.float32)
        ours = Network(config).logits(weights, ids, mode)[0]
    return theirs, ours


def test_unrounded_logits_equal_the_engine(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, quantised=False, topk=LENGTH)
    assert float((theirs - ours).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_selected_entries_equal_the_engine(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, quantised=False, topk=16)
    difference = (theirs - ours).abs().amax(1)
    # From the 17th entry on, entries whose scores tie (at zero, behind the relu) may be picked differently.
    assert float(difference[: 4 * 17 - 1].max()) <= 1e-4 * float(theirs.abs().max())
    assert float(difference.median()) <= 0.02 * float(theirs.std())


def test_rounded_logits_agree_with_the_engine(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, quantised=True, topk=LENGTH)
    # Rounding turns a last-bit difference into one of a whole step, which spreads: exact before the first such turn.
    assert float((theirs - ours)[:4].abs().max()) <= 1e-4 * float(theirs.abs().max())
    assert float((theirs - ours).abs().median()) <= 0.05 * float(theirs.std())


def test_rounded_weights_are_what_a_checkpoint_holds(tmp_path: Path) -> None:
    config = small_config()
    parameters = lively_parameters(config)
    save_checkpoint(tmp_path, config, parameters, "{}")
    _, stored = load_parameters(tmp_path)
    working = working_weights(parameters, True, torch.float32)
    assert working.keys() == stored.keys()
    for name, value in working.items():
        assert torch.equal(value, stored[name]), name


def test_fp4_experts_are_lossless_in_fp8() -> None:
    parameters = lively_parameters(small_config())
    working = working_weights(parameters, True, torch.float32)
    for name in (n for n in working if ".experts.w" in n):
        for expert in working[name].detach():
            data, scale = fp4_as_fp8(expert)
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            assert torch.equal(data.float() * wide, expert)
    spread = torch.ones(128, 128) * 6
    spread[:, :32] *= 2.0**-20  # more than e4m3 reaches below its largest value
    with pytest.raises(ValueError, match="span"):
        fp4_as_fp8(spread)


def three_documents() -> tuple[Tensor, Layout, list[tuple[int, int]]]:
    """Two sequences of 640: documents of 256 and 384, and one of 640 with a jump of 3,840 positions in it."""
    ids = torch.randint(2, 512, (2, 640), generator=torch.Generator().manual_seed(9))
    start = torch.tensor([[0, 0, 2, 2, 2], [0, 0, 0, 0, 0]])
    place = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 33, 34]])
    frequencies = Frequencies.of(small_config(), torch.device("cpu"))
    return ids, Layout.of(start, place, frequencies), [(0, 256), (256, 640)]


@pytest.mark.parametrize("mode", [Mode(dtype=torch.float32), PLAIN])
def test_packed_documents_do_not_see_each_other(mode: Mode) -> None:
    config = small_config()
    weights = {n: p.detach() for n, p in lively_parameters(config).items()}
    ids, layout, spans = three_documents()
    network = Network(config)
    packed = network.logits(weights, ids, mode, layout)
    for start, end in spans:
        alone = network.logits(weights, ids[:1, start:end], mode)[0]
        # From the 17th entry on, entries whose scores tie (at zero, behind the relu) may be picked differently.
        sure = 4 * 17 - 1 if mode.sparse else end - start
        torch.testing.assert_close(packed[0, start : start + sure], alone[:sure], atol=2e-4, rtol=1e-4)
    changed = ids.clone()
    changed[0, :256] = 7
    after = network.logits(weights, changed, mode, layout)
    assert torch.equal(after[0, 256:], packed[0, 256:])
    assert not torch.equal(after[0, :256], packed[0, :256])


def test_a_jump_of_positions_changes_far_attention_only() -> None:
    """Up to the jump nothing changes; a window layer does not notice it; layers with entries do."""
    ids, layout, _ = three_documents()
    plain = Layout.whole(2, 640, Frequencies.of(small_config(), torch.device("cpu")))
    windows = small_config(compress_ratios=(0, 0, 0))
    for config, same in ((windows, True), (small_config(), False)):
        weights = {n: p.detach() for n, p in lively_parameters(config).items()}
        network = Network(config)
        jumped = network.logits(weights, ids, PLAIN, layout)[1]
        straight = network.logits(weights, ids, PLAIN, plain)[1]
        torch.testing.assert_close(jumped[:384], straight[:384], atol=1e-5, rtol=1e-5)
        assert torch.allclose(jumped[384:], straight[384:], atol=1e-4) == same


def test_the_window_reaches_across_a_jump_as_without_it() -> None:
    """Of a layer with entries, what a query sees in its window does not depend on the jump: no entry is far there."""
    torch.manual_seed(0)
    frequencies = Frequencies.of(small_config(), torch.device("cpu"))
    place = torch.tensor([[0, 1, 5000, 5001]])
    layout = Layout.of(torch.zeros(1, 4, dtype=torch.int64), place, frequencies)
    straight = Layout.whole(1, 512, frequencies)
    raw_q, raw_kv = torch.randn(512, 2, 128), torch.randn(512, 128)

    def attended(at: Layout) -> Tensor:
        cos, sin = at.compressed
        q = layers.rotate(raw_q, cos[:, None], sin[:, None])
        kv = layers.rotate(raw_kv, cos, sin)
        out, _ = operations.attention.window_attention(q, kv, kv.roll(128, 0), at.opens, *at.jump)
        return layers.rotate(out, cos[:, None], -sin[:, None])

    # float32 angles at position 640,000 are off by up to 0.03 radians, as they are in the engine.
    torch.testing.assert_close(attended(layout), attended(straight), atol=0.1, rtol=0.05)
    assert float((attended(layout) - attended(straight)).abs().mean()) < 0.01


def test_pieces_of_a_batch_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    parameters = lively_parameters(config)
    ids = torch.randint(2, 512, (2, 512), generator=torch.Generator().manual_seed(3))
    mode = Mode(quantised=True, sparse=True, mtp=True, dtype=torch.float32)
    found = []
    for size in (1024, 256):  # one piece of two sequences; four of half a sequence
        monkeypatch.setattr(operations, "PIECE", size)
        weights = working_weights(parameters, True, torch.float32)
        output = Network(config).forward(weights, ids, mode, torch.arange(0, 512, 8).expand(2, -1))
        (output.hidden.sum() + output.mtp_hidden.sum() + output.index_loss + output.balance).backward()  # type: ignore[union-attr]
        found.append((output.hidden, output.balance, {n: p.grad for n, p in parameters.items()}))
        for p in parameters.values():
            p.grad = None
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1])
    for name, grad in found[0][2].items():
        if grad is not None:
            torch.testing.assert_close(grad, found[1][2][name], atol=2e-2, rtol=2e-2, msg=name)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    config = small_config()
    parameters = lively_parameters(config)
    ids = torch.randint(2, 512, (1, 512), generator=torch.Generator().manual_seed(3))
    grads = []
    for recompute in (False, True):
        mode = Mode(sparse=True, mtp=True, recompute=recompute, dtype=torch.float32)
        output = Network(config).forward(parameters, ids, mode, torch.arange(0, 512, 4)[None])
        (output.hidden.square().sum() + output.index_loss).backward()
        grads.append({n: p.grad for n, p in parameters.items()})
        for p in parameters.values():
            p.grad = None
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            assert torch.equal(grad, grads[1][name]), name


def test_hadamard_equals_the_kernels_reference() -> None:
    x = torch.randn(3, 2, 128)
    torch.testing.assert_close(layers.hadamard(x), rounding.hadamard(x), atol=1e-5, rtol=1e-5)


def test_straight_through_rounds_values_and_passes_gradients() -> None:
    x = torch.randn(4, 128, requires_grad=True)
    y = layers.fp8_ste(x)
    assert not torch.equal(x, y)
    y.backward(weight := torch.randn(4, 128))
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


def test_the_indexer_learns_to_imitate_the_attention_alone() -> None:
    config = small_config()
    parameters = lively_parameters(config)
    weights = working_weights(parameters, False, torch.float32)
    ids = torch.randint(2, 512, (1, 256), generator=torch.Generator().manual_seed(1))
    output = Network(config).forward(weights, ids, Mode(dtype=torch.float32), torch.arange(256)[None])
    output.index_loss.backward()
    for name, p in parameters.items():
        assert (p.grad is not None and bool(p.grad.any())) == (".indexer." in name), name


def test_given_routes_are_taken() -> None:
    config = small_config()
    weights = {n: p.detach() for n, p in lively_parameters(config).items()}
    ids = torch.randint(2, 512, (1, 128), generator=torch.Generator().manual_seed(1))
    network = Network(config)
    own = network.forward(weights, ids, PLAIN)
    again = network.forward(weights, ids, PLAIN, routes=own.chosen)
    assert torch.equal(own.hidden, again.hidden)
    other = {name: (chosen + 1) % config.n_routed_experts for name, chosen in own.chosen.items()}
    moved = network.forward(weights, ids, PLAIN, routes=other)
    assert torch.equal(moved.chosen["layers.2"], other["layers.2"])
    assert torch.equal(moved.chosen["layers.0"], own.chosen["layers.0"])  # a hash layer goes by its table
    assert not torch.allclose(moved.hidden, own.hidden)


def test_mixing_matrices_are_doubly_stochastic_and_differentiable() -> None:
    logits = (torch.randn(7, 4, 4, generator=torch.Generator().manual_seed(2))).requires_grad_()
    comb = sinkhorn.sinkhorn(logits, 20, 1e-6)
    torch.testing.assert_close(comb.sum(-1), torch.ones(7, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(comb.sum(-2), torch.ones(7, 4), atol=1e-4, rtol=0)
    comb.square().sum().backward()
    assert logits.grad is not None


def test_the_kernels_of_the_mixing_equal_plain_operations() -> None:
    """In Triton's interpreter where there is no GPU: results and gradients, an odd number of tokens."""
    pytest.importorskip("triton")
    from dsv4_training import sinkhorn_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(4)
    logits = (torch.randn(101, 4, 4, generator=g) * 3).to(device).requires_grad_()
    expected = sinkhorn.plain(logits, 20, 1e-6)
    weight = torch.randn(101, 4, 4, generator=g).to(device)
    expected.backward(weight)
    out, sums = sinkhorn_triton.launch_forward(logits.detach(), 20, 1e-6)
    found = sinkhorn_triton.launch_backward(out, sums, weight, 20, 1e-6)
    torch.testing.assert_close(out, expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, logits.grad, atol=2e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="4x4"):
        sinkhorn_triton.launch_forward(torch.zeros(2, 3, 3, device=device), 20, 1e-6)


def test_a_sequence_must_fill_blocks() -> None:
    config = small_config()
    weights = working_weights(initial_parameters(config, 0, {}), False, torch.float32)
    with pytest.raises(ValueError, match="multiple of 128"):
        Network(config).forward(weights, torch.zeros(1, 100, dtype=torch.int64), Mode(dtype=torch.float32))
