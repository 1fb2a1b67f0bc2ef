"""One layer of a saved adapter: its shape, from the file's header, and its factors, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .adapter_files import Adapter
from .backends import Factors
from .checkpoint_merge.plan import factored_shape
from .precision import accumulation_dtype
from .saved_adapter import open_adapter, weights_file
from .validation import check_factors, check_finite


class SavedLayers(NamedTuple):
    """The adapter in `file`, layer by layer. Messages name the file and the tensor."""

    adapter: Adapter
    file: Path

    @classmethod
    def open(cls, folder: Path) -> SavedLayers:
        """Raises as `open_adapter` does."""
        return cls(open_adapter(folder), weights_file(folder))

    def shape(self, layer: str) -> tuple[int, int]:
        """(out_features, in_features), without reading a tensor. ValueError where the factors do not fit each other."""
        try:
            return factored_shape(self.adapter, layer)
        except ValueError as error:
            raise ValueError(f"{str(self.file)!r}: {error}") from error

    def factors(self, layer: str) -> Factors:
        """The factors, as saved, and the scale, in fp32 at least.

        Raises ValueError as `shape` does, for dtypes that differ, and for NaN and infinity.
        """
        self.shape(layer)
        A, B, C, D, scale = (self.adapter.state[f"{layer}.{name}"] for name in Factors._fields)
        factors = Factors(A, B, C, D, scale.to(accumulation_dtype(scale.dtype)))
        try:
            check_factors(A, B, C, D)
            for name, tensor in zip(Factors._fields, factors, strict=True):
                check_finite(name, tensor)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(self.file)!r}: {layer}.{error}") from error
        return factors
