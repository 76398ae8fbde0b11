"""`dsv4 download`: a published model from the hub to this disk, checked to the last byte."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4cli import options

if TYPE_CHECKING:
    from dsv4_engine.download import Done


def download(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="v4-flash, v4-pro, or a Hugging Face id (owner/name).")],
    revision: Annotated[
        str, typer.Option("--revision", metavar="NAME", help="A branch, a tag or a commit of it.")
    ] = "main",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="PATH", help="A folder of its own for it. By default the cache of Hugging Face's tools."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Get a published model, or what is missing of it, and check every byte.

    Stopped in any way, the same command goes on where it was.
    What is there already is checked too, and repaired; only what dsv4 needs is transferred.
    HF_TOKEN, HF_ENDPOINT, HF_HOME and the other variables of Hugging Face's tools apply.

    Examples:

    [bold]dsv4 download v4-flash[/bold]

    [bold]dsv4 download v4-pro --dir /data/v4-pro[/bold]

    [bold]HF_HOME=/data/huggingface dsv4 download deepseek-ai/DeepSeek-V4-Flash-Base[/bold]
    """
    from dsv4cli.errors import InputProblem, reported

    with reported():
        from dsv4_engine.download import download as get
        from dsv4_engine.locate import BUNDLED, hub_id
        from dsv4cli import output
        from dsv4cli.interrupt import Stopped

        if model == BUNDLED:
            raise InputProblem(f"{BUNDLED} comes with dsv4", f"It needs no download: dsv4 run ... --model {BUNDLED}")
        try:
            done = get(
                hub_id(model),
                revision,
                folder.expanduser().absolute() if folder else None,
                bar=lambda label: output.progress_bar(label, "bytes"),
                say=output.note,
            )
        except KeyboardInterrupt:
            again = Stopped()
            again.hint = f"What has come is kept. Go on with: {_command(model, revision, folder)}"
            raise again from None
        name = model if folder is None and revision == "main" else str(folder or done.folder)
        if json:
            output.print_json(_document(done, name))
        else:
            _show(done, name)


def _command(model: str, revision: str, folder: Path | None) -> str:
    """What was typed, to be typed again."""
    import shlex

    given = [*(["--revision", revision] if revision != "main" else []), *(["--dir", str(folder)] if folder else [])]
    return shlex.join(["dsv4", "download", model, *given])


def _document(done: Done, name: str) -> dict[str, Any]:
    return {
        "model": name,
        "repo": done.repo,
        "revision": done.revision,
        "commit": done.commit,
        "folder": str(done.folder),
        "files": done.files,
        "bytes": done.bytes,
        "transferred_bytes": done.transferred,
        "transfer_s": round(done.transfer_seconds, 3),
        "total_s": round(done.seconds, 3),
    }


def _show(done: Done, name: str) -> None:
    from shlex import quote

    from dsv4cli.output import duration, file_size, per_second

    came = "nothing had to come"
    if done.transferred:
        rate = file_size(per_second(done.transferred, done.transfer_seconds))
        came = f"{file_size(done.transferred)} came in {duration(done.transfer_seconds)}, {rate}/s"
    print(f"{done.repo} is whole: {done.files} files, {file_size(done.bytes)}, every hash right; {came}")
    print(f"{done.folder}\n")
    print("What it takes on this machine, and a first question:")
    print(f"  dsv4 inspect {quote(name)} --plan")
    print(f'  dsv4 run "What does this do?" --file main.py --model {quote(name)}')
