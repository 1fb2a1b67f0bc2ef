"""For transformers' Trainer. Needs transformers; nothing else in the package imports this module."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .monitoring import ROWS, DualLoraMonitor
from .validation import check_positive_int
from .warmup import DualLoraWarmup

_logger = logging.getLogger("dual_lora_kernels")


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


class DualLoraStatisticsCallback(TrainerCallback):
    """Logs `DualLoraMonitor`'s figures every n steps to whatever the Trainer reports to.

    They go through the Trainer's own `log`: into TensorBoard, Weights & Biases and the like, its log history and its
    progress bar. A callback is not told its Trainer, so it is given it::

        trainer.add_callback(DualLoraStatisticsCallback(trainer, every_n_steps=50))

    The first sign churn is since the beginning of the run, or of a resumed one. Training is not changed, to the bit; it
    goes on, without figures, where a factor has become NaN or infinite, which the package's log says. It raises
    ValueError when it begins where there is no adapter, or where DeepSpeed's ZeRO-3 or FSDP1 keep it in parts.
    """

    def __init__(self, trainer: Trainer, every_n_steps: int, rows: int | None = ROWS) -> None:
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self._trainer, self._rows = trainer, rows
        self._monitor: DualLoraMonitor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._monitor = DualLoraMonitor(kwargs["model"], self._rows)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every_n_steps:
            return
        assert self._monitor is not None  # the Trainer calls on_train_begin first
        try:
            figures = self._monitor.statistics()
        except ValueError as error:
            _logger.warning("no statistics of the adapter at step %d: %s", state.global_step, error)
            return
        wants_loss = control.should_log
        self._trainer.log(figures)
        control.should_log = wants_loss  # logging takes it for done
