"""Prefill and decode on one GPU against Transformers' deepseek_v4: V4-Flash's widths, same values, same process.

    python -m benchmarks.against_transformers_gpu [--layers 4] [--prefill 4K 8K 16K] [--decode 4K]

Random weights are drawn on the GPU in the published forms.  dsv4 computes on them packed (FP4 experts, FP8 linears,
activations and cache rounded as docs/numerics.md says).  Transformers has the same values in bfloat16, which holds them
exactly, and rounds nothing: its FP8 path takes kernels from the hub.  Its attention is its only one ("eager"), its
experts run in every way it has, of which the fastest counts.  The next token is the one with the largest
logit, chosen on the GPU on both sides.  Logits are compared first; where they disagree no ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.flash_gpu import GREEDY, last_layers, size
from benchmarks.timing import timed
from dsv4_engine.accounting import readable_bytes
from dsv4_engine.config import ModelConfig
from dsv4_engine.engine import Engine
from dsv4_engine.gpu.plan import gpu_memory_plan, published_form
from dsv4_engine.gpu.random_engine import backend_of_published, engine_over
from dsv4_engine.gpu.weights import RandomSource
from dsv4_engine.sampling import Sampler
from dsv4_engine.weights import tensor_specs
from dsv4_kernels.linear import Weight

# Relative RMS of a position's logits, median.  Unrelated logits are 1.4 away; what is rounded on one side only, and the
# experts and entries chosen otherwise for it, make up the rest.
TOLERANCE = 0.15
COMPARED, WARM = 700, 5  # tokens; steps before those that are timed
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # Transformers' ways through its experts
# Published names to Transformers' modules, one after the other; source: its conversion_mapping.py.
_PACKED = ("quantization_config", "expert_dtype")
RENAMED = (
    (r"^(embed)\.", r"model.\1_tokens."), (r"^head\.", "lm_head."), (r"^hc_head_", "model.hc_head.hc_"),
    (r"^(layers|norm)\.", r"model.\1."), (r"\.attn\.", ".self_attn."), (r"\.ffn\.", ".mlp."),
    (r"\.attn_norm\.", ".input_layernorm."), (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."), (r"\.attn_sink$", ".sinks"), (r"\.q_norm\.", ".q_a_norm."),
    (r"\.indexer\.compressor\.", ".compressor.indexer."), (r"self_attn\.indexer\.weights_proj", "self_attn.compressor"
    ".indexer.scorer.weights_proj"), (r"self_attn\.indexer\.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    (r"(compressor|indexer)\.norm\.", r"\1.kv_norm."), (r"\.ape$", ".position_bias"), (r"\.wq_(a|b)\.", r".q_\1_proj."),
    (r"\.wkv\.", ".kv_proj."), (r"\.wgate\.", ".gate_proj."), (r"\.wo_(a|b)\.", r".o_\1_proj."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"), (r"shared_experts\.w1\.", "shared_experts.gate_proj."),
    (r"shared_experts\.w2\.", "shared_experts.down_proj."), (r"shared_experts\.w3\.", "shared_experts.up_proj."),
)  # fmt: skip


class Peer:
    """Transformers' model on a device; its parameters are filled one by one under their published names."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        given = {key: value for key, value in config.to_dict().items() if key not in _PACKED}
        kind = transformers.models.deepseek_v4.DeepseekV4Config
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                kind.from_dict(given), dtype=torch.bfloat16, attn_implementation="eager"
            )
        self.model.eval().requires_grad_(False)
        self._inner, self.cache = config.moe_intermediate_size, None
        # As loading a checkpoint has it, but for norms: their weights are all 1, and 5.17 multiplies them as they are.
        kept = {part for part in self.model._keep_in_fp32_modules_strict if not part.endswith("norm")}
        self._places = dict(self.model.named_parameters())
        for name, value in self._places.items():
            value.data = value.data.to(torch.float32 if kept & set(name.split(".")) else torch.bfloat16)
        self._places |= {name: value for name, value in self.model.named_buffers() if name in self.model.state_dict()}
        self._left = set(self._places)

    @torch.no_grad()
    def take(self, name: str, value: Tensor) -> None:
        """A tensor under its published name."""
        expert = re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.w([123])\.weight", name)
        if expert is not None:
            layer, number, part = (int(x) for x in expert.groups())
            theirs = f"model.layers.{layer}.mlp.experts.{'down_proj' if part == 2 else 'gate_up_proj'}"
            place = self._places[theirs].data[number]
            if part != 2:  # gate above up
                place = place[: self._inner] if part == 1 else place[self._inner :]
        else:
            theirs = name
            for pattern, to in RENAMED:
                theirs = re.sub(pattern, to, theirs)
            place = self._places[theirs].data
        assert place.shape == value.shape, f"{name} is {tuple(value.shape)}, {theirs} {tuple(place.shape)}"
        place.copy_(value)
        self._left.discard(theirs)

    def check_filled(self) -> None:
        if self._left:
            version, left = transformers.__version__, sorted(self._left)[:8]
            raise SystemExit(f"Transformers {version} has tensors that no published one fills: {left}")

    @torch.inference_mode()
    def prefill(self, ids: Tensor, keep: int = 1) -> Tensor:
        """float32 logits of the last ``keep`` tokens, on the host (0: all)."""
        self.cache = None
        out = self.model(ids[None].to(self.model.device), use_cache=True, logits_to_keep=keep)
        self.cache = out.past_key_values
        return out.logits[0].float().cpu()

    @torch.inference_mode()
    def step(self, token: int) -> int:
        """The next token behind one more."""
        ids = torch.tensor([[token]], device=self.model.device)
        out = self.model(ids, past_key_values=self.cache, use_cache=True)
        return int(out.logits[0, -1].argmax())


