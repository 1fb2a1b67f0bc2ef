"""Precision of products: what they accumulate in, and a guard that keeps fp32 ones in fp32 whatever a setting says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CUDA: Any = torch.backends.cuda.matmul
_CPU: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_SETTINGS: dict[str, Any] = {"cuda": _CUDA, "cpu": _CPU, "xpu": _CPU}
_lock = threading.Lock()
_inside = 0
_before: tuple[str | None, list[str]] = (None, [])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def ieee_matmul(device_type: str) -> Iterator[None]:
    """Within it, fp32 products on `device_type` are not rounded to TF32 or bf16, in any thread.

    The sign of Q = D C is a cliff: rounding the factors (``torch.set_float32_matmul_precision("high")`` does on CUDA,
    ``"medium"`` also on CPUs) would flip signs between passes. The settings are the process's, and autograd runs
    backward passes in threads of its own, so they are restored when the last thread leaves. MPS has no such setting.

    PyTorch keeps an old and a new form of the settings, and raises where one is read while they disagree, so both are
    changed together.
    """
    global _inside, _before
    setting = _SETTINGS.get(device_type)
    with _lock:
        holds = setting is not None and (_inside > 0 or setting.fp32_precision not in ("none", "ieee"))
        if holds:
            if not _inside:
                _before = _legacy(), [_own(each) for each in (_CUDA, _CPU)]
                _set("highest" if _before[0] else None, ["ieee", "ieee"])
            _inside += 1
    try:
        yield
    finally:
        if holds:
            with _lock:
                _inside -= 1
                if not _inside:
                    _set(*_before)


def _legacy() -> str | None:
    """The old form of the setting; None where the user's own mixture of the forms keeps it from being read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _own(setting: Any) -> str:
    """A device's value without inheritance, which its getter resolves: what equals the parent's is the parent's."""
    value: str = setting.fp32_precision
    return "none" if value == torch.backends.fp32_precision else value  # type: ignore[attr-defined]


def _set(legacy: str | None, values: list[str]) -> None:
    # The old setter writes the new form, too, so it goes first.
    if legacy is not None and legacy != torch.get_float32_matmul_precision():
        torch.set_float32_matmul_precision(legacy)
    for setting, value in zip((_CUDA, _CPU), values, strict=True):
        if setting.fp32_precision != value:
            setting.fp32_precision = value
