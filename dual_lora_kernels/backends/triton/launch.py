"""One kernel launch, and the compiled kernels of launches that repeat.

Triton's own launcher binds and specialises about 70 values anew in every launch, which costs more than the rest of a
panel's host time (docs/decisions.md). Steps of a training run repeat the same launches on the same shapes, so what a
launch compiled to is kept, and a repetition hands it its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from .arguments import Constants, Matrix, SumConstants

_MOST_KEPT = 4096
"""Beyond so many kept launches all are dropped: batches of ever new lengths make ever new ones."""
_ALIGNMENT = 16
_NOTHING = nullcontext()


class Plan(NamedTuple):
    """What a launch is besides its arguments. Kernels are compiled without contraction to fused multiply-adds."""

    grid: tuple[int, int, int]
    constants: Constants | SumConstants
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options. Contraction is off: where W needs a fused multiply-add, it is written out."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


class _Kept(NamedTuple):
    """What a launch compiled to, and the sizes and strides of its matrices."""

    run: Callable[..., None]
    constants: Constants | SumConstants
    layouts: list[tuple[int, ...]]


_kept: dict[Hashable, _Kept] = {}


class Launch(NamedTuple):
    """A kernel, what it is called with, and how to plan the rest.

    `arrange` makes the kernel's arguments before the constants of `matrices`, as `arguments.Matrix`, and `others`,
    tensors and integers. `plan` is called once for each `choices` and each kind of matrices and others: their dtypes,
    sizes, strides, alignment and device. What else its plan depends on is in `choices`.
    """

    kernel: Any
    matrices: tuple[torch.Tensor, ...]
    others: tuple[Any, ...]
    arrange: Callable[[Sequence[Any], tuple[Any, ...]], tuple[Any, ...]]
    choices: tuple[Hashable, ...]
    plan: Callable[[], Plan]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernel's arguments before the constants."""
        return self.arrange([Matrix(tensor, *_layout(tensor)) for tensor in self.matrices], self.others)

    def run(self) -> None:
        """Launch the kernel on the current stream of its tensors' device."""
        with _device_guard(self.matrices[0]):
            key = self._key()
            kept = _kept.get(key)
            if kept is None:
                self._run_first(key)
            else:
                matrices = [(tensor, *layout) for tensor, layout in zip(self.matrices, kept.layouts, strict=True)]
                kept.run(*self.arrange(matrices, self.others), kept.constants)

    def _key(self) -> Hashable:
        """What Triton compiles for, and what a plan may look at."""
        return (
            self.kernel.fn,
            self.choices,
            self.matrices[0].get_device(),
            *[(each.dtype, each.data_ptr() % _ALIGNMENT, each.shape, each.stride()) for each in self.matrices],
            *[
                (each.dtype, each.data_ptr() % _ALIGNMENT) if isinstance(each, torch.Tensor) else each
                for each in self.others
            ],
        )

    def _run_first(self, key: Hashable) -> None:
        plan = self.plan()
        compiled = self.kernel[plan.grid](*self.arguments, plan.constants, **plan.options)
        if compiled is not None:  # the interpreter compiles nothing
            if len(_kept) >= _MOST_KEPT:
                _kept.clear()
            layouts = [_layout(tensor) for tensor in self.matrices]
            _kept[key] = _Kept(compiled[plan.grid], plan.constants, layouts)


def _layout(tensor: torch.Tensor) -> tuple[int, ...]:
    return (*tensor.shape, *tensor.stride())


def _device_guard(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)
