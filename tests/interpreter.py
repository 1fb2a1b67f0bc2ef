"""Makes Triton's interpreter three times faster and its products fixed, so that the numerical suite can use it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from triton.runtime import interpreter


def fixed_dot(a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
    """A product whose elements are each a fixed chain of multiplications and additions, as on a GPU.

    NumPy's OpenBLAS gives an element other bits in a tile of another shape on an AMD EPYC (Zen 5), so that what the
    kernels promise would be untestable there.
    """
    left, right = (operand.data.astype(accumulator.data.dtype, copy=False) for operand in (a, b))
    total = np.zeros_like(accumulator.data)
    for index in range(left.shape[1]):
        total += left[:, index, None] * right[None, index]
    return interpreter.TensorHandle(total + accumulator.data, accumulator.dtype.scalar)


def speed_up() -> None:
    """Patch `triton.language` once a launch instead of at every call of a helper, and leave out overflow assertions.

    Measured on a forward and backward pass of a small layer: the first saves 40 % of the time, the second 25 %.
    """
    patch = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: dict[frozenset[str], Any] = {}

    def patch_once(function: Any) -> Any:
        names = frozenset(name for name in ("tl", "core") if name in function.__globals__)
        if names not in patched:
            patched[names] = patch(function)
        return interpreter._LangPatchScope()  # empty: nothing to undo before the launch ends

    patch_attributes = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *scopes: Any) -> None:
        """Triton 3.6 makes a loop's bound an int in a way that NumPy 2.4 refuses for arrays of one element."""
        patch_attributes(tensor, *scopes)
        scopes[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def launch_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return launch(self, *args, **kwargs)
        finally:
            for scope in reversed(patched.values()):
                scope.restore()
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched
    interpreter._patch_lang_tensor = patch_tensor
    builder = interpreter.interpreter_builder
    builder.create_dot = fixed_dot
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
