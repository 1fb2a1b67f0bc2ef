"""The numerical suite runs on every backend and device that the machine has.

``TRITON_INTERPRET=1 pytest`` runs it on the Triton backend in Triton's interpreter, on a CPU, and nothing else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

import dual_lora_kernels
from dual_lora_kernels import available_backends, workspace_bytes
from dual_lora_kernels.backends import _BACKENDS
from dual_lora_kernels.self_check.checks import NAIVE_ERRORS

from .accuracy import error_ratios, summary  # noqa: F401  # a fixture of every test
from .browsers import has_browser
from .documentation_site import has_mkdocs
from .processes import Processes

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this run walks the Triton backend through Triton's interpreter: it then runs that backend's tests alone."""

TRITON_ONLY = (
    "ahead_of_time", "architecture", "gpu_session", "static_report", "triton", "triton_fit", "triton_launch", "tuning",
)  # fmt: skip
NATIVE_ONLY = ("native", "native_library", "native_operators")
collect_ignore = [] if importlib.util.find_spec("triton") else [f"test_{name}.py" for name in TRITON_ONLY]
"""Tests of the Triton backend and its tools import triton, those of the native one call its library; they are left out
where that is not installed, and the report's header says so."""
if "native" not in available_backends():
    collect_ignore += [f"test_{name}.py" for name in NATIVE_ONLY]

if not importlib.util.find_spec("bitsandbytes"):
    collect_ignore += [
        "test_quantised_libraries.py", "test_quantised_layers.py", "test_peft_quantised.py", "test_bench_models.py",
    ]  # fmt: skip

if not importlib.util.find_spec("jsonschema"):
    collect_ignore += ["test_publish.py", *(path.name for path in Path(__file__).parent.glob("test_bench_*.py"))]

if not has_browser():
    collect_ignore += ["test_inspection_browser.py", "test_documentation_browser.py"]

if not has_mkdocs():
    collect_ignore += ["test_documentation_site.py", "test_documentation_browser.py"]

if not importlib.util.find_spec("deepspeed"):  # `make deepspeed` installs it
    collect_ignore += ["test_deepspeed.py"]

if IS_INTERPRETED:
    from .interpreter import speed_up

    speed_up()

settings.register_profile(
    "default",
    max_examples=int(os.environ.get("DUAL_LORA_EXAMPLES", 6 if IS_INTERPRETED else 40)),  # a pass takes a second there
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


class BackendCase(NamedTuple):
    """A backend and the strategy that its passes run with."""

    name: str
    strategy: str

    def runs_on(self, device: str) -> bool:
        """Whether this run can execute it on `device`, ``"cpu"`` or ``"cuda"``."""
        if self.name == "native":
            return device == "cpu"
        return self.name != "triton" or device == "cuda" or IS_INTERPRETED


CASES = [
    BackendCase(name, strategy)
    for name in available_backends()
    for strategy in {"triton": ("panels", "fused"), "native": ("panels", "auto")}.get(name, ("auto",))
]


def pytest_report_header() -> list[str]:
    """Which backends are tested, and why others are not."""
    missing = {name: backend.why_unavailable() for name, backend in _BACKENDS.items()}
    present = [f"{name} ({_BACKENDS[name].description()})" for name, reason in missing.items() if reason is None]
    lacking = [] if importlib.util.find_spec("bitsandbytes") else ["no bitsandbytes: its layers' tests are left out"]
    if not importlib.util.find_spec("jsonschema"):
        lacking.append("no jsonschema: tests of the benchmark suite's documents are left out")
    if not has_browser():
        lacking.append("no chromium, chromedriver or selenium: tests in a browser are left out")
    if not has_mkdocs():
        lacking.append("no mkdocs: tests of the documentation's site are left out")
    return [
        "backends: " + ", ".join(present),
        *(f"no {name}: {reason}" for name, reason in missing.items() if reason),
        *lacking,
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The errors that tests compared with the naive implementation's."""
    lines = summary(report for reports in terminalreporter.stats.values() for report in reports if _is_call(report))
    if lines:
        terminalreporter.section(f"largest rms error over the naive implementation's, at most {NAIVE_ERRORS}")
        for line in lines:
            terminalreporter.write_line(line)


def _is_call(report: object) -> bool:
    return isinstance(report, pytest.TestReport) and report.when == "call"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out (deselect, and so report) what this machine or this run cannot execute."""
    kept = [item for item in items if _runs_here(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not _runs_here(item)])
        items[:] = kept


def _runs_here(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return False
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    case = parameters.get("backend")
    if IS_INTERPRETED and not ((case and case.name == "triton") or item.get_closest_marker("interpreter")):
        return False
    device = parameters.get("device", "cpu")
    if item.get_closest_marker("interpreter") and not IS_INTERPRETED and "device" in parameters and device == "cpu":
        return False
    return case is None or case.runs_on(device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device; ROCm's is called "cuda" too."""
    return torch.device(request.param)


@pytest.fixture(params=CASES, ids=lambda case: case.name if case.strategy == "auto" else "-".join(case))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of this installation, with its kernels over panels and fused where it has both."""
    with dual_lora_kernels.settings(strategy=request.param.strategy):
        yield request.param.name


@pytest.fixture
def small_workspace() -> Iterator[int]:
    """A workspace that forces many panels and chunks on small problems; yields its bytes."""
    with dual_lora_kernels.settings(workspace_bytes=16 * 1024):
        yield workspace_bytes()


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    """What a test sets is as before after it."""
    with dual_lora_kernels.settings():
        yield


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    """Two processes joined by gloo."""
    processes = Processes(2)
    yield processes
    processes.end()


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    """Four processes joined by gloo."""
    processes = Processes(4)
    yield processes
    processes.end()
