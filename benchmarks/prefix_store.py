"""The prefix store alone: opening, finding, reading, writing and upkeep, with many segments and with large ones.

    python -m benchmarks.prefix_store [--segments 100000] [--folder PATH]

Random bytes; every read is compared with what was written.  Opening is timed in processes of their own.  Medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dsv4_engine.prefix_cache import Origin, PrefixStore, Segment, objects, segments
from dsv4_engine.prefix_cache.folder import Folder

ORIGIN = Origin("benchmark", "kv=mixed segment=16", "benchmark")
LENGTH, CHAIN = 16, 512  # tokens a segment; segments a prompt: 1M tokens at 2,048 a segment
SIZES = {"tiny, 2,048 tokens": 274_432, "V4-Flash, 2,048 tokens": 3514 * 2048}
OPEN = """
import sys, time
from pathlib import Path
from dsv4_engine.prefix_cache import PrefixStore
start = time.perf_counter()
store = PrefixStore.open(Path(sys.argv[1]))  # its default budget depends on what is kept: this asks the index
print(time.perf_counter() - start)
store.close()
"""


# Dies between the file of an object and its row in the index.
KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.prefix_store import content, prompt
from dsv4_engine.prefix_cache import PrefixStore
from dsv4_engine.prefix_cache.index import Index
Index.add = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
store = PrefixStore.open(Path(sys.argv[1]))
link = prompt(int(sys.argv[2]))[0]
store.write(link, "rows", content(link))
"""


def prompt(number: int, count: int = CHAIN) -> list[Segment]:
    numbers = random.Random(number)
    return segments(ORIGIN, [numbers.randrange(129_280) for _ in range(count * LENGTH)], LENGTH)


def content(link: Segment, size: int = 1000) -> bytes:
    return hashlib.shake_256(link.key).digest(size)


def build(folder: Path, count: int) -> None:
    """Lay out the files of ``count`` segments, as writing them would, but without waiting for the disk each time."""
    files = Folder(folder)
    files.make()
    for number in range(-(-count // CHAIN)):
        for link in prompt(number)[: count - number * CHAIN]:
            path = files.path(link.key, "rows")
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.write_bytes(b"".join(objects.compose(link, "rows", content(link))[1]))
            path.chmod(0o600)


def median(run: Callable[[], object], times: int = 9) -> float:
    """Median seconds of several calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def many(folder: Path, count: int) -> dict[str, float]:
    """Seconds of each operation on a store of ``count`` small segments."""
    build(folder, count)
    found: dict[str, float] = {}
    start = time.perf_counter()
    with PrefixStore.open(folder) as store:
        found["index made from the files"] = time.perf_counter() - start
        assert store.stats().segments == count and store.notices == []
    opened = [
        float(subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, check=True).stdout)
        for _ in range(9)
    ]
    found["open"], found["open, slowest of 9"] = statistics.median(opened), max(opened)
    after = []
    for number in range(5):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(2 * 10**6 + number)])
        assert killed.returncode == -signal.SIGKILL
        start = time.perf_counter()
        with PrefixStore.open(folder) as store:
            after.append(time.perf_counter() - start)
            link = prompt(2 * 10**6 + number)[0]
            assert store.read(link.key, "rows") == content(link)
            store.discard(link.key, "rows")
    found["open after kill -9"] = statistics.median(after)
    with PrefixStore.open(folder, budget=10**12) as store:
        whole = [link.key for link in prompt(1)]
        numbers = random.Random(0)
        assert len(store.find(whole)) == CHAIN
        chains = [[link.key for link in prompt(n)] for n in numbers.sample(range(1, count // CHAIN), 9)]
        each = iter(chains)
        found["find 512 segments (1M tokens)"] = median(lambda: store.find(next(each)))
        each = iter(chains)
        found["find 64 segments (128K tokens)"] = median(lambda: store.find(next(each)[:64]))
        news = iter(prompt(10**6 + n) for n in range(9))
        links = [next(news) for _ in range(9)]
        each = iter([[link.key for link in chain] for chain in links])
        found["find nothing of 512"] = median(lambda: store.find(next(each)))
        first = iter(links)
        found["say why not"] = median(lambda: store.miss(next(first)[0]))
        found["touch 512"] = median(lambda: store.touch(whole))
        found["statistics"] = median(store.stats, 3)
        fresh = iter(links)

        def write() -> None:
            link = next(fresh)[0]
            assert store.write(link, "rows", content(link))

        found["write 1 KB"] = median(write)
        size = store.stats().size
        start = time.perf_counter()
        pruned = store.prune(int(size * 0.99))
        found[f"evict {pruned.segments:,} segments"] = time.perf_counter() - start
        start = time.perf_counter()
        checked = store.verify()
        found["verify all"] = time.perf_counter() - start
        assert checked.sound and checked.objects == count + 9 - pruned.segments
    return found


def large(folder: Path, size: int) -> dict[str, float]:
    """MB/s of writing and reading segments of ``size`` bytes, and bytes that reach the disk for each one kept."""
    links = prompt(7, 12)
    payloads = [os.urandom(size) for _ in links]
    with PrefixStore.open(folder, budget=10**12) as store:
        before, start = written_by_process(), time.perf_counter()
        for link, payload in zip(links, payloads, strict=True):
            assert store.write(link, "rows", payload)
        seconds = time.perf_counter() - start
        reading = median(lambda: [store.read(link.key, "rows") for link in links], 5)
        assert all(store.read(link.key, "rows") == payload for link, payload in zip(links, payloads, strict=True))
    total = size * len(links)
    disk = (written_by_process() - before) / total
    return {"write": total / seconds / 1e6, "read": total / reading / 1e6, "amplification": disk}


def written_by_process() -> int:
    """Bytes this process caused to be written to disks, index and log included; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.prefix_store")
    options.add_argument("--segments", type=int, default=100_000)
    options.add_argument("--folder", type=Path, help="on which disk; by default the one of temporary files")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as base:
        seconds = many(Path(base) / "many", chosen.segments)
        rates = {name: large(Path(base) / str(size), size) for name, size in SIZES.items()}
    print(f"{chosen.segments:,} segments")
    for name, value in seconds.items():
        print(f"  {name:32}{value * 1e3:10.2f} ms")
    print(f"\n{'an object of':32}{'write':>10}{'read':>12}   bytes to disk a byte kept")
    for name, rate in rates.items():
        print(f"  {name:30}{rate['write']:7.0f} MB/s{rate['read']:7.0f} MB/s   {rate['amplification']:.3f}")
    print(json.dumps({"segments": chosen.segments, "seconds": seconds, "objects": rates}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
