"""Subjects of one case while they are checked and timed: one that fails or is refused costs the others nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..harness.results import Case, Measurement, Setting
from .checks import refusal
from .memory import peak_temporary_bytes


@dataclass
class Subjects:
    """What is to be timed, and what is known of it already."""

    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    trainable: dict[str, int] = field(default_factory=dict)
    checked: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def unless_it_fails(self, name: str) -> Iterator[None]:
        """Whatever a subject cannot do, the others are still to be measured."""
        try:
            yield
        except Exception as error:
            self.runs.pop(name, None)
            first = next(iter(str(error).strip().splitlines()), "")
            self.left_out[name] = f"{type(error).__name__}: {first}"

    def decide(self, name: str, errors: Mapping[str, float], run: Callable[[], object]) -> None:
        """Take a subject in if its errors are allowed."""
        reason = refusal(errors)
        self.checked[name] = {key: round(error, 4) for key, error in errors.items() if error < float("inf")}
        if reason is None:
            self.runs[name] = run
        else:
            self.left_out[name] = reason

    def traced(
        self, device: torch.device, kinds: Sequence[str], names: Iterable[str] | None = None
    ) -> dict[str, dict[str, int]]:
        """Bytes by the allocator of one run of each of `names`, by default all; `kinds`: ``temporary``, ``peak``."""
        found = {}
        for name in list(self.runs) if names is None else names:
            with self.unless_it_fails(name):
                trace = peak_temporary_bytes(self.runs[name], device)
                sizes = {"temporary": trace.peak_temporary, "peak": trace.peak}
                found[name] = {kind: sizes[kind] for kind in kinds}
        return found

    def case(
        self,
        settings: Mapping[str, Setting],
        reference: str,
        names: Sequence[str],
        seconds: Mapping[str, Sequence[float]],
        traces: Mapping[str, Mapping[str, int]],
        counts: Mapping[str, float] | None = None,
    ) -> Case:
        """`names` in their order. What failed after it was timed, such as when its memory was traced, has no seconds.

        seconds: by round. traces: bytes by kind. counts: the same of every subject.

        Raises:
            RuntimeError: the reference was left out, so there is nothing that ratios could be to.
        """
        if reference in self.left_out:
            raise RuntimeError(f"{reference}, the reference: {self.left_out[reference]}")
        subjects = {
            name: Measurement(
                seconds=tuple(seconds[name]) if name in self.runs else (),
                trainable=self.trainable.get(name),
                checked=self.checked.get(name, {}),
                bytes=traces.get(name, {}),
                counts=counts or {},
                left_out=self.left_out.get(name),
            )
            for name in names
        }
        return Case(settings, reference, subjects)
