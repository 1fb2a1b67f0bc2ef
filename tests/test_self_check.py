"""`dual-lora doctor --check` passes here, finds planted faults, and never ends in a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dual_lora_kernels import backends, cli, self_check, strategy, workspace_bytes
from dual_lora_kernels.backends.eager import EagerBackend
from dual_lora_kernels.self_check import Outcome
from dual_lora_kernels.self_check.checks import CHECKS

NAMES = [check.name for check in CHECKS]


@pytest.fixture(autouse=True)
def _only_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small sizes, on CPUs, and the settings as before in the end."""
    run = self_check.run
    monkeypatch.setattr(self_check, "run", lambda _, report: run(["cpu"], report, small=True))
    before = strategy(), workspace_bytes(), torch.get_num_threads()
    yield
    assert (strategy(), workspace_bytes(), torch.get_num_threads()) == before


class Faulty(EagerBackend):
    """The eager backend under the name "native", so that all promises are checked, with a fault at one place."""

    name = "native"

    def fault(self, out: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Spoil W."""

    def effective_weight(self, out: torch.Tensor, weight: torch.Tensor | None, *rest: Any) -> None:
        super().effective_weight(out, weight, *rest)
        self.fault(out, weight)


class BlockDependent(Faulty):
    def fault(self, out: torch.Tensor, weight: torch.Tensor | None) -> None:
        if out.shape[1] == 1:
            out.mul_(1.01)


class OtherMerge(Faulty):
    def fault(self, out: torch.Tensor, weight: torch.Tensor | None) -> None:
        if weight is not None and out.data_ptr() == weight.data_ptr():
            out.view(-1)[:1].mul_(1.5)


class OtherSign(Faulty):
    def effective_weight(self, out: Any, weight: Any, factors: Any, *rest: Any) -> None:
        super().effective_weight(out, weight, factors._replace(D=-factors.D), *rest)


class Imprecise(Faulty):
    def factor_gradients(self, h: torch.Tensor, *rest: Any) -> None:
        super().factor_gradients(h.bfloat16().to(h.dtype), *rest)


class ThreadDependent(Faulty):
    def fault(self, out: torch.Tensor, weight: torch.Tensor | None) -> None:
        if torch.get_num_threads() == 3:
            out.mul_(1.01)


class Raising(Faulty):
    def factor_gradients(self, *args: Any) -> None:
        raise RuntimeError("no such instruction\nin many words")


FAULTS: list[tuple[type[Faulty], set[str]]] = [
    (Faulty, set()),
    (BlockDependent, {"W across blocks", "forward, ∂X and merge"}),
    (OtherMerge, {"forward, ∂X and merge"}),
    (OtherSign, {"exact arithmetic", "error against fp64"}),
    (Imprecise, {"error against fp64"}),
    (ThreadDependent, {"thread counts"}),
    (Raising, {"exact arithmetic", "error against fp64", "thread counts", "step's time"}),
]


@pytest.mark.parametrize(("faulty", "found"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_planted_faults_are_found(
    faulty: type[Faulty], found: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {"native": faulty()})
    assert cli.main(["doctor", "--check"]) == (1 if found else 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:4] in ("ok  ", "FAIL", "info")]
    assert len(lines) == len(CHECKS)
    assert {name for name in NAMES for line in lines if line.startswith("FAIL") and f"{name}: " in line} == found


def test_an_exception_is_a_failure_in_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {"native": Raising()})
    assert cli.main(["doctor", "--check"]) == 1
    out = capsys.readouterr().out
    assert "step's time: RuntimeError: no such instruction\n" in out
    assert "2 passed, 4 failed" in out


def test_every_backend_of_this_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--check"]) == 0
    out = capsys.readouterr().out
    names = [name for name in backends.available_backends() if name != "triton"]
    assert all(f"{name:6}  {check}: " in out for name in names for check in NAMES)
    assert " passed, 0 failed" in out.splitlines()[-1]
    assert "PyTorch" in out.splitlines()[0]


def test_the_json_object_has_the_facts_and_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--check", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert {"versions", "devices", "checks"} <= document.keys()
    outcomes = [Outcome(**check) for check in document["checks"]]
    assert [str(outcome) for outcome in outcomes] == [
        line for line in captured.err.splitlines() if line[:4] in ("ok  ", "FAIL", "info")
    ]
    assert {outcome.check for outcome in outcomes} == set(NAMES)


def test_without_check_nothing_is_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(self_check, "run", lambda *_: pytest.fail("checked"))
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "--json"]) == 0
    assert "checks" not in capsys.readouterr().out
