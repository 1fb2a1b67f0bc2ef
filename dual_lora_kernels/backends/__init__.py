"""Backends and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from ..validation import check_choice
from .block import Base, Block, DenseBase, Drawn, Factors, ParameterGradients, base_of
from .eager import EagerBackend
from .interface import PANEL_UNIT, Backend, DoesNotFit, Estimator, FusedPasses, Settings, SharedProducts
from .native import NativeBackend
from .triton import TritonBackend

_logger = logging.getLogger("dual_lora_kernels")
__all__ = [
    "PANEL_UNIT",
    "Backend",
    "Base",
    "Block",
    "DenseBase",
    "DoesNotFit",
    "Drawn",
    "Estimator",
    "Factors",
    "FusedPasses",
    "ParameterGradients",
    "Settings",
    "SharedProducts",
    "available_backends",
    "base_of",
    "candidates",
    "check_backend_name",
    "resolve_backend",
]

_BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), NativeBackend(), EagerBackend())
}
"""In order of preference for ``"auto"``."""
_announced: set[tuple[str, str]] = set()


def available_backends() -> list[str]:
    """Names of the backends that this installation has, in the order in which ``"auto"`` tries them."""
    return [name for name, backend in _BACKENDS.items() if backend.why_unavailable() is None]


def check_backend_name(name: str) -> None:
    """Raise ValueError unless `name` is a backend's or ``"auto"``."""
    check_choice("backend", name, ("auto", *_BACKENDS))


def candidates(
    name: str, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype
) -> Iterator[tuple[Backend, str | None]]:
    """The backends that `name` admits, in order of preference, each with None or its reason not to serve such a call.

    Lazy: a call that is served asks none of the backends after the one that serves it, and so loads none of their
    libraries.
    """
    for backend in _BACKENDS.values() if name == "auto" else (_BACKENDS[name],):
        reason = backend.why_unavailable() or backend.why_not(device, compute_dtype, factor_dtype)
        if name == "auto":
            reason = reason or backend.why_not_auto(device)
        yield backend, reason


def resolve_backend(name: str, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> Backend:
    """The backend that serves a call.

    Raises ValueError where `name` is unknown, or cannot serve the call, with the backend's own reason. ``"auto"`` tries
    them in order and logs, once per device type, which one runs and why others do not.
    """
    check_backend_name(name)
    reasons: list[str] = []
    for candidate, reason in candidates(name, device, compute_dtype, factor_dtype):
        if reason is None:
            if (candidate.name, device.type) not in _announced:
                _announced.add((candidate.name, device.type))
                passed_over = f" (not {'; '.join(reasons)})" if reasons else ""
                _logger.info(
                    "backend '%s' runs on %s: %s%s", candidate.name, device.type, candidate.description(), passed_over
                )
            return candidate
        reasons.append(f"'{candidate.name}': {reason}")
    raise ValueError(f"backend: got {name!r}, which does not serve this call: {'; '.join(reasons)}")
