"""The few cases that tell whether a layer's speed has changed, for pytest-benchmark and for the ratio check.

All in fp32 with r1 = r2 = 16. Subjects are methods of `methods.METHODS`, and ``floor``: what no method can avoid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from dual_lora_kernels import DualLoraLinear
from dual_lora_kernels.reference import effective_weight

from .layer_step import FLOOR, floor_step, step
from .methods import NaiveDualLora, build, frozen_linear

KINDS = ("forward", "step", "decode", "merge")


@dataclass(frozen=True)
class CoreCase:
    """A square layer [size, size]. kind: one of ``KINDS``; tokens: of a call, 0 where the layer is merged."""

    kind: str
    size: int
    tokens: int

    @property
    def name(self) -> str:
        """Such as ``step 1024x1024, 256 tokens``."""
        return f"{self.kind} {self.size}x{self.size}" + (f", {self.tokens} tokens" if self.tokens else "")


class Timed(NamedTuple):
    """`run` is what is timed, `before` what has to be called before each time."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


def prepare(case: CoreCase, subject: str) -> Timed:
    """The subject on a layer and an input of its own, drawn anew.

    The floor of a step is the three products, of a forward pass and of decoding F.linear on W0, and of merging to read
    and write every weight once. `DualLoraLinear.merge` keeps W0, which PEFT's methods do not, and so copies it as well.

    Raises:
        ValueError: there is no such kind or method.
        ImportError: the method's library is not installed.
    """
    if case.kind not in KINDS:
        raise ValueError(f"kind: got {case.kind!r}, expected one of {', '.join(KINDS)}")
    linear = frozen_linear(case.size, case.size, torch.float32)
    if case.kind == "merge":
        return _merge(linear, subject)
    x = torch.randn(case.tokens, case.size)
    if case.kind == "step":
        grad = torch.randn(case.tokens, case.size)
        if subject == FLOOR:
            return Timed(floor_step(linear.weight, x, grad))
        return Timed(step(build(subject, linear), x.requires_grad_(), grad))
    module = linear if subject == FLOOR else build(subject, linear).eval()
    return Timed(torch.no_grad()(lambda: module(x)))


def _merge(linear: nn.Linear, subject: str) -> Timed:
    weight = linear.weight
    if subject == FLOOR:
        target = torch.empty_like(weight)
        return Timed(lambda: target.copy_(weight))
    module: Any = build(subject, linear)
    if isinstance(module, NaiveDualLora):
        scale = torch.tensor(module.scale)
        factors = (module.A, module.B, module.C, module.D)
        return Timed(
            torch.no_grad()(lambda: weight.copy_(effective_weight(weight, *factors, scale, weight.dtype, "nearest")))
        )
    is_own = isinstance(module, DualLoraLinear)
    merge, unmerge = (module.merge, module.unmerge) if is_own else (module.merge_adapter, module.unmerge_adapter)
    merge()  # or the first `before` would have nothing to take back
    return Timed(merge, unmerge)
