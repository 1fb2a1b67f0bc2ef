"""The few cases that tell whether a layer's speed has changed, for pytest-benchmark and for the ratio check.

All in fp32 with r1 = r2 = 16. Subjects are methods of `methods.METHODS`, and ``floor``: what no method can avoid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .layer_step import FLOOR, floor_step, step
from .merging import copying, merging
from .methods import build, frozen_linear

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
        tokens = f", {self.tokens} token{'s' if self.tokens > 1 else ''}" if self.tokens else ""
        return f"{self.kind} {self.size}x{self.size}{tokens}"


def prepare(case: CoreCase, subject: str) -> Callable[[], object]:
    """What is to be timed: the subject on a layer and an input of its own, drawn anew.

    The floor of a step is the three products, of a forward pass and of decoding F.linear on W0, and of merging to read
    and write every weight once.

    Raises:
        ValueError: there is no such kind or method.
        ImportError: the method's library is not installed.
    """
    if case.kind not in KINDS:
        raise ValueError(f"kind: got {case.kind!r}, expected one of {', '.join(KINDS)}")
    linear = frozen_linear(case.size, case.size, torch.float32)
    is_floor = subject == FLOOR
    if case.kind == "merge":
        return copying(linear.weight) if is_floor else merging(subject, build(subject, linear))
    x = torch.randn(case.tokens, case.size)
    if case.kind == "step":
        grad = torch.randn(case.tokens, case.size)
        if is_floor:
            return floor_step(linear.weight, x, grad)
        return step(build(subject, linear), x.requires_grad_(), grad)
    module = linear if is_floor else build(subject, linear).eval()
    return torch.no_grad()(lambda: module(x))
