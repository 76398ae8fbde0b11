"""What `doctor` finds out: versions, devices, memory, and whether they compute.  Collects; prints nothing."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dsv4cli.errors import explain
from dsv4cli.options import Dtype, computed_in

# The packages dsv4 stands on.
REQUIRED = (
    "torch",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "accelerate",
    "numpy",
    "psutil",
    "pathspec",
    "typer",
    "rich",
    "prompt-toolkit",
    "matplotlib",
    "plotext",
)
# Only where there is a GPU; a CPU build of torch comes without it.
TRITON_VERSIONS = "triton>=3.6,<3.10"
_REPORT = "Report this, with the output of `dsv4 doctor --json`."


@dataclass
class Findings:
    """Everything found; ``problems`` keep the CPU path from working, ``missing`` does not."""

    dsv4: str
    python: str
    system: str
    packages: dict[str, str | None]
    cpu: dict[str, Any]
    gpus: list[dict[str, Any]] = field(default_factory=list)
    backends: dict[str, str | None] = field(default_factory=dict)
    self_check: dict[str, Any] = field(default_factory=dict)
    missing: list[dict[str, str]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def examine() -> Findings:
    """Look at this machine and this installation.  Raises nothing: what fails becomes a problem."""
    found = Findings(
        dsv4=_version("dsv4") or "source tree",
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: _version(name) for name in (*REQUIRED, "triton")},
        cpu={"count": os.cpu_count()},
    )
    for name in REQUIRED:
        if found.packages[name] is None:
            _problem(found, f"the package {name} is not installed", "Install dsv4 again.")
    _memory(found)
    _devices(found)
    _compute(found)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _problem(found: Findings, what: str, how: str) -> None:
    found.problems.append({"what": what, "how": how})


def _memory(found: Findings) -> None:
    if found.packages["psutil"] is None:
        return
    import psutil

    memory = psutil.virtual_memory()
    found.cpu |= {"memory_bytes": memory.total, "available_bytes": memory.available}


def _devices(found: Findings) -> None:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that torch brings does not load
        _problem(found, f"torch cannot be imported: {error}", "Install torch again, as its site says for this system.")
        return
    found.cpu["threads"] = torch.get_num_threads()
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.gpus.append(
            {"device": f"cuda:{index}", "name": card.name, "memory_bytes": card.total_memory,
             "capability": f"{card.major}.{card.minor}"}
        )  # fmt: skip
    if found.gpus and found.packages["triton"] is None:
        how = f"pip install '{TRITON_VERSIONS}'"
        found.missing.append({"what": "triton", "for": "kernels for NVIDIA GPUs", "how": how})


def _backends(found: Findings) -> None:
    """What computes on each device; None, and the reason among what is missing, where nothing does."""
    from dsv4_engine.engine import choose_backend

    for device in ("cpu", *(gpu["device"] for gpu in found.gpus)):
        try:
            found.backends[device] = choose_backend(device).name
        except ValueError as error:
            found.backends[device] = None
            how = "Use --device cpu, or install a build of torch for this GPU."
            found.missing.append({"what": device, "for": f"computing there: {error}", "how": how})


def _compute(found: Findings) -> None:
    """Load the bundled model and feed it a few tokens on each device: the shortest proof that all is in place."""
    if "torch" not in sys.modules:
        return
    try:
        _backends(found)
        found.self_check = _self_check("cpu")
    except Exception as error:  # whatever it is, it is what the person needs to be told
        report = explain(error)
        _problem(found, f"the bundled model does not compute: {report.message}", report.hint)
        return
    if not found.self_check["finite"]:
        _problem(found, "the bundled model computes no finite numbers", _REPORT)
    for gpu in (gpu for gpu in found.gpus if found.backends[gpu["device"]]):
        device = gpu["device"]
        try:
            gpu["self_check"] = _self_check(device)
            found.backends[device] = gpu["self_check"]["backend"]  # kernels are chosen with a model in hand
        except Exception as error:  # a GPU that does not compute leaves the CPU as it was
            report = explain(error)
            found.missing.append({"what": device, "for": f"computing there: {report.message}", "how": report.hint})
            continue
        if not gpu["self_check"]["finite"]:
            found.missing.append({"what": device, "for": "computing there: no finite numbers", "how": _REPORT})


def _self_check(device: str) -> dict[str, Any]:
    from dsv4_engine import Engine

    started = time.monotonic()
    engine = Engine.load("tiny", device=device, dtype=computed_in(Dtype.auto, device))
    logits = engine.session().extend(engine.tokenizer.encode("The sky is"))
    finite = bool(logits.isfinite().all())
    seconds = round(time.monotonic() - started, 2)
    return {"model": engine.name, "backend": engine.backend.name, "finite": finite, "seconds": seconds}
