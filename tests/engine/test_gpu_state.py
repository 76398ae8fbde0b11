"""The GPU's form of a sequence's state, on the CPU: nothing here needs more than memory and the layout of rows."""

import pytest
import torch

from dsv4_engine.config import ModelConfig
from dsv4_engine.gpu.state import RATIOS, WINDOW_RING, GpuState, Layout, Part, ring_rows
from dsv4_engine.model import Model
from dsv4_engine.prefix_cache.rows import StateCodec
from dsv4_engine.state import Rows, SequenceState, new_layer_state, row_formats
from dsv4_kernels.triton.rows import SEGMENT_ROWS
from support.random_checkpoint import small_config
from support.triton_mode import DEVICE

RATIOS_OF_LAYERS = [0, 4, 128, 4]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(
        small_config(quantised=True, head_dim=128, sliding_window=128, compress_ratios=[*RATIOS_OF_LAYERS, 0])
        | {"num_hidden_layers": 4}
    )


def layouts(config: ModelConfig, cut: int | None) -> list[Layout]:
    """All layers on one device, or those from ``cut`` on on another."""
    parts = [RATIOS_OF_LAYERS] if cut is None else [RATIOS_OF_LAYERS[:cut], RATIOS_OF_LAYERS[cut:]]
    return [Layout(config, part, torch.device(DEVICE)) for part in parts]


