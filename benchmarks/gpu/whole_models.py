"""Which whole models a GPU session measures, in the order of their value, and how."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from ..harness.results import Case
from ..models.case import ModelCase
from ..models.measure import train
from ..models.shapes import TINY

SUBJECTS = ("floor", "lora", "dora", "naive", "dual_lora")
_MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b")
_STEP = ModelCase("llama-3.2-1b", dtype="bf16", batch=4, sequence=1024)
"""As many tokens as the layers' goals are about."""


def cases() -> list[ModelCase]:
    """Real shapes in bf16, 4 × 1024 tokens: the three sizes, and then with checkpointing, as large ones are trained."""
    plain = [dataclasses.replace(_STEP, model=name, layers=None) for name in _MODELS]
    return [*plain, *(dataclasses.replace(case, checkpointing=True) for case in plain)]


def tiny() -> list[ModelCase]:
    """For a CPU and Triton's interpreter."""
    return [ModelCase(f"llama-h64{TINY}", dtype="bf16", batch=1, sequence=3, layers=1)]


def measure(case: ModelCase, device: str, rounds: int, memory: bool) -> Case:
    """Training steps of every subject; without bars of their own, which would cross the session's."""
    return train(dataclasses.replace(case, device=device), SUBJECTS, rounds, Console(quiet=True), memory=memory)
