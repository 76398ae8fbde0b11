"""Runs a function in several processes that are connected by gloo, and returns what each gave."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_engine.ranks import Ranks, join, leave


def _started(function: Callable[..., Any], ranks: Ranks, out: Path, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    join(ranks)
    torch.save(function(ranks, *arguments), out / f"{ranks.rank}.pt")
    leave()


def across(count: int, out: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(ranks, *arguments) in ``count`` processes; out: an empty folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import torch again
    processes = [
        context.Process(target=_started, args=(function, Ranks(rank, count), out, port, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(out / f"{rank}.pt") for rank in range(count)]
