"""The prefix cache: time to the first token cold, warm and after an edit, what is stored, and what each policy costs.

    python -m benchmarks.prefix_cache [--tokens 4096 16384 131072] [--policies 16384] [--model tiny] [--folder PATH]

Times are the engine's: from a loaded model and an open store to the logits of the prompt's last token.  The prompt is
random tokens, new for every row.  The logits of "first", "again" and "edit" are compared, bit for bit, with those of
sessions without a cache ("asked" is only timed); where they differ, the program ends with 1 and prints no ratio.
"first" writes the store, "alone" has none; "again" is the same prompt, "asked" another 40 tokens at its end, "edit" one
token changed at 99.5%.  Medians of 3, but of "first" and "alone".  Stored bytes are those of all files, as long as they
are and as the disk allots them, after closing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_engine import Engine
from dsv4_engine.accounting import kv_bytes_per_token
from dsv4_engine.prefix_cache import PrefixStore
from dsv4_engine.prefix_cache.cache import PrefixCache, Reuse
from dsv4_engine.prefix_cache.policy import Policy

REPEATS = 3
QUESTION = 40
POLICIES = [Policy("full"), *(Policy("periodic", 1024 * k) for k in (2, 4, 8, 16, 32)), Policy(), Policy("zero")]
EDITS = (0.15, 0.35, 0.55, 0.75, 0.95)


class Disagreement(Exception):
    """A cached session gave other logits."""


def prompt(engine: Engine, tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(engine.config.vocab_size), k=tokens)


def edited(ids: Sequence[int], share: float) -> list[int]:
    place = int(len(ids) * share)
    return [*ids[:place], (ids[place] + 1) % 1000, *ids[place + 1 :]]


def first_token(engine: Engine, ids: Sequence[int], cache: PrefixCache | None) -> tuple[float, torch.Tensor, Reuse]:
    """Seconds to the last token's logits, these, and what was reused."""
    started = time.perf_counter()
    session, reuse = (engine.session(), Reuse(0)) if cache is None else cache.start(ids)
    if len(ids) - 1 > session.position:
        session.extend(ids[session.position : -1], logits="none")
    logits = session.extend(ids[-1:])
    return time.perf_counter() - started, logits, reuse


def again(
    engine: Engine, folder: Path, policy: Policy, ids: Sequence[int], wanted: torch.Tensor | None
) -> tuple[float, Reuse]:
    """The median of several starts that keep nothing, so that each finds the same store."""
    seconds = []
    for _ in range(REPEATS):
        with PrefixStore.open(folder) as store:
            cache = PrefixCache(store, engine, policy)
            started = time.perf_counter()
            session, reuse = cache.start(ids)
            session.on_chunk = None
            if len(ids) - 1 > session.position:
                session.extend(ids[session.position : -1], logits="none")
            logits = session.extend(ids[-1:])
            seconds.append(time.perf_counter() - started)
        if wanted is not None and not torch.equal(logits, wanted):
            raise Disagreement(f"{len(ids):,} tokens, {reuse}")
    return statistics.median(seconds), reuse


def stored(folder: Path) -> tuple[int, int]:
    """Bytes of all files, and of the blocks that the disk gives them."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(file.st_size for file in files), sum(file.st_blocks * 512 for file in files)


def written_by_process() -> int:
    """Bytes this process has handed to write calls; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def fill(
    engine: Engine, folder: Path, policy: Policy, ids: Sequence[int]
) -> tuple[float, torch.Tensor, dict[str, int]]:
    """A first run: seconds, logits and bytes."""
    before = written_by_process()
    with PrefixStore.open(folder) as store:
        seconds, logits, _ = first_token(engine, ids, PrefixCache(store, engine, policy))
        kinds = store.stats().sizes
    size, allotted = stored(folder)
    return (
        seconds,
        logits,
        {
            "stored": size,
            "allotted": allotted,
            "written": written_by_process() - before,
            **{f"of {kind}": held for kind, held in kinds.items()},
        },
    )


