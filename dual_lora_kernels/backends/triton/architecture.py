"""What the kernels need to know of a chip: its family, whose tile shapes it uses, and its matrix units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from .shapes import TABLE, Shapes

_NVIDIA_FAMILIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_89",  # as Ada: 100 KiB of shared memory a block
    (8, 7): "sm_80",
    (8, 9): "sm_89",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_120",
    (12, 1): "sm_120",
}
_AMD_FAMILIES = {
    "gfx90a": "gfx90a",
    "gfx940": "gfx942",
    "gfx941": "gfx942",
    "gfx942": "gfx942",
    "gfx950": "gfx950",
    "gfx1100": "gfx1100",
    "gfx1101": "gfx1100",
    "gfx1102": "gfx1100",
    "gfx1151": "gfx1100",
    "gfx1200": "gfx1201",
    "gfx1201": "gfx1201",
}
INTERPRETED_FAMILY = "sm_90"
"""The family whose tile shapes and products the interpreter walks through by default."""


@dataclass(frozen=True)
class Architecture:
    """A chip's family. `compute_units`: NVIDIA's streaming multiprocessors (SMs) or AMD's compute units (CUs)."""

    family: str
    compute_units: int

    @property
    def is_nvidia(self) -> bool:
        """Whether the matrix units know TF32."""
        return self.family.startswith("sm_")

    def shapes(self, itemsize: int) -> Shapes:
        """Tile shapes for a compute dtype of `itemsize` bytes."""
        return TABLE[self.family if itemsize == 2 else f"any_{8 * itemsize}bit"]


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when the package was imported)."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> Architecture | str:
    """The device's architecture, or the reason why kernels cannot run on it."""
    if device.type == "cpu":
        if is_interpreted():
            return Architecture(INTERPRETED_FAMILY, compute_units=1)
        return "Triton runs on CPUs in its interpreter only (TRITON_INTERPRET=1, for tests)"
    if device.type != "cuda":
        return f"there are no kernels for device type {device.type!r}"
    return _gpu_architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu_architecture(device: int) -> Architecture | str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.partition(":")[0]
        family = _AMD_FAMILIES.get(name)
        known = ", ".join(_AMD_FAMILIES)
    else:
        name = f"compute capability {properties.major}.{properties.minor}"
        family = _NVIDIA_FAMILIES.get((properties.major, properties.minor))
        known = ", ".join(f"{major}.{minor}" for major, minor in _NVIDIA_FAMILIES)
    if family is None:
        return f"no tile shapes for {name} ({properties.name}); there are for {known}"
    return Architecture(family, properties.multi_processor_count)
