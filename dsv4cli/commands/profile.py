"""`dsv4 profile`: what a model costs at a context length, what a device could do, and what this one does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dsv4cli import options


def profile(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="v3.2, v4-pro, v4-flash, tiny, a checkpoint folder or a Hugging Face id. By default the first three.",
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            parser=options.parse_size,
            metavar="TOKENS",
            help="The context to count at, such as 128K. By default 1M, and 4K with --measure.",
        ),
    ] = None,
    kv_dtype: options.KvDtypeOption = options.KvDtype.mixed,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whose roofline: h200, h100, a100, rtx4090, or cpu or cuda for this machine's, measured. By default "
            "the first four; with --measure the cpu.",
        ),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Costs at 4K, 8K, ... up to --ctx, with plots.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write the sweep's plot as an image: .png, .svg or .pdf.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time one model on this machine, and measure its cache.")
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Time one layer of each kind with random weights, loading no model."),
    ] = False,
    dtype: options.DtypeOption = options.Dtype.auto,
    device_map: options.DeviceMap = "auto",
    gpu_mem: options.GpuMem = None,
    cpu_mem: options.CpuMem = None,
    json: options.Json = False,
) -> None:
    """Show what a model costs: FLOPs, cache, rooflines, measured times.

    From the configuration alone, against DeepSeek-V3.2; --measure also runs the model.

    Examples:

    [bold]dsv4 profile --ctx 1M[/bold]

    [bold]dsv4 profile v4-flash --ctx 128K --device h200[/bold]

    [bold]dsv4 profile --sweep --plot costs.png[/bold]

    [bold]dsv4 profile tiny --measure[/bold]

    [bold]dsv4 profile v4-flash --measure --random-weights --ctx 4K[/bold]
    """
    from dsv4cli.errors import reported

    with reported():
        from dsv4cli import output, plots, profile_tables, profiling

        if measure:
            models = models or [os.environ.get(options.MODEL_ENV) or options.DEFAULT_MODEL]
        wanted = profiling.Wanted(
            tuple(models or ()),
            ctx,
            kv_dtype.value,
            device,
            options.computed_in(dtype, device),
            sweep or plot is not None,
            measure,
            random_weights,
            options.Placed.of(device_map, gpu_mem, cpu_mem),
        )
        profiling.check(wanted)
        if plot is not None:
            plots.check_image_path(plot)
        found = profiling.collect(wanted)
        if json:
            output.print_json(found)
        else:
            profile_tables.show(found, plots_too=sweep)
        if plot is not None:
            profile_tables.save_sweep(plot, found)
