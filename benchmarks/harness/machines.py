"""Settings of a process by which one processor stands in for others: instruction sets, the vendors' paths, threads.

What a library computes depends on the processor that it finds. These settings make it behave as on an older or another
maker's: MKL by MKL_CBWR, oneDNN by ONEDNN_MAX_CPU_ISA, PyTorch's own kernels by ATEN_CPU_CAPABILITY, the native
backend's by DUAL_LORA_CPU_CAPABILITY. All are read when a process starts.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from dual_lora_kernels.backends.native import NativeBackend

LIBRARIES: dict[str, dict[str, str]] = {
    "own": {},
    "avx2": {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "oldest": {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
"""Names of the vendors' paths → the settings that choose them; ``"own"`` is what they choose here by themselves."""
THREADS = (1, 2, 3)


@dataclass(frozen=True)
class Machine:
    """One combination: the native kernels' instruction set (None: the best), the vendors' paths, and threads."""

    kernels: str | None
    libraries: str
    threads: int

    def __str__(self) -> str:
        plural = "s" if self.threads > 1 else ""
        return f"{self.kernels or 'best'} kernels, {self.libraries} libraries, {self.threads} thread{plural}"

    def environment(self) -> dict[str, str]:
        """The variables of a process that is to run so, over this one's."""
        # MKL would take no more threads than there are cores, and PyTorch no more than MKL.
        settings = {"OMP_NUM_THREADS": str(self.threads), "MKL_DYNAMIC": "FALSE", **LIBRARIES[self.libraries]}
        return {**os.environ, **settings, **({"DUAL_LORA_CPU_CAPABILITY": self.kernels} if self.kernels else {})}


def native_kernels() -> list[str]:
    """The native backend's instruction sets that this processor runs, best first; empty without the backend."""
    if NativeBackend().why_unavailable() is not None:
        return []
    program = (
        "from dual_lora_kernels.backends.native import NativeBackend as N; N().why_unavailable(); N().description()"
    )
    environment = {**os.environ, "DUAL_LORA_CPU_CAPABILITY": "none"}  # the error lists what there is
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    _, found, names = done.stderr.strip().rpartition("this build on this processor has ")
    if not found:
        raise RuntimeError(f"asked for its instruction sets, the native backend answered: {done.stderr}")
    return names.split(", ")


def every_machine(kernels: list[str]) -> list[Machine]:
    """All combinations."""
    sets: list[str | None] = [*kernels] or [None]
    return [Machine(*combination) for combination in itertools.product(sets, LIBRARIES, THREADS)]


def few_machines(kernels: list[str]) -> Iterator[Machine]:
    """Each instruction set, each library path but this machine's own and each number of threads at least once."""
    others = [name for name in LIBRARIES if name != "own"]
    for index, name in enumerate(reversed(kernels or ["none"])):
        # The processor's own combination is what an ordinary run of the tests has.
        libraries, threads = others[-1 - index % len(others)], THREADS[(2 * index) % len(THREADS)]
        yield Machine(name if kernels else None, libraries, threads)
