"""The tile shapes that ``dual-lora tune`` tries: a small grid per kernel, around what compiles without spilling."""

from __future__ import annotations

import dataclasses

from ..backends.triton.shapes import PanelShape, ProductShape, Shapes
from .kernel_calls import PRODUCTS

Shape = PanelShape | ProductShape
CLASSES: tuple[int | None, ...] = (16, 64, 128, None)
"""Upper ends of the fused products' token classes; None is everything beyond."""
CLASS_TOKENS = {16: 16, 64: 64, 128: 128, None: 512}
"""The tokens that a class is timed with. Beyond: about where panels take over."""

# rows, columns, warps: W is written once, so there is no loop to pipeline
_WEIGHT = ((32, 128, 4), (64, 64, 4), (64, 128, 8), (128, 64, 4), (128, 128, 8), (32, 256, 4), (64, 256, 8))
# rows, columns, warps, stages, programs to an SM or CU
_GRADIENTS = (
    (64, 32, 4, 2, 4), (64, 64, 4, 2, 2), (128, 32, 4, 2, 2), (64, 16, 4, 1, 5), (64, 32, 2, 1, 4), (32, 32, 4, 2, 3),
    (32, 32, 2, 1, 5), (32, 32, 4, 1, 6), (32, 16, 4, 1, 8), (64, 16, 8, 1, 3),
)  # fmt: skip
# block M, N, K, warps, stages
_PRODUCTS: dict[int | None, tuple[tuple[int, int, int, int, int], ...]] = {
    16: (
        (16, 64, 32, 4, 2), (16, 32, 64, 4, 2), (16, 64, 64, 4, 2), (16, 128, 32, 4, 2), (16, 64, 32, 2, 2),
        (16, 32, 32, 2, 2), (16, 64, 128, 4, 3), (16, 128, 64, 8, 3), (16, 32, 32, 8, 2), (16, 64, 32, 8, 2),
    ),
    64: (
        (64, 32, 64, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 4, 2), (64, 128, 64, 8, 3), (64, 128, 32, 4, 2),
        (32, 64, 64, 4, 2), (64, 64, 32, 8, 1), (32, 64, 32, 8, 1),
    ),
    128: (
        (128, 32, 64, 4, 2), (64, 64, 64, 4, 2), (128, 64, 64, 4, 2), (128, 64, 64, 8, 3), (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 2), (128, 64, 32, 8, 1), (128, 32, 32, 8, 1),
    ),
    None: (
        (256, 128, 64, 8, 2), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3), (256, 64, 64, 8, 3), (128, 128, 64, 8, 2),
    ),
}  # fmt: skip
_PROGRAMS: dict[int | None, int] = {16: 4, 64: 3, 128: 2, None: 2}
"""Programs that an SM or CU mostly holds of a class's shapes (static counts), for which splits are cut."""
# block M, N, K, warps, stages
_TOKEN_PRODUCT = (
    (64, 64, 64, 4, 2), (64, 64, 32, 4, 2), (64, 32, 64, 4, 2), (64, 32, 32, 4, 2), (128, 64, 64, 8, 2),
    (32, 32, 64, 4, 2), (64, 32, 32, 8, 1), (32, 32, 32, 8, 1), (32, 16, 32, 4, 1),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slot:
    """One entry of a family's table: a kernel, and for a fused product the class of tokens up to `up_to`."""

    kernel: str
    up_to: int | None
    tokens: int

    @property
    def name(self) -> str:
        """For people."""
        if self.kernel not in PRODUCTS:
            return self.kernel
        return f"{self.kernel} up to {self.up_to}" if self.up_to else f"{self.kernel} beyond"


def slots(kernel: str, tokens: dict[int | None, int], token_product_tokens: int) -> list[Slot]:
    """The entries that tuning `kernel` measures, with the tokens that each class is timed with."""
    if kernel in PRODUCTS:
        return [Slot(kernel, up_to, tokens[up_to]) for up_to in CLASSES]
    return [Slot(kernel, None, token_product_tokens if kernel == "token_product" else 0)]


def current(slot: Slot, shapes: Shapes) -> Shape:
    """The shape that a family's table has for `slot`."""
    if slot.kernel in PRODUCTS:
        return dataclasses.replace(shapes.weight_product(slot.kernel, slot.up_to or 2**30, 0, 0), up_to=slot.up_to)
    shape: Shape = getattr(shapes, slot.kernel)
    return shape


def candidates(slot: Slot, shapes: Shapes) -> list[Shape]:
    """The shape in use first, then the grid's others."""
    found: list[Shape] = [current(slot, shapes)]
    if slot.kernel == "effective_weight":
        found += [PanelShape(rows, columns, warps, stages=1) for rows, columns, warps in _WEIGHT]
    elif slot.kernel == "factor_gradients":
        found += [
            PanelShape(rows, columns, warps, stages, programs) for rows, columns, warps, stages, programs in _GRADIENTS
        ]
    else:
        grid = _TOKEN_PRODUCT if slot.kernel == "token_product" else _PRODUCTS[slot.up_to]
        found += [
            ProductShape(block_m, block_n, block_k, warps, stages, slot.up_to, programs_per_unit=_PROGRAMS[slot.up_to])
            for block_m, block_n, block_k, warps, stages in grid
        ]
    in_use = dataclasses.replace(found[0], source="")
    return [found[0], *(shape for shape in found[1:] if shape != in_use)]
