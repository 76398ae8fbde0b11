"""`dsv4 cache`: what the prefix cache holds, whether it is sound, and less of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4cli import options

if TYPE_CHECKING:
    from dsv4_engine.prefix_cache import PrefixStore

app = typer.Typer(
    help="The prefixes kept on disk, so that no prompt is read twice.",
    epilog="Start with: dsv4 cache stats",
    no_args_is_help=True,
)


def _bytes(text: str | int) -> int:
    """A size in bytes, as the store reads it."""
    from dsv4_engine.errors import InputError
    from dsv4_engine.prefix_cache.folder import parse_bytes

    try:
        return text if isinstance(text, int) else parse_bytes(text)
    except InputError as error:
        raise typer.BadParameter(f"{error.message}. {error.hint}") from None


_BUDGET = Annotated[
    int | None,
    typer.Option(
        parser=_bytes,
        envvar="DSV4_CACHE_BUDGET",
        metavar="SIZE",
        help="What may stay, such as 500M or 20G. By default a quarter of the free disk and the cache together.",
    ),
]
_YES = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before removing.")]
_REPLAY = Annotated[
    bool, typer.Option("--replay", help="Also compute some segments again with --model and compare every bit.")
]
_SAMPLE = Annotated[int, typer.Option(min=1, metavar="N", help="How many segments --replay computes.")]


@app.command("ls")
def ls(cache_dir: options.CacheDir = None, json: options.Json = False) -> None:
    """List the prompts whose beginnings are kept, the last used first.

    A prompt is named by a hash. Prompts that begin alike share what they have in common: size counts all that one
    needs, own what no other one does.

    Examples:

    [bold]dsv4 cache ls[/bold]

    [bold]dsv4 cache ls --json[/bold]
    """
    from dsv4cli import output
    from dsv4cli.cache_views import prompts, show_prompts

    with _opened(cache_dir) as store:
        found = prompts(store)
        if json:
            output.print_json({"folder": str(store.folder), "prompts": found})
        elif not found:
            output.note(f"nothing is kept in {store.folder}")
        else:
            show_prompts(found)


@app.command("stats")
def stats(cache_dir: options.CacheDir = None, json: options.Json = False) -> None:
    """Show what is kept, for which models, and what it takes.

    Examples:

    [bold]dsv4 cache stats[/bold]

    [bold]dsv4 cache stats --cache-dir /data/prefixes --json[/bold]
    """
    from dsv4cli import output
    from dsv4cli.cache_views import show_stats

    with _opened(cache_dir) as store:
        found = store.stats()
        document = {**asdict(found), "write_amplification": found.write_amplification}
        if json:
            output.print_json(document)
        else:
            show_stats(document)


@app.command("verify")
def verify(
    replay: _REPLAY = False,
    sample: _SAMPLE = 8,
    model: options.Model = options.DEFAULT_MODEL,
    dtype: options.DtypeOption = options.Dtype.auto,
    kv_dtype: options.KvDtypeOption = options.KvDtype.mixed,
    device: options.Device = "cpu",
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Read everything that is kept and check it against its checksums.

    What is damaged is set aside and computed again when it is next needed. Exits with 1 when something was wrong.

    Examples:

    [bold]dsv4 cache verify[/bold]

    [bold]dsv4 cache verify --replay --model v4-flash[/bold]
    """
    from dsv4cli import output
    from dsv4cli.cache_views import show_verified
    from dsv4cli.errors import FAILURE

    with _opened(cache_dir) as store:
        with output.progress_bar("Checking", "bytes") as progress:
            found = store.verify(progress)
        document = {**asdict(found), "sound": found.sound, "replay": None}
        wrong = not found.sound
        if replay:
            again = _replay(store, sample, model, options.computed_in(dtype, device), kv_dtype.value, device)
            document["replay"] = again
            wrong = wrong or bool(again["different"])
        if json:
            output.print_json(document)
        else:
            show_verified(document)
    if wrong:
        raise typer.Exit(FAILURE)


@app.command("prune")
def prune(
    budget: _BUDGET = None, yes: _YES = False, cache_dir: options.CacheDir = None, json: options.Json = False
) -> None:
    """Remove what is worth least until the rest fits a size.

    Seldom and long unused prompts go first, from their ends: what another kept prompt begins with stays.

    Examples:

    [bold]dsv4 cache prune --budget 20G[/bold]

    [bold]dsv4 cache prune --budget 500M --yes[/bold]
    """
    from dsv4cli import output

    with _opened(cache_dir) as store:
        going = store.prune(budget, trial=True)
        size, rest = output.file_size(going.freed), output.file_size(going.kept)
        gone = {"segments": 0, "freed": 0, "kept": going.kept + going.freed}
        if going.segments == 0:
            output.note(f"nothing to remove: {rest} stay")
        elif _agreed(f"Remove {size} from {store.folder}? {rest} stay.", yes):
            gone = asdict(store.prune(budget))
            output.note(f"removed {output.file_size(gone['freed'])}, {output.file_size(gone['kept'])} stay")
        if json:
            output.print_json(gone)


@app.command("clear")
def clear(yes: _YES = False, cache_dir: options.CacheDir = None, json: options.Json = False) -> None:
    """Remove everything that is kept.

    Examples:

    [bold]dsv4 cache clear[/bold]

    [bold]dsv4 cache clear --yes[/bold]
    """
    from dsv4cli import output

    with _opened(cache_dir) as store:
        found = store.stats()
        size = found.size + found.quarantined + found.staged + found.other_versions
        agreed = _agreed(f"Remove all {output.file_size(size)} from {store.folder}?", yes)
        if agreed:
            store.clear()
            output.note(f"removed {output.file_size(size)}")
        if json:
            output.print_json({"freed": size if agreed else 0})


@contextmanager
def _opened(cache_dir: Any) -> Iterator[PrefixStore]:
    """The store, and what went wrong with it on standard error."""
    from dsv4cli.errors import reported

    with reported():
        from dsv4_engine.prefix_cache import PrefixStore
        from dsv4cli import output

        with PrefixStore.open(cache_dir) as store:
            try:
                yield store
            finally:
                for notice in store.notices:
                    output.note(f"note: {notice}")


def _agreed(question: str, yes: bool) -> bool:
    """Ask on the terminal; without one, only --yes can agree."""
    from dsv4cli import output
    from dsv4cli.errors import InputProblem

    if yes:
        return True
    if not _asked_on_terminal():
        raise InputProblem("nobody is there to ask before removing", "Give --yes to remove without asking.")
    if typer.confirm(question, err=True):
        return True
    output.note("nothing was removed")
    return False


def _asked_on_terminal() -> bool:
    import sys

    from dsv4cli import output

    return output.is_terminal(sys.stdin)


def _replay(store: PrefixStore, sample: int, model: str, dtype: str, kv_dtype: str, device: str) -> dict[str, Any]:
    from dsv4_engine import Engine
    from dsv4_engine.prefix_cache.cache import replay
    from dsv4cli import output

    with output.progress_bar("Loading", "bytes") as progress:
        engine = Engine.load(model, device=device, dtype=dtype, kv_dtype=kv_dtype, progress=progress)
    with output.progress_bar("Computing again", "segments") as progress:
        found = replay(store, engine, sample, progress)
    different = [key.hex() for key in found.different]
    return {"model": engine.name, "checked": found.checked, "different": different, "skipped": found.skipped}
