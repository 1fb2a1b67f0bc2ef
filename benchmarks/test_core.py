"""The core cases under pytest-benchmark.

    pytest benchmarks --benchmark-autosave         # all of them, kept under .benchmarks
    pytest benchmarks --benchmark-compare          # beside the run that was kept last
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:15%
    pytest benchmarks -k 256x256                   # seconds
    pytest benchmarks -k "step and 4096x4096"

A comparison is between two runs, so it wants a quiet machine; ``python -m benchmarks layer`` and ``python -m
benchmarks.ratio_check`` compare within one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .layers.core_cases import KINDS, CoreCase, prepare
from .layers.layer_step import FLOOR

TOKENS = {256: 128, 1024: 256, 4096: 512}
"""Size → tokens of a forward pass or a step."""
SUBJECTS = (FLOOR, "lora", "dora", "naive", "dual_lora")
_COUNTS = {"decode": 1, "merge": 0}


def _case(kind: str, size: int) -> CoreCase:
    return CoreCase(kind, size, _COUNTS.get(kind, TOKENS[size]))


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("case", [_case(kind, size) for size in TOKENS for kind in KINDS], ids=lambda case: case.name)
def test_time(case: CoreCase, subject: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    benchmark.group = case.name
    benchmark(prepare(case, subject))  # as often as a second allows, five times at least
