"""`dual-lora doctor --check` passes here, finds planted faults, and never ends in a traceback."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dual_lora_kernels import backends, cli, functional, panels, self_check, strategy, workspace_bytes
from dual_lora_kernels.backends import Block, Estimator, ParameterGradients, Settings
from dual_lora_kernels.backends.eager import EagerBackend
from dual_lora_kernels.self_check import Outcome, checks
from dual_lora_kernels.self_check.checks import CHECKS

NAMES = [check.name for check in CHECKS]


@pytest.fixture(autouse=True)
def _only_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small sizes, on CPUs, and the settings as before in the end."""
    run = self_check.run
    monkeypatch.setattr(self_check, "run", lambda _, *reports: run(["cpu"], *reports, small=True))
    monkeypatch.setattr(functional, "_checked", {})  # calls remember their backend, which tests here replace
    before = strategy(), workspace_bytes(), torch.get_num_threads()
    yield
    assert (strategy(), workspace_bytes(), torch.get_num_threads()) == before


class Faulty(EagerBackend):
    """The eager backend under the name "native", so that all promises are checked, with a fault at one place."""

    name = "native"

    def fault(self, out: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Spoil W."""

    def effective_weight(self, out: torch.Tensor, block: Block, settings: Settings) -> None:
        super().effective_weight(out, block, settings)
        self.fault(out, block.dense_base)


class BlockDependent(Faulty):
    def fault(self, out: torch.Tensor, weight: torch.Tensor | None) -> None:
        if out.shape[1] == 1:
            out.mul_(1.01)


class OtherMerge(Faulty):
    def fault(self, out: torch.Tensor, weight: torch.Tensor | None) -> None:
        if weight is not None and out.data_ptr() == weight.data_ptr():
            out.view(-1)[:1].mul_(1.5)


class OtherSign(Faulty):
    def effective_weight(self, out: torch.Tensor, block: Block, settings: Settings) -> None:
        factors = block.factors._replace(D=-block.factors.D)
        super().effective_weight(out, block._replace(factors=factors), settings)


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


class NotANumber(Faulty):
    """Gradients of bf16 layers, and no others, are NaN."""

    def factor_gradients(self, h: Any, block: Block, estimator: Any, gradients: Any, settings: Settings) -> None:
        super().factor_gradients(h, block, estimator, gradients, settings)
        if block.dtype == torch.bfloat16 and gradients.A is not None:
            gradients.A.fill_(math.nan)


class WrongInDefaultLayers(Faulty):
    """Gradients are wrong in a bf16 layer with fp32 factors, and in no other."""

    def factor_gradients(self, h: Any, block: Block, estimator: Any, gradients: Any, settings: Settings) -> None:
        super().factor_gradients(h, block, estimator, gradients, settings)
        is_default = block.dtype == torch.bfloat16 and block.factors.A.dtype == torch.float32
        if is_default and gradients.A is not None:
            gradients.A.mul_(-3)


class FusedFewTokens:
    """A kernel of its own for the forward pass of a few tokens, as the native backend has, that is an ulp off."""

    def why_not(self, operation: str, *rest: Any) -> str | None:
        return None if operation == "forward" else "only its forward pass has a kernel of its own"

    def preferred(self, operation: str, input: torch.Tensor) -> bool:
        return input.shape[0] <= 8

    def weight_product(self, operation: str, input: torch.Tensor, block: Block, bias: Any, settings: Settings) -> Any:
        y = panels.forward(input, block, bias, EagerBackend(), settings)
        return y if input.dtype == torch.bfloat16 else y.nextafter(torch.full_like(y, math.inf))


class WrongFewTokens(Faulty):
    fused = FusedFewTokens()


class FusedTokenProduct(FusedFewTokens):
    """A kernel for the factors' gradients alone, which adds them the wrong way round."""

    def why_not(self, operation: str, *rest: Any) -> str | None:
        return None if operation == "token_product" else "only its gradients have a kernel of their own"

    def preferred(self, operation: str, input: torch.Tensor) -> bool:
        return True

    def token_product(
        self, grad: Any, x: Any, block: Block, estimator: Estimator, gradients: ParameterGradients, settings: Settings
    ) -> None:
        panels.parameter_gradients(-grad, x, block, estimator, gradients, EagerBackend(), settings)


class WrongFusedGradients(Faulty):
    fused = FusedTokenProduct()


FAULTS: list[tuple[type[Faulty], set[str]]] = [
    (Faulty, set()),
    (BlockDependent, {"W across blocks", "forward, ∂X and merge"}),
    (OtherMerge, {"forward, ∂X and merge"}),
    (OtherSign, {"exact arithmetic", "error against fp64"}),
    (Imprecise, {"error against fp64"}),
    (ThreadDependent, {"thread counts"}),
    (NotANumber, {"error against fp64"}),
    (WrongInDefaultLayers, {"error against fp64"}),
    (WrongFewTokens, {"forward, ∂X and merge", "exact arithmetic"}),
    (WrongFusedGradients, {"exact arithmetic", "error against fp64"}),
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


class Unreadable(Faulty):
    def why_not(self, *_: Any) -> str | None:
        raise OSError("cannot open /home/alice/cache/driver.so, see https://example.org/help/page")


def test_a_backend_that_cannot_be_asked_is_a_failure_without_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {"native": Unreadable()})
    assert cli.main(["doctor", "--check"]) == 1
    words = "OSError: cannot open …/driver.so, see https://example.org/help/page"
    out = capsys.readouterr().out
    assert f"fp64 layers cannot run: {words}\n" in out
    assert f"FAIL  cpu     -       backends: {words}\n" in out
    assert "0 passed, 1 failed" in out


def test_a_device_without_a_name_is_listed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: int) -> str:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_name", fail)
    cli.main(["doctor"])
    assert "xpu:0: RuntimeError: the driver is gone\n" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_an_absurd_time_is_a_failure(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_seconds", lambda *_: seconds)
    passed, figure = checks.speed(checks.Subject("cpu", "eager", small=True))
    assert passed is False
    assert str(seconds) in figure


def test_times_are_taken_on_the_device_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited_for.append)
    checks._seconds(checks.Subject("cuda:1", "eager", small=True), lambda: None)
    assert waited_for == [torch.device("cuda:1")] * 2


def test_a_terminal_shows_what_is_being_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {"native": Faulty()})
    cli.main(["doctor", "--check"])
    assert "checking" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["doctor", "--check"])
    err = capsys.readouterr().err
    assert all(f"checking {name} (cpu, native)" in err for name in NAMES)
    assert err.endswith("\r\033[K")


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
