"""The choice of backend and strategy, and the reasons given for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dual_lora_kernels import available_backends, dual_lora_linear, set_strategy, strategy
from dual_lora_kernels.backends import candidates, resolve_backend
from dual_lora_kernels.backends import triton as triton_backend
from dual_lora_kernels.backends.eager import EagerBackend
from dual_lora_kernels.backends.native import NativeBackend
from dual_lora_kernels.self_check.problems import gaussian


def _resolve(name: str) -> str:
    return resolve_backend(name, torch.device("cpu"), torch.float32, torch.float32).name


def test_a_cpu_runs_on_the_native_backend_where_it_was_compiled() -> None:
    assert _resolve("auto") == ("native" if "native" in available_backends() else "eager")


def test_without_triton_the_backend_is_not_available_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_import_failure", lambda: "triton cannot be imported: pip install triton")
    assert "triton" not in available_backends()
    assert _resolve("auto") in ("native", "eager")
    with pytest.raises(ValueError, match="pip install triton"):
        _resolve("triton")


def _reasons(name: str) -> dict[str, str | None]:
    found = candidates(name, torch.device("cpu"), torch.float32, torch.float32)
    return {backend.name: reason for backend, reason in found}


def test_candidates_come_in_order_with_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_import_failure", lambda: None)
    monkeypatch.setattr(triton_backend.TritonBackend, "why_not", lambda *_: None)
    monkeypatch.setattr(NativeBackend, "why_unavailable", lambda _: "no compiler")
    reasons = {"triton": "Triton's interpreter is for tests", "native": "no compiler", "eager": None}
    assert list(_reasons("auto").items()) == list(reasons.items())
    assert _reasons("triton") == {"triton": None}, "reserved, and so for those who name it"


def test_a_call_that_is_served_asks_no_further_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(NativeBackend, "why_unavailable", lambda _: None)
    monkeypatch.setattr(NativeBackend, "description", lambda _: "a stand-in")
    monkeypatch.setattr(EagerBackend, "why_unavailable", fail)
    assert _resolve("auto") == "native"


def test_the_package_works_where_triton_cannot_be_imported() -> None:
    program = """
import sys
sys.modules["triton"] = None
from dual_lora_kernels import DualLoraLinear, available_backends
import torch
DualLoraLinear(4, 4)(torch.ones(1, 4)).sum().backward()
assert available_backends() in (["native", "eager"], ["eager"])
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, check=True, timeout=120)


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(ValueError, match="strategy: got 'fast', expected one of 'auto', 'fused', 'panels'"):
        set_strategy("fast")
    assert strategy() == "auto"


def test_a_backend_without_fused_kernels_refuses_to_run_fused() -> None:
    problem = gaussian(4, 5, 6, 2, 2)
    set_strategy("fused")
    with pytest.raises(ValueError, match="backend 'eager' does not serve here: it has no fused kernels"):
        dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="eager")
