"""``dual-lora doctor --check``: what the package promises, tried on this machine with every backend that it has.

For hardware that nobody here has. `run` makes the checks, in under a minute, and hands out each outcome as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..backends import candidates
from ..doctor import in_words
from .checks import CHECKS, Check, Subject

__all__ = ["Outcome", "run"]

_LAYER = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Outcome:
    """Of one check of one backend on one device. `passed` is None where the figure is for information."""

    device: str
    backend: str
    check: str
    passed: bool | None
    figure: str

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAIL", None: "info"}[self.passed]
        return f"{verdict:4}  {self.device:6}  {self.backend:6}  {self.check}: {self.figure}"


def run(
    devices: list[str], report: Callable[[Outcome], None], begin: Callable[[str], None], small: bool = False
) -> list[Outcome]:
    """Check every backend that ``"auto"`` could choose on each device.

    `begin` is told what each check is before it starts, `report` gets its outcome at once. A check that raises has
    failed, with the exception's words. Threads, strategy and workspace are as before in the end. `small` takes smaller
    sizes, for tests.
    """
    outcomes: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        report(outcome)

    for device in devices:
        try:
            backends = _backends(device)
        except Exception as error:  # a driver that fails, say
            add(Outcome(device, "-", "backends", False, in_words(error)))
            continue
        for backend in backends:
            for check in CHECKS:
                begin(f"{check.name} ({device}, {backend})")
                with _threads_kept():
                    outcome = _outcome(check, Subject(device, backend, small))
                add(outcome)
    return outcomes


def _backends(device: str) -> list[str]:
    return [backend.name for backend, reason in candidates("auto", torch.device(device), *_LAYER) if reason is None]


def _outcome(check: Check, subject: Subject) -> Outcome:
    try:
        passed, figure = check.function(subject)
    except Exception as error:  # whatever a machine that nobody here has comes up with
        passed, figure = False, in_words(error)
    return Outcome(subject.device, subject.backend, check.name, passed, figure)


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
