"""The bundled model from a recipe, in one command: ``python -m dsv4_training --recipe FILE``.

Stopped or killed, the same command goes on from the last state.  Other actions write the checkpoint of that state while
a run goes on, score a checkpoint in the engine, plot a run, compare Muon with AdamW, or provoke a spike of the loss.
Post-training makes specialists of a checkpoint and merges them; its comparison shows how near the student comes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from dsv4_engine.errors import InputError

from . import recipe as recipes

ACTIONS = ("train", "export", "score", "plot", "compare-optimisers", "provoke-spike", "post-train", "post-compare")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m dsv4_training", description=__doc__, epilog=f"Recipes that ship: {recipes.shipped()}"
    )
    p.add_argument("action", nargs="?", default="train", choices=ACTIONS, help="default: train")
    p.add_argument("--recipe", type=Path, required=True, help="a TOML file")
    p.add_argument("--out", type=Path, help="folder of the checkpoint, or of curves and plots (default: ./NAME)")
    p.add_argument("--stop-after", type=float, metavar="MINUTES", help="train: write the state then and leave the rest")
    p.add_argument("--workers", type=int, help="train: processes that draw text (default: by the number of cores)")
    p.add_argument("--samples", type=int, default=30, help="score: questions of each task and length (default: 30)")
    p.add_argument("--lengths", default="1024,2048,4096,8192", help="score: tokens, separated by commas")
    p.add_argument("--tasks", default="", help="score: names, separated by commas (default: all)")
    p.add_argument("--device", default="cpu", help="score: cpu or cuda (default: cpu)")
    p.add_argument(
        "--context", type=int, default=1, help="train, under torchrun: processes that share a sequence (default: 1)"
    )
    p.add_argument(
        "--only", metavar="NAME", help="post-*: one specialist; post-train also: student, student-1 (default: all)"
    )
    p.add_argument("--base", type=Path, help="post-train, post-compare: folder of the checkpoint to start from")
    return p


def act(options: argparse.Namespace) -> int:
    if options.action.startswith("post-"):
        return act_post(options)
    recipe = recipes.load(options.recipe)
    out = options.out or Path(recipe.name)
    from . import evaluate, metrics, run, spike  # torch, which --help and a wrong recipe do without

    if options.action == "train":
        run.train(recipe, options.recipe, out, options.stop_after, options.workers, options.context)
    elif options.action == "export":
        run.export(recipe, out)
    elif options.action == "score":
        names = options.tasks.split(",") if options.tasks else evaluate.TASKS
        if unknown := [name for name in names if name not in evaluate.TASKS]:
            raise InputError(f"there is no task {unknown[0]}", f"Tasks: {', '.join(evaluate.TASKS)}.")
        lengths = [_length(text) for text in options.lengths.split(",")]
        run.score(recipe, out, options.samples, lengths, names, options.device)
    elif options.action == "plot":
        folder = run.folder_of(out)
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise InputError(f"there is no {path}", "Train first, or name the run's folder with --out.")
        metrics.plot({recipe.name: metrics.read(path)}, folder / "training.png")
    elif options.action == "compare-optimisers":
        run.compare_optimisers(recipe, out)
    else:
        spike.provoke(recipe, out)
    return 0


def act_post(options: argparse.Namespace) -> int:
    """1 when the student is too far behind a specialist."""
    from . import post

    recipe = post.load(options.recipe)
    if options.base is None or not (options.base / "config.json").is_file():
        raise InputError("there is no checkpoint to start from", "Name its folder with --base.")
    out = options.out or Path(recipe.name)
    from . import specialists

    run = specialists.start(recipe, options.recipe, options.base, out, options.workers)
    if options.action == "post-train":
        run.train(options.only)
        return 0
    rows = run.compare(options.only)
    print(specialists.table(rows, recipe.comparison.points))
    return 0 if specialists.near_enough(rows, recipe.comparison.points) else 1


def _length(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 256:
        raise InputError(
            f"the length {text.strip()!r} is no number of tokens from 256 on", "As in --lengths 1024,8192."
        )
    return int(text)


def main() -> int:
    options = parser().parse_args()
    # Of several processes that torchrun starts, one tells of their progress.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    try:
        return act(options)
    except InputError as error:
        print(f"error: {error.message}\n{error.hint}".rstrip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last state", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
