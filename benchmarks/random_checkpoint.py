"""Write a checkpoint of random weights in a published model's formats and widths, with as many of its layers as wanted.

    python -m benchmarks.random_checkpoint --preset v4-flash --layers 4 --out DIR [--tokenizer tokenizer.json]

The folder is a checkpoint like any other: `dsv4 inspect DIR --plan`, `dsv4 run -m DIR` and every benchmark take it.
What such a model writes means nothing; what it takes in bytes and seconds is the published model's, layer by layer.
`run` and `chat` need a tokenizer beside it: give the published one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from dsv4_engine.config import PRESETS, ModelConfig
from dsv4_engine.errors import InputError
from dsv4_engine.random_weights import first_layers, random_checkpoint


def _progress(done: int, total: int) -> None:
    print(f"\r{done / 2**30:.1f} of {total / 2**30:.1f} GiB", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="v4-flash")
    parser.add_argument("--layers", type=int, help="the first so many; by default all")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is empty or not there yet")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to put beside the weights")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        config = ModelConfig.preset(given.preset)
        config = first_layers(config, config.num_hidden_layers if given.layers is None else given.layers)
        if given.tokenizer is not None and not given.tokenizer.is_file():
            raise InputError(f"{given.tokenizer} is no file", "Give the tokenizer.json of a published checkpoint.")
        if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
            raise InputError(f"{given.out} is not an empty folder", "Give one that is empty or not there yet.")
        given.out.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        random_checkpoint(given.out, config, given.seed, _progress)
        if given.tokenizer is not None:
            shutil.copyfile(given.tokenizer, given.out / "tokenizer.json")
    except (InputError, OSError) as error:
        hint = getattr(error, "hint", "")
        print(f"\nerror: {error}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in given.out.iterdir())
    print(file=sys.stderr)
    print(json.dumps({"folder": str(given.out), "layers": config.num_hidden_layers, "bytes": size,
                      "seconds": round(time.perf_counter() - started, 1)}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
