"""`ModelCase`: which model is trained, and on how much."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..harness.environment import DTYPE_NAMES
from .shapes import Shape, shape

DENSE, NF4 = "dense", "nf4"


@dataclass(frozen=True)
class ModelCase:
    """One model and one batch, the same for every method.

    model: a name that `shapes.shape` knows. layers: its blocks; None: as many as it has. dtype: of the frozen weights,
    by its short name. batch, sequence: sequences, and tokens of each. rank: r1 = r2; other methods' ranks follow. base:
    ``"dense"`` or ``"nf4"``, of the adapted layers. checkpointing: of every block's activations.

    Raises:
        ValueError: there is no model of that name.
    """

    model: str
    dtype: str = "fp32"
    batch: int = 4
    sequence: int = 256
    layers: int | None = None
    rank: int = 16
    base: str = DENSE
    checkpointing: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.shape.layers)

    @property
    def shape(self) -> Shape:
        """Its numbers."""
        return shape(self.model, self.layers)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The frozen weights' dtype."""
        return DTYPE_NAMES[self.dtype]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    @property
    def title(self) -> str:
        """In words."""
        return (
            f"{self.model}, {self.layers} layers, {self.dtype}{' in NF4' if self.base == NF4 else ''}, {self.batch} × "
            f"{self.sequence} tokens, r1=r2={self.rank}{', checkpointed' if self.checkpointing else ''}"
        )
