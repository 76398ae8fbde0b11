"""Every flag, declared once: its name, help, range and default.

Commands take these types in their signatures.  Values are checked here, before anything heavy is imported, so that a
wrong flag is answered at once.  Knows nothing of the engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def parse_size(text: str | int) -> int:
    """A number of tokens: ``4096``, ``128K`` (131,072) or ``1M`` (1,048,576)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", str(text).strip().lower().replace("_", "").replace(",", ""))
    if not match:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write 4096, 128K or 1M.")
    value = float(match[1]) * _UNITS[match[2]]
    if value < 1 or value != int(value):
        raise typer.BadParameter(f"{text!r} is not a whole number of at least 1.")
    return int(value)


_BYTES = {"": 1, "b": 1, **{f"{u}b": 1000 ** (i + 1) for i, u in enumerate("kmgt")},
          **{f"{u}{end}": 1024 ** (i + 1) for i, u in enumerate("kmgt") for end in ("", "ib")}}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """A size in bytes: ``24GiB`` or ``24G`` (1024^3), ``24GB`` (1000^3), or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", str(text).strip().lower())
    if not match or match[2] not in _BYTES or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is not a size in bytes; write 24GiB, 24GB or 512MiB.")
    return int(float(match[1]) * _BYTES[match[2]])


def parse_number(text: str | float, low: float, high: float) -> float:
    """A finite number in [low, high]; NaN, which compares false with everything, is refused too."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise typer.BadParameter(f"{text!r} is not a number from {low:g} to {high:g}.")
    return value


class Many(tuple[Any, ...]):
    """Values of a flag that takes several, separated by commas."""


def list_of(parse: Callable[[str], Any]) -> Callable[[str | Many], Many]:
    """A parser for different values, separated by commas."""

    def values(text: str | Many) -> Many:
        if isinstance(text, Many):
            return text
        found = Many(parse(part.strip()) for part in text.split(","))
        if len(set(found)) < len(found):
            raise typer.BadParameter(f"{text!r} names something twice.")
        return found

    return values


def _sizes(text: str | Many) -> Many:
    return text if isinstance(text, Many) else Many(parse_bytes(part) for part in text.split(","))


def _between(low: float, high: float) -> Callable[[str | float], float]:
    """A parser for a finite number in [low, high]."""
    return lambda text: parse_number(text, low, high)


def parse_seed(text: str | int) -> int:
    """What torch's generator takes: an integer of 63 bits."""
    if not re.fullmatch(r"\d{1,19}", str(text)) or int(text) >= 2**63:
        raise typer.BadParameter(f"{text!r} is not a whole number from 0 to {2**63 - 1}.")
    return int(text)


DEFAULT_POLICY = "periodic"


def parse_policy(text: str) -> str:
    """A cache policy: full, zero, periodic, or periodic with an interval, such as periodic:16K."""
    name, colon, interval = text.partition(":")
    if name not in ("full", "periodic", "zero") or (colon and name != "periodic"):
        raise typer.BadParameter(f"{text!r} is not full, zero, periodic, or such as periodic:16K.")
    return f"{name}:{parse_size(interval)}" if colon else name


class Think(StrEnum):
    """How long the model may think before it answers."""

    none = "none"
    high = "high"
    max = "max"


