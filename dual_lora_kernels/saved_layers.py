"""One layer of a saved adapter: its shape, from the file's header, and its factors, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .adapter_files import Adapter
from .backends import Factors
from .precision import accumulation_dtype
from .safetensors_file import DTYPES, LazyTensors
from .saved_adapter import open_adapter, weights_file
from .validation import SUPPORTED_DTYPES, check_factors, check_finite


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
            return _factored_shape(self.adapter, layer)
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


def _factored_shape(adapter: Adapter, layer: str) -> tuple[int, int]:
    """(out_features, in_features) of a saved layer, from its factors' shapes. ValueError where they do not fit."""
    assert isinstance(adapter.state, LazyTensors)
    config = adapter.configs[layer]
    found: dict[str, tuple[int, ...]] = {}
    for name in Factors._fields:
        if f"{layer}.{name}" not in adapter.state:
            raise ValueError(f"the adapter has no {layer}.{name}")
        entry = adapter.state.entry(f"{layer}.{name}")
        if DTYPES.get(entry.dtype) not in SUPPORTED_DTYPES:
            raise ValueError(f"{layer}.{name} is of {entry.dtype}, expected BF16, F16, F32 or F64")
        found[name] = entry.shape
    rows, columns = found["B"][:1], found["A"][1:]
    expected = {
        "A": (config.r1, *columns), "B": (*rows, config.r1), "C": (config.r2, *columns), "D": (*rows, config.r2),
        "scale": (),
    }  # fmt: skip
    for name, shape in expected.items():
        if found[name] != shape or len(rows) != 1 or len(columns) != 1:
            raise ValueError(f"{layer}.{name} has shape {found[name]}, expected {shape} by the other factors and ranks")
    return rows[0], columns[0]
