"""Routed experts in page-locked memory behind a GPU with a memory limit: steps, prefill, hit rates, link traffic.

    python -m benchmarks.offload [--layers 24] [--limits 24,48,80] [--steps 16] [--prefill 8192] [--accelerate 4]

V4-Flash at full width with random weights, as many of its 43 layers as memory holds.  Each limit gives the GPU the
share of all experts that the plan for all 43 layers gives it (`dsv4 inspect v4-flash --plan --gpu-mem ...`).  A step
may at best take the longer of computing (all experts on the GPU, one graph) and its missed experts' bytes over the
link, which is measured.  Routing is set from outside, by the router's biases: uniformly random, or drawn with weights
of 1 / rank.  The layer before names 60% of a layer's experts, or 90%, or is not asked (`unasked`); what else it names
comes near.  Logits are compared with those of all experts on the GPU first.  Accelerate's plain offload runs on the
same weights: `cpu_offload` on a layer's experts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsv4_engine.config import ModelConfig
from dsv4_engine.device_map import DeviceMap
from dsv4_engine.gpu.apart import GpuPool, Residency, with_pools
from dsv4_engine.gpu.apart_plan import Machine, apart_plan
from dsv4_engine.gpu.decode import Steps
from dsv4_engine.gpu.layer import GpuExperts
from dsv4_engine.gpu.model import GpuModel
from dsv4_engine.gpu.weights import RandomSource
from dsv4_engine.offload.layout import ExpertLayout, ExpertPool
from dsv4_engine.offload.policy import Slots
from dsv4_engine.offload.store import ExpertStore
from dsv4_engine.random_weights import first_layers
from dsv4_engine.weights import Published

GIB = 1 << 30
CTX = 131_072
GUESSED = 0.6  # of a layer's experts, which the layer before names: 0.54 to 0.69 of the bundled model's
HELD = 4096  # tokens before the steps
# Name, whether some experts are chosen more often, and the share that the layer before names (None: it is not asked).
ROUTINGS = (
    ("uniform", False, GUESSED), ("uniform, not asked", False, None),
    ("skewed", True, GUESSED), ("skewed, not asked", True, None), ("skewed, 90% named", True, 0.9),
)  # fmt: skip
SETTLED = 256  # tokens that the pool has seen before steps are counted: two half-lives
WARM_STEPS = 8
DEVICE = torch.device("cuda", 0)


class RandomExperts:
    """Experts drawn on the GPU and laid into memory; stands for a checkpoint's files."""

    def __init__(self, config: ModelConfig) -> None:
        self.layout = ExpertLayout.published(config)
        self.layers = [f"layers.{i}.ffn." for i in range(config.num_hidden_layers)]
        self._generator = torch.Generator(DEVICE).manual_seed(1)
        self._drawn = {
            name: torch.empty(shape, dtype=torch.uint8, device=DEVICE) for name, shape in self.layout.shapes.items()
        }

    def read(self, layer: int, expert: int, pool: ExpertPool, slot: int) -> int:
        for name, values in self._drawn.items():
            if name.startswith("s"):  # as random_weights.py scales them, for 4096 and 2048 inputs
                values.fill_(119 if name == "s13" else 120)
            else:
                values.random_(0, 256, generator=self._generator)
            pool.tensors[name][slot].view(torch.uint8).copy_(values, non_blocking=True)
        return self.layout.nbytes


def filled_store(config: ModelConfig) -> ExpertStore:
    """All experts in page-locked memory, expert e of layer l in slot l E + e."""
    number = config.num_hidden_layers * config.n_routed_experts
    reader = RandomExperts(config)
    store = ExpertStore(reader, config, number, pinned=True)
    for layer in range(config.num_hidden_layers):
        for expert in range(config.n_routed_experts):
            slot = store.slots.claim(layer, expert)
            assert slot == layer * config.n_routed_experts + expert
            reader.read(layer, expert, store.pool, slot)
            store.slots.unpin(slot)
    torch.cuda.synchronize()
    return store


def model_over(config: ModelConfig, store: ExpertStore, slots: int) -> tuple[GpuModel, Residency]:
    """The model with ``slots`` experts on the GPU; its other weights are the same each time."""
    source = RandomSource(config, DEVICE, seed=0)
    ranges = [(0, config.num_hidden_layers)]
    with torch.inference_mode():
        residency = with_pools([source], config, ranges, range(config.num_hidden_layers), [slots], store)
        model = GpuModel([source], config, ranges, residency)
    # A random source draws anew whenever it is asked.
    tables = {block.layer: block.ffn.table for block in model.blocks if block.ffn.table is not None}
    residency.hashed = {layer: table.cpu().numpy() for layer, table in tables.items()}
    return model, residency


