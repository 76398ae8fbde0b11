"""A loaded model and what it is: `Engine.load` opens, checks, plans and builds; sessions do the running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsv4_kernels.backend import Backend, choose_backend

from .checkpoint import Checkpoint
from .config import ModelConfig
from .device_map import AUTO, Limits, chosen_map
from .errors import DeviceError, InputError
from .following import LeadingModel, lead
from .free_memory import available_memory
from .gpu.choice import with_triton
from .lanes import Lanes
from .locate import resolve_model
from .model import Model
from .offload.disk import ExpertFiles
from .offload.store import ExpertStore
from .part import Part
from .placement import MemoryPlan, memory_plan
from .ranks import join, launched
from .session import Progress, Session
from .source import Source
from .state import KV_DTYPES, KvDtype
from .token_step import TokenStep
from .weights import Weights

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_PLAN_CTX = 131_072
# Below this a decode step gains nothing from more threads, and waits for each of them wherever a core is busy with
# something else (docs/performance.md).
SMALL_WEIGHTS = 256 << 20


@dataclass(frozen=True)
class Engine:
    """A checkpoint ready to run.  Immutable: everything that grows is in its sessions.

    ctx: the most tokens a session may hold; chunk: tokens of a prefill chunk.
    """

    model: Model
    weights: Weights
    config: ModelConfig
    path: Path
    name: str
    backend: Backend
    dtype: str
    kv_dtype: KvDtype
    ctx: int
    chunk: int
    plan: MemoryPlan

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        kv_dtype: str = "mixed",
        ctx: int | None = None,
        progress: Progress | None = None,
        limits: Limits = Limits(),  # noqa: B008  # frozen
        device_map: str | Path = AUTO,
    ) -> Engine:
        """Open the checkpoint ``path`` (a folder, an alias or a downloaded hub id).

        device: cpu, cuda (torch's current one), cuda:N, or several (cuda:N,cuda:M or cuda:all), which share the layers;
        one that cannot be used is a DeviceError that says why.
        dtype: float32 | bfloat16, compute for unquantised weights; kv_dtype: mixed | bf16 | fp32 (docs/numerics.md);
        ctx: the context to plan memory for and to hold sessions to; None holds them to what the memory allows, at
        most the model's own limit.
        limits: of memory to use; device_map: auto | balanced | a JSON file (device_map.py): what lies where.
        Routed experts that do not fit stay in the files, and as many as fit are held (docs/offload.md).
        progress(done, total) counts bytes of the files; half of a tensor's when it is checked, half once in place.
        Raises an InputError (with a next step) for anything wrong with the files or the arguments, and
        MemoryPlanError when the model does not fit.
        Under torchrun this is rank 0's call: the other processes are in `following.follow` and load their shares.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", "Choose one of these.")
        if kv_dtype not in KV_DTYPES:
            raise InputError(f"kv_dtype {kv_dtype!r} is not one of {', '.join(KV_DTYPES)}", "Choose one of these.")
        ranks = launched()
        join(ranks)
        try:
            backend = choose_backend(ranks.device(device))
        except ValueError as error:
            raise DeviceError(str(error), "Use --device cpu.") from error
        folder = resolve_model(path)
        config = ModelConfig.from_folder(folder)
        if ctx is not None and not 0 < ctx <= config.max_position_embeddings:
            raise InputError(
                f"a context of {ctx:,} tokens is outside the model's 1 to {config.max_position_embeddings:,}",
                "Give a context within that range.",
            )
        weights = Weights.open(Checkpoint.open(folder), config, values=False)
        ranks.check(config, quantised=weights.forms["layers.0.attn.wo_b.weight"] != "plain")
        planned = ctx or min(config.max_position_embeddings, DEFAULT_PLAN_CTX)
        if ranks.count == 1:
            backend = with_triton(backend, config, weights.forms, dtype, kv_dtype)
        seen = _counter(progress, weights.total_bytes)
        kv: KvDtype = kv_dtype  # type: ignore[assignment]  # checked above
        # Values are checked after the plan: reading gigabytes of scales should not delay a "does not fit".
        if backend.name == "triton":
            from .gpu.model import gpu_model  # needs triton, as nothing before does

            model, plan = gpu_model(weights, config, backend, planned, seen, limits, device_map)
        else:
            where = chosen_map(device_map, config, [str(backend.device)])
            held = weights if ranks.count == 1 else Part(weights, config, ranks)
            if limits.cpu is None and ranks.beside > 1:  # the processes of one machine share its memory
                limits = replace(limits, cpu=available_memory() // ranks.beside)
            plan = memory_plan(
                config, held, str(backend.device), dtype, kv_dtype, planned, limits, where, alone=ranks.count == 1
            )
            if ranks.leads:  # only now, so that what is wrong with the files or the arguments is said once
                formats = {"dtype": dtype, "kv_dtype": kv_dtype}
                lead(ranks, path=path, device=device, **formats, ctx=ctx, limits=limits, device_map=device_map)
            weights.check_values(seen, apart=plan.device_map.apart())
            store = None
            if plan.slots:
                own, apart = range(*ranks.share(config.n_routed_experts)), plan.device_map.apart()
                store = ExpertStore(ExpertFiles(weights), config, plan.slots, apart, own=own)
            source = Source(
                weights, DTYPES[dtype], plan.expand, seen=seen, device=backend.device, ranks=ranks, store=store
            )
            model = LeadingModel(source, config, kv) if ranks.leads else Model(source, config, kv)
        return cls(
            model=model,
            weights=weights,
            config=config,
            path=folder,
            name=str(path),
            backend=backend,
            dtype=dtype,
            kv_dtype=kv,
            ctx=ctx or min(config.max_position_embeddings, plan.max_ctx),
            chunk=plan.chunk,
            plan=plan,
        )

    @property
    def device(self) -> str:
        return str(self.backend)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; work on token ids needs none.  Raises TokenizerError when none fits."""
        from .tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path, self.config.vocab_size)

    def session(self) -> Session:
        """A new, empty sequence."""
        return Session(self.model, self.model.new_state(), [], self.ctx, self.chunk, self._step, self._lanes)

    @cached_property
    def _step(self) -> TokenStep | None:
        small = self.plan.expand and self.plan.weights < SMALL_WEIGHTS and self.model.ranks.count == 1
        return TokenStep(self.model) if small and TokenStep.possible(self.model) else None

    @cached_property
    def _lanes(self) -> Lanes | None:
        return Lanes(self.model, self.plan.lanes) if self.plan.lanes > 1 else None


def _counter(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """Adds up sizes of tensors that are seen twice and tells ``progress``; None where nobody listens."""
    if progress is None:
        return None
    twice = 0

    def seen(size: int) -> None:
        nonlocal twice
        twice += size
        progress(twice // 2, total)

    return seen
