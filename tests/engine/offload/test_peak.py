"""What a process takes against what its plan says, in a process of its own.

python -m pytest -m slow tests/engine/offload/test_peak.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4_engine.config import ModelConfig
from dsv4_engine.random_weights import one_layer_of_each_kind, random_checkpoint

pytestmark = pytest.mark.slow
WITHIN = 0.05
RUN = """
import json, resource, sys, torch
from dsv4_engine import Engine
from dsv4_engine.device_map import Limits
torch.set_num_threads(1)
folder, limit, ctx = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = Engine.load(folder, limits=Limits(cpu=limit or None), ctx=ctx)
ids = torch.randint(engine.config.vocab_size, (ctx - 2,)).tolist()
session = engine.session()
session.extend(ids)
session.extend(ids[:1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "planned": engine.plan.total("cpu"), "slots": engine.plan.slots}))
"""


def measured(folder: Path, limit: int, ctx: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(limit), str(ctx)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V4-Flash's widths, one layer of each kind, with fewer experts and words."""
    whole = ModelConfig.preset("v4-flash")
    config = replace(one_layer_of_each_kind(whole), n_routed_experts=32, vocab_size=16_384)
    return random_checkpoint(tmp_path_factory.mktemp("wide"), config)


@pytest.mark.parametrize(("limit", "slots"), [(0, False), (2 << 30, True)])
def test_the_peak_is_what_was_planned(folder: Path, limit: int, slots: bool) -> None:
    found = measured(folder, limit, 514)
    assert bool(found["slots"]) == slots
    assert found["peak"] <= found["planned"] * 1.005
    assert found["peak"] >= found["planned"] * (1 - WITHIN)
