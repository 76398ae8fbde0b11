"""`dsv4 quantize`: a checkpoint written anew in the published formats, or its FP4 experts in FP8."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4cli import options


class Scheme(StrEnum):
    """What the tensors become."""

    published = "published"
    fp8 = "fp8"


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint folder, a Hugging Face id, or tiny, v4-flash, v4-pro.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A new or empty folder, or one where this same job was interrupted.")
    ],
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="published: experts in FP4, linears in FP8, the rest as published. "
            "fp8: FP4 experts in FP8, without loss, which is checked on every value."
        ),
    ] = Scheme.published,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads that convert; they change no byte. By default one a CPU."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            metavar="FILE",
            help="Afterwards run both models on this text and show what changed: the loss and the distributions.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="Where --check computes: cpu, cuda or cuda:N.")] = "cpu",
    json: options.Json = False,
) -> None:
    """Write a checkpoint in the published formats: experts in FP4, linears in FP8.

    SRC may hold BF16, F32 or FP8 weights; it is only read. Memory stays below 2 GiB whatever its size.
    Whenever a run ends early, by Ctrl-C, a kill or a full disk, the same command goes on where it stopped.
    The report of errors by part is printed and kept in DST/quantize.json.

    Examples:

    [bold]dsv4 quantize ./my-bf16 ./my-fp4[/bold]

    [bold]dsv4 quantize ./my-bf16 ./my-fp4 --check text.txt[/bold]

    [bold]dsv4 quantize v4-flash ./flash-fp8 --scheme fp8[/bold]
    """
    from dsv4cli.errors import FAILURE, reported

    with reported():
        import time

        from dsv4cli import output
        from dsv4cli.answering import peak_memory

        text = None if check is None else _text(check)
        begun = time.monotonic()
        report, done_before = _quantised(source, destination, scheme.value, workers, text)
        found = {
            "source": source,
            "destination": str(destination),
            **report,
            "seconds": time.monotonic() - begun,
            "peak_memory_bytes": peak_memory(),
            "check": None,
        }
        if not json:
            _show(found, done_before)
        if text is not None:
            found["check"] = _compared(source, destination, text, device)
        if json:
            output.print_json(found)
        elif found["check"]:
            _show_check(found["check"], str(check))
        if found["lossless"] is False:
            raise typer.Exit(FAILURE)


def _text(file: Path) -> str:
    from dsv4cli.errors import InputProblem

    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputProblem(f"{file} is not a text in UTF-8", "Give a text file to --check.") from None


def _quantised(
    source: str, destination: Path, scheme: str, workers: int | None, text: str | None
) -> tuple[Mapping[str, Any], bool]:
    """The report, and whether the result was there already (then it is only compared)."""
    from dsv4_engine.quantize import finished_report, quantize, token_ids
    from dsv4cli.output import progress_bar

    if text is not None:
        token_ids(source, text)  # what is wrong with the text is said before hours of work
        if (report := finished_report(source, destination, scheme)) is not None:
            return report, True
    with progress_bar("quantising", "bytes") as progress:
        return quantize(source, destination, scheme, workers, progress).to_dict(), False


def _compared(source: str, destination: Path, text: str, device: str) -> dict[str, Any]:
    from dataclasses import asdict

    from dsv4_engine.quantize import compare
    from dsv4cli.output import progress_bar

    with progress_bar("comparing", "tokens") as progress:
        found = compare(source, destination, text, device, progress)
    return {**asdict(found), "loss_change": found.loss_change}


def _show(found: Mapping[str, Any], done_before: bool) -> None:
    from dsv4cli.output import count, duration, file_size, note, table

    rows = [
        [
            row["part"],
            row["from"] if row["from"] == row["to"] else f"{row['from']} -> {row['to']}",
            count(row["tensors"]),
            file_size(row["bytes_before"]),
            file_size(row["bytes_after"]),
            f"{100 * row['relative_error']:.2f}%" if row["relative_error"] else "0",
            count(row["saturated"]),
            f"{100 * row['zeroed'] / row['values']:.2g}%" if row["zeroed"] else "0",
            f"{row['worst']['tensor']} {100 * row['worst']['relative_error']:.2f}%" if row["worst"] else "-",
        ]
        for row in found["kinds"]
    ]
    columns = ("part", "type", "tensors", "before", "after", "error", "saturated", "became 0", "worst tensor")
    table(f"{found['source']} -> {found['destination']} ({found['scheme']})", columns, rows)
    print(f"{file_size(found['bytes_before'])} became {file_size(found['bytes_after'])}")
    if found["lossless"]:
        print("every FP4 value is the same in FP8")
    for tensor in found["inexact"]:
        print(
            f"not lossless: {tensor['tensor']}, {count(tensor['blocks'])} of its blocks, {count(tensor['changed'])} "
            f"values, off by up to {tensor['error']:.3g} of the block's largest"
        )
        for block in tensor["shown"]:
            print(
                f"  block at row {block['row']}, column {block['column']}: scales span 2^{block['span']}, "
                f"{count(block['changed'])} values, off by up to {block['error']:.3g}"
            )
        if tensor["blocks"] > len(tensor["shown"]):
            print(f"  and {count(tensor['blocks'] - len(tensor['shown']))} more blocks")
    if done_before:
        note("it was finished before; nothing was written")
    else:
        note(f"{duration(found['seconds'])} · peak memory {file_size(found['peak_memory_bytes'])}", style="dim")


def _show_check(check: Mapping[str, Any], name: str) -> None:
    from dsv4cli.output import count, table

    table(
        f"\nBoth models on {count(check['tokens'])} tokens of {name}",
        ["", ""],
        [
            ["loss", f"{check['loss_before']:.4f} -> {check['loss_after']:.4f} nats a token"],
            ["change", f"{check['loss_change']:+.4f}"],
            ["KL of the logits", f"mean {check['kl_mean']:.3g}, median {check['kl_median']:.3g}, "
                                 f"99% below {check['kl_p99']:.3g}, largest {check['kl_max']:.3g}"],
            ["same likeliest token", f"{100 * check['same_top']:.2f}%"],
        ],
    )  # fmt: skip
