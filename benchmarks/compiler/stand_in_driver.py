"""A GPU's driver that loads and launches nothing, so that a machine without a GPU can look at Triton's launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

_SHARED_BYTES = 227 * 1024
_THREADS = 1024
_LEADING = 9
"""What a launcher takes before the kernel's own arguments: grid, stream, function, metadata and hooks."""


class StandInDriver:
    """Answers what Triton asks of a driver; `launched` gets the arguments of every launch."""

    def __init__(self, target: GPUTarget, launched: Callable[[tuple[Any, ...]], None]) -> None:
        self._target = target
        self._launched = launched
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, _THREADS),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": _SHARED_BYTES},
        )

    def get_current_target(self) -> GPUTarget:
        """The chip that kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The first and only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """A launcher that only hands on the kernel's arguments."""
        return lambda *arguments: self._launched(arguments[_LEADING:])


@contextmanager
def stand_in_driver(target: GPUTarget, launched: Callable[[tuple[Any, ...]], None] = lambda _: None) -> Iterator[None]:
    """Within it, kernels are compiled for `target` and launched nowhere."""
    before = driver._active
    driver.set_active(StandInDriver(target, launched))
    try:
        yield
    finally:
        driver._active = before
