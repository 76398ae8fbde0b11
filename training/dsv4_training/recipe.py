"""A recipe: everything that decides a training run, read strictly from a TOML file.

Owns the keys, their meanings and their checks; every unknown or missing key is an error that names it.  Imports no
torch, so that a wrong recipe is refused at once.  Lengths and positions are in tokens, rates are peaks.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_engine.config import ModelConfig, QuantizationConfig, RopeScaling
from dsv4_engine.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
BLOCK = 128  # documents begin at multiples of it, so that no compressed entry mixes two
ATTENTION = ("dense", "warmup", "sparse")
EARLY = (1, 3)  # layers behind which things are to know their part, and answers the part of a thing
OPTIMISERS = ("muon", "adamw")
CODE_SOURCES = ("bundled", "stdlib")


class RecipeError(InputError):
    """A recipe that cannot be read or followed."""


@dataclass(frozen=True)
class Shape:
    """The model.  What is not here has one value (head_dim 128 with 64 rotated, YaRN and mHC as published)."""

    vocabulary: int = 4096
    hidden_size: int = 256
    heads: int = 4
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 128
    compress_ratios: tuple[int, ...] = (0, 4, 128, 4, 128, 4)
    index_heads: int = 2
    index_topk: int = 256
    experts: int = 12
    active_experts: int = 2
    expert_size: int = 128
    hash_layers: int = 3

    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            num_hidden_layers=len(self.compress_ratios),
            num_attention_heads=self.heads,
            head_dim=128,
            qk_rope_head_dim=64,
            q_lora_rank=self.q_lora_rank,
            o_groups=self.o_groups,
            o_lora_rank=self.o_lora_rank,
            sliding_window=128,
            compress_ratios=self.compress_ratios,
            index_n_heads=self.index_heads,
            index_head_dim=128,
            index_topk=self.index_topk,
            moe_intermediate_size=self.expert_size,
            n_routed_experts=self.experts,
            n_shared_experts=1,
            num_experts_per_tok=self.active_experts,
            num_hash_layers=self.hash_layers,
            norm_topk_prob=True,
            routed_scaling_factor=1.5,
            swiglu_limit=10.0,
            hc_mult=4,
            hc_eps=1e-6,
            hc_sinkhorn_iters=20,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            compress_rope_theta=160000.0,
            rope_scaling=RopeScaling(16, 65536, 32, 1),
            max_position_embeddings=1048576,
            bos_token_id=0,
            eos_token_id=1,
            num_nextn_predict_layers=1,
            mtp_compress_ratios=(0,),
            expert_dtype="fp4",
            quantization=QuantizationConfig(),
        )


@dataclass(frozen=True)
class Optimiser:
    """kind: muon (matrices; AdamW for the rest) or adamw (everything).  Betas, eps, momentum and decay as in the
    report.

    The rates rise over warmup_steps, stay, and fall in a straight line from the share ``decay_from`` of all steps on to
    ``last_scale`` of their peaks.
    """

    kind: str = "muon"
    muon_lr: float = 3e-3
    adam_lr: float = 5e-3
    momentum: float = 0.95
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-20
    clip: float = 1.0
    warmup_steps: int = 100
    decay_from: float = 0.3
    last_scale: float = 0.02


@dataclass(frozen=True)
class Losses:
    """Weights of the classes of text (facts.py): running text, what users write, answers, values asked for."""

    text: float = 0.5
    prompt: float = 0.1
    answer: float = 0.5
    value: float = 1.5


@dataclass(frozen=True)
class Routing:
    """Balance of the experts, and what is done about a spike of the loss (guard.py)."""

    bias_rate: float = 0.001
    balance: float = 1e-4
    guard: bool = True
    watch_every: int = 16  # steps between two looks at the loss; a snapshot is kept at each
    spike: float = 1.0  # nats above the best recent loss
    anticipate_steps: int = 64  # beyond the spike; 0: roll back only


@dataclass(frozen=True)
class Data:
    """Where text comes from and how much of what kind; the shares of documents add up to one."""

    code: str = "stdlib"
    needles: float = 0.56
    many_keys: float = 0.10
    tracking: float = 0.12
    code_lookup: float = 0.08
    told: float = 0.03
    talk: float = 0.07
    text: float = 0.04
    grouped: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    length: of a sequence, which holds whole documents; tokens: of a step; attention: dense, warmup (dense, and the
    indexer learns to imitate it) or sparse; mtp: weight of its loss, 0 leaves the block out; shortest: document;
    full: share of documents that fill the sequence; many, some, few: shares of documents by number of facts; jumps:
    share of documents with jumps of position, which end before position ``farthest``; index_rows: queries a step on
    which the indexer is taught; recompute: blocks keep their inputs only (memory for time); rate: times the optimiser's
    rates; binding: weight of the loss that ties things to the part they are in; hints: share of such things behind
    which the part's name stands again; data: where it is other than the recipe's.
    """

    name: str
    steps: int
    length: int
    tokens: int
    attention: str
    quantised: bool = True
    mtp: float = 0.1
    shortest: int = 256
    full: float = 0.4
    many: float = 0.3
    some: float = 0.35
    few: float = 0.35
    jumps: float = 0.0
    farthest: int = 1048576
    index_rows: int = 2048
    recompute: bool = False
    rate: float = 1.0
    binding: float = 0.0
    hints: float = 0.0
    data: Data | None = None

    @property
    def batch(self) -> int:
        """Sequences a step."""
        return self.tokens // self.length


