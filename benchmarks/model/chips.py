"""Ceilings of the chips whose steps are predicted. A GPU session measures three of them and replaces those."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates as programs reach them, not as data sheets have them; a unit is an SM or a CU.

    `cycles_per_instruction`: for which one of a unit's four schedulers is busy with an instruction of a whole warp.
    `launch_seconds`: what a kernel takes besides its work, and `small_operation_seconds` what an operation of PyTorch
    on a few megabytes takes, both in a queue that is never empty.
    """

    family: str
    units: int
    clock: float
    product_operations: float
    bytes_per_second: float
    cache_bytes_per_second: float
    cache_bytes: int
    registers: int
    shared_bytes: int
    warp_size: int
    cycles_per_instruction: int = 1
    launch_seconds: float = 1.5e-6
    small_operation_seconds: float = 2.5e-6

    @property
    def macs_per_cycle(self) -> float:
        """Multiply-adds of bf16 operands that a unit's matrix cores do a cycle at the product's rate."""
        return self.product_operations / 2 / self.units / self.clock


_NVIDIA = dict(registers=65536, shared_bytes=227 * 1024, warp_size=32)
_CDNA = dict(registers=131072, shared_bytes=64 * 1024, warp_size=64, cycles_per_instruction=4)
CHIPS = {
    "H200": Chip("sm_90", 132, 1.755e9, 740e12, 4.3e12, 5.5e12, 50 * 2**20, **_NVIDIA),
    "H100": Chip("sm_90", 132, 1.755e9, 700e12, 3.0e12, 5.5e12, 50 * 2**20, **_NVIDIA),
    "A100": Chip(
        "sm_80", 108, 1.41e9, 250e12, 1.75e12, 3.5e12, 40 * 2**20, **(_NVIDIA | dict(shared_bytes=163 * 1024))
    ),
    "MI300X": Chip("gfx942", 304, 2.1e9, 600e12, 4.0e12, 8.0e12, 256 * 2**20, **_CDNA),
}
"""None measured by this project yet. Products and copies: rates that public benchmarks report for large sizes, H200's
as this project's plans have used them. Caches: H100 and A100 from published microbenchmarks of their L2, MI300X's
256 MiB Infinity Cache. Clocks: the boost clock of H100 and A100 under load, MI300X's peak."""
