"""Slots that the device itself keeps filled: the choices of the host's rule, and every byte where the table says.

python -m pytest -m gpu tests/kernels/test_triton_moe_fetch.py   # on a GPU, at V4-Flash's sizes
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4[gpu]'")

from dsv4_engine.offload.layout import ExpertLayout
from dsv4_engine.offload.policy import HALF_LIFE, Slots
from dsv4_kernels.triton import moe_fetch
from dsv4_kernels.triton.moe_fetch import Held, fetch, fetch_ahead, place, propose

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
TOPK = 6


def chosen_by(slots: Slots, layer: int, experts: list[int], counts: list[int] | None = None) -> None:
    """One token on the host."""
    slots._pins[:] = 0
    for expert in experts:
        if slots.slot_of[layer, expert] >= 0:
            slots.pin(int(slots.slot_of[layer, expert]))
    for expert in experts:
        if slots.slot_of[layer, expert] < 0:
            slots.claim(layer, expert)
    slots.used(layer, 1, experts, counts or [1] * len(experts))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("number", "skewed"), [(TOPK, False), (40, True), (90, False), (4 * 64, True)])
def test_the_choices_are_the_hosts(device: str, number: int, skewed: bool) -> None:
    layers, experts, turns = (4, 64, 100) if device == "cuda" else (4, 64, 12)
    held, slots = Held.empty(layers, experts, number, torch.device(device)), Slots(layers, experts, number)
    generator = torch.Generator().manual_seed(number)
    weights, hits = 1 / torch.arange(1.0, experts + 1) if skewed else torch.ones(experts), 0
    for turn in range(turns):
        if turn == turns // 2:  # the host goes on for a while, and the device again
            slots.hold(held.rank.double().cpu().numpy(), held.held.cpu().numpy())
            for layer in range(layers):
                chosen_by(slots, layer, list(range(TOPK)))
            rank, who = slots.held()
            held.rank.copy_(torch.from_numpy(rank))
            held.held.copy_(torch.from_numpy(who))
            held.slot_of.copy_(torch.from_numpy(slots.slot_of))
        for layer in range(layers):
            chosen = torch.multinomial(weights.roll(7 * layer), TOPK, generator=generator).sort().values
            hits += int((slots.slot_of[layer, chosen.numpy()] >= 0).sum())
            place(held, layer, chosen.int()[None].to(device), HALF_LIFE)
            chosen_by(slots, layer, chosen.tolist())
            assert np.array_equal(slots.slot_of, held.slot_of.cpu().numpy())
    assert held.usage.tolist() == [hits, turns * layers * TOPK - hits, 0, 0]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_an_expert_that_is_chosen_twice_takes_one_slot(device: str) -> None:
    """A hash layer's table may say so; it counts as two tokens, and as much room is needed as there are experts."""
    held, slots = Held.empty(2, 12, 4, torch.device(device)), Slots(2, 12, 4)
    for layer, experts in ((1, [3, 5, 3, 3]), (1, [7, 7, 5, 9]), (0, [3, 3, 1, 2]), (1, [3, 9, 9, 3])):
        place(held, layer, torch.tensor([experts], dtype=torch.int32, device=device), HALF_LIFE)
        chosen_by(slots, layer, sorted(set(experts)), [experts.count(e) for e in sorted(set(experts))])
        assert np.array_equal(slots.slot_of, held.slot_of.cpu().numpy())
    assert held.usage.tolist() == [2, 8, 0, 0]  # the 5 and, at last, the 3


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_every_byte_arrives(device: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses of the next layer are right or wrong, what was begun ahead has come before the choice is known, has not
    begun, or has come half.
    """
    sizes = (4096, 2048) if device == "cuda" else (128, 256)
    monkeypatch.setattr(moe_fetch, "CHUNK", 8192 if device == "cuda" else 512)
    dtype = torch.int8 if form == "fp4" else torch.float8_e4m3fn
    layers, experts, number = 3, 12, 16
    layout = ExpertLayout(form, dtype, *sizes)  # type: ignore[arg-type]
    memory, pool = layout.pool(layers * experts, pinned=device == "cuda"), layout.pool(number, device)
    generator = torch.Generator().manual_seed(0)
    for tensor in memory.tensors.values():
        tensor.view(torch.uint8).random_(0, 256, generator=generator)
    source_of = torch.randperm(layers * experts, generator=generator).int().view(layers, experts)
    places, held = source_of.to(device), Held.empty(layers, experts, number, torch.device(device))
    tensors, right, wrong, begun = (places, memory.tensors, pool.tensors), 0, 0, False

    def some() -> torch.Tensor:
        return torch.randperm(experts, generator=generator)[:TOPK].int()[None].to(device)

    chosen = some()
    for turn in range(24):
        layer, when = turn % layers, turn % 4
        number_ahead = int(held.ahead[layer, 1]) if begun else -1
        known = number_ahead - layer * experts in chosen[0].tolist()
        if begun and when == 0:
            fetch_ahead(held, layer, *tensors)
        if begun and when == 1:  # has come half, and goes on from there
            parts = list(moe_fetch._parts(memory.tensors, pool.tensors))
            parts[8] //= 2
            moe_fetch._fetch_ahead[moe_fetch._programs(held)](
                held.ahead[layer], places, *parts, CHUNK=moe_fetch.CHUNK, num_warps=8
            )
        place(held, layer, chosen, HALF_LIFE, begun)
        fetch(held, *tensors)
        if begun and when > 0:
            fetch_ahead(held, layer, *tensors)
        right, wrong = right + (begun and known), wrong + (number_ahead >= 0 and not known)
        assert held.usage.tolist()[2:] == [right + wrong, right]
        assert set((layer * experts + chosen[0]).tolist()) <= set(held.held.tolist())
        for slot, who in enumerate(held.held.tolist()):
            for name, tensor in pool.tensors.items():
                source = memory.tensors[name][int(source_of.view(-1)[who])]
                assert who < 0 or torch.equal(tensor[slot].view(torch.uint8).cpu(), source.view(torch.uint8))
        assert sorted(held.slot_of[held.slot_of >= 0].tolist()) == torch.nonzero(held.held >= 0)[:, 0].tolist()
        there, likely, begun = held.slot_of[layer].clone(), some(), layer + 1 < layers
        if begun:
            propose(held, layer + 1, likely, chosen)
            absent = [e for e in likely[0].tolist() if held.slot_of[layer + 1, e] < 0]
            assert held.ahead[layer + 1, :2].tolist() == [0, (layer + 1) * experts + absent[0] if absent else -1]
            assert torch.equal(there[chosen[0].long()], held.slot_of[layer, chosen[0].long()])  # computed meanwhile
        chosen = some() if turn % 5 < 3 else likely
    assert right > 2 < wrong


def test_what_does_not_fit_is_refused() -> None:
    held = Held.empty(2, 12, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="6 experts of layer 0 do not go into 4 slots"):
        place(held, 0, torch.arange(6, dtype=torch.int32)[None], HALF_LIFE)
    with pytest.raises(ValueError, match="layer 2"):
        place(held, 2, torch.arange(3, dtype=torch.int32)[None], HALF_LIFE)
    with pytest.raises(ValueError, match="int32"):
        place(held, 0, torch.arange(3)[None], HALF_LIFE)
