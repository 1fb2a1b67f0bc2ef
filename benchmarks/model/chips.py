"""Ceilings of the chips whose steps are predicted. A GPU session measures two of them and replaces those."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
_SMALL = _NVIDIA | dict(shared_bytes=99 * 1024)
_CDNA = dict(registers=131072, shared_bytes=64 * 1024, warp_size=64, cycles_per_instruction=4)
_RDNA = dict(registers=196608, shared_bytes=64 * 1024, warp_size=32)
CHIPS = {
    "H200": Chip("sm_90", 132, 1.755e9, 740e12, 4.3e12, 5.5e12, 50 * 2**20, **_NVIDIA),
    "H100": Chip("sm_90", 132, 1.755e9, 700e12, 3.0e12, 5.5e12, 50 * 2**20, **_NVIDIA),
    "A100": Chip(
        "sm_80", 108, 1.41e9, 250e12, 1.75e12, 3.5e12, 40 * 2**20, **(_NVIDIA | dict(shared_bytes=163 * 1024))
    ),
    "L40S": Chip("sm_89", 142, 2.5e9, 300e12, 0.75e12, 4.0e12, 96 * 2**20, **_SMALL),
    "B200": Chip("sm_100", 148, 1.8e9, 1600e12, 6.5e12, 9.0e12, 126 * 2**20, **_NVIDIA),
    "RTX5090": Chip("sm_120", 170, 2.4e9, 200e12, 1.5e12, 5.0e12, 96 * 2**20, **_SMALL),
    "MI250X": Chip("gfx90a", 110, 1.7e9, 140e12, 1.3e12, 2.5e12, 8 * 2**20, **_CDNA),
    "MI355X": Chip(
        "gfx950", 256, 2.4e9, 1300e12, 6.0e12, 10.0e12, 256 * 2**20, **(_CDNA | dict(shared_bytes=160 * 1024))
    ),
    "RX7900XTX": Chip("gfx1100", 96, 2.3e9, 90e12, 0.85e12, 2.5e12, 96 * 2**20, **_RDNA),
    "RX9070XT": Chip("gfx1201", 64, 2.7e9, 150e12, 0.6e12, 2.5e12, 64 * 2**20, **_RDNA),
    "MI300X": Chip("gfx942", 304, 2.1e9, 600e12, 4.0e12, 8.0e12, 256 * 2**20, **_CDNA),
}
"""Estimates; this project has measured none of them. H200's rates of products and copies are those that its plans use,
the others are data sheets with a like discount. They are there to compare versions and to choose between tile shapes.
RDNA's matrix instructions are not told apart from others. Caches are the L2, or AMD's Infinity Cache.
"""


def measured(family: str, units: int, product_operations: float, bytes_per_second: float) -> Chip | None:
    """The known chip of a family with what a session has measured in place of its rates; None for no such family."""
    known = (chip for chip in CHIPS.values() if chip.family == family)
    nearest = min(known, key=lambda chip: abs(chip.units - units), default=None)
    if nearest is None:
        return None
    return replace(nearest, units=units, product_operations=product_operations, bytes_per_second=bytes_per_second)
