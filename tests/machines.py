"""The numerical tests under settings that stand in for other machines: ``python -m tests.machines [--every]``.

Without ``--every``, a few combinations that have each setting at least once, with fewer examples (`make test`). With
it, all of them (`make test-machines`). Exit status 1 where a test fails under any.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from benchmarks.gpu import numerical_suite
from benchmarks.harness.machines import Machine, every_machine, few_machines, native_kernels

SUITE = (
    "reference", "grid", "rounding", "panels", "functional", "linear", "linear_state", "native", "model", "origin",
    "quantised", "column_sampling", "sampled_gradients", "checkpoint_merge", "analysis", "spectra",
)  # fmt: skip
"""Tests whose outcome may depend on how a processor or a library computes."""
_SECONDS = 1800.0
_FEW_EXAMPLES = "10"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__.partition(":")[0])
    parser.add_argument("--every", action="store_true", help="all combinations, with all examples")
    every = parser.parse_args().every
    kernels = native_kernels()
    machines = every_machine(kernels) if every else list(few_machines(kernels))
    names = [name for name in SUITE if kernels or name != "native"]
    passed = failed = 0
    for index, machine in enumerate(machines, 1):
        print(f"[{index}/{len(machines)}] {machine} … ", end="", flush=True)
        started = time.monotonic()
        results = _run(machine, names, {} if every else {"DUAL_LORA_EXAMPLES": _FEW_EXAMPLES})
        counts = results["counts"]
        ok = results["complete"] and results["exit_code"] == 0
        passed += counts.get("passed", 0)
        failed += counts.get("failed", 0) + counts.get("error", 0) or int(not ok)
        summary = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if outcome != "deselected")
        print(f"{summary or 'no test ran'} in {time.monotonic() - started:.0f} s", flush=True)
        if not ok:
            print("\n".join(results["tail"]), flush=True)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


def _run(machine: Machine, names: list[str], settings: dict[str, str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    files = [f"tests/test_{name}.py" for name in names]
    numerical_suite.run(results, files, _SECONDS, machine.environment() | settings)
    return results


if __name__ == "__main__":
    sys.exit(main())
