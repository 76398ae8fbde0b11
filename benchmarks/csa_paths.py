"""CSA attention on a CPU: scoring all entries under a mask against fetching each query's chosen ones.

    python -m benchmarks.csa_paths

Random data; outputs compared first; best of 5.  `dsv4_engine.attention.gathers` draws its line through this table.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.timing import timed
from dsv4_engine.attention import gathers
from dsv4_kernels.attention import dense_attention, gathered_attention

TOLERANCE = 1e-5  # relative RMS
QUERIES, WINDOW = 128, 128


@torch.inference_mode()
def main() -> int:
    rows = []
    print(f"{'heads':>6}{'channels':>9}{'chosen':>7}{'entries':>8}{'all':>10}{'fetched':>10}  taken")
    for heads, channels, chosen in ((4, 128, 128), (16, 128, 512), (64, 512, 512)):
        for times in (2, 4, 8, 16):
            entries = times * chosen
            q = torch.randn(QUERIES, heads, channels) * channels**-0.5
            near, far, sink = (
                torch.randn(QUERIES + WINDOW - 1, channels),
                torch.randn(entries, channels),
                torch.randn(heads),
            )
            picked = torch.stack([torch.randperm(entries)[:chosen] for _ in range(QUERIES)])
            mask = torch.zeros(QUERIES, entries, dtype=torch.bool).scatter_(1, picked, True)
            seen = torch.full((QUERIES,), entries)
            results = {}

            def score() -> None:
                results["all"] = dense_attention(q, near, far, mask, sink, WINDOW, seen)  # noqa: B023

            def fetch() -> None:
                results["fetched"] = gathered_attention(q, near, far, picked, sink, WINDOW)  # noqa: B023

            score()
            fetch()
            error = float((results["all"] - results["fetched"]).norm() / results["all"].norm())
            if error > TOLERANCE:
                print(f"the outputs disagree by {error:.1e}")
                return 1
            a, b = (min(timed(run) for _ in range(5)) for run in (score, fetch))
            taken = "fetched" if gathers(entries, chosen, heads) else "all"
            print(f"{heads:6}{channels:9}{chosen:7}{entries:8}{a * 1e3:7.1f} ms{b * 1e3:7.1f} ms  {taken}")
            rows.append(
                {"heads": heads, "channels": channels, "chosen": chosen, "entries": entries, "all": a, "fetched": b}
            )
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
