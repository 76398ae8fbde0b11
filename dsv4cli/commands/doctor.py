"""`dsv4 doctor`: versions, devices, chosen backends, what is missing and how to get it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dsv4cli import options

if TYPE_CHECKING:
    from dsv4cli.machine import Findings


def doctor(json: options.Json = False) -> None:
    """Check this machine and this installation.

    Loads the bundled model on the CPU and on each GPU and feeds it a few tokens. Exits with 0 when that works on the
    CPU, else with 1.

    Examples:

    [bold]dsv4 doctor[/bold]

    [bold]dsv4 doctor --json[/bold]
    """
    from dsv4cli import output
    from dsv4cli.errors import FAILURE, reported
    from dsv4cli.machine import examine

    with reported():
        found = examine()
        if json:
            output.print_json(found.document())
        else:
            _show(found)
        for problem in found.problems:
            output.note(f"error: {problem['what']}", style="red")
            if problem["how"]:
                output.note(f"hint: {problem['how']}", style="cyan")
    if found.problems:
        raise typer.Exit(FAILURE)


def _show(found: Findings) -> None:
    from dsv4cli.output import file_size, table

    rows = [["dsv4", found.dsv4], ["python", found.python], ["system", found.system]]
    rows += [[name, number] for name, number in found.packages.items() if number]
    rows.append(["", ""])
    memory = found.cpu.get("memory_bytes")
    held = f", {file_size(memory)} memory, {file_size(found.cpu['available_bytes'])} free" if memory else ""
    rows.append(["cpu", f"{found.cpu['count']} cores, torch threads {found.cpu.get('threads', '?')}{held}"])
    rows += [
        [gpu["device"], f"{gpu['name']}, {file_size(gpu['memory_bytes'])}, compute capability {gpu['capability']}"]
        for gpu in found.gpus
    ]
    chosen = [f"{name or 'none in this version'} on {device}" for device, name in found.backends.items()]
    rows.append(["backends", ", ".join(chosen) or "none"])
    if found.self_check:
        rows.append(["self-check", f"{found.self_check['model']} computes, {found.self_check['seconds']} s"])
    rows += [
        ["", f"{gpu['self_check']['model']} computes on {gpu['device']}, {gpu['self_check']['seconds']} s"]
        for gpu in found.gpus
        if gpu.get("self_check", {}).get("finite")
    ]
    table("", ["", ""], rows)
    if found.missing:
        table("\nMissing, and not needed on a CPU", ["what", "for", "how to get it"],
              [[item["what"], item["for"], item["how"]] for item in found.missing])  # fmt: skip