def pool_of(residency: Residency) -> GpuPool:
    return next(iter(residency.pools.values()))


class Guess:
    """Stands for the next layer where its router is asked beforehand: asks it, and gives what was set."""

    def __init__(self, experts: GpuExperts, config: ModelConfig) -> None:
        self._experts = experts
        self.likely = torch.zeros(1, config.num_experts_per_tok, dtype=torch.int32, device=DEVICE)

    def routed(self, u_SD: Tensor, token_ids_S: Tensor) -> tuple[Tensor, Tensor]:
        return self.likely, self._experts.routed(u_SD, token_ids_S)[1]


class Routing:
    """Sets which experts a step chooses: the six largest of a layer's biases, which are far larger than scores.

    guessed: the share of them that the layer before names; None: nobody asks it.
    """

    def __init__(self, config: ModelConfig, model: GpuModel, skewed: bool, guessed: float | None = None) -> None:
        self._biases = [b.ffn.bias for b in model.blocks if b.ffn.bias is not None]
        self._guessed, self.topk, self._guesses = guessed, config.num_experts_per_tok, list[Guess]()
        for block, after in pairwise(model.blocks):
            block.ffn.following = None if guessed is None else after.ffn
            if guessed is not None and after.ffn.bias is not None:
                self._guesses.append(Guess(after.ffn, config))
                block.ffn.following = self._guesses[-1]  # type: ignore[assignment]
        model._steps = Steps(model.stages, model.chosen, recorded=True)  # records anew
        # One for what is chosen, so that it does not depend on what is named.
        self._generator, self._guesser = torch.Generator().manual_seed(2), torch.Generator().manual_seed(5)
        self._vocabulary, self._experts = config.vocab_size, config.n_routed_experts
        weights = 1 / torch.arange(1, self._experts + 1) if skewed else torch.ones(self._experts)
        # Which experts are frequent differs from layer to layer.
        self._log = torch.stack([weights.log()[torch.randperm(self._experts, generator=self._generator)]
                                 for _ in self._biases])  # fmt: skip

    def draw(self) -> tuple[Tensor, Tensor]:
        """A token, and what its experts are the largest of, by layer; the hash layers' follow from the token."""
        noise = torch.rand(self._log.shape, generator=self._generator).log().neg().log().neg()
        token = torch.randint(self._vocabulary, (1,), generator=self._generator)
        return token, (self._log + noise) * 1000  # Gumbel: without replacement, by weight

    def next(self) -> Tensor:
        """Draw a token and set the experts of its layers."""
        token, drawn = self.draw()
        drawn = drawn.to(DEVICE)
        for bias, values in zip(self._biases, drawn, strict=True):
            bias.copy_(values)
        for guess, values in zip(self._guesses, drawn[len(drawn) - len(self._guesses) :], strict=True):
            assert self._guessed is not None
            experts = values.topk(2 * self.topk).indices
            right = torch.rand(self.topk, generator=self._guesser) < self._guessed  # else one that comes near
            named = torch.where(right.to(DEVICE), experts[: self.topk], experts[self.topk :])
            guess.likely.copy_(named[torch.randperm(self.topk, generator=self._guesser).to(DEVICE)][None])
        torch.cuda.synchronize()
        return token


def steps(model: GpuModel, routing: Routing, state: Any, count: int) -> list[float]:
    """Seconds of each step."""
    found = []
    for _ in range(count):
        token = routing.next()
        before = time.perf_counter()
        state.save()
        model.logits(model.forward(token, state))
        torch.cuda.synchronize()
        found.append(time.perf_counter() - before)
    return found


