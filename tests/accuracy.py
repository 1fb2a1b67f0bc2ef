"""Errors against fp64, compared with the naive implementation's in the same dtype.

One criterion (`self_check.checks.NAIVE_ERRORS`) wherever only the order of a sum differs; where arithmetic is exact,
tests compare bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch

from dual_lora_kernels.self_check.checks import NAIVE_ERRORS

_PROPERTY = "error ratio"


class ErrorRatios:
    """Collects squared errors against fp64, ours and the naive implementation's, and compares them in the end."""

    def __init__(self, node: pytest.Item) -> None:
        self._node = node
        self._squares: dict[str, list[float]] = {}

    def add(self, quantity: str, ours: torch.Tensor, naive: torch.Tensor, truth: torch.Tensor) -> None:
        """Add one sample of a quantity; all of one shape, `truth` in fp64."""
        sums = self._squares.setdefault(quantity, [0.0, 0.0])
        for index, value in enumerate((ours, naive)):
            sums[index] += (value.double() - truth).square().sum().item()

    def check(self) -> None:
        """Raise AssertionError where an rms error is above the criterion; the ratios go to pytest's summary."""
        ratios = {name: (own / other) ** 0.5 for name, (own, other) in self._squares.items() if own}
        self._node.user_properties += [(_PROPERTY, (self._node.name, name, ratio)) for name, ratio in ratios.items()]
        above = {name: ratio for name, ratio in ratios.items() if not ratio <= NAIVE_ERRORS}
        assert not above, f"rms errors over the naive implementation's, at most {NAIVE_ERRORS}: {above}"


@pytest.fixture
def error_ratios(request: pytest.FixtureRequest) -> ErrorRatios:
    """The test's collector."""
    return ErrorRatios(request.node)


def summary(reports: Iterable[pytest.TestReport]) -> Sequence[str]:
    """A line for each test with ratios: its largest, and of which quantity."""
    largest: dict[str, tuple[float, str]] = {}
    for report in reports:
        for key, value in report.user_properties:
            if key == _PROPERTY:
                test, quantity, ratio = value  # type: ignore[misc]
                largest[test] = max(largest.get(test, (0.0, "")), (ratio, quantity))
    return [f"{ratio:.3f} ({quantity})  {test}" for test, (ratio, quantity) in sorted(largest.items())]
