"""Settings shared by every test: one thread a process, no network, and the markers' reasons for skipping."""

from __future__ import annotations

import os
import signal
import zlib

# Before torch is imported anywhere: two cores are shared by whatever else runs, and results must not depend on them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# A shell that starts the tests in the background has them ignore Ctrl-C, and they it in what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads this when a kernel is defined, and other libraries import kernels of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _nothing_of_the_developer(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A developer's own default model, prefix cache and journal neither change what the tests run nor are changed."""
    monkeypatch.delenv("DSV4_MODEL", raising=False)
    monkeypatch.delenv("DSV4_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def _draw_for(what: str) -> None:
    torch.manual_seed(zlib.crc32(f"{os.environ.get('DSV4_TEST_SEED', '')} {what}".encode()))


@pytest.fixture(autouse=True)
def _random_numbers(request: pytest.FixtureRequest) -> None:
    """A test's random numbers are its own, whichever tests its process ran before; DSV4_TEST_SEED=7 draws others."""
    _draw_for(request.node.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    if fixturedef.scope != "function":
        _draw_for(f"{request.node.nodeid} {fixturedef.argname}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where no accelerator is found, and say so.  torch is imported only if one is there."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
