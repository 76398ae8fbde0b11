"""Which part of a model lies where: made by Accelerate from sizes and limits, or read from a file.

Owns the names that a map may use, its checks, and the translation to and from Accelerate.  Knows sizes, no tensors.
Modules are embed, head (with the last norm and the streams' head), layers.N and layers.N.ffn.experts, and mtp.0 alike;
devices are cpu, disk (routed experts only) and cuda:N.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4_engine.config import ModelConfig
from dsv4_engine.errors import InputError
from dsv4_engine.strict_json import parse_json

AUTO, BALANCED = "auto", "balanced"
EXPERTS = "ffn.experts"
_HINT = (
    f'Write such as {{"": "cuda:0", "layers.*.{EXPERTS}": "cpu"}}; names are embed, head, layers.N, layers.N.{EXPERTS}.'
)


@dataclass(frozen=True)
class Limits:
    """Bytes that may be used at most.  gpu: of each GPU in order, the last for all further ones; None: what is free."""

    gpu: tuple[int, ...] = ()
    cpu: int | None = None

    def of(self, number: int) -> int | None:
        """The limit of the GPU with this place in the order."""
        return self.gpu[min(number, len(self.gpu) - 1)] if self.gpu else None


@dataclass(frozen=True)
class DeviceMap:
    """embed, head: devices.  layers: the device of each layer without its experts; experts: where those stay."""

    embed: str
    layers: tuple[str, ...]
    experts: tuple[str, ...]
    head: str

    @property
    def devices(self) -> tuple[str, ...]:
        """Where is computed, in the order of the layers."""
        return tuple(dict.fromkeys((self.embed, *self.layers, self.head)))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The layers of each of `devices`: [start, end)."""
        return [(self.layers.index(d), len(self.layers) - self.layers[::-1].index(d)) for d in self.devices]

    def apart(self) -> tuple[int, ...]:
        """Layers whose experts are not where they are computed."""
        return tuple(i for i, (layer, home) in enumerate(zip(self.layers, self.experts, strict=True)) if layer != home)


def everything_on(device: str, layers: int, experts: str | None = None) -> DeviceMap:
    """All on one device, or the experts elsewhere."""
    return DeviceMap(device, (device,) * layers, (experts or device,) * layers, device)


def chosen_map(given: str | Path, config: ModelConfig, devices: Sequence[str]) -> DeviceMap | None:
    """The map in a file; None for auto and balanced, which sizes decide."""
    return None if str(given) in (AUTO, BALANCED) else read_map(given, config, devices)


# ---- from a file -----------------------------------------------------------------------------------------------------


def read_map(path: str | Path, config: ModelConfig, devices: Sequence[str]) -> DeviceMap:
    """A JSON object from module names to devices; the longest name that fits a module decides, and * is any layer.

    devices: those that compute, as ["cpu"] or ["cuda:0", "cuda:1"].  Raises InputError for a file that is none,
    unknown modules or devices, a module without a device, and what cannot be run.
    """
    path = Path(path)
    try:
        given = parse_json(path.read_bytes())
    except OSError as error:
        problem = f"the device map {path} cannot be read: {error.strerror}"
        raise InputError(problem, f"Give {AUTO}, {BALANCED}, or a JSON file.") from error
    except ValueError as error:
        raise InputError(f"the device map {path} is not JSON: {error}", _HINT) from error
    if not isinstance(given, dict) or not given:
        raise InputError(f"the device map {path} is no JSON object of modules and devices", _HINT)
    return _resolved({str(k): v for k, v in given.items()}, config, list(devices), str(path))


