"""A case of the suite from a whole model: every subject checked, its time in the same rounds, its memory by itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ..harness.results import Case, Measurement, Setting
from ..harness.timing import Seconds, interleaved
from ..layers.layer_step import FLOOR
from ..layers.methods import FROZEN
from .base import base_model
from .case import ModelCase
from .checks import checked
from .memory import Room, step_memory_apart
from .quiet import quiet_libraries
from .shares import shares
from .steps import batch, generation, training_step
from .subjects import dense, expected_trainable, subject_model


@dataclass
class _Run:
    """What is known of a case's subjects so far."""

    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=dict)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)


def train(
    case: ModelCase,
    subjects: Sequence[str],
    rounds: int,
    console: Console,
    memory: bool = True,
    remark: Callable[[str], object] | None = None,
) -> Case:
    """Training steps of `subjects` and of the model's floor, which ratios are to.

    `remark` is told whose memory could not be measured; without it the console is.
    """
    subjects = list(dict.fromkeys((FLOOR, *subjects)))
    tokens = batch(case)
    run = _time(case, subjects, lambda model: training_step(model, tokens), rounds, console, profiled=True)
    for counts in run.counts.values():
        counts["tokens"] = case.tokens
    if memory:
        for subject in track(list(run.seconds), "memory", console=console, transient=True):
            try:
                run.bytes[subject] = step_memory_apart(case, subject)
            except (BrokenProcessPool, RuntimeError) as error:  # killed by the system, or refused by PyTorch
                first_line = str(error).partition("\n")[0]
                (remark or console.print)(
                    f"The memory of {subject} was not measured: {type(error).__name__}: {first_line}"
                )
    return _case(case, run, subjects, FLOOR, kind="train")


def generate(case: ModelCase, subjects: Sequence[str], new_tokens: int, rounds: int, console: Console) -> Case:
    """Greedy generation after the case's batch, by `subjects` and the model without an adapter, which ratios are to."""
    subjects = list(dict.fromkeys((FROZEN, *subjects)))
    prompt = batch(case)
    run = _time(case, subjects, lambda model: generation(model, prompt, new_tokens), rounds, console)
    for counts in run.counts.values():
        counts["tokens"] = case.batch * new_tokens
    return _case(case, run, subjects, FROZEN, kind="generate", new_tokens=new_tokens)


def _time(
    case: ModelCase,
    subjects: Sequence[str],
    function: Callable[[Any], Callable[[], object]],
    rounds: int,
    console: Console,
    profiled: bool = False,
) -> _Run:
    """Check and build the subjects, and time what `function` makes of their models; with shares where `profiled`."""
    with console.status("checking that every subject computes what it claims"):
        errors, left_out = checked(case, subjects)
    run = _Run(errors, left_out)
    device = torch.device(case.device)
    with quiet_libraries():
        with console.status("building the models"):
            functions = _functions(case, [name for name in subjects if name not in left_out], function, run)
        run.seconds = interleaved(functions, rounds=rounds, warmup=1, device=device, console=console)
        run.counts = {name: _shares(name, step, device) if profiled else {} for name, step in functions.items()}
    functions.clear()
    gc.collect()  # models have cycles, and processes for the memory need room
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return run


def _shares(subject: str, step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """None on a GPU, nor of the eager backend, whose own threads the profiler does not see."""
    if device.type != "cpu" or subject == "dual_lora_eager":
        return {}
    return {f"share_{part}": round(value, 4) for part, value in shares(step).items()}


def _functions(
    case: ModelCase, subjects: Sequence[str], function: Callable[[Any], Callable[[], object]], run: _Run
) -> dict[str, Callable[[], object]]:
    base = base_model(case)
    room, functions = Room(case), {}
    for subject in subjects:
        if reason := room.why_not(subject):
            run.left_out[subject] = reason
            continue
        own = base_model(dense(case)) if subject == FLOOR and case != dense(case) else base
        functions[subject] = function(subject_model(own, subject, case))
    return functions


def _case(case: ModelCase, run: _Run, subjects: Sequence[str], reference: str, **described: Setting) -> Case:
    settings: dict[str, Setting] = {
        **described, "dtype": case.dtype, "model": case.model, "hidden_size": case.shape.hidden,
        "layers": case.shape.layers, "batch": case.batch, "sequence": case.sequence, "tokens": case.tokens,
        "rank": case.rank, "base": case.base, "checkpointing": case.checkpointing,
    }  # fmt: skip
    measured = {
        name: Measurement(
            seconds=tuple(run.seconds.get(name, ())),
            trainable=expected_trainable(name, case),
            checked=run.errors.get(name, {}),
            bytes=run.bytes.get(name, {}),
            counts=run.counts.get(name, {}),
            left_out=run.left_out.get(name),
        )
        for name in subjects
    }
    return Case(settings, reference, measured)
