"""A case of the suite from a whole model: every subject's time in the same rounds, and its memory by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ..harness.results import Case, Measurement, Setting
from ..harness.timing import interleaved
from .base import base_model
from .case import ModelCase
from .memory import Room, step_memory_apart
from .quiet import quiet_libraries
from .shares import shares
from .steps import batch, generation, training_step
from .subjects import FLOOR, FROZEN, dense, expected_trainable, subject_model


@dataclass
class _Built:
    """The subjects' functions to time, and why others have none."""

    functions: dict[str, Callable[[], object]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def settings(case: ModelCase, kind: str, **others: Setting) -> dict[str, Setting]:
    """A case's settings as results have them."""
    return {
        "kind": kind, "dtype": case.dtype, "model": case.model, "hidden_size": case.shape.hidden,
        "layers": case.shape.layers, "batch": case.batch, "sequence": case.sequence, "tokens": case.tokens,
        "rank": case.rank, "base": case.base, "checkpointing": case.checkpointing, **others,
    }  # fmt: skip


def train(
    case: ModelCase, subjects: Sequence[str], rounds: int, console: Console, *, memory: bool = True,
    checked: Mapping[str, Mapping[str, float]] | None = None,
) -> Case:  # fmt: skip
    """Training steps of `subjects`, the reference among them: the floor, or else the first."""
    tokens = batch(case)
    device = torch.device(case.device)
    built = _build(case, subjects, lambda model: training_step(model, tokens))
    with quiet_libraries():
        seconds = interleaved(built.functions, rounds=rounds, warmup=1, device=device, console=console)
        profiled = {} if device.type == "cuda" else {name: shares(step) for name, step in built.functions.items()}
    timed = list(built.functions)
    built.functions.clear()  # with their models: the processes of the memory need room
    sizes = _sizes(case, timed if memory else [], built.left_out, console)
    measured = {
        name: Measurement(
            seconds=tuple(seconds[name]),
            trainable=expected_trainable(name, case),
            checked=(checked or {}).get(name, {}),
            bytes=sizes.get(name, {}),
            counts={
                "tokens": case.tokens,
                **{f"share_{part}": round(value, 4) for part, value in profiled.get(name, {}).items()},
            },
        )
        for name in timed
    }
    return _case(settings(case, "train"), FLOOR, subjects, measured, built.left_out)


def generate(
    case: ModelCase, subjects: Sequence[str], new_tokens: int, rounds: int, console: Console,
    checked: Mapping[str, Mapping[str, float]] | None = None,
) -> Case:  # fmt: skip
    """Greedy generation of `new_tokens` after the case's batch, with a cache."""
    prompt = batch(case)
    built = _build(case, subjects, lambda model: generation(model, prompt, new_tokens))
    with quiet_libraries():
        device = torch.device(case.device)
        seconds = interleaved(built.functions, rounds=rounds, warmup=1, device=device, console=console)
    measured = {
        name: Measurement(
            seconds=tuple(times),
            trainable=expected_trainable(name, case),
            checked=(checked or {}).get(name, {}),
            counts={"tokens": case.batch * new_tokens},
        )
        for name, times in seconds.items()
    }
    described = settings(case, "generate", new_tokens=new_tokens)
    return _case(described, FROZEN, subjects, measured, built.left_out)


def _build(case: ModelCase, subjects: Sequence[str], function: Callable[[Any], Callable[[], object]]) -> _Built:
    built, room = _Built(), Room(case)
    with quiet_libraries():
        base = base_model(case)
        for subject in subjects:
            reason = room.why_not(subject)
            if reason is None:
                try:
                    own = base_model(dense(case)) if subject == FLOOR and case != dense(case) else base
                    built.functions[subject] = function(subject_model(own, subject, case))
                except ImportError as error:
                    reason = str(error)
            if reason is not None:
                built.left_out[subject] = reason
    return built


def _sizes(
    case: ModelCase, subjects: Sequence[str], left_out: dict[str, str], console: Console
) -> dict[str, dict[str, int]]:
    sizes = {}
    for subject in track(subjects, "memory", console=console, transient=True):
        try:
            sizes[subject] = step_memory_apart(case, subject)
        except BrokenProcessPool:
            left_out[subject] = "its process for the memory was killed"
    return sizes


def _case(
    described: Mapping[str, Setting], reference: str, subjects: Sequence[str], measured: Mapping[str, Measurement],
    left_out: Mapping[str, str],
) -> Case:  # fmt: skip
    found = {}
    for name in subjects:
        found[name] = measured[name] if name in measured else Measurement(left_out=left_out[name])
    return Case(described, reference if reference in measured else next(iter(measured)), found)
