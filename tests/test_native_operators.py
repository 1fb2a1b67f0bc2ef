"""The native library as a whole: every instruction set that this processor runs, and what its operators refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dual_lora_kernels
from benchmarks.harness.machines import native_kernels
from dual_lora_kernels.self_check.problems import Problem, exact, gaussian

OPS = torch.ops.dual_lora_kernels
ROOT = Path(__file__).parents[1]
BUILT = json.loads((Path(dual_lora_kernels.__file__).parent / "_native_build.json").read_text())["kernels"]


def _python(*arguments: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DUAL_LORA_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def capabilities() -> list[str]:
    """The instruction sets that were compiled and that this processor runs."""
    return native_kernels()


def test_the_best_instruction_set_runs_by_default(capabilities: list[str]) -> None:
    assert OPS.cpu_capability() == (os.environ.get("DUAL_LORA_CPU_CAPABILITY") or capabilities[0])
    assert capabilities[-1] == "portable"


@pytest.mark.parametrize("name", [name for name in BUILT if name != OPS.cpu_capability()])
def test_every_instruction_set(capabilities: list[str], name: str) -> None:
    """tests/test_native.py on each; one is chosen for the life of a process, and this process runs it on its own."""
    if name not in capabilities:
        pytest.skip(f"this build on this processor has {', '.join(capabilities)}")
    process = _python("-m", "pytest", "tests/test_native.py", capability=name)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert f"({name} kernels" in process.stdout  # pytest's header


if os.environ.get("DUAL_LORA_SANITIZE"):

    def test_sanitized_runs_are_of_the_sanitized_library() -> None:
        """`make sanitize`: what this process has loaded is the copy's library, and calls the sanitizers' runtimes."""
        mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
        (library,) = (path for path in mapped if path.name == "_native.abi3.so")
        assert library.is_relative_to(ROOT)
        assert ROOT.name == "sanitize"
        assert b"__asan_report_load" in library.read_bytes()
        assert b"__ubsan_handle" in library.read_bytes()


# ---- bad arguments

PROBLEM = exact(4, 20, 30, 3, 2)
DOUBLE, HALF = torch.float64, torch.float16
FACTORS: list[tuple[dict[str, Any], str]] = [
    ({"A": torch.zeros(3, 30, 1)}, "A: got 3 dimensions, expected 2"),
    ({"C": torch.zeros(30)}, "C: got 1 dimensions, expected 2"),
    ({"A": torch.zeros(4, 30)}, r"B: got \[20, 3\], expected \[20, 4\]"),
    ({"B": torch.zeros(21, 3)}, r"D: got \[20, 2\], expected \[21, 2\]"),
    ({"C": torch.zeros(2, 31)}, r"C: got \[2, 31\], expected \[2, 30\]"),
    ({"D": torch.zeros(20, 2, dtype=DOUBLE)}, "A, B, C, D: got Float and Double"),
    ({"A": torch.zeros(3, 30, dtype=torch.int32)}, "A: got Int, expected float32"),
    ({"scale": torch.ones(2)}, "scale: got 2 elements"),
    ({"scale": torch.ones((), dtype=HALF)}, "scale: got Half"),
]
COMMON: list[tuple[dict[str, Any], str]] = [
    *FACTORS,
    ({"weight": torch.zeros(20, 29)}, r"weight: got \[20, 29\], expected \[20, 30\]"),
    ({"weight": torch.zeros(0, 30)}, r"weight: got \[0, 30\], expected \[20, 30\]"),
    ({"weight": torch.zeros(20, 30, dtype=torch.complex64)}, "weight: got ComplexFloat"),
    ({"out": torch.zeros(20)}, "out: got 1 dimensions"),
    ({"out": torch.zeros(20, 30, dtype=torch.int64), "grid": torch.int64}, "(out|grid): got Long"),
]
GRADIENTS: list[tuple[dict[str, Any], str]] = [
    ({"h": torch.zeros(20, 31)}, r"h: got \[20, 31\], expected \[20, 30\]"),
    ({"h": torch.zeros(20, 30, dtype=torch.complex64)}, "h: got ComplexFloat, expected float32"),
    ({"estimator": 3}, "estimator: got 3, expected 0, 1 or 2"),
    *(
        ({f"grad_{name}": torch.zeros(4, 5)}, rf"grad_{name}: got \[4, 5\], expected \[{n}, {k}\]")
        for name, (n, k) in {"A": (3, 30), "B": (20, 3), "C": (2, 30), "D": (20, 2)}.items()
    ),
    ({"grad_D": torch.zeros(20, 2, dtype=DOUBLE)}, "grad_D: got Double, expected Float for h of Float"),
]
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "cpu_effective_weight": [
        *COMMON,
        ({"out": torch.zeros(30, 20)}, r"out: got \[30, 20\], expected \[20, 30\]"),
        ({"grid": DOUBLE}, "grid: got Double, expected out's dtype, Float, or a 16-bit one"),
        ({"out": torch.zeros(20, 30, dtype=DOUBLE), "grid": HALF}, "grid: got Half, expected out's dtype, Double"),
    ],
    "cpu_factor_gradients": [*FACTORS, *GRADIENTS],
    "cpu_weight_and_factor_gradients": [
        *COMMON,
        *GRADIENTS,
        ({"out": torch.zeros(30, 20)}, r"out: got \[30, 20\], expected \[20, 30\]"),
        ({"out": torch.zeros(20, 0)}, r"out: got \[20, 0\], expected \[20, 30\]"),
        ({"out": None}, "results: expected W and the gradients"),
    ],
    "cpu_few_tokens": [
        *COMMON,
        ({"out": torch.zeros(4, 21)}, r"out: got \[4, 21\], expected \[4, 20\]"),
        ({"input": torch.zeros(4, 31)}, r"input: got \[4, 31\], expected \[4, 30\]"),
        ({"input": torch.zeros(4, 30, dtype=DOUBLE)}, "input: got Double with factors of Float"),
        ({"bias": torch.zeros(19)}, r"bias: expected \[20\] on the CPU"),
        ({"bias": torch.zeros(20, dtype=torch.bool)}, "bias: got Bool"),
    ],
}


def _arguments(operator: str, problem: Problem) -> dict[str, Any]:
    """What a valid call is about, by name; what it writes is zero."""
    shared = {"weight": problem.weight, **problem.factors._asdict()}
    if operator == "cpu_few_tokens":
        return {"out": torch.zeros(4, 20), "input": problem.x, "bias": problem.bias, **shared}
    if operator == "cpu_effective_weight":
        return {"out": torch.zeros(20, 30), "grid": torch.float32, **shared}
    gradients = {f"grad_{name}": torch.zeros_like(getattr(problem, name)) for name in "ABCD"}
    options = {"h": torch.ones(20, 30), "estimator": 0, "clip_bound": 1.0, "workspace": 1 << 20}
    return {"out": torch.zeros(20, 30), "grid": torch.float32, **shared, **gradients, **options}


def _call(operator: str, given: dict[str, Any]) -> None:
    """The operator on these arguments, put into lists as it takes them."""
    factors = [given[name] for name in ("A", "B", "C", "D", "scale")]
    if operator == "cpu_few_tokens":
        OPS.cpu_few_tokens(given["out"], given["input"], [given["weight"]], [], factors, given["bias"], (0, 0))
    elif operator == "cpu_effective_weight":
        OPS.cpu_effective_weight(given["out"], [given["weight"]], [], factors, given["grid"], (0, 0))
    else:
        gradients = [given[f"grad_{name}"] for name in "ABCD"]
        options = (given["estimator"], given["clip_bound"], given["workspace"])
        if operator == "cpu_factor_gradients":
            OPS.cpu_factor_gradients(given["h"], factors, None, gradients, *options)
        else:
            results = [given["out"], *gradients]
            dither = given["grid"], (0, 0)
            OPS.cpu_weight_and_factor_gradients(results, [given["weight"]], [], given["h"], factors, *dither, *options)


@pytest.mark.parametrize(
    ("operator", "change", "message"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_bad_arguments_are_named_before_anything_is_written(
    operator: str, change: dict[str, Any], message: str
) -> None:
    arguments = _arguments(operator, PROBLEM)
    _call(operator, arguments)  # as it is, it runs
    arguments = _arguments(operator, PROBLEM) | change
    with pytest.raises(RuntimeError, match=rf"(^|, ){message}"):
        _call(operator, arguments)
    for name, value in arguments.items():
        if value is not None and (name == "out" or name.startswith("grad_")):
            assert not value.any(), name


def test_quantised_weights_that_do_not_fit_are_refused() -> None:
    """Before anything is read: tensors too short for the layout, of other dtypes, or for another number of columns."""
    factors = (*gaussian(1, 20, 30, 4, 2).factors,)
    out = torch.zeros(20, 30)
    packed, table, absmax = torch.zeros(300, dtype=torch.uint8), torch.zeros(16), torch.zeros(10)
    fits = [0, 0, 30, 64, 0, 1]
    OPS.cpu_effective_weight(out, [packed, table, absmax], fits, factors, torch.float32, None)
    for tensors, layout, message in (
        ([packed[:299], table, absmax], fits, "packed: got 299 elements of Byte, expected at least 300"),
        ([packed.char(), table, absmax], fits, "packed: got 300 elements of Char"),
        ([packed, table[:15], absmax], fits, "table: got 15 elements"),
        ([packed, table, absmax[:9]], fits, "absmax: got 9 elements of Float, expected at least 10"),
        ([packed, table, absmax.double()], fits, "absmax: got 10 elements of Double"),
        ([packed, table, absmax], [1, *fits[1:]], "packed: got 300 elements of Byte, expected at least 315"),
        ([packed, table, absmax], [0, 1, *fits[2:]], "do not fit each other or the factors"),
        ([packed, table, absmax], [*fits[:4], 256, 1], "do not fit each other or the factors"),
        ([packed, table, absmax], fits[:5], "do not fit each other or the factors"),
        ([packed, table, absmax], [*fits[:5], 3], "do not fit each other or the factors"),
        ([packed, table], [], "weight: got 2 tensors, expected one, or a layout"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.cpu_effective_weight(out.fill_(7), tensors, layout, factors, torch.float32, None)
        assert bool((out == 7).all())


def test_lists_of_the_wrong_length_are_refused() -> None:
    given = _arguments("cpu_factor_gradients", PROBLEM)
    factors, gradients = list(PROBLEM.factors), [given[f"grad_{name}"] for name in "ABCD"]
    with pytest.raises(RuntimeError, match="factors: got 4 tensors, expected A, B, C, D and the scale"):
        OPS.cpu_effective_weight(given["out"], [], [], factors[:4], torch.float32, None)
    with pytest.raises(RuntimeError, match="gradients: got 3, expected those of A, B, C and D"):
        OPS.cpu_factor_gradients(given["h"], factors, None, gradients[:3], 0, 1.0, 1 << 20)
    with pytest.raises(RuntimeError, match="dither: expected a row and a column"):
        OPS.cpu_effective_weight(given["out"], [], [], factors, torch.float32, (0,))
