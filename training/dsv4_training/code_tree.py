"""Real code for "which file defines this function": the bundled modules of Python's library, or the interpreter's own.

Owns which files count, their split into training and evaluation (by name, like the corpus), and their cutting into
excerpts.  Both sources are under the PSF licence; evals/dsv4_evals/data/SOURCES.md.  Knows no tokens.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dsv4_engine.errors import InputError

from .corpus import Corpus, is_held_out

# Tests, other people's packages, tables, and the documentation (which the corpus holds, split by its own names).
LEFT_OUT = re.compile(
    r"(^|/)(test|tests|idlelib|idle_test|lib2to3|site-packages|dist-packages|pydoc_data|__pycache__|turtledemo|"
    r"ensurepip|config-[^/]*|lib-dynload)(/|$)|^encodings/(cp|iso|mac|koi|ptcp|hp_)"
)
LARGEST = 60_000  # characters of a file that are used
LEAST_FILES = 40
_DEFINITION = re.compile(r"^[ ]{0,8}(?:async )?def ([A-Za-z_]\w*)\(", re.MULTILINE)
_TOP = re.compile(r"^(?=(?:async def|def|class|@)\b|@)", re.MULTILINE)


@dataclass(frozen=True)
class SourceFile:
    """path: within the tree, with slashes."""

    path: str
    text: str

    def functions(self) -> list[str]:
        """Names of functions and methods that are defined once in it, without dunders."""
        names = _DEFINITION.findall(self.text)
        return [n for n in dict.fromkeys(names) if names.count(n) == 1 and not n.startswith("__")]


@dataclass(frozen=True)
class CodeTree:
    """about: where it comes from, with a digest of all of it, for the record of a run."""

    training: tuple[SourceFile, ...]
    evaluation: tuple[SourceFile, ...]
    about: str

    def files(self, evaluation: bool) -> tuple[SourceFile, ...]:
        return self.evaluation if evaluation else self.training


def load(source: str, corpus: Corpus, library: Path | None = None) -> CodeTree:
    """source: "bundled" (the corpus' modules) or "stdlib" (the interpreter's library, or the folder ``library``).

    Raises InputError when there is too little of it.
    """
    if source == "bundled":
        return _split(
            (
                SourceFile(d.name.split("/", 1)[1], d.text)
                for d in (*corpus.training, *corpus.evaluation)
                if d.kind == "python-lib"
            ),
            "modules of Python 3.11's library, bundled",
        )
    root = library or Path(sysconfig.get_paths()["stdlib"])
    version = sysconfig.get_python_version()
    return _split(_read(root), f"the library of Python {version}")


def _read(root: Path) -> Iterator[SourceFile]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) >= 400 and max(map(len, text.splitlines())) < 400:
            yield SourceFile(name, text[:LARGEST])


def _split(files: Iterator[SourceFile], about: str) -> CodeTree:
    kept = [file for file in files if file.functions()]
    digest = hashlib.sha256("\0".join(f"{f.path}\0{f.text}" for f in kept).encode()).hexdigest()[:16]
    held = [is_held_out(f"python-lib/{file.path}") for file in kept]
    tree = CodeTree(
        tuple(file for file, out in zip(kept, held, strict=True) if not out),
        tuple(file for file, out in zip(kept, held, strict=True) if out),
        f"{about}: {len(kept)} files, {digest}",
    )
    if len(kept) < LEAST_FILES or not tree.evaluation:
        raise InputError(
            f"too little code to learn from: {about} gives {len(kept)} files",
            'Install the whole library of Python, or set data.code = "bundled" in the recipe.',
        )
    return tree


def excerpt(rng: Random, file: SourceFile, characters: int) -> SourceFile:
    """About ``characters`` of a file: whole lines, from the start of it or of a function or class; at least one def."""
    if len(file.text) <= characters:
        return file
    starts = [0, *(match.start() for match in _TOP.finditer(file.text))]
    for _ in range(8):
        start = rng.choice(starts)
        end = file.text.find("\n", min(len(file.text), start + characters) - 1)
        part = SourceFile(file.path, file.text[start : end + 1 if end >= 0 else len(file.text)])
        if part.functions():
            return part
    match = _DEFINITION.search(file.text)
    assert match is not None, "only files with functions are kept"
    end = file.text.find("\n", min(len(file.text), match.start() + characters) - 1)
    return SourceFile(file.path, file.text[match.start() : end + 1 if end >= 0 else len(file.text)])
