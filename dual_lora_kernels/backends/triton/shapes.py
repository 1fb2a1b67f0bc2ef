"""Tile shapes of every kernel, per architecture family: data, in ``tile_shapes.json``, each with its origin.

``dual-lora tune`` measures the shapes on the GPU at hand and rewrites that GPU's entries. Families named
``any_32bit`` and ``any_64bit`` hold the shapes for fp32 and fp64 computation, on every chip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "tile_shapes.json"
BLOCK_RANKS = (16, 32)
"""Ranks that kernels take at once: matrix units want 16 and powers of two, and factors must fit beside a tile."""


@dataclass(frozen=True)
class PanelShape:
    """A tile of W or H [rows, columns].

    A program of `factor_gradients` takes as many column tiles as leave `programs_per_unit` programs for each SM or CU.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs_per_unit: int = 2
    source: str = ""


@dataclass(frozen=True)
class ProductShape:
    """The tile of a fused product: outputs `block_m` × `block_n`, in steps of `block_k` along the sum.

    In the forward pass and ∂X, M are the tokens, so the tile of W is `block_n` × `block_k` or its transpose. In
    ``token_product``, H = Gᵀ X [rows, columns] is the output and the sum runs over the tokens. The shape is for at most
    `up_to` tokens. With `whole_tiles` it is only for weights of whole tiles, since its kernel spills registers where it
    masks the weight. An SM or CU holds `programs_per_unit` of its programs, by registers and shared memory.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    up_to: int | None = None
    whole_tiles: bool = False
    programs_per_unit: int = 2
    source: str = ""

    def suits(self, tokens: int, features: int, length: int) -> bool:
        """Whether it is meant for so many tokens, and for results of `features` from sums over `length`."""
        is_whole = features % self.block_n == 0 and length % self.block_k == 0
        return (self.up_to is None or tokens <= self.up_to) and (is_whole or not self.whole_tiles)


@dataclass(frozen=True)
class Shapes:
    """One family's entries.

    `fused_up_to`: the largest number of tokens for which a pass runs fused. `fused_rank`: the largest rank, one of
    `BLOCK_RANKS`, for which all of them compile without a spill and within shared memory.
    """

    effective_weight: PanelShape
    factor_gradients: PanelShape
    forward: tuple[ProductShape, ...]
    input_gradient: tuple[ProductShape, ...]
    token_product: ProductShape
    fused_up_to: dict[str, int]
    fused_rank: int

    def __post_init__(self) -> None:
        for operation in ("forward", "input_gradient"):
            bounds = [float("inf") if shape.up_to is None else shape.up_to for shape in getattr(self, operation)]
            if bounds != sorted(bounds) or not getattr(self, operation)[-1].suits(2**31, 1, 1):
                raise ValueError(
                    f"{operation}: got up_to {bounds}, expected them not to fall, and the last for all tokens and sizes"
                )
        if self.fused_rank not in BLOCK_RANKS:
            raise ValueError(f"fused_rank: got {self.fused_rank}, expected {' or '.join(map(str, BLOCK_RANKS))}")

    def weight_product(self, operation: str, tokens: int, features: int, length: int) -> ProductShape:
        """The first shape of ``"forward"`` or ``"input_gradient"`` that suits the sizes; see `ProductShape.suits`."""
        entries: tuple[ProductShape, ...] = getattr(self, operation)
        return next(shape for shape in entries if shape.suits(tokens, features, length))


def parse(entry: dict[str, Any]) -> Shapes:
    """One family's entry of the file."""
    return Shapes(
        effective_weight=PanelShape(**entry["effective_weight"]),
        factor_gradients=PanelShape(**entry["factor_gradients"]),
        forward=tuple(ProductShape(**shape) for shape in entry["forward"]),
        input_gradient=tuple(ProductShape(**shape) for shape in entry["input_gradient"]),
        token_product=ProductShape(**entry["token_product"]),
        fused_up_to=dict(entry["fused_up_to"]),
        fused_rank=entry["fused_rank"],
    )


def load(path: Path = PATH) -> dict[str, Shapes]:
    """All families of a table."""
    return {family: parse(entry) for family, entry in json.loads(path.read_text(encoding="utf-8")).items()}


TABLE = load()
