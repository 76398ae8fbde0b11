"""Builds evals/dsv4_evals/data/corpus.txt.xz from three freely licensed sources (see SOURCES.md beside it).

Run once by a maintainer; the result is committed, so training itself needs no network and no packages.  A record
is a header line ``\\x1e<name>`` and the text after it.  Files are taken in a fixed order until each
source's share is full.

    python training/build_corpus.py --kjv kjv.txt --python-docs .../html/_sources --stdlib /usr/lib/python3.11
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
from collections.abc import Iterator
from pathlib import Path

RECORD = "\x1e"
VERSES_A_RECORD = 60
OUT = Path(__file__).parents[1] / "evals" / "dsv4_evals" / "data" / "corpus.txt.xz"


def stable_order(paths: list[Path], root: Path) -> list[Path]:
    """A fixed shuffle, so that a share of a source is spread over the whole of it."""
    return sorted(paths, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest())


def kjv_records(path: Path) -> Iterator[tuple[str, str]]:
    """``Ge1:1 In the beginning ...`` lines, in records of consecutive verses without their numbers."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for start in range(0, len(lines), VERSES_A_RECORD):
        part = [line.split(" ", 1) for line in lines[start : start + VERSES_A_RECORD] if " " in line]
        paragraphs = [" ".join(text.strip() for _, text in part[i : i + 6]) for i in range(0, len(part), 6)]
        yield f"kjv/{part[0][0]}", "\n\n".join(paragraphs) + "\n"


def file_records(root: Path, pattern: str, prefix: str, largest: int) -> Iterator[tuple[str, str]]:
    for path in stable_order([p for p in root.rglob(pattern) if p.is_file()], root):
        name = str(path.relative_to(root))
        if any(
            part in name for part in ("test", "idlelib", "lib2to3/pgen2", "__pycache__", "dist-packages", "config-3")
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 600 and max(map(len, text.splitlines())) < 400:
            yield f"{prefix}/{name.removesuffix('.txt')}", text[:largest]


def take(records: Iterator[tuple[str, str]], characters: int) -> list[tuple[str, str]]:
    taken, total = [], 0
    for name, text in records:
        if total >= characters:
            break
        taken.append((name, text))
        total += len(text)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kjv", type=Path, required=True, help="the text as printed by `bible -f gen1:1-rev22:21`")
    parser.add_argument("--python-docs", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    verses = sorted(kjv_records(options.kjv), key=lambda r: hashlib.sha256(r[0].encode()).digest())
    records = take(iter(verses), 1_800_000)
    records += take(file_records(options.python_docs, "*.rst.txt", "python-docs", 60_000), 3_200_000)
    records += take(file_records(options.stdlib, "*.py", "python-lib", 40_000), 2_000_000)
    text = "".join(f"{RECORD}{name}\n{body}" for name, body in records)
    options.out.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
