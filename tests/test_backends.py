"""The choice of backend and strategy, and the reasons given for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from dual_lora_kernels import available_backends, dual_lora_linear, set_strategy, strategy
from dual_lora_kernels.backends import resolve_backend
from dual_lora_kernels.backends import triton as triton_backend

from .problems import gaussian

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def _strategy() -> Iterator[None]:
    before = strategy()
    yield
    set_strategy(before)


def _resolve(name: str, device: str = "cpu") -> str:
    return resolve_backend(name, torch.device(device), torch.float32, torch.float32).name


def test_a_cpu_runs_on_the_eager_backend() -> None:
    assert _resolve("auto") == "eager"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_on_a_cpu_says_why_not() -> None:
    assert "triton" in available_backends()
    with pytest.raises(ValueError, match="in its interpreter only"):
        _resolve("triton")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_on_an_unknown_device_says_why_not() -> None:
    with pytest.raises(ValueError, match="no kernels for device type 'mps'"):
        _resolve("triton", "mps")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("rocm", [False, True])
def test_an_unknown_chip_is_named_with_those_that_are_known(rocm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from dual_lora_kernels.backends.triton.architecture import _gpu_architecture

    chip = SimpleNamespace(name="Old", gcnArchName="gfx906:sramecc+", major=7, minor=0, multi_processor_count=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    monkeypatch.setattr(torch.version, "hip", "6.0" if rocm else None)
    reason = _gpu_architecture.__wrapped__(0)
    assert isinstance(reason, str)
    assert ("gfx906" in reason and "gfx942" in reason) if rocm else ("7.0" in reason and "9.0" in reason)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("rocm", "name", "family"), [(None, (8, 6), "sm_89"), (None, (9, 0), "sm_90"), ("6.4", "gfx942:xnack-", "gfx942")]
)
def test_chips_use_their_familys_shapes(
    rocm: str | None, name: tuple[int, int] | str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from dual_lora_kernels.backends.triton.architecture import Architecture, _gpu_architecture

    major, minor = name if isinstance(name, tuple) else (9, 4)
    chip = SimpleNamespace(name="Chip", gcnArchName=name, major=major, minor=minor, multi_processor_count=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    monkeypatch.setattr(torch.version, "hip", rocm)
    assert _gpu_architecture.__wrapped__(0) == Architecture(family, 80)


def test_without_triton_the_backend_is_not_available_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_import_failure", lambda: "triton cannot be imported: pip install triton")
    assert "triton" not in available_backends()
    assert _resolve("auto") == "eager"
    with pytest.raises(ValueError, match="pip install triton"):
        _resolve("triton")


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(ValueError, match="strategy: got 'fast', expected one of 'auto', 'fused', 'panels'"):
        set_strategy("fast")
    assert strategy() == "auto"


def test_a_backend_without_fused_kernels_refuses_to_run_fused() -> None:
    problem = gaussian(4, 5, 6, 2, 2)
    set_strategy("fused")
    with pytest.raises(ValueError, match="backend 'eager' does not serve here: it has no fused kernels"):
        dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="eager")
