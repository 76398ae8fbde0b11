"""Triton for the tests: the device that runs the kernels, or the reason why none can.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py asks for it, before anything imports Triton).
"""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4[gpu]'")