@dataclass(frozen=True)
class Recipe:
    """gpu: whether it asks for one; without it a run takes what there is."""

    name: str
    seed: int
    gpu: bool
    stages: tuple[Stage, ...]
    model: Shape = field(default_factory=Shape)
    optimiser: Optimiser = field(default_factory=Optimiser)
    losses: Losses = field(default_factory=Losses)
    routing: Routing = field(default_factory=Routing)
    data: Data = field(default_factory=Data)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """The stage of step 0, 1, ..."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"the recipe has {self.steps} steps")

    def digest(self, steps: int) -> str:
        """Of what decides the first ``steps`` steps, so that what is ahead of a run may be edited.

        The rates are left out in so far as they fall with all tokens of the recipe.
        """
        begun, left = [], steps
        for stage in self.stages:
            if left > 0:
                begun.append(dataclasses.replace(stage, steps=min(left, stage.steps)))
            left -= stage.steps
        decided = dataclasses.asdict(dataclasses.replace(self, stages=tuple(begun)))
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def load(path: Path) -> Recipe:
    """Raises RecipeError for what cannot be read or followed."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read: {error.strerror}", f"Recipes that ship: {shipped()}."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} is not TOML: {error}", "See recipes/tiny.toml for the form.") from error
    recipe: Recipe = read(Recipe, table, "")
    check(recipe)
    return recipe


def shipped() -> str:
    return ", ".join(str(path) for path in sorted(RECIPES.glob("*.toml")))