def contexts(engine: Engine, sizes: Sequence[int], base: Path) -> list[dict[str, Any]]:
    analytic = kv_bytes_per_token(engine.config, engine.kv_dtype)
    print(
        f"{'tokens':>8}{'alone':>9}{'first':>9}{'again':>9}{'':>7}{'asked':>9}{'':>7}{'edit':>9}{'':>7}"
        f"{'stored':>9}{'allotted':>10}{'written':>9}   (seconds; B/token, analytic {analytic:.1f})"
    )
    rows = []
    for number, tokens in enumerate(sizes):
        folder, ids = base / f"context-{tokens}", prompt(engine, tokens, seed=number)
        first, wanted, size = fill(engine, folder, Policy(), ids)
        other = [*ids[:-QUESTION], *prompt(engine, QUESTION, seed=1000 + number)]
        changed = edited(ids, 0.995)
        alone, wanted_changed, _ = first_token(engine, changed, None)
        edit, reused_edit = again(engine, folder, Policy(), changed, wanted_changed)
        warm, reused = again(engine, folder, Policy(), ids, wanted)
        asked, reused_asked = again(engine, folder, Policy(), other, None)
        per_token = {name: held / tokens for name, held in size.items()}
        print(
            f"{tokens:8,}{alone:9.2f}{first:9.2f}{warm:9.3f}{first / warm:6.0f}x{asked:9.3f}{first / asked:6.0f}x"
            f"{edit:9.3f}{first / edit:6.0f}x{per_token['stored']:9.1f}{per_token['allotted']:10.1f}"
            f"{per_token['written']:9.1f}"
        )
        rows.append(
            {
                "tokens": tokens,
                "alone_s": alone,
                "first_s": first,
                "again_s": warm,
                "asked_s": asked,
                "edit_s": edit,
                "reused": [r.tokens for r in (reused, reused_asked, reused_edit)],
                "run_again_for_windows": [r.replayed for r in (reused, reused_asked, reused_edit)],
                "bytes": size,
                "analytic_bytes_a_token": analytic,
            }
        )
    return rows


def policies(engine: Engine, tokens: int, base: Path) -> list[dict[str, Any]]:
    """Each policy over the same prompt: what it stores, and what a start costs after edits all over the prompt."""
    analytic = kv_bytes_per_token(engine.config, engine.kv_dtype) * tokens
    ids = prompt(engine, tokens, seed=77)
    wanted = first_token(engine, ids, None)[1]
    variants = [edited(ids, share) for share in EDITS]
    shortest = [changed[: int(tokens * share) + 2] for changed, share in zip(variants, EDITS, strict=True)]
    print(f"\n{tokens:,} tokens; 'near': tokens before an edit that are computed again, mean and most")
    print(f"{'policy':>16}{'first':>9}{'again':>9}{'near':>8}{'most':>7}{'stored':>10}{'states':>10}{'of rows':>9}")
    rows = []
    for number, policy in enumerate(POLICIES):
        folder = base / f"policy-{number}"
        first, logits, size = fill(engine, folder, policy, ids)
        if not torch.equal(logits, wanted):
            raise Disagreement(f"{policy}, while it was filled")
        warm, _ = again(engine, folder, policy, ids, wanted)
        near = []
        with PrefixStore.open(folder) as store:
            for changed in shortest:
                near.append(len(changed) - 2 - PrefixCache(store, engine, policy).start(changed)[1].tokens)
        name = policy.name + (f" {policy.interval // 1024}K" if policy.name == "periodic" else "")
        print(
            f"{name:>16}{first:9.2f}{warm:9.3f}{statistics.mean(near):8.0f}{max(near):7}{size['stored'] / tokens:10.1f}"
            f"{size.get('of state', 0) / tokens:10.1f}{size['stored'] / analytic:8.1%}"
        )
        rows.append(
            {
                "policy": name,
                "first_s": first,
                "again_s": warm,
                "near": near,
                "bytes": size,
                "of_rows": size["stored"] / analytic,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 16_384])
    parser.add_argument("--policies", type=int, default=16_384, help="tokens of the comparison of policies; 0 for none")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--kv-dtype", default="mixed")
    parser.add_argument("--folder", type=Path, help="where the stores are made, by default a temporary folder")
    options = parser.parse_args()
    engine = Engine.load(options.model, kv_dtype=options.kv_dtype)
    threads = f"{torch.get_num_threads()} threads"
    print(f"{engine.name}, {engine.kv_dtype}, chunks of {engine.chunk}, {threads}, {os.cpu_count()} cores")
    engine.session().extend(prompt(engine, 2 * engine.chunk, seed=5))  # what is made at the first use is made now
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        try:
            found = {
                "contexts": contexts(engine, options.tokens, Path(name)),
                "policies": policies(engine, options.policies, Path(name)) if options.policies else [],
            }
        except Disagreement as error:
            print(f"the logits of a cached session differ: {error}")
            return 1
    print(json.dumps({"model": engine.name, "kv_dtype": engine.kv_dtype, "threads": threads, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
