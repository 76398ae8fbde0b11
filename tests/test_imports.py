"""Who may import whom, read from the source with ast, and that nothing but the command line prints.

The command line may use evals, engine and training; evals nothing of ours; training the engine and the kernels; the
engine the kernels; the kernels nothing.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"dsv4cli", "dsv4_evals", "dsv4_training", "dsv4_engine", "dsv4_kernels"}
MAY_IMPORT = {
    "dsv4cli": {"dsv4_evals", "dsv4_engine", "dsv4_training"},
    "dsv4_evals": set(),
    "dsv4_training": {"dsv4_engine", "dsv4_kernels"},
    "dsv4_engine": {"dsv4_kernels"},
    "dsv4_kernels": set(),
}
FOLDERS = {
    "dsv4cli": "dsv4cli",
    "dsv4_evals": "evals/dsv4_evals",
    "dsv4_training": "training/dsv4_training",
    "dsv4_engine": "engine/dsv4_engine",
    "dsv4_kernels": "kernels/dsv4_kernels",
}
# Its bars and tables are for a person, and it is started by one: the training's own command.
MAY_PRINT = {"training/dsv4_training/__main__.py"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS[package]).rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[str]:
    """The top-level packages that absolute imports name, wherever in the file they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def prints(tree: ast.Module) -> bool:
    """Whether the file calls print, or writes to the terminal's streams."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
            return True
    return False


def files() -> list[tuple[str, Path]]:
    return [(package, path) for package in FOLDERS for path in sources(package)]


def test_there_is_something_to_read() -> None:
    for package in FOLDERS:
        assert sources(package), package


@pytest.mark.parametrize(("package", "path"), files(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_each_file_keeps_to_its_room(package: str, path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    names = set(imported(tree))
    wrong = (names & OURS) - MAY_IMPORT[package] - {package}
    assert not wrong, f"{package} must not import {', '.join(sorted(wrong))}"
    if package != "dsv4cli":
        drawing = names & {"typer", "rich", "prompt_toolkit"}
        assert not drawing, f"only dsv4cli may import {', '.join(sorted(drawing))}"
        if path.relative_to(ROOT).as_posix() not in MAY_PRINT:
            assert not prints(tree), "only dsv4cli prints"


def test_the_checks_see_what_they_look_for() -> None:
    tree = ast.parse("def f():\n    import rich.table\n    from dsv4_engine.session import Session\n    print(1)\n")
    assert set(imported(tree)) == {"rich", "dsv4_engine"}
    assert prints(tree)
    assert prints(ast.parse("import sys\nsys.stderr.write('x')"))
    assert not prints(ast.parse("from .session import Session"))


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "run --help",
        "chat --help",
        "--version",
        "run x --file /nowhere",
        "eval --help",
        "eval needle --help",
        "eval needle --depths 101",
        "download --help",
    ],
)
def test_help_and_wrong_files_do_not_load_torch(line: str) -> None:
    script = (
        "import sys, dsv4cli.main\n"
        f"sys.argv = ['dsv4', *{line.split()!r}]\n"
        "try:\n    dsv4cli.main.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'prompt_toolkit', 'huggingface_hub'}\n"
        "found = heavy & set(sys.modules)\n"
        "sys.exit(f'loaded {found}' if found else 0)\n"
    )
    paths = [str(ROOT / folder) for folder in (".", "engine", "evals", "kernels", "training")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{script}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
