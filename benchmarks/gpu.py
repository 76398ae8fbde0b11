"""What the GPU benchmarks share: times of graph replays, ceilings, tables, and the peers that can be imported."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType

import torch

# Measured on one H200: an 8192^3 product of torch in bf16 and in fp8, a copy of 4 GiB (read and written).
BF16_CEILING, FP8_CEILING, COPY_CEILING = 813e12, 1302e12, 4.26e12


def replay_ms(run: Callable[[], object], budget_ms: float = 60.0, rounds: int = 9) -> float:
    """Median milliseconds of one call, from replays of a graph that holds as many as fit ``budget_ms / rounds``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # inputs may still be on their way
    with torch.cuda.stream(stream):
        run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        calls = max(1, min(200, int(budget_ms / rounds / max(start.elapsed_time(end), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
        graph.replay()
        times = []
        for _ in range(rounds):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls)
    del graph
    return statistics.median(times)


def peer(name: str) -> ModuleType | None:
    """The peer's module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@dataclass
class Row:
    """One measured line.  share: of the ceiling; against: the peer's time over ours, None without that peer."""

    what: str
    shape: str
    ms: float
    rate: str
    share: float
    error: float
    peer_ms: float | None = None

    def line(self) -> str:
        against = f"{self.peer_ms:9.4f} ms {self.peer_ms / self.ms:6.2f}" if self.peer_ms else f"{'-':>12}{'-':>7}"
        return (
            f"{self.what:24}{self.shape:48}{self.ms:9.4f} ms{self.rate:>14}{self.share:7.0%}{self.error:9.1e}{against}"
        )


HEADER = f"{'':24}{'shape':48}{'time':>12}{'rate':>14}{'share':>7}{'error':>9}{'peer':>12}{'ratio':>7}"


def report(rows: list[Row]) -> None:
    """One line of JSON, last."""
    name = torch.cuda.get_device_name()
    print(json.dumps({"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}))
