"""That nothing of the evaluation is trained on: documents, code and keys of its side stay on it.

Sides are decided by name (corpus.is_held_out).  Names say nothing of copies, so lines are compared too: a held-out
document may share lines with training (verses that the Bible repeats, boilerplate of modules), but not be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dsv4_engine.errors import InputError

from .code_tree import CodeTree
from .corpus import Corpus, is_held_out

LONG = 60  # characters; shorter lines (headings, common statements) say nothing
MOST_SHARED = 0.5  # of a document's long lines


class LeakError(InputError):
    """A held-out text is in the training text."""


def long_lines(text: str) -> set[str]:
    """Without comments: licences at the top of modules are alike."""
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= LONG and not line.startswith("#")}


def shared(held_out: Iterable[tuple[str, str]], training: Iterable[str]) -> Iterator[tuple[str, float]]:
    """(name, share of its long lines that training holds) of each held-out (name, text)."""
    known: set[str] = set()
    for text in training:
        known |= long_lines(text)
    for name, text in held_out:
        lines = long_lines(text)
        yield name, len(lines & known) / len(lines) if len(lines) >= 5 else 0.0


def check(corpus: Corpus, tree: CodeTree) -> dict[str, float]:
    """The shares by name.  Raises LeakError when a name is on both sides, or a held-out text in training."""
    names = {d.name for d in corpus.training} | {f"python-lib/{f.path}" for f in tree.training}
    wrong = sorted(name for name in names if is_held_out(name))
    if wrong:
        raise LeakError(f"held-out text is on the training side: {', '.join(wrong[:5])}", "Split it by name.")
    training = [*(d.text for d in corpus.training), *(f.text for f in tree.training)]
    held = [*((d.name, d.text) for d in corpus.evaluation), *((f.path, f.text) for f in tree.evaluation)]
    shares = dict(shared(held, training))
    copied = {name: share for name, share in shares.items() if share > MOST_SHARED}
    if copied:
        worst = max(copied, key=copied.__getitem__)
        raise LeakError(
            f"{len(copied)} held-out texts are in the training text, {worst} to {copied[worst]:.0%} of its lines",
            "Leave their copies out of training (code_tree.LEFT_OUT).",
        )
    return shares
