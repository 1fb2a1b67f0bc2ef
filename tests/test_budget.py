"""Time budgets, and signals that end a part of a run."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dual_lora_kernels.tuning.budget import Deadline, Guard, Stopped, part_seconds


def test_a_part_takes_what_the_later_ones_leave_or_its_fair_share() -> None:
    assert part_seconds(100.0, [20.0, 30.0]) == 70.0
    assert part_seconds(10.0, [20.0, 30.0]) == 4.0  # two fifths of what is left
    assert part_seconds(50.0, [20.0, 30.0]) == 20.0
    assert part_seconds(0.0, [20.0]) == part_seconds(-3.0, [20.0]) == 0.0


def test_a_deadline_counts_down() -> None:
    now = [5.0]
    deadline = Deadline.after(2.0, clock=lambda: now[0])
    assert (deadline.left(), deadline.passed) == (2.0, False)
    now[0] = 7.0
    assert (deadline.left(), deadline.passed) == (0.0, True)


def test_a_guard_ends_a_part_by_its_time_and_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dual_lora_kernels.tuning.budget.GRACE", 0.0)
    handler = signal.getsignal(signal.SIGTERM)
    with Guard() as guard:
        with pytest.raises(Stopped, match="its time was up"), guard.part(0.05):
            time.sleep(5)
        assert guard.told is None
        with guard.part(60):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        os.kill(os.getpid(), signal.SIGTERM)  # between parts: remembered, not raised
        assert guard.told == "SIGTERM"
    with Guard() as guard, pytest.raises(Stopped, match="stopped by SIGTERM"), guard.part(60):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler
