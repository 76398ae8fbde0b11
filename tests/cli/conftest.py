"""A complete small checkpoint for the command line's tests: random weights and a tokenizer of single bytes.

The answers are noise; what surrounds them is what these tests are about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

CTX = 4096


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli() -> Cli:
    """Runs dsv4 in this process: ``cli("run", "Why?", input="...")``."""
    from dsv4cli.main import app

    def run(*arguments: str | Path, input: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


def byte_tokenizer() -> str:
    """A tokenizer.json with the protocol's special tokens and one token a byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from dsv4_engine.protocol import BOS, EOS
    from dsv4_engine.tokenizer import REQUIRED_SPECIALS

    specials = [BOS, EOS, *(token for token in REQUIRED_SPECIALS if token not in (BOS, EOS))]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return str(tokenizer.to_str())


def write_model(folder: Path, **settings: Any) -> Path:
    """A folder with config.json, weights and tokenizer.json; ``settings`` go to make_checkpoint."""
    from support.random_checkpoint import make_checkpoint

    tokenizer = byte_tokenizer()
    size = len(json.loads(tokenizer)["model"]["vocab"])
    make_checkpoint(folder, **{"vocab_size": size, "max_position_embeddings": CTX, **settings})
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers noise; not to be changed."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def note(tmp_path: Path) -> Path:
    """A small text file."""
    file = tmp_path / "note.txt"
    file.write_text("The code is 7319.\n", encoding="utf-8")
    return file


def environment() -> dict[str, str]:
    """For subprocesses: this tree's packages, whether or not dsv4 is installed."""
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
