"""An engine over random weights that are made where they are used, to time a model that is not there.

Every figure obtained so has to say so: `Engine.name` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dsv4_kernels.backend import Backend, choose_backend

from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..engine import Engine
from ..errors import DeviceError
from ..weights import Weights, tensor_specs
from .choice import with_triton
from .plan import GpuPlan, gpu_memory_plan, published_form

if TYPE_CHECKING:
    from .weights import RandomSource


def backend_of_published(config: ModelConfig, device: str, dtype: str = "bfloat16", kv_dtype: str = "mixed") -> Backend:
    """What would run this model's published checkpoint on ``device``.  Raises DeviceError as Engine.load does."""
    forms = {name: published_form(spec, config) for name, spec in tensor_specs(config, mtp=False).items()}
    try:
        backend = choose_backend(device)
    except ValueError as error:
        raise DeviceError(str(error), "Use --device cpu.") from error
    return with_triton(backend, config, forms, dtype, kv_dtype)


def random_engine(config: ModelConfig, backend: Backend, ctx: int, seed: int = 0) -> Engine:
    """A model of this configuration with random weights in the published forms, ready for ``ctx`` tokens.

    backend: a "triton" one (`backend_of_published`).  Raises MemoryPlanError where it does not fit.
    """
    from .weights import RandomSource

    specs = tensor_specs(config, mtp=False)
    plan = gpu_memory_plan(config, specs, lambda name: published_form(specs[name], config), backend, ctx)
    return engine_over([RandomSource(config, place, seed) for place in backend.devices], config, backend, plan, ctx)


def engine_over(
    sources: Sequence[RandomSource], config: ModelConfig, backend: Backend, plan: GpuPlan, ctx: int
) -> Engine:
    """As `random_engine`, over one source of random weights for each device and a plan that was made before."""
    from .model import as_model

    specs = tensor_specs(config, mtp=False)
    forms = {name: published_form(spec, config) for name, spec in specs.items()}
    model, memory = as_model(sources, config, plan)
    nothing: MappingProxyType[str, str] = MappingProxyType({})
    absent = Checkpoint(Path(), MappingProxyType({}), nothing, MappingProxyType({}))
    name = f"random weights, seed {sources[0].seed}"
    weights = Weights(absent, config, MappingProxyType(specs), MappingProxyType(forms), (), False, name, nothing)
    return Engine(
        model=model,
        weights=weights,
        config=config,
        path=Path(),
        name=name,
        backend=backend,
        dtype="bfloat16",
        kv_dtype="mixed",
        ctx=ctx,
        chunk=memory.chunk,
        plan=memory,
    )
