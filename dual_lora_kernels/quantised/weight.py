"""`QuantisedWeight`: W0 [n, k] as quantised numbers, of which any block is dequantised by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch

_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 22
"""Elements that are dequantised at a time, on a CPU and elsewhere. Temporaries take up to 40 bytes for each: they stay
in a CPU's caches, and a GPU would rather have fewer launches."""


class QuantisedWeight:
    """A quantised W0, or a block of one. Blocks share the tensors; nothing is copied until numbers are asked for.

    Its numbers are those of the library's own dequantisation, in the dtype that this gives (`dtype`); W0 + ΔW is
    rounded once more, to the compute dtype. `quantised_weight` reads it from a layer. No gradient is defined for it.

    Attributes:
        tensors: plain tensors on one device.
        layout: what they mean: a named tuple, whose `shape` [n, k], `row0` and `col0` say which block of the whole
            matrix this is, and whose `dtype` is that of the dequantised numbers. These come first, numbers follow.
    """

    kind: ClassVar[str]
    layout_type: ClassVar[type[Any]]
    dense = None
    """W0 is not in memory as a tensor: see `backends.block.Base`."""
    _kinds: ClassVar[dict[str, type[QuantisedWeight]]] = {}

    def __init__(self, tensors: Sequence[torch.Tensor], layout: Any) -> None:
        """Raises ValueError where the tensors do not hold what the layout says."""
        self.tensors = tuple(tensors)
        self.layout = layout
        self.check()
        self._encoded: str | None = self._encode()  # now: torch.compile cannot, once its numbers are symbols

    def __init_subclass__(cls) -> None:
        QuantisedWeight._kinds[cls.kind] = cls

    def __repr__(self) -> str:
        n, k = self.layout.shape
        return f"{type(self).__name__}({n} x {k}, {self.dtype}, {self.device})"

    @property
    def shape(self) -> torch.Size:
        """[n, k]."""
        return torch.Size(self.layout.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantised numbers."""
        dtype: torch.dtype = self.layout.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    def check(self) -> None:
        """Raise ValueError where the tensors do not hold what the layout says: kernels read them by address."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Self:
        """Rows start … stop, without a copy."""
        layout = self.layout
        return self._block(layout._replace(shape=(stop - start, layout.shape[1]), row0=layout.row0 + start))

    def columns(self, start: int, stop: int) -> Self:
        """Columns start … stop, without a copy."""
        layout = self.layout
        return self._block(layout._replace(shape=(layout.shape[0], stop - start), col0=layout.col0 + start))

    def _block(self, layout: Any) -> Self:
        block = object.__new__(type(self))
        block.tensors, block.layout, block._encoded = self.tensors, layout, None
        return block

    def values(self) -> torch.Tensor:
        """The numbers [n, k] before their rounding to `dtype`; `load` asks for a few rows at a time."""
        raise NotImplementedError

    def load(self, out: torch.Tensor) -> None:
        """Write the numbers into `out` [n, k], of any dtype and strides, a few rows at a time."""
        n, k = self.layout.shape
        step = max(1, (_CHUNK if out.device.type == "cpu" else _DEVICE_CHUNK) // max(1, k))
        for start in range(0, n, step):
            part = self.rows(start, min(start + step, n))
            out[start : start + step] = part.values().to(self.dtype)

    def dequantised(self) -> torch.Tensor:
        """All of the numbers as a tensor [n, k]: for export and inspection; training never needs it."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.load(out)
        return out

    @property
    def encoded_layout(self) -> str:
        """The layout as text, for operators' schemas."""
        if self._encoded is None:
            self._encoded = self._encode()
        return self._encoded

    def _encode(self) -> str:
        (n, k), row0, col0, dtype, *rest = self.layout
        words = [self.kind, str(dtype).removeprefix("torch."), n, k, row0, col0, *rest]
        return " ".join([str(int(word) if isinstance(word, bool) else word) for word in words])

    @staticmethod
    def restored(tensors: Sequence[torch.Tensor], encoded_layout: str) -> QuantisedWeight:
        """The weight of these tensors and an `encoded_layout`."""
        cls, layout = _decoded(encoded_layout)
        weight = object.__new__(cls)
        weight.tensors, weight.layout, weight._encoded = tuple(tensors), layout, encoded_layout
        return weight


@lru_cache(maxsize=1024)
def _decoded(text: str) -> tuple[type[QuantisedWeight], Any]:
    kind, dtype, n, k, row0, col0, *rest = text.split()
    cls = QuantisedWeight._kinds[kind]
    numbers = [int(word) if word.lstrip("-").isdigit() else float(word) for word in rest]
    return cls, cls.layout_type((int(n), int(k)), int(row0), int(col0), getattr(torch, dtype), *numbers)
