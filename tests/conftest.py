"""The numerical suite runs on every backend and device that the machine has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from dual_lora_kernels import available_backends, set_workspace_bytes, workspace_bytes

settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out (deselect, and so report) what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device; ROCm's is called "cuda" too."""
    return torch.device(request.param)


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of this installation."""
    name: str = request.param
    return name


@pytest.fixture
def small_workspace():
    """A workspace that forces many panels and chunks on small problems; yields its bytes."""
    before = workspace_bytes()
    set_workspace_bytes(16 * 1024)
    yield workspace_bytes()
    set_workspace_bytes(before)
