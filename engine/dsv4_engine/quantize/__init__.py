"""Checkpoints in other formats: `quantize` writes one from another, `compare` says what that did to its answers.

schemes.py: what becomes of each tensor.  job.py: the result laid out beforehand.  convert.py: the arithmetic.
rows.py: bytes in and out.  folder.py: the result's folder, unfinished and whole.  run.py: the work.  report.py: the
account.  check.py: both models on one text.
"""

from .check import Comparison, compare, token_ids
from .report import Report
from .run import DiskProblem, Paused, default_workers, finished_report, quantize
from .schemes import SCHEMES

__all__ = [
    "SCHEMES",
    "Comparison",
    "DiskProblem",
    "Paused",
    "Report",
    "compare",
    "default_workers",
    "finished_report",
    "quantize",
    "token_ids",
]
