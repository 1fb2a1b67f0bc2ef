"""Trains any model with transformers' Trainer and measures it: losses, speed, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from .data import BlockDataset
from .memory import PeakMemory
from .models import trainable_parameters

WARMUP_FRACTION = 0.1
"""Share of the steps over which the learning rate rises before its cosine decay; the same for every method."""


@dataclass(frozen=True)
class TrainingRun:
    """What one training run gave. Losses are in nats per token; ``held_out`` pairs a step with a loss."""

    train_losses: list[float]
    held_out: list[tuple[int, float]]
    learning_rate: float
    trainable_parameters: int
    total_parameters: int
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int

    @property
    def final_train_loss(self) -> float:
        """Mean over the last tenth of the steps: a single step's loss is noisy."""
        return statistics.fmean(self.train_losses[-math.ceil(len(self.train_losses) / 10) :])

    @property
    def final_held_out_loss(self) -> float:
        """Held-out loss after the last step."""
        return self.held_out[-1][1]


class _StepTimes(TrainerCallback):
    """Wall-clock seconds of each optimiser step: forward, backward and update, without evaluation or data loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _finish_queued_kernels()
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _finish_queued_kernels()
        self.seconds.append(time.perf_counter() - self._start)


class _ProgressBar(ProgressCallback):
    """Trainer's progress bar with the loss beside it; no printed line for every step, no bar for each evaluation."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._label)

    def on_prediction_step(self, *arguments: Any, **kwargs: Any) -> None:
        """Evaluations take a second or two."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


def _finish_queued_kernels() -> None:
    """GPU work is queued; a wall clock means something only once the queue is empty."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _arguments(out: Path, batch_size: int, seed: int, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        seed=seed,
        data_seed=seed,
        report_to="none",
        save_strategy="no",
        label_names=["labels"],  # PEFT's wrapper hides the model's signature, from which the Trainer would take it
        remove_unused_columns=False,
        prediction_loss_only=True,  # the logits of the whole held-out set would otherwise be kept
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,  # a diverged run is reported as it is
        **more,
    )


def evaluate(model: nn.Module, blocks: BlockDataset, *, out: Path, batch_size: int, seed: int) -> float:
    """Mean loss in nats per predicted token."""
    trainer = Trainer(model, _arguments(out, batch_size, seed, disable_tqdm=True))
    trainer.remove_callback(PrinterCallback)
    return float(trainer.evaluate(blocks)["eval_loss"])


def train(
    model: nn.Module,
    parameter_groups: list[dict[str, Any]],
    train_blocks: BlockDataset,
    held_out_blocks: BlockDataset,
    *,
    label: str,
    out: Path,
    steps: int,
    batch_size: int,
    seed: int,
    evaluations: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingRun:
    """Trains in place with AdamW, a linear warm-up and a cosine decay; the data's order depends on the seed alone.

    The held-out loss is taken ``evaluations`` times, evenly spaced, the last time after the last step.
    """
    arguments = _arguments(
        out,
        batch_size,
        seed,
        max_steps=steps,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARMUP_FRACTION * steps),
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=math.ceil(steps / evaluations),
    )
    model.to(arguments.device)  # before the optimiser is made: it must hold the parameters that are trained
    optimizer = torch.optim.AdamW(parameter_groups, fused=True)  # CPU, 3.1 M parameters: 4 ms a step instead of 13
    step_times = _StepTimes()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks,
        optimizers=(optimizer, None),
        callbacks=[*callbacks, step_times],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_ProgressBar(label))
    started = time.perf_counter()
    with PeakMemory(arguments.device) as memory:
        trainer.train()
    seconds = time.perf_counter() - started
    history = trainer.state.log_history
    held_out = [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
    if not held_out or held_out[-1][0] < steps:
        held_out.append((steps, float(trainer.evaluate()["eval_loss"])))
    tokens = batch_size * train_blocks.blocks.shape[1]
    return TrainingRun(
        train_losses=[float(entry["loss"]) for entry in history if "loss" in entry],
        held_out=held_out,
        learning_rate=max(group["initial_lr"] for group in optimizer.param_groups),
        trainable_parameters=trainable_parameters(model),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens_per_second=tokens / statistics.median(step_times.seconds),
        seconds=seconds,
        peak_memory_bytes=memory.bytes,
    )