def _resolved(given: Mapping[str, object], config: ModelConfig, devices: list[str], path: str) -> DeviceMap:
    layers = config.num_hidden_layers
    modules = [
        "embed",
        "head",
        *(f"layers.{i}" for i in range(layers)),
        *(f"layers.{i}.{EXPERTS}" for i in range(layers)),
    ]
    patterns = {key: _pattern(key) for key in given}
    unknown = [key for key, pattern in patterns.items() if not any(pattern.match(module) for module in modules)]
    if unknown:
        raise InputError(f"{path}: the model has no module {unknown[0]!r} (layers 0 to {layers - 1})", _HINT)
    places = {key: _device(value, devices, f"{path}: {key!r}") for key, value in given.items()}
    found: dict[str, str] = {}
    for module in modules:
        fitting = [key for key, pattern in patterns.items() if pattern.match(module)]
        if not fitting:
            raise InputError(f"{path}: no device is named for {module}", 'Add "" for all that is not named.')
        found[module] = places[max(fitting, key=lambda key: (len(key.split(".")) if key else 0, "*" not in key))]
    for module, device in found.items():
        if device not in devices and not module.endswith(EXPERTS):
            problem = f"{path}: {module} cannot be on {device}"
            raise InputError(problem, f"Only routed experts can be apart; this runs on {', '.join(devices)}.")
    dense = [found[f"layers.{i}"] for i in range(layers)]
    experts = [found[f"layers.{i}.{EXPERTS}"] for i in range(layers)]
    order = [found["embed"], *dense, found["head"]]
    if [devices.index(d) for d in order] != sorted(devices.index(d) for d in order):
        raise InputError(
            f"{path}: layers go back to a device that was left", "Name the devices in the order of layers."
        )
    if dense[0] != found["embed"] or dense[-1] != found["head"]:
        raise InputError(
            f"{path}: embed and head are not with their layers", "Put embed with layers.0, head with the last."
        )
    for i, (device, home) in enumerate(zip(dense, experts, strict=True)):
        if home not in (device, "cpu", "disk"):
            raise InputError(
                f"{path}: layers.{i} is on {device} and its experts on {home}", "Keep them on one GPU, on cpu or disk."
            )
    return DeviceMap(found["embed"], tuple(dense), tuple(experts), found["head"])


def _pattern(key: str) -> re.Pattern[str]:
    """Modules that a key names: itself and what lies in it."""
    if not key:
        return re.compile("")
    return re.compile(re.escape(key).replace(r"\*", r"\d+") + r"(\.|$)")


def _device(value: object, devices: list[str], where: str) -> str:
    name = f"cuda:{value}" if type(value) is int else str(value)
    if name == "cuda":
        name = "cuda:0"
    if name not in (*devices, "cpu", "disk"):
        known = ", ".join(dict.fromkeys((*devices, "cpu", "disk")))
        raise InputError(f"{where} is to be on {value!r}, which is not there", f"Use one of {known}.")
    return name


# ---- from sizes, by Accelerate ---------------------------------------------------------------------------------------


def spread(
    sizes: Sequence[int], before: int, after: int, room: Mapping[str, int], *, balanced: bool = False
) -> tuple[str, ...] | None:
    """The device of each layer; None where they do not fit.

    sizes: bytes of layers; before, after: of embedding and head, which go with the first and the last layer.
    room: bytes by device, in the order to be filled; balanced: fill them alike instead of one after another.
    """
    import torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory
    from torch import nn

    class Held(nn.Module):
        """Stands for a module of so many bytes, with no memory behind it."""

        def __init__(self, size: int) -> None:
            super().__init__()
            data = torch.empty(max(size, 1), dtype=torch.uint8, device="meta")
            self.held = nn.Parameter(data, requires_grad=False)

    units = list(sizes)
    units[0], units[-1] = units[0] + before, units[-1] + after
    model = nn.Sequential(*(Held(size) for size in units))
    numbers = {device: number for number, device in enumerate(room)}
    names = list(room)
    largest = max(units)
    # Accelerate keeps room on the first device for the largest layer, as if others came and went there: none do, so
    # that room is lent to it where the layers do not fit otherwise.
    for lent in (0, largest):
        memory: dict[int | str, int] = {number: room[device] for device, number in numbers.items()} | {"cpu": 0}
        with _quiet():
            if balanced:
                memory = get_balanced_memory(model, memory, no_split_module_classes=["Held"])
            memory[0] += lent
            found = infer_auto_device_map(model, memory, no_split_module_classes=["Held"], fallback_allocation=False)
        placed = [_longest(found, str(i)) for i in range(len(units))]
        if all(isinstance(place, int) for place in placed):
            devices = tuple(names[int(place)] for place in placed)  # type: ignore[call-overload]
            held = dict.fromkeys(room, 0)
            for device, size in zip(devices, units, strict=True):
                held[device] += size
            if all(size <= room[device] for device, size in held.items()):
                return devices
    return None


def _longest(found: Mapping[str, object], name: str) -> object:
    return found[name] if name in found else found.get("", found.get(f"{name}.held"))


class _quiet:
    """Accelerate warns of devices that this machine does not have; a plan may be for another one."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("accelerate.utils.modeling")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        self._logger.setLevel(self._level)


def to_json(device_map: DeviceMap) -> str:
    """The map as a file that `read_map` takes."""
    named = {"embed": device_map.embed, "head": device_map.head}
    for i, (layer, experts) in enumerate(zip(device_map.layers, device_map.experts, strict=True)):
        named[f"layers.{i}"] = layer
        if experts != layer:
            named[f"layers.{i}.{EXPERTS}"] = experts
    return json.dumps(named, indent=1)
