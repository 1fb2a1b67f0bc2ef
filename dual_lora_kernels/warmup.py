"""Linear warm-up of the update's scale. Without it training collapses, as the paper reports."""

from __future__ import annotations

import operator

from torch import nn

from .adapter import dual_lora_adapters
from .validation import check_positive_int


class DualLoraWarmup:
    """Raises every Dual LoRA layer's scale linearly to alpha/√(r1·r2) over the first `steps` optimiser steps.

    During step t, counted from 0, the scale is multiplied by min(1, (t + 1)/steps). Adopters use 20 to 50 steps. The
    scales are changed in place, so a compiled model does not recompile. Adapters of PEFT's that do not train, beside
    one that does, keep their scales. ::

        warmup = DualLoraWarmup(model, steps=50)
        for batch in data:
            loss(model, batch).backward()
            optimizer.step()
            warmup.step()

    Raises ValueError where `steps` is not positive or the model has no Dual LoRA layers.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = check_positive_int("steps", steps)
        layers = [layer for _, layer in dual_lora_adapters(model)]
        self._layers = [layer for layer in layers if layer.trains()] or layers
        if not self._layers:
            raise ValueError(f"model: got {type(model).__name__} without Dual LoRA layers, expected an adapted model")
        self.set_step(0)

    @property
    def factor(self) -> float:
        """The present factor on the scales, in (0, 1]."""
        return min(1.0, (self._step + 1) / self.steps)

    def step(self) -> None:
        """Advance by one optimiser step."""
        self.set_step(self._step + 1)

    def set_step(self, step: int) -> None:
        """Set the scales for optimiser step `step`, counted from 0 (to resume a run, say)."""
        if step < 0:
            raise ValueError(f"step: got {step}, expected 0 or more")
        self._step = operator.index(step)
        for layer in self._layers:
            layer.set_scale(layer.full_scale * self.factor)

    def state_dict(self) -> dict[str, int]:
        """The step, for a checkpoint."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from `state_dict`."""
        self.set_step(state["step"])