def link_rate(store: ExpertStore, pool: GpuPool) -> float:
    """Bytes a second of copies from memory, as large as experts are, all over memory."""
    source, target = store.pool.tensors["w13"], pool.pool.tensors["w13"]
    rows = list(range(0, source.shape[0], max(1, source.shape[0] // 200)))
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        before = time.perf_counter()
        for i, row in enumerate(rows):
            target[i % target.shape[0]].copy_(source[row], non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, len(rows) * source[0].nbytes / (time.perf_counter() - before))
    return best


def settled(residency: Residency, routing: Routing) -> None:
    """The pool's table as after SETTLED tokens; what is in the slots does not matter where routing is set."""
    pool, hashed = pool_of(residency), residency.hashed
    pool.begin(tokens=2)
    slots = Slots(pool.slots.layers, pool.slots.experts, pool.slots.slots)
    for _ in range(SETTLED):
        token, drawn = routing.draw()
        chosen = np.concatenate([np.stack([hashed[layer][int(token)] for layer in sorted(hashed)]),
                                 drawn.topk(routing.topk).indices.numpy()])  # fmt: skip
        for layer, experts in enumerate(np.unique(each).tolist() for each in chosen):
            there = [int(slot) for slot in slots.slot_of[layer, experts] if slot >= 0]
            slots.pin_only(there)
            for expert in experts:
                if slots.slot_of[layer, expert] < 0:
                    slots.claim(layer, expert)
            slots.used(layer, 1, experts, [1] * len(experts))
    pool.slots.hold(*slots.held())
    pool._pinned, pool._early, pool._arrived = [], {}, {}


def prefill_seconds(model: GpuModel, config: ModelConfig, tokens: int) -> float:
    """Of a second chunk; the first one compiles and fills the pool."""
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        if block.ffn.bias is not None:
            block.ffn.bias.zero_()
    state = model.new_state()
    for _ in range(2):
        ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
        torch.cuda.synchronize()
        before = time.perf_counter()
        state.save()
        model.forward(ids, state)
        torch.cuda.synchronize()
        took = time.perf_counter() - before
    return took


def begun(model: GpuModel, config: ModelConfig) -> tuple[Tensor, Any]:
    """Logits behind HELD tokens and behind some steps, with the router's own choice; and the state to go on from."""
    ids = torch.randint(config.vocab_size, (HELD + 8,), generator=torch.Generator().manual_seed(4))
    state, found = model.new_state(), []
    for piece in ids.split([HELD, *[1] * 8]):
        state.save()
        found.append(model.logits(model.forward(piece, state)[-1:]).cpu().clone())
    return torch.cat(found), state


@torch.inference_mode()
def measured(config: ModelConfig, store: ExpertStore, slots: int, given: argparse.Namespace) -> dict[str, Any]:
    """One pool size: steps under both routings, prefill, memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, residency = model_over(config, store, slots)
    logits, state = begun(model, config)
    row: dict[str, Any] = {"slots": slots, "share": slots / store.pool.slots, "logits": logits}
    row["link"] = link_rate(store, pool_of(residency))
    for name, skewed, guessed in ROUTINGS:
        routing = Routing(config, model, skewed, guessed)
        settled(residency, routing)
        steps(model, routing, state, WARM_STEPS)
        before = vars(residency.usage)
        took = steps(model, routing, state, given.steps)
        delta = {key: value - before[key] for key, value in vars(residency.usage).items()}
        row[name] = {
            "ms": 1e3 * statistics.median(took),
            "hit_rate": delta["hits"] / (delta["hits"] + delta["misses"]),
            "bytes": delta["bytes"] / given.steps,
        }
    if given.prefill:
        row["prefill_s"] = prefill_seconds(model, config, given.prefill)
    row["peak"] = torch.cuda.max_memory_allocated()
    return row


@torch.inference_mode()
def resident(config: ModelConfig, store: ExpertStore, given: argparse.Namespace) -> dict[str, Any]:
    """All experts on the GPU, one graph: what computing takes."""
    model, residency = model_over(config, store, store.pool.slots)
    logits, state = begun(model, config)
    row: dict[str, Any] = {"logits": logits}
    model.chosen, model._steps = None, Steps(model.stages, None)
    pool = pool_of(residency)
    pool.begin(tokens=2)
    for layer in range(config.num_hidden_layers):
        for expert in range(config.n_routed_experts):
            if pool.slots.slot_of[layer, expert] < 0:
                pool.slots.unpin(pool._into_slot(layer, expert, layer * config.n_routed_experts + expert))
        pool._publish(layer, True)
    torch.cuda.synchronize()
    if given.prefill:
        row["prefill_s"] = prefill_seconds(model, config, given.prefill)
    routing = Routing(config, model, skewed=False)
    took = steps(model, routing, state, 8 + given.steps)[8:]
    return row | {"ms": 1e3 * statistics.median(took)}


class LayerExperts(nn.Module):
    """A layer's experts as one module, as Transformers holds them."""

    def __init__(self, store: ExpertStore, layer: int, run: Callable[..., Tensor]) -> None:
        super().__init__()
        number, self._run = store.slots.experts, run
        for name, tensor in store.pool.tensors.items():
            mine = tensor[layer * number : (layer + 1) * number].view(torch.uint8)
            setattr(self, name, nn.Parameter(mine, requires_grad=False))
        self._table = torch.arange(number, dtype=torch.int32, device=DEVICE)

    def forward(self, x: Any, chosen: Tensor, weights: Tensor, limit: float) -> Tensor:
        from dsv4_kernels.triton.moe import ExpertPool as KernelPool

        w13, s13, w2, s2 = (getattr(self, name).data for name in ("w13", "s13", "w2", "s2"))
        pool = KernelPool(w13, s13, w2, s2, self._table)
        return self._run(x, chosen, weights, pool, limit)


def accelerate_step(store: ExpertStore, config: ModelConfig, layers: int) -> dict[str, float]:
    """Seconds a layer's experts take under Accelerate's plain offload, for one token."""
    from accelerate import cpu_offload

    from dsv4_kernels.triton.moe import routed_experts
    from dsv4_kernels.triton.rounded import round_activations

    x = round_activations(torch.randn(1, config.hidden_size, device=DEVICE, dtype=torch.bfloat16))
    chosen = torch.arange(config.num_experts_per_tok, dtype=torch.int32, device=DEVICE)[None]
    weights = torch.full(chosen.shape, 0.2, device=DEVICE)
    times = []
    for layer in range(layers):
        module = cpu_offload(LayerExperts(store, layer, routed_experts), execution_device=DEVICE)
        for _ in range(3):
            torch.cuda.synchronize()
            before = time.perf_counter()
            with torch.no_grad():
                module(x, chosen, weights, config.swiglu_limit)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
    return {"ms_a_layer": 1e3 * statistics.median(times)}


def slots_for(whole: ModelConfig, limit: int, layers: int) -> tuple[int, float]:
    """The same share of experts as all layers would have under a limit; and that share."""
    published = Published(whole)
    machine = Machine(("cuda:0",), (limit,), 1 << 50, 0)
    home = DeviceMap("cuda:0", ("cuda:0",) * whole.num_hidden_layers, ("cpu",) * whole.num_hidden_layers, "cuda:0")
    plan = apart_plan(whole, published.specs, published.form, machine, CTX, home)
    share = plan.gpu_slots[0] / plan.experts
    return max(whole.n_routed_experts, round(share * layers * whole.n_routed_experts)), share


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--limits", default="24,48,80", help="GiB of GPU memory")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of a chunk; 0: none")
    parser.add_argument("--accelerate", type=int, default=3, help="layers to time under Accelerate; 0: none")
    given = parser.parse_args(arguments)
    whole = ModelConfig.preset("v4-flash")
    config = first_layers(whole, given.layers)
    scale = whole.num_hidden_layers / given.layers
    started = time.perf_counter()
    store = filled_store(config)
    print(f"{given.layers} layers, {store.pool.nbytes / GIB:.1f} GiB of experts locked and drawn in "
          f"{time.perf_counter() - started:.1f} s", flush=True)  # fmt: skip
    full = resident(config, store, given)
    least = full["ms"]
    print(f"all on the GPU: step {least:.2f} ms; prefill {full.get('prefill_s', 0):.2f} s", flush=True)
    print(f"{'limit':>6}{'share':>7} {'routing':17}{'hits':>6}{'MB':>7}{'step':>9}{'link':>9}{'ratio':>7}"
          f"{'tok/s x43':>10}{'prefill':>9}{'peak':>7}")  # fmt: skip
    rows = []
    for limit in (float(text) for text in given.limits.split(",")):
        slots, _ = slots_for(whole, int(limit * GIB), given.layers)
        row = measured(config, store, slots, given) | {"limit_gib": limit}
        same = torch.equal(row.pop("logits"), full["logits"])
        for name, _, _ in ROUTINGS:
            found = row[name]
            found["link_ms"] = 1e3 * found["bytes"] / row["link"]
            found["ratio"] = found["ms"] / max(found["link_ms"], least)
            found["tok_s_43"] = 1e3 / (found["ms"] * scale)
            prefill = f"{given.prefill / (row['prefill_s'] * scale):7.0f}/s" if "prefill_s" in row else ""
            print(f"{limit:6.0f}{row['share']:7.1%} {name:17}{found['hit_rate']:6.0%}{found['bytes'] / 1e6:7.0f}"
                  f"{found['ms']:7.2f}ms{found['link_ms']:7.2f}ms{found['ratio']:7.2f}{found['tok_s_43']:10.1f}{prefill:>9}"
                  f"{row['peak'] / GIB:7.1f}", flush=True)  # fmt: skip
        print(f"       link {row['link'] / 1e9:.1f} GB/s; logits {'equal' if same else 'DIFFER'}", flush=True)
        rows.append(row | {"same": same})
    peer = accelerate_step(store, config, given.accelerate) if given.accelerate else None
    if peer is not None:
        ours = rows[0]["uniform"]["ms"] / given.layers
        print(f"Accelerate's plain offload: {peer['ms_a_layer']:.1f} ms a layer for its experts alone; "
              f"ours {ours:.2f} ms for the whole layer: {peer['ms_a_layer'] / ours:.0f} times")  # fmt: skip
    full.pop("logits")
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": given.layers,
                      "resident": full, "rows": rows, "accelerate": peer}))  # fmt: skip


if __name__ == "__main__":
    main()
