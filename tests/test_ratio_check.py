"""The check on ratios: its decision, its rates by the record, and what it measures."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import ratio_check
from benchmarks.harness.machines import Machine
from benchmarks.harness.sequential import Batch, decide, decisions, upper_limit

BOUNDS = {"a": 1.0, "b": 2.0}
VALUES = st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5])
BATCHES = st.lists(st.fixed_dictionaries({"a": VALUES, "b": VALUES}), min_size=3, max_size=3)


@given(BATCHES)
def test_a_check_fails_where_one_ratio_is_above_its_bound_in_every_batch(batches: list[Batch]) -> None:
    agreed = {name for name, bound in BOUNDS.items() if all(batch[name] > bound for batch in batches)}
    decision = decide(batches, BOUNDS, 3)
    assert decision.above == {name: min(batch[name] for batch in batches) for name in agreed}
    assert decision.passed == (not agreed)


@given(BATCHES)
def test_a_check_takes_no_more_batches_than_it_needs(batches: list[Batch]) -> None:
    taken = decide(batches, BOUNDS, 3).batches
    assert taken == 3 or decide(batches[:taken], BOUNDS, taken).passed
    assert taken == 1 or not decide(batches[: taken - 1], BOUNDS, taken - 1).passed


def test_too_few_batches_are_no_decision() -> None:
    bad = {"a": 9.0, "b": 9.0}
    for batches in ([], [bad], [bad, bad]):
        with pytest.raises(ValueError, match=f"batches: got {len(batches)}, expected 3 or one within the bounds"):
            decide(batches, BOUNDS, 3)


def test_checks_follow_each_other_on_the_batches_that_are_left() -> None:
    good, bad = {"a": 1.0, "b": 1.0}, {"a": 9.0, "b": 1.0}
    ended = decisions([good, bad, good, bad, bad, bad, bad], BOUNDS, 3)
    assert [(each.passed, each.batches) for each in ended] == [(True, 1), (True, 2), (False, 3)]


@pytest.mark.parametrize("trials", [1, 20, 400])
def test_the_upper_limit_is_the_exact_one(trials: int) -> None:
    assert upper_limit(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials), rel=1e-9)
    assert upper_limit(trials, trials) == 1.0
    assert upper_limit(trials - 1, trials) == pytest.approx(0.95 ** (1 / trials), rel=1e-9)


def _record() -> Any:
    return json.loads(ratio_check.RECORD.read_text(encoding="utf-8"))


def test_the_record_says_what_its_batches_give() -> None:
    record = _record()
    assert (record["allowed"], record["batches"]) == (ratio_check.ALLOWED, ratio_check.BATCHES)
    assert record["rates"] == ratio_check.rates(record["series"])
    assert record["bounds"] == {name: ratio_check.bounds(record["series"], name) for name in record["bounds"]}
    assert set(record["bounds"]) == set(ratio_check.CASES)


def test_the_recorded_checks_neither_fail_without_reason_nor_miss_a_slowdown() -> None:
    rates = _record()["rates"]
    plain = [each for each in rates if each["planted"] == "none"]
    assert {each["libraries"] for each in plain if each["busy"] == 0} == set(ratio_check.CASES)
    assert {each["libraries"] for each in plain if each["busy"] == 2} == set(ratio_check.CASES)
    assert all(each["checks"] >= (50 if each["busy"] else 40) for each in plain)
    assert [each for each in plain if each["failed"]] == []
    planted = [each for each in rates if each["planted"] != "none"]
    cases = sum(len(ratio_check.CASES[each["libraries"]]) for each in plain)
    assert len(planted) >= cases, "each case has a subject at least"
    assert all(each["failed"] == each["checks"] > 0 for each in planted)


def test_a_planted_slowdown_is_one_of_the_processors_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr(ratio_check.time, "process_time", clock)

    def work() -> str:
        now[0] += 8.0
        return "done"

    spent: list[float] = []
    assert ratio_check._clocked(work, 2, 1.0, spent)() == "done"
    assert ratio_check._clocked(work, 2, 1.5, spent)() == "done"
    assert spent[0] == 16.25
    assert spent[1] / spent[0] == pytest.approx(1.5, abs=0.75 / 16)  # three more looks at the clock


def test_a_process_measures_what_there_are_bounds_for() -> None:
    for machine in ratio_check.machines()[:1]:
        with ratio_check.batches_of(machine) as batches:
            found = next(batches)
        assert all(value > 0 for value in found.values())
        bounds = ratio_check.bounds(ratio_check._recorded(), machine.libraries)
        assert found.keys() <= bounds.keys()
        assert len(found) == len(ratio_check.own_subjects(machine)) * len(ratio_check.REFERENCES) * len(
            ratio_check.CASES[machine.libraries]
        )


@pytest.mark.parametrize(
    ("recorded", "slower", "passes"), [(True, 1.0, True), (True, 1.5, False), (False, 1.5, True), (False, 2.0, False)]
)
def test_a_check_says_which_ratio_is_too_large(
    recorded: bool, slower: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor that the record is not from, more is allowed."""
    monkeypatch.setattr(ratio_check, "is_recorded_processor", lambda: recorded)
    machine = Machine("avx2", "avx2", 1)
    usual = ratio_check.medians(ratio_check._recorded(), "avx2")
    name = next(iter(usual))

    @contextmanager
    def planted(_: Machine) -> Iterator[Iterator[Batch]]:
        yield iter([usual | {name: usual[name] * slower}] * ratio_check.BATCHES)

    monkeypatch.setattr(ratio_check, "machines", lambda: [machine])
    monkeypatch.setattr(ratio_check, "batches_of", planted)
    console = Console(record=True, width=200)
    assert ratio_check.check(console) == passes
    assert (f"{name}: {usual[name] * slower:.2f}" in console.export_text()) != passes


def test_other_processors_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    console = Console(record=True, width=200)
    assert ratio_check.check(console)
    assert "not judged: bounds are known for x86 processors, and this one is arm64" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--record", "0"], "got '0', expected a positive integer"),
        (["--record", "1", "--busy", "-1"], "expected a number of processes"),
        (["--record", "1", "--slowdown", "0.5"], "got '0.5', expected a number from 1"),
        (["--busy", "1"], "--busy, --slowdown, --libraries: these say how to --record"),
    ],
)
def test_arguments_are_refused(arguments: Sequence[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ratio_check.main(arguments)
    assert reason in capsys.readouterr().err
