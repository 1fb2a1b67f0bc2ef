"""One kernel launch, and the compiled kernels of launches that repeat.

Triton's own launcher binds and specialises about 70 values anew in every launch, which costs more than the rest of a
panel's host time (docs/decisions.md). Steps of a training run repeat the same launches on the same shapes, so what a
launch compiled to is kept, and a repetition hands it its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from .arguments import Constants, FactorMatrices, Matrix

_MOST_KEPT = 4096
"""Beyond so many kept launches all are dropped: batches of ever new lengths make ever new ones."""
_ALIGNMENT = 16


class Plan(NamedTuple):
    """What a launch is besides its arguments. Kernels are compiled without contraction to fused multiply-adds."""

    grid: tuple[int, int, int]
    constants: Constants
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options. Contraction is off: where W needs a fused multiply-add, it is written out."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


class _Kept(NamedTuple):
    run: Callable[..., None]
    constants: Constants


_kept: dict[Hashable, _Kept] = {}


class Launch(NamedTuple):
    """A kernel, its arguments before the constants, and how to plan the rest.

    `plan` is called once for each `choices` and each kind of arguments: their dtypes, sizes, strides, alignment and
    device. What else its plan depends on is in `choices`.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    choices: tuple[Hashable, ...]
    plan: Callable[[], Plan]

    def run(self) -> None:
        """Launch the kernel on the current stream of its tensors' device."""
        first = self.arguments[0].pointer
        with _device_guard(first.device):
            key = (self.kernel.fn, first.device, self.choices, *map(_kind, self.arguments))
            kept = _kept.get(key)
            if kept is not None:
                kept.run(*self.arguments, kept.constants)
                return
            plan = self.plan()
            compiled = self.kernel[plan.grid](*self.arguments, plan.constants, **plan.options)
            if compiled is not None:  # the interpreter compiles nothing
                if len(_kept) >= _MOST_KEPT:
                    _kept.clear()
                _kept[key] = _Kept(compiled[plan.grid], plan.constants)


def _kind(argument: Any) -> Hashable:
    """What Triton compiles for in an argument, and what a plan may look at."""
    if isinstance(argument, Matrix):
        tensor = argument[0]
        return (tensor.dtype, tensor.data_ptr() % _ALIGNMENT, argument[1:])
    if isinstance(argument, FactorMatrices):
        A, B, C, D, scale = argument
        return (_kind(A), _kind(B), _kind(C), _kind(D), _kind(scale))
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.data_ptr() % _ALIGNMENT)
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    return argument  # type: ignore[no-any-return]


def _device_guard(device: torch.device) -> Any:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
