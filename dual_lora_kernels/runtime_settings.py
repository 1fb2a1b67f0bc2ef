"""The settings of calls that name none: backend, strategy and workspace. Setters change them, `settings` for a while.

They belong to the process, as those of PyTorch's sdpa_kernel do: torch.compile can guard on them. A forward pass reads
them once, and its backward pass is handed what it read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .backends import Settings, check_backend_name
from .validation import check_choice, check_positive_int

DEFAULT_WORKSPACE_BYTES = 32 * 1024 * 1024
STRATEGIES = ("auto", "fused", "panels")
_settings = Settings("auto", DEFAULT_WORKSPACE_BYTES)
_backend = "auto"


def current_settings() -> Settings:
    """Strategy and workspace of a call that begins now."""
    return _settings


def default_backend() -> str:
    """The backend of calls that name none; ``"auto"`` at first."""
    return _backend


def strategy() -> str:
    """How passes run, as `set_strategy` chose; ``"auto"`` at first."""
    return _settings.strategy


def workspace_bytes() -> int:
    """The bound that `set_workspace_bytes` set."""
    return _settings.workspace


def set_default_backend(name: str) -> None:
    """Choose the backend of calls that name none: ``"auto"`` (the first that serves the call) or a backend's name.

    Raises ValueError for a name that is neither.
    """
    global _backend
    check_backend_name(name)
    _backend = name


def set_strategy(name: str) -> None:
    """Choose how passes run: ``"panels"``, ``"fused"``, or ``"auto"``, the one that the backend expects to be faster.

    ``"fused"`` raises ValueError in calls that cannot run so. The weights used are the same bits either way. Raises
    ValueError for another name.
    """
    global _settings
    check_choice("strategy", name, STRATEGIES)
    _settings = Settings(name, _settings.workspace)


def set_workspace_bytes(count: int) -> None:
    """Bound the temporary memory of a call, in bytes (default 32 MiB).

    A panel takes at least one row or column, the Triton backend's partial sums of gradients at least one row of tiles,
    and the eager backend six tiles, 1.5 MiB (3 MiB for fp64 factors), so the bound is exceeded where that alone is
    larger. Raises TypeError unless `count` is an integer, ValueError unless it is positive.
    """
    global _settings
    _settings = Settings(_settings.strategy, check_positive_int("count", count))


@contextmanager
def settings(
    *, strategy: str | None = None, workspace_bytes: int | None = None, backend: str | None = None
) -> Iterator[None]:
    """Calls in this ``with`` block, or in the function that this decorates, run with these settings.

    Those left None stay as they are. Backward passes use what their forward pass ran with, wherever they run. Raises as
    the setters do, before anything is changed.
    """
    global _settings, _backend
    before = _settings, _backend
    if strategy is not None:
        check_choice("strategy", strategy, STRATEGIES)
    if workspace_bytes is not None:
        workspace_bytes = check_positive_int("workspace_bytes", workspace_bytes)
    if backend is not None:
        check_backend_name(backend)
        _backend = backend
    _settings = Settings(strategy or _settings.strategy, workspace_bytes or _settings.workspace)
    try:
        yield
    finally:
        _settings, _backend = before
