"""Integers with a scale, and perhaps a zero point, for blocks of elements: LLM.int8 and torchao's int8 and int4."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .weight import QuantisedWeight


class IntegerLayout(NamedTuple):
    """A scale serves blocks of `block_rows` × `block_columns`."""

    shape: tuple[int, int]
    row0: int
    col0: int
    dtype: torch.dtype
    block_rows: int
    block_columns: int
    multiplier: float


class IntegerWeight(QuantisedWeight):
    """W0[i, j] = (integer[i, j] − zero_point) · scale · multiplier, each step rounded as the library rounds it.

    Tensors: integers int8 [N, K], scale [N / block_rows, K / block_columns] and, where there is one, zero_point of the
    scale's shape. The difference is computed in `dtype`, its product with the scale in the wider of the two dtypes.
    """

    kind = "integers"
    layout_type = IntegerLayout
    layout: IntegerLayout

    def check(self) -> None:
        layout, (integers, *others) = self.layout, self.tensors
        reach = tuple(start + size for start, size in zip((layout.row0, layout.col0), layout.shape, strict=True))
        blocks = tuple(
            -(-size // block) for size, block in zip(reach, (layout.block_rows, layout.block_columns), strict=True)
        )
        for name, tensor, least in (("integers", integers, reach), *(("scale", each, blocks) for each in others)):
            if tensor.dim() != 2 or tensor.shape[0] < least[0] or tensor.shape[1] < least[1]:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected at least {least}")

    def values(self) -> torch.Tensor:
        layout, (integers, scale, *zero_points) = self.layout, self.tensors
        (n, k), row, col = layout.shape, layout.row0, layout.col0
        whole_rows = layout.block_rows == 1 and scale.shape[1] == 1
        rows = columns = None
        if not whole_rows:
            rows = torch.arange(row, row + n, device=self.device)[:, None] // layout.block_rows
            columns = torch.arange(col, col + k, device=self.device) // layout.block_columns

        def spread(each: torch.Tensor) -> torch.Tensor:
            return each[row : row + n] if whole_rows else each[rows, columns]

        numbers = integers[row : row + n, col : col + k].to(layout.dtype)
        for zero_point in zero_points:
            numbers = numbers - spread(zero_point).to(layout.dtype)
        numbers = numbers * spread(scale)
        return numbers if layout.multiplier == 1 else numbers.mul_(layout.multiplier)
