"""`dsv4 inspect`: what a model is made of and what it takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dsv4cli import options


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            envvar=options.MODEL_ENV,
            help="A checkpoint folder, a Hugging Face id, or tiny, v4-flash, v4-pro.",
        ),
    ] = options.DEFAULT_MODEL,
    ctx: options.Ctx = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    kv_dtype: options.KvDtypeOption = options.KvDtype.mixed,
    device: options.Device = "cpu",
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would lie where, and what to expect; nothing need be downloaded.")
    ] = False,
    device_map: options.DeviceMap = "auto",
    gpu_mem: options.GpuMem = None,
    cpu_mem: options.CpuMem = None,
    json: options.Json = False,
) -> None:
    """Show layers, parameters, and sizes on disk and in memory.

    Reads the headers of the files only, and checks every name, type and shape.
    v4-flash and v4-pro are described from their published configuration when they are not downloaded.

    Examples:

    [bold]dsv4 inspect[/bold]

    [bold]dsv4 inspect v4-flash --ctx 1M[/bold]

    [bold]dsv4 inspect v4-flash --plan --gpu-mem 24GiB --cpu-mem 192GiB --ctx 1M[/bold]

    [bold]dsv4 inspect ./my-checkpoint --json[/bold]
    """
    from dsv4cli.errors import reported

    with reported():
        from dsv4cli import output
        from dsv4cli.anatomy import describe

        placed = options.Placed.of(device_map, gpu_mem, cpu_mem)
        found = describe(
            model,
            ctx=ctx,
            device=device,
            dtype=options.computed_in(dtype, device),
            kv_dtype=kv_dtype.value,
            plan=plan,
            placed=placed,
        )
        if json:
            output.print_json(found)
        else:
            _show(found)


def _show(found: dict[str, Any]) -> None:
    from dsv4cli.anatomy import spans
    from dsv4cli.output import count, file_size, short_count, table

    numbers, most, kv = found["parameters"], found["max_ctx"], found["kv"]
    layers = sum(layer["count"] for layer in found["layers"])
    mtp = f", and {short_count(numbers['mtp'])} in the MTP block" if numbers["mtp"] else ""
    disk = found["disk"] or {"total": None, "by_part": {}}
    table(
        found["model"],
        ["", ""],
        [
            ["folder", found["path"] or "not downloaded; from the published configuration"],
            ["layers", f"{layers}, the first {found['hash_layers']} hash-routed"],
            ["parameters", f"{short_count(numbers['total'])}, {short_count(numbers['active'])} active a token{mtp}"],
            ["context", f"up to {count(most)} tokens"],
            ["cache", f"{kv['bytes_per_token']:,.1f} bytes a token ({kv['dtype']}), "
                      f"{file_size(kv['bytes_per_token'] * most)} at {count(most)}"],
            ["on disk", _size(disk["total"])],
        ],
    )  # fmt: skip
    rows = [
        [layer["kind"], str(layer["count"]), _bytes_a_token(layer), layer["meaning"], spans(layer["indices"])]
        for layer in found["layers"]
    ]
    table("\nLayers", ["kind", "layers", "cache a token", "attends to", "which"], rows)
    rows = [
        [part, short_count(number["total"]), short_count(number["active"]), _size(disk["by_part"].get(part))]
        for part, number in numbers["by_part"].items()
    ]
    if "mtp" in disk["by_part"]:
        rows.append(["MTP block", short_count(numbers["mtp"]), "-", _size(disk["by_part"]["mtp"])])
    if "unused" in disk["by_part"]:
        rows.append(["unused", "-", "-", _size(disk["by_part"]["unused"])])
    table("\nParts", ["part", "parameters", "active", "on disk"], rows)
    if found["memory"]:
        _show_memory(found["memory"])
    if found["plan"]:
        from dsv4cli.plan import show_plan

        show_plan(found["plan"])


def _bytes_a_token(layer: dict[str, Any]) -> str:
    return f"{layer['kv_bytes_per_token']:,.1f} B"


def _size(number: int | None) -> str:
    from dsv4cli.output import file_size

    return "-" if number is None else file_size(number)


def _show_memory(memory: dict[str, Any]) -> None:
    from dsv4cli.output import count, file_size, table

    title = f"\nMemory on {memory['device']} for {count(memory['ctx'])} tokens"
    if not memory["fits"]:
        table(title, ["", ""], [["does not fit", memory["message"]], ["", memory["hint"]]])
        return
    held = "expanded" if memory["expand"] else "packed, unpacked at each use"
    rows = [["weights", file_size(memory["weights"]), held]]
    if memory["unpacked"]:
        rows.append(["a matrix unpacked", file_size(memory["unpacked"]), "at a time"])
    chunks = f"in chunks of {count(memory['chunk'])} tokens"
    if memory["lanes"] > 1:
        chunks += f", {memory['lanes']} at a time"
    rows += [
        ["cache", file_size(memory["kv"]), memory["kv_dtype"]],
        ["working set", file_size(memory["working_set"]), chunks],
        ["needed", file_size(memory["needed"]), f"of {file_size(memory['available'])} available"],
    ]
    table(title, ["", "", ""], rows)