class Dtype(StrEnum):
    """What unquantised weights compute in.  auto: see `computed_in`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class KvDtype(StrEnum):
    """How the cache holds its rows."""

    mixed = "mixed"
    bf16 = "bf16"
    fp32 = "fp32"


def computed_in(dtype: Dtype, device: str | None) -> str:
    """The type behind ``dtype`` on a device: on GPUs the kernels compute in bfloat16, as the published code does."""
    if dtype is not Dtype.auto:
        return dtype.value
    return "float32" if device in (None, "cpu") else "bfloat16"


@dataclass(frozen=True)
class Placed:
    """Where a model may lie: the values of --device-map, --gpu-mem and --cpu-mem."""

    device_map: str = "auto"
    gpu: tuple[int, ...] = ()
    cpu: int | None = None

    @classmethod
    def of(cls, device_map: str, gpu: Many | None, cpu: int | None) -> Placed:
        return cls(device_map, tuple(gpu or ()), cpu)


ANYWHERE = Placed()
PLACED = ("device_map", "gpu_mem", "cpu_mem")
_MODEL, _SAMPLING, _CACHE, _OUTPUT = "Model", "Answer", "Cache", "Output"

DEFAULT_MODEL = "tiny"
MODEL_ENV = "DSV4_MODEL"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar=MODEL_ENV,
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="A checkpoint folder, a Hugging Face id, or tiny, v4-flash, v4-pro.",
    ),
]
Ctx = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="TOKENS",
        rich_help_panel=_MODEL,
        help="Room for prompt and answer together, such as 128K or 1M. By default what model and memory allow.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        rich_help_panel=_MODEL,
        help="What unquantised weights compute in; auto is float32 on a CPU, bfloat16 on GPUs.",
    ),
]
KvDtypeOption = Annotated[
    KvDtype,
    typer.Option(
        "--kv-dtype", rich_help_panel=_MODEL, help="How the cache is held; mixed is the published FP8, BF16 and FP4."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="Where to compute: cpu, cuda, cuda:N, several GPUs as cuda:0,cuda:1, or cuda:all.",
    ),
]
DeviceMap = Annotated[
    str,
    typer.Option(
        "--device-map",
        metavar="auto|balanced|FILE",
        rich_help_panel=_MODEL,
        help="What lies where: auto fills one GPU after another and keeps routed experts that do not fit in memory or "
        "on disk, balanced spreads layers evenly, a JSON file says it.",
    ),
]
GpuMem = Annotated[
    Many | None,
    typer.Option(
        "--gpu-mem",
        parser=_sizes,
        metavar="SIZE,...",
        envvar="DSV4_GPU_MEM",
        rich_help_panel=_MODEL,
        help="Memory to use of each GPU at most, such as 24GiB, or 24GiB,48GiB for two. By default what is free.",
    ),
]
CpuMem = Annotated[
    int | None,
    typer.Option(
        "--cpu-mem",
        parser=parse_bytes,
        metavar="SIZE",
        envvar="DSV4_CPU_MEM",
        rich_help_panel=_MODEL,
        help="Memory for the whole process at most, such as 16GiB. By default what is free.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        parser=parse_size,
        metavar="TOKENS",
        rich_help_panel=_SAMPLING,
        help="Stop after so many tokens, thinking included. By default when the context is full.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        parser=_between(0, 2),
        metavar="NUMBER",
        rich_help_panel=_SAMPLING,
        help="0 always takes the likeliest token. By default what the model recommends.",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        parser=_between(1e-6, 1),
        metavar="NUMBER",
        rich_help_panel=_SAMPLING,
        help="Keep the likeliest tokens that together have this probability.",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        parser=_between(0, 1),
        metavar="NUMBER",
        rich_help_panel=_SAMPLING,
        help="Drop tokens less likely than this share of the likeliest.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        parser=parse_seed,
        metavar="NUMBER",
        rich_help_panel=_SAMPLING,
        help="The same seed repeats the same answer. By default a new one each time.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", rich_help_panel=_SAMPLING, help="End the answer before this text; may be given several times."
    ),
]
ThinkOption = Annotated[
    Think,
    typer.Option(
        "--think", rich_help_panel=_SAMPLING, help="Reason before answering; max is for contexts of 384K and more."
    ),
]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", rich_help_panel=_SAMPLING, help="A system message put before the conversation."),
]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        help="A file, a folder (its text files, without what .gitignore names), a glob in quotes, or - for "
        "standard input; may be given several times.",
    ),
]
Load = Annotated[Path | None, typer.Option("--load", metavar="PATH", help="Go on with a conversation kept by /save.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        envvar="DSV4_CACHE_DIR",
        metavar="PATH",
        rich_help_panel=_CACHE,
        help="Where prefixes are kept on disk. By default ~/.cache/dsv4/prefix.",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", rich_help_panel=_CACHE, help="Read and keep nothing on disk: no prefixes, no journal."),
]
CachePolicy = Annotated[
    str,
    typer.Option(
        parser=parse_policy,
        metavar="POLICY",
        rich_help_panel=_CACHE,
        help="Which states are kept with what was read: periodic (at a prompt's end; periodic:16K also every so many "
        "tokens), full (at every chunk; much larger), zero (none; some tokens are read again).",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", rich_help_panel=_CACHE, help="Go on with the last answer that was interrupted.")
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="Print one JSON document on standard output.")
]