class Shared(RandomSource):
    """Random weights that are handed to the peer too."""

    def __init__(self, config: ModelConfig, device: torch.device, peer: Peer) -> None:
        super().__init__(config, device)
        self._peer = peer

    def raw(self, name: str) -> Tensor:
        value = super().raw(name)
        self._peer.take(name, value)
        return value

    def packed_into(self, name: str, data: Tensor, scale: Tensor) -> None:
        super().packed_into(name, data, scale)
        form = self.form(f"{name}.weight")
        codes = data.view(torch.int8 if form == "fp4" else torch.float8_e4m3fn)
        weight = Weight(codes, scale.view(torch.float8_e8m0fnu), form)
        self._peer.take(f"{name}.weight", weight.dequantised(torch.bfloat16))


def distance(got: Tensor, want: Tensor) -> Tensor:
    """Relative RMS of each row."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


Times = dict[str, float]  # seconds by Transformers' way through its experts; without those that lack memory


def every_way(run: Callable[[], float], peer: Peer, ways: Sequence[str]) -> Times:
    """``run``'s seconds."""
    found = {}
    for way in ways:
        peer.model.set_experts_implementation(way)
        try:
            found[way] = run()
        except torch.OutOfMemoryError:
            peer.cache = None
            torch.cuda.empty_cache()
    return found


def row(what: str, ours: float, theirs: Times, agree: bool) -> dict[str, Any]:
    """Prints a line; the ratio is to the fastest way."""
    best = min(theirs.values(), default=None)
    line = f"{what:28}{1e3 * ours:12.2f} ms"
    if best is None:
        line += f"{'out of memory':>15}"
    else:
        ways = ", ".join(f"{way} {1e3 * seconds:.1f}" for way, seconds in theirs.items())
        ratio = f"{best / ours:.1f}x" if agree else "none: the outputs disagree"
        line += f"{1e3 * best:12.2f} ms{ratio:>10}  ({ways})"
    print(line, flush=True)
    return {"what": what, "dsv4_s": ours, "transformers_s": theirs}


def prefills(engine: Engine, peer: Peer, prompt: Tensor, repeats: int) -> tuple[float, Times]:
    """Median seconds of each side."""

    def median(run: Callable[[], object]) -> float:
        run()
        return statistics.median(timed(run) for _ in range(repeats))

    ours = median(lambda: engine.session().extend(prompt.tolist()))
    return ours, every_way(lambda: median(lambda: peer.prefill(prompt)), peer, EXPERTS[:2])


def steps(engine: Engine, peer: Peer, prompt: Tensor, repeats: int) -> tuple[float, Times]:
    """Median seconds of a decoded token, from token to token, behind the prompt."""
    session = engine.session()
    session.extend(prompt.tolist())
    sampler = Sampler(GREEDY)

    def ours(token: int) -> int:  # as `generate` does it
        logits = session.extend([token], logits="device")
        begun = sampler.begin(logits)
        assert begun is not None
        session.ahead(begun)
        return sampler.end(logits, begun)

    def median(step: Callable[[int], int]) -> float:
        token, times = 1, []
        for _ in range(repeats + WARM):
            start = time.perf_counter()
            token = step(token)
            times.append(time.perf_counter() - start)
        return statistics.median(times[WARM:])

    def theirs() -> float:
        peer.prefill(prompt)
        return median(peer.step)

    return median(ours), every_way(theirs, peer, EXPERTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="the last so many of V4-Flash's 43")
    parser.add_argument("--prefill", type=size, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--decode", type=size, nargs="*", default=[4096], help="contexts to decode at")
    parser.add_argument("--repeats", type=int, default=5, help="prefills to time, and four times as many steps")
    given = parser.parse_args()
    config = last_layers(ModelConfig.preset("v4-flash"), given.layers)
    backend = backend_of_published(config, "cuda:0")
    if backend.name != "triton":
        raise SystemExit(f"this measures the Triton kernels: {backend.why}")
    specs = tensor_specs(config, mtp=False)
    # Planned first, while all of the memory is free.
    plan = gpu_memory_plan(config, specs, lambda n: published_form(specs[n], config), backend, 1 << 16)
    peer = Peer(config, backend.device)
    engine = engine_over([Shared(config, backend.device, peer)], config, backend, plan, 1 << 16)
    peer.check_filled()
    torch.cuda.empty_cache()
    theirs = readable_bytes(sum(p.nbytes for p in peer.model.parameters()))
    print(f"V4-Flash's widths, {given.layers} of 43 layers, random weights: dsv4 {readable_bytes(plan.plan.weights)} "
          f"as published, Transformers {transformers.__version__} {theirs} in bfloat16; "
          f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)  # fmt: skip

    longest = max([COMPARED, *given.prefill, *given.decode])
    ids = torch.randint(config.vocab_size, (longest,), generator=torch.Generator().manual_seed(1))
    some = ids[:COMPARED]
    off = distance(engine.session().extend(some.tolist(), logits="all").cpu(), peer.prefill(some, 0))
    agree = bool(off.median() < TOLERANCE)
    print(f"logits of {COMPARED} tokens differ by {off.median():.3f} of their size (90%: {off.quantile(0.9):.3f}; "
          f"allowed for the median {TOLERANCE})", flush=True)  # fmt: skip
    rows = [
        row(f"prefill {tokens:,} tokens", *prefills(engine, peer, ids[:tokens], given.repeats), agree)
        for tokens in given.prefill
    ]
    rows += [
        row(f"decode a token at {tokens:,}", *steps(engine, peer, ids[:tokens], 4 * given.repeats), agree)
        for tokens in given.decode
    ]
    print(json.dumps({"layers": given.layers, "agree": agree, "off": float(off.median()), "rows": rows}))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
