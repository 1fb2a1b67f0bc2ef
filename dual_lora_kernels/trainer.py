"""For transformers' Trainer. Needs transformers; nothing else in the package imports this module."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .validation import check_positive_int
from .warmup import DualLoraWarmup


class DualLoraWarmupCallback(TrainerCallback):
    """`DualLoraWarmup` over the first `steps` optimiser steps of a Trainer run, also of a resumed one."""

    def __init__(self, steps: int) -> None:
        check_positive_int("steps", steps)
        self.steps = steps
        self._warmup: DualLoraWarmup | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self._warmup = DualLoraWarmup(model, self.steps)
        self._warmup.set_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._warmup is not None  # the Trainer calls on_train_begin first
        if state.global_step < self.steps:
            self._warmup.set_step(state.global_step)