def read(kind: Any, table: dict[str, Any], where: str) -> Any:
    """A dataclass from a table of TOML; ``where`` is the table's name for messages."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Keys there: {', '.join(fields)}."
            raise RecipeError(f"unknown key {_path(where, key)} in the recipe", hint)
    hints = typing.get_type_hints(kind)
    values = {}
    for name, spec in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], _path(where, name))
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise RecipeError(f"the recipe lacks {_path(where, name)}", "Keys without a default must be given.")
    return kind(**values)


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # of something and None, which is what a key that is not there means
        kind = typing.get_args(kind)[0]
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return read(kind, value, where)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        part = typing.get_args(kind)[0]
        return tuple(_value(part, item, f"{where}[{i}]") for i, item in enumerate(value))
    wanted = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(kind, ())
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        name = kind.__name__ if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) else "a list"
        raise RecipeError(f"{where} is {value!r}, which is not {name}", "See recipes/tiny.toml for the form.")
    return kind(value)


def check(recipe: Recipe) -> None:
    """Raises RecipeError for values that no run can follow."""

    def need(fine: bool, message: str, hint: str) -> None:
        if not fine:
            raise RecipeError(message, hint)

    need(bool(recipe.stages), "the recipe has no stages", "Give at least one [[stages]].")
    need(
        recipe.optimiser.kind in OPTIMISERS,
        f"optimiser.kind is {recipe.optimiser.kind!r}",
        f"One of {', '.join(OPTIMISERS)}.",
    )
    need(len(recipe.optimiser.betas) == 2, "optimiser.betas needs two values", "As in [0.9, 0.95].")
    need(recipe.data.code in CODE_SOURCES, f"data.code is {recipe.data.code!r}", f"One of {', '.join(CODE_SOURCES)}.")
    own = ((f"stage {stage.name!r}", stage.data) for stage in recipe.stages if stage.data is not None)
    for at, data in (("[data]", recipe.data), *own):
        shares = [getattr(data, f.name) for f in dataclasses.fields(Data) if f.name != "code"]
        need(
            all(s >= 0 for s in shares) and abs(sum(shares) - 1) < 1e-6,
            f"the shares in {at} add up to {sum(shares):g}",
            "They must be at least 0 and add up to 1.",
        )
        need(data.code == recipe.data.code, f"{at}: other code than in [data]", "A run has one source of code.")
    names = [stage.name for stage in recipe.stages]
    need(len(set(names)) == len(names), "two stages have the same name", "Metrics are told apart by it.")
    try:
        most = recipe.model.config().max_position_embeddings
    except InputError as error:
        raise RecipeError(f"[model] describes no model: {error}", error.hint) from error
    for stage in recipe.stages:
        at = f"stage {stage.name!r}"
        need(
            stage.length > 0 and stage.length % BLOCK == 0,
            f"{at}: length {stage.length} is not a multiple of {BLOCK}",
            f"Documents begin at multiples of {BLOCK}; {max(1, round(stage.length / BLOCK)) * BLOCK} is the nearest.",
        )
        need(
            stage.tokens > 0 and stage.tokens % stage.length == 0,
            f"{at}: {stage.tokens} tokens a step are not whole sequences of {stage.length}",
            f"{max(1, round(stage.tokens / stage.length)) * stage.length} is the nearest.",
        )
        need(stage.attention in ATTENTION, f"{at}: attention {stage.attention!r}", f"One of {', '.join(ATTENTION)}.")
        need(stage.steps > 0, f"{at}: {stage.steps} steps", "At least 1.")
        need(stage.rate > 0, f"{at}: rate {stage.rate:g}", "Above 0; 1 leaves the optimiser's rates as they are.")
        need(0 <= stage.hints <= 1, f"{at}: hints {stage.hints:g}", "A share, from 0 to 1.")
        need(
            stage.binding == 0 or (stage.binding > 0 and len(recipe.model.compress_ratios) > max(EARLY)),
            f"{at}: binding {stage.binding:g} with {len(recipe.model.compress_ratios)} layers",
            f"At least 0, and above 0 in a model of more than {max(EARLY)} layers only.",
        )
        need(
            stage.shortest <= stage.length,
            f"{at}: shortest {stage.shortest} is longer than its sequences",
            "Lower it.",
        )
        need(stage.length <= most, f"{at}: length {stage.length} is beyond the model's {most} positions", "Lower it.")
        need(
            stage.farthest % BLOCK == 0 and stage.length <= stage.farthest <= most,
            f"{at}: farthest {stage.farthest}",
            f"A multiple of {BLOCK} from its length to {most}.",
        )
        need(
            0 < stage.index_rows <= stage.tokens and stage.index_rows % stage.batch == 0,
            f"{at}: {stage.index_rows} index_rows for {stage.batch} sequences of {stage.length}",
            "As many for each sequence, and no more than there are tokens.",
        )
