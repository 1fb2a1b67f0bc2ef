"""Precision of products: what they accumulate in, and a guard that keeps fp32 ones in fp32 whatever a setting says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SETTINGS: dict[str, Any] = {
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    "xpu": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
}
_lock = threading.Lock()
_inside: dict[int, int] = {}
_before: dict[int, str] = {}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def ieee_matmul(device_type: str) -> Iterator[None]:
    """Within it, fp32 products on `device_type` are not rounded to TF32 or bf16, in any thread.

    The sign of Q = D C is a cliff: rounding the factors (``torch.set_float32_matmul_precision("high")`` does on CUDA,
    ``"medium"`` also on CPUs) would flip signs between passes. The setting is the process's, and autograd runs
    backward passes in threads of its own, so it is restored when the last of them leaves. MPS has no such setting.
    """
    setting = _SETTINGS.get(device_type)
    if setting is None:
        yield
        return
    key = id(setting)
    with _lock:
        if not _inside.get(key):
            current = setting.fp32_precision
            # The getter resolves inheritance: what equals the parent's value is given back to the parent.
            _before[key] = "none" if current == torch.backends.fp32_precision else current  # type: ignore[attr-defined]
            if current not in ("none", "ieee"):
                setting.fp32_precision = "ieee"
        _inside[key] = _inside.get(key, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _inside[key] -= 1
            if not _inside[key] and setting.fp32_precision != _before[key]:
                setting.fp32_precision = _before[key]
