"""Four-bit formats beside the published ones: error of weights, loss and KL on the bundled model, bytes of V4-Flash.

    python -m benchmarks.quantize_variants

Which matrices are rounded how is the only difference between the models: activations, cache and all other weights stay
as published.  The text is held out from the bundled model's training.  The second row says what the least change of
weights does, by moving roundings of activations and index picks: less than that cannot be told from nothing.
docs/quantize.md draws its conclusions from this.
"""

from __future__ import annotations

import json
import lzma
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_engine import Engine
from dsv4_engine.config import ModelConfig
from dsv4_engine.quantize.convert import encode_fp4, encode_fp8
from dsv4_engine.weights import Weights, tensor_specs
from dsv4_kernels.linear import Weight
from dsv4_training.corpus import parse

TOKENS = 6000
Rounding = Callable[[Tensor], Tensor]


def fp4(x: Tensor) -> Tensor:
    return encode_fp4(x)[0].dequantised(torch.float32)


def fp8(x: Tensor) -> Tensor:
    return encode_fp8(x)[0].dequantised(torch.float32)


def nudged(x: Tensor) -> Tensor:
    return x * (1 + 1e-6 * torch.randn_like(x))


def int4(group: int) -> Rounding:
    """Symmetric codes -7..7 with a BF16 scale a group, the best of nine clippings by squared error."""

    def rounded(x: Tensor) -> Tensor:
        x_OGB = x.unflatten(1, (-1, group))
        best, least = torch.zeros_like(x_OGB), torch.full(x_OGB.shape[:2], math.inf)
        for clip in torch.linspace(0.6, 1.0, 9).tolist():
            scale = (x_OGB.abs().amax(2, keepdim=True) * (clip / 7)).bfloat16().float().clamp_min(2.0**-126)
            value = (x_OGB / scale).round().clamp(-7, 7) * scale
            error = (value - x_OGB).square().sum(2)
            best = torch.where((error < least)[..., None], value, best)
            least = torch.minimum(error, least)
        return best.flatten(1)

    return rounded


@dataclass(frozen=True)
class Variant:
    """expert, linear: how these matrices are rounded further, None where they stay; bits: a weight, scales included."""

    name: str
    expert: Rounding | None
    linear: Rounding | None
    bits: tuple[float, float]


FP4_BITS, FP8_BITS = 4 + 8 / 32, 8 + 8 / 128**2
VARIANTS = (
    Variant("published: experts FP4, linears FP8", None, None, (FP4_BITS, FP8_BITS)),
    Variant("all moved by a millionth", nudged, nudged, (FP4_BITS, FP8_BITS)),
    Variant("experts FP8", fp8, None, (FP8_BITS, FP8_BITS)),
    Variant("FP4 everything", None, fp4, (FP4_BITS, FP4_BITS)),
    *(Variant(f"experts INT4, groups of {g}", int4(g), None, (4 + 16 / g, FP8_BITS)) for g in (32, 64, 128)),
    Variant("linears INT4, groups of 32", None, int4(32), (FP4_BITS, 4.5)),
    Variant("linears INT4, groups of 128", None, int4(128), (FP4_BITS, 4.125)),
)


def roles(config: ModelConfig) -> dict[str, str]:
    return {n.removesuffix(".weight"): s.role for n, s in tensor_specs(config, True).items() if n.endswith(".weight")}


@torch.inference_mode()
def logits(variant: Variant, ids: list[int]) -> tuple[Tensor, float]:
    """Logits [S, V] in float32, and the relative error of all matrices that the variant rounds."""
    role, plain = roles(ModelConfig.from_folder(Engine.load("tiny").path)), Weights.weight
    sums = [0.0, 0.0]

    def weight(self: Weights, name: str) -> Weight:
        held = plain(self, name)
        rounding = {"expert": variant.expert, "linear": variant.linear}.get(role[name])
        if rounding is None:
            return held
        x = held.dequantised(torch.float32)
        value = rounding(x)
        sums[0] += float((value - x).double().square().sum())
        sums[1] += float(x.double().square().sum())
        return Weight(value, round_activations=held.round_activations)

    with patch.object(Weights, "weight", weight):
        engine = Engine.load("tiny", ctx=len(ids))
    return engine.session().extend(ids, logits="all"), math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0


def trained_matrices() -> Tensor:
    """Every weight of the bundled model's linears: the nearest to unrounded weights that there is, in rows of 128."""
    engine = Engine.load("tiny")
    names = [n for n, r in roles(engine.config).items() if r == "linear" and f"{n}.weight" in engine.weights.specs]
    return torch.cat([engine.weights.weight(n).dequantised(torch.float32).reshape(-1, 128) for n in names])


def relative(x: Tensor, rounding: Rounding) -> float:
    return float((rounding(x) - x).norm() / x.norm())


def flash_bytes(bits: tuple[float, float]) -> float:
    """V4-Flash on disk, in GB: the published files with experts and linears of this many bits a weight."""
    size = {"expert": 0, "linear": 0}
    for spec in tensor_specs(ModelConfig.preset("v4-flash"), mtp=True).values():
        if spec.role in size:
            size[spec.role] += math.prod(spec.shape)
    saved = size["expert"] * (FP4_BITS - bits[0]) + size["linear"] * (FP8_BITS - bits[1])
    return (159_609_485_896 - saved / 8) / 1e9


def main() -> int:
    torch.manual_seed(0)
    print("relative error of one rounding        FP8     FP4   INT4/32  INT4/64  INT4/128")
    single = {}
    for name, x in (("normal", torch.randn(1 << 13, 128)), ("trained linears", trained_matrices())):
        single[name] = [relative(x, r) for r in (fp8, fp4, int4(32), int4(64), int4(128))]
        print(f"{name:32}" + "".join(f"{100 * error:8.2f}%" for error in single[name]))

    text = lzma.decompress((resources.files("dsv4_evals") / "data" / "corpus.txt.xz").read_bytes()).decode()
    tokenizer = Engine.load("tiny").tokenizer
    held_out = "\n\n".join(document.text for document in parse(text).evaluation)
    ids = [tokenizer.bos_id, *tokenizer.encode(held_out[: 8 * TOKENS], specials=False)][:TOKENS]
    target = torch.tensor(ids[1:])
    base = F.log_softmax(logits(VARIANTS[0], ids)[0][:-1].double(), -1)
    base_loss = float(F.nll_loss(base, target))
    print(f"\n{len(ids):,} tokens of held-out text")
    print(f"{'':38}{'error':>8}{'loss':>9}{'change':>9}{'KL':>10}{'same top':>10}{'Flash':>10}")
    rows = []
    for variant in VARIANTS:
        found, error = logits(variant, ids)
        q = F.log_softmax(found[:-1].double(), -1)
        loss, kl = float(F.nll_loss(q, target)), float((base.exp() * (base - q)).sum(-1).mean())
        same = float((base.argmax(-1) == q.argmax(-1)).double().mean())
        row = {"variant": variant.name, "error": error, "loss": loss, "change": loss - base_loss, "kl": kl,
               "same_top": same, "flash_gb": flash_bytes(variant.bits)}  # fmt: skip
        rows.append(row)
        print(f"{variant.name:38}{100 * error:7.2f}%{loss:9.4f}{loss - base_loss:+9.4f}{kl:10.5f}{100 * same:9.2f}%"
              f"{row['flash_gb']:7.1f} GB")  # fmt: skip
    print(json.dumps({"single": single, "variants": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
