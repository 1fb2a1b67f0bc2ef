"""A guard that keeps fp32 matrix products in fp32 whatever the process-wide setting says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

_SETTINGS: dict[str, Any] = {
    "cuda": torch.backends.cuda.matmul,
    "cpu": getattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="ieee")),
}


@contextmanager
def ieee_matmul(device_type: str) -> Iterator[None]:
    """Within it, fp32 products on `device_type` are not rounded to TF32 or bf16.

    The sign of Q = D C is a cliff: rounding the factors (``torch.set_float32_matmul_precision("high")`` does on CUDA,
    ``"medium"`` also on CPUs) would flip signs between passes. Other devices have no such setting.
    """
    setting = _SETTINGS.get(device_type)
    before = "ieee" if setting is None else setting.fp32_precision
    inherited = before == "none" and getattr(torch.backends, "fp32_precision", "none") in ("none", "ieee")
    if setting is None or before == "ieee" or inherited:
        yield
        return
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before