def random_state(config: ModelConfig, position: int, ahead: int = 0) -> SequenceState:
    """A state as the torch path would have it after ``position`` tokens, of values that its formats hold exactly."""
    torch.manual_seed(position)
    state = SequenceState([new_layer_state(config, ratio, "mixed") for ratio in config.compress_ratios], position)
    fmt, keys = row_formats(config, "mixed")
    for layer, ratio in zip(state.layers, config.compress_ratios, strict=True):
        layer.window = fmt.rounded(torch.randn(min(position, config.sliding_window - 1), config.head_dim))
        for block in (layer.block, layer.index_block):
            if block is not None and block.previous is not None and position:
                block.previous = (torch.randn_like(block.previous[0]), torch.randn_like(block.previous[1]))
        if ratio:
            count = (position + ahead) // ratio
            layer.entries = Rows.known(fmt, fmt.encode(torch.randn(count, config.head_dim)), position // ratio)
        if ratio == 4:
            stored = keys.encode(torch.randn(count, config.index_head_dim))
            layer.index_keys = Rows.known(keys, stored, position // ratio)
    return state


class Holder:
    """As much of a model as StateCodec asks for."""

    kv_dtype = "mixed"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    blank_state = Model.blank_state

    def new_state(self) -> SequenceState:
        return SequenceState([new_layer_state(self.config, ratio, "mixed") for ratio in self.config.compress_ratios])


def joined(parts: list[memoryview]) -> bytes:
    return b"".join(bytes(part) for part in parts)


@pytest.mark.parametrize("cut", [None, 1, 3])
@pytest.mark.parametrize("position", [0, 128, 8192, 8192 + 384])
def test_the_same_bytes_as_the_torch_path(config: ModelConfig, position: int, cut: int | None) -> None:
    state = random_state(config, position)
    codec = StateCodec(Holder(config))  # type: ignore[arg-type]
    gpu = GpuState.adopted(state, layouts(config, cut), config)
    assert joined(codec.position(gpu)) == joined(codec.position(state))  # type: ignore[arg-type]
    assert joined(codec.rows(gpu, 0, position)) == joined(codec.rows(state, 0, position))  # type: ignore[arg-type]
    middle = position // 256 * 128
    assert joined(codec.rows(gpu, middle, position)) == joined(codec.rows(state, middle, position))  # type: ignore[arg-type]


def test_rows_that_are_known_beforehand(config: ModelConfig) -> None:
    state = random_state(config, 256, ahead=8192)
    gpu = GpuState.adopted(state, layouts(config, None), config)
    assert (gpu.position, gpu.known) == (256, 256 + 8192)
    gpu.position = gpu.known
    for layer, want in zip(gpu.layers, state.layers, strict=True):
        for held, wanted in ((layer.entries, want.entries), (layer.index_keys, want.index_keys)):
            assert (held is None) == (wanted is None)
            if held is not None and wanted is not None:
                assert torch.equal(torch.cat(held.held()).cpu(), torch.cat(wanted.held()))


def scribble(state: GpuState, position: int, value: int) -> None:
    """Write the last row before ``position`` of every list, and its window row, as kernels would."""
    state.reserve(position)
    state.position = position
    for part in state.parts:
        for number, buffers in enumerate(part.buffers):
            values, _ = ring_rows(buffers.window, 128)
            values[(position - 1) % WINDOW_RING] = value
            if buffers.ratio:
                row = position // buffers.ratio - 1
                slab = part.slabs[buffers.ratio][row // SEGMENT_ROWS]
                keys = part.layout.segment(slab, number, keys=buffers.ratio == 4)
                keys.view(SEGMENT_ROWS, -1)[row % SEGMENT_ROWS] = value


def snapshot(state: GpuState) -> list[torch.Tensor]:
    return [
        tensor
        for layer in state.layers
        for tensor in (layer.window, *(t for rows in (layer.entries, layer.index_keys) if rows for t in rows.held()))
    ]


def assert_unchanged(state: GpuState, before: list[torch.Tensor]) -> None:
    for now, then in zip(snapshot(state), before, strict=True):
        assert torch.equal(now, then)


def addresses_are_right(state: GpuState) -> bool:
    return all(
        int(part.layout.table(part.flat, ratio)[row, number])
        == part.slabs[ratio][number].data_ptr() + int(part.layout.offsets[ratio][row])
        for part in state.parts
        for ratio in RATIOS
        for row in range(part.layout.offsets[ratio].shape[0])
        for number in range(len(part.slabs[ratio]))
    )


@pytest.mark.parametrize("position", [1024, 8192, 16_384 - 128])
def test_forks_and_marks(config: ModelConfig, position: int) -> None:
    """The last slab is one's own, full ones are shared; a mark stays what it is."""
    state = GpuState.adopted(random_state(config, position), layouts(config, 2), config)
    mark, before = state.mark(), snapshot(state)
    fork = state.fork()
    scribble(state, position + 512, 7)
    assert_unchanged(mark, before)
    assert_unchanged(fork, before)
    scribble(fork, position + 512, 9)
    assert_unchanged(mark, before)
    other = mark.fork()
    scribble(other, position + 512, 11)
    assert_unchanged(mark, before)
    assert all(addresses_are_right(each) for each in (state, fork, mark, other))
    for each, value in ((state, 7), (fork, 9), (other, 11)):
        part = each.parts[0]
        assert part.slabs[4][-1][-1] >= 0
        keys = part.layout.segment(
            part.slabs[4][(position + 512) // 4 // SEGMENT_ROWS - ((position + 512) % 8192 == 0)], 1, keys=True
        )
        assert keys[((position + 512) // 4 - 1) % SEGMENT_ROWS].eq(value).all()
    shared = position // 4 // SEGMENT_ROWS
    mine, theirs = state.parts[0].slabs[4], fork.parts[0].slabs[4]
    assert all(a is b for a, b in zip(mine[:shared], theirs[:shared], strict=True))
    assert all(a is not b for a, b in zip(mine[shared:], theirs[shared:], strict=False))


def test_a_chunk_can_be_undone(config: ModelConfig) -> None:
    state = GpuState.adopted(random_state(config, 8192 - 128), layouts(config, None), config)
    before = snapshot(state)
    state.save()
    state.backup()
    scribble(state, 8192 + 256, 5)
    for part in state.parts:
        for buffers in part.buffers:
            buffers.window.fill_(3)
            if buffers.ring is not None:
                buffers.ring.fill_(3)
    state.restore()
    assert state.position == 8192 - 128
    assert_unchanged(state, before)
    assert addresses_are_right(state)  # also of the slabs that were added meanwhile


def test_room_that_nobody_reads(config: ModelConfig) -> None:
    part = Part.unread(layouts(config, None)[0])
    for ratio in RATIOS:
        table = part.layout.table(part.flat, ratio)
        assert (table == table[:, :1]).all()
        assert (table[:, 0] == part.slabs[ratio][0].data_ptr() + part.layout.offsets[ratio]).all()


@pytest.mark.parametrize("position", [0, 5, 127, 128, 1000])
def test_bytes_held(config: ModelConfig, position: int) -> None:
    """As SequenceState counts them, but for windows, which are packed here."""
    gpu = GpuState.empty(layouts(config, 1), config)
    gpu.position = position
    other = random_state(config, position // 128 * 128)
    windows = sum(layer.window.nbytes for layer in other.layers)
    at_128 = GpuState.empty(layouts(config, 1), config)
    at_128.position = other.position
    packed = 4 * min(other.position, 127) * 200
    assert at_128.nbytes == other.nbytes - windows + packed
    assert gpu.nbytes >= at_128.nbytes
