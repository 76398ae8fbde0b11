"""The compressor's kernel against float64 pooling and the engine's bytes; interpreted where there is no GPU."""

import pytest
import torch

from support.triton_mode import DEVICE  # isort: split

from dsv4_kernels.triton.compress import Compressing, compress
from support.streams_case import EPS, CompressorCase, compressor_case, keys_hold, random_phases, rows_hold

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of poisoned values


def run(case: CompressorCase, chunks: list[int]) -> None:
    """Hand over all tokens; the last chunk takes what is left."""
    position = 0
    for size in [*chunks, case.projected.shape[0]]:
        part = case.projected[position : position + size]
        first = position // case.ratio
        compress(
            part,
            case.ratio,
            torch.tensor([position], device=part.device),
            case.phases[first : first + part.shape[0] // case.ratio + 1],
            EPS,
            case.entries,
            case.index_keys,
        )
        position += part.shape[0]
    assert position == case.projected.shape[0]


def check(case: CompressorCase, blocks: slice | None = None) -> None:
    finished = case.projected.shape[0] // case.ratio
    blocks = blocks or slice(0, finished)
    (rows, keys), (want, want_keys) = case.rows(finished + 1), case.wanted(blocks)
    assert rows_hold(rows[blocks], want)
    assert (rows[finished:] == 0xFF).all()  # the unfinished block wrote nothing
    assert (keys is None) == (want_keys is None)
    if keys is not None and want_keys is not None:
        assert keys_hold(keys[blocks], want_keys)
        assert (keys[finished:] == 0xFF).all()


def same(a: CompressorCase, b: CompressorCase) -> bool:
    """Equal rows, and equal slots of the ring that a later call reads."""
    tokens = a.projected.shape[0]
    read = 8 if a.ratio == 4 else tokens % a.ratio
    slots = torch.arange(tokens - min(read, tokens), tokens) % (8 if a.ratio == 4 else a.ratio)
    pairs = [*zip(a.stored, b.stored, strict=True), *zip(a.stored_keys, b.stored_keys, strict=True)]
    pairs.append((a.entries.ring[slots], b.entries.ring[slots]))
    if a.index_keys is not None and b.index_keys is not None:
        pairs.append((a.index_keys.ring[slots], b.index_keys.ring[slots]))
    return all(torch.equal(left, right) for left, right in pairs)


CASES = [(4, 128, 64, 23), (4, 256, 0, 9), (128, 128, 0, 300), (128, 256, 0, 131), (128, 128, 0, 63)]


@pytest.mark.parametrize(("ratio", "channels", "index_channels", "tokens"), CASES)
def test_one_chunk(ratio: int, channels: int, index_channels: int, tokens: int) -> None:
    case = compressor_case(tokens, ratio, channels, index_channels, DEVICE)
    run(case, [])
    check(case)


@pytest.mark.parametrize(("ratio", "channels", "index_channels", "tokens"), CASES)
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [2, 3, 1, 0, 2], [127, 1, 1], [5, 124], [4, 4]])
def test_any_chunks(ratio: int, channels: int, index_channels: int, tokens: int, chunks: list[int]) -> None:
    """Chunk ends that cut a block of 4 and of 128, calls of one token, of none, of more than a block."""
    case = compressor_case(tokens, ratio, channels, index_channels, DEVICE)
    whole = case.fresh()
    run(whole, [])
    run(case, chunks)
    assert same(case, whole)
    check(case)


def test_a_step_may_be_repeated() -> None:
    case = compressor_case(12, 4, 128, 64, DEVICE)
    whole = case.fresh()
    run(whole, [])
    run(case, [7, 1])  # tokens 8 .. 11 are in the ring
    position = torch.tensor([11], device=DEVICE)
    for _ in range(2):
        compress(case.projected[11:], 4, position, case.phases[2:4], EPS, case.entries, case.index_keys)
    assert same(case, whole)


def test_rows_of_a_later_segment() -> None:
    """Rows 2047 and 2048 lie in different segments."""
    case = compressor_case(8, 4, 128, 64, DEVICE)
    late = compressor_case(2049 * 4, 4, 128, 64, DEVICE)
    assert late.index_keys is not None
    late.projected[2046 * 4 :] = torch.randn_like(late.projected[2046 * 4 :])
    start = 2046 * 4
    late.entries.ring.zero_()
    late.index_keys.ring.zero_()
    position = torch.tensor([start], device=DEVICE)
    phases = late.phases[2046:2050]
    compress(late.projected[start:], 4, position, phases, EPS, late.entries, late.index_keys)
    blocks = slice(2047, 2049)  # the first one's previous block is not known here
    check(late, blocks)
    assert len(late.stored) == 2 and case.ratio == 4


def test_refusals_name_the_alternative() -> None:
    case = compressor_case(4, 4, 128, 0, DEVICE)
    position, phases = torch.zeros(1, dtype=torch.int64, device=DEVICE), random_phases(2, DEVICE)
    with pytest.raises(ValueError, match="device='cpu'"):
        compress(case.projected, 6, position, phases, EPS, case.entries)
    with pytest.raises(ValueError, match="projected columns"):
        compress(case.projected[:, :100], 4, position, phases, EPS, case.entries)
    short = Compressing(case.entries.ape, case.entries.norm, case.entries.ring[:4], case.entries.segments)
    with pytest.raises(ValueError, match="ring"):
        compress(case.projected, 4, position, phases, EPS, short)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "index_channels"), [(4, 128), (128, 0)])
@pytest.mark.parametrize("tokens", [63, 1000, 8199])
def test_flash(ratio: int, index_channels: int, tokens: int) -> None:
    case = compressor_case(tokens, ratio, 512, index_channels, "cuda")
    whole = case.fresh()
    run(whole, [])
    check(whole)
    for chunks in ([1] * 9, [127, 2, 1, 129], [5, 1, 640], [62, 1]):
        again = case.fresh()
        run(again, chunks)
        assert same(again, whole)


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "index_channels"), [(4, 128), (128, 0)])
def test_token_by_token(ratio: int, index_channels: int) -> None:
    case = compressor_case(520, ratio, 512, index_channels, "cuda")
    whole = case.fresh()
    run(whole, [])
    run(case, [1] * 519)
    assert same(case, whole)
