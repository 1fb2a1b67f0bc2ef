"""Settings: read in the forward pass, used by its backward pass, changed for a while by a context manager."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import dual_lora_kernels as dlk
from dual_lora_kernels.backends import Settings
from dual_lora_kernels.backends.eager import EagerBackend
from dual_lora_kernels.runtime_settings import current_settings, default_backend
from dual_lora_kernels.self_check.problems import gaussian


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that the eager backend is handed."""
    seen: list[Settings] = []
    for name in ("effective_weight", "factor_gradients"):
        original = getattr(EagerBackend, name)

        def spy(self: Any, *arguments: Any, original: Any = original) -> None:
            seen.append(arguments[-1])
            original(self, *arguments)

        monkeypatch.setattr(EagerBackend, name, spy)
    return seen


def _output() -> torch.Tensor:
    problem = gaussian(3, 8, 9, 2, 2).requiring_grad()
    return dlk.dual_lora_linear(problem.x, problem.weight, *problem.factors)


def test_a_backward_pass_has_its_forward_passs_settings(used: list[Settings]) -> None:
    with dlk.settings(strategy="panels", workspace_bytes=12345, backend="eager"):
        out = _output()
    dlk.set_workspace_bytes(999)
    out.sum().backward()
    assert len(used) == 3
    assert set(used) == {Settings("panels", 12345)}


def test_also_in_another_thread(used: list[Settings]) -> None:
    with dlk.settings(workspace_bytes=12345, backend="eager"):
        out = _output()
    thread = threading.Thread(target=out.sum().backward)
    thread.start()
    thread.join()
    assert {settings.workspace for settings in used} == {12345}


def test_settings_last_as_long_as_the_block() -> None:
    before = default_backend(), current_settings()
    with dlk.settings(strategy="panels", workspace_bytes=1000):
        with dlk.settings(workspace_bytes=2000, backend="eager"):
            assert (dlk.strategy(), dlk.workspace_bytes(), default_backend()) == ("panels", 2000, "eager")
        assert (dlk.strategy(), dlk.workspace_bytes(), default_backend()) == ("panels", 1000, before[0])
    assert (default_backend(), current_settings()) == before


def test_an_exception_and_a_setter_within_are_undone() -> None:
    before = default_backend(), current_settings()

    @dlk.settings(strategy="panels")
    def fail() -> None:
        dlk.set_workspace_bytes(77)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (default_backend(), current_settings()) == before


def test_settings_decorate() -> None:
    @dlk.settings(workspace_bytes=4321)
    def inside() -> int:
        return dlk.workspace_bytes()

    assert (inside(), inside()) == (4321, 4321)
    assert dlk.workspace_bytes() != 4321


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"strategy": "fast"}, ValueError, "strategy: got 'fast', expected one of 'auto', 'fused', 'panels'"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes: got 0, expected a positive integer"),
        ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes: got 1.5 of type float"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda', expected one of 'auto', 'triton', 'native', 'eager'"),
        ({"backend": "eager", "workspace_bytes": -1}, ValueError, "workspace_bytes: got -1"),
    ],
)
def test_bad_settings_are_named_and_change_nothing(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    before = default_backend(), current_settings()
    with pytest.raises(error, match=f"^{message}"), dlk.settings(**wrong):
        pytest.fail("entered")
    assert (default_backend(), current_settings()) == before


def test_compiled_code_follows_the_settings(used: list[Settings]) -> None:
    """Those around a compiled function and those within it."""
    torch._dynamo.reset()
    problem = gaussian(3, 8, 9, 2, 2)

    def call() -> torch.Tensor:
        return dlk.dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="eager")

    def call_within() -> torch.Tensor:
        with dlk.settings(workspace_bytes=3000):
            return call()

    outer, inner = (torch.compile(each, fullgraph=True, backend="aot_eager") for each in (call, call_within))
    for workspace in (1000, 2000):
        with dlk.settings(workspace_bytes=workspace):
            outer()
    inner()
    assert [settings.workspace for settings in used] == [1000, 2000, 3000]
