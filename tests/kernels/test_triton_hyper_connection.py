"""The hyper-connections' kernels against float64; in Triton's interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.rounding import round_fp8
from dsv4_kernels.triton import hyper_connection as kernel
from dsv4_kernels.triton.hyper_connection import Connected, Connection, Write, connect, head_read, write_streams
from support.streams_case import EPS, ITERATIONS, StreamsCase, between, error, poisoned, streams_case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values

BF16 = 2e-3  # relative RMS of rounding to bf16: 1.7e-3
MIXING = 2e-6  # of post and comb, 39 normalisations in float32 included; measured 5e-7


def run(case: StreamsCase, out: torch.Tensor | None = None) -> Connected:
    with poisoned():
        return connect(case.x, case.before, case.weights, iterations=ITERATIONS, hc_eps=EPS, norm_eps=EPS, out=out)


def same(a: Connected, b: Connected, tokens: slice) -> bool:
    pairs = [
        (a.streams, b.streams), (a.u, b.u), (a.post, b.post), (a.comb, b.comb),
        (a.rounded.data.view(torch.uint8), b.rounded.data.view(torch.uint8)), (a.rounded.scale, b.rounded.scale),
    ]  # fmt: skip
    return all(torch.equal(left, right[tokens]) for left, right in pairs)


def check(case: StreamsCase) -> Connected:
    got = run(case)
    assert error(got.streams, case.streams()) < BF16
    post, comb = case.post_and_comb(got.streams)
    assert (got.post - post).abs().max() < MIXING and (got.comb - comb).abs().max() < MIXING
    assert between(got.u, *case.read(got.streams))
    assert torch.equal(got.rounded.values().to(torch.bfloat16), round_fp8(got.u, 128))
    return got


@pytest.mark.parametrize(("tokens", "hidden", "routed"), [(3, 256, 0), (66, 128, 2), (2, 384, None)])
def test_connect(tokens: int, hidden: int, routed: int | None) -> None:
    check(streams_case(tokens, hidden, routed, DEVICE))


def test_sums_do_not_depend_on_who_adds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One range a program, as for a single token, or many, as in prefill."""
    monkeypatch.setattr(kernel, "SUBS", 5)
    case = streams_case(5, 384, 1, DEVICE)  # 12 ranges: the last sum is shorter
    alone = run(case)
    monkeypatch.setattr(kernel, "FEW", 0)
    together = run(case)
    assert same(alone, together, slice(None))
    assert same(run(case.part(slice(2, 3))), together, slice(2, 3))


def test_first_read_of_an_expanded_embedding() -> None:
    case = streams_case(3, 256, None, DEVICE)
    case.x = case.x[:, :1].expand(-1, 4, -1)
    assert check(case).streams is case.x


def test_streams_may_be_written_in_place() -> None:
    case = streams_case(4, 128, 2, DEVICE)
    want = run(case)
    x = case.x.clone()
    case.x = x
    got = run(case, x)
    assert got.streams is x and same(got, want, slice(None))
    assert case.before is not None
    assert torch.equal(write_streams(streams := case.x.clone(), case.before), run(case).streams)
    assert torch.equal(streams, case.x)


def test_head_read() -> None:
    case = streams_case(3, 256, 2, DEVICE, head=True)
    with poisoned():
        streams, h = head_read(case.x, case.before, case.weights, hc_eps=EPS, norm_eps=EPS)
    assert error(streams, case.streams()) < BF16 and h.dtype == torch.float32
    assert between(h, *case.read(streams))


def test_no_tokens() -> None:
    case = streams_case(0, 256, 2, DEVICE)
    assert run(case).u.shape == (0, 256)
    assert write_streams(case.x, case.before).shape == (0, 4, 256)  # type: ignore[arg-type]


def test_weights_are_split_exactly() -> None:
    x = torch.randn(1000) * torch.randint(-60, 60, (1000,)).float().exp2()
    assert torch.equal(kernel.three_parts(x).float().sum(0), x)
    assert torch.equal(kernel.three_parts(x).double().sum(0), x.double())


def test_refusals_name_the_alternative() -> None:
    case = streams_case(2, 256, 1, DEVICE)
    with pytest.raises(ValueError, match="device='cpu'"):
        connect(case.x.float(), None, case.weights, iterations=1, hc_eps=EPS, norm_eps=EPS)
    with pytest.raises(ValueError, match="device='cpu'"):
        Connection.of(torch.zeros(24, 400), torch.zeros(24), torch.zeros(3), torch.zeros(100))
    assert case.before is not None
    with pytest.raises(ValueError, match="post"):
        write_streams(case.x, Write(case.before.result, case.before.comb, case.before.comb))


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize(("tokens", "routed"), [(1, 0), (1, 6), (63, 6), (1000, 0), (1000, 6), (1000, None)])
def test_flash_and_pro(tokens: int, routed: int | None, hidden: int) -> None:
    check(streams_case(tokens, hidden, routed, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
def test_bits_do_not_depend_on_the_chunk(hidden: int) -> None:
    for routed in (0, 6):
        case = streams_case(8192, hidden, routed, "cuda")
        together = run(case)
        assert same(run(case), together, slice(None))
        for part in (slice(0, 1), slice(8191, 8192), slice(77, 78), slice(60, 130), slice(1, 1001), slice(500, 5000)):
            assert same(run(case.part(part)), together, part)
    head = streams_case(300, hidden, 0, "cuda", head=True)
    _, h = head_read(head.x, head.before, head.weights, hc_eps=EPS, norm_eps=EPS)
    for part in (slice(0, 1), slice(299, 300), slice(3, 90)):
        one = head.part(part)
        assert torch.equal(head_read(one.x, one.before, one.weights, hc_eps=EPS, norm_eps=EPS)[1], h[part])


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("routed", [0, 2, 6, 7, None])
def test_the_kernel_for_many_tokens(routed: int | None, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in place, from an embedding expanded over the streams, and with more results than it takes."""
    case = streams_case(1100, hidden, routed, "cuda")
    many = check(case)
    embedding = replace(case, x=case.x[:, :1].expand(-1, 4, -1))
    expanded = run(embedding)
    written = run(replace(case, x=(x := case.x.clone())), x)
    monkeypatch.setattr(kernel, "MANY", 1 << 30)
    assert same(run(case), many, slice(None)) and same(run(embedding), expanded, slice(None))
    assert same(written, many, slice(None)) and written.streams is x


@pytest.mark.gpu
def test_repetition_is_stable() -> None:
    """Fifty calls on the same inputs: a race would show."""
    case = streams_case(777, 4096, 6, "cuda")
    want = run(case)
    assert all(same(run(case), want, slice(None)) for _ in range(50))
