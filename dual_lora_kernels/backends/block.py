"""What belongs together travels as one value: a block of the weight, its factors, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from ..column_sampling import Sample
from ..precision import accumulation_dtype
from ..quantised.weight import QuantisedWeight


class Factors(NamedTuple):
    """The four factors of a block: A [r1, k], B [n, r1], C [r2, k], D [n, r2], one dtype, and the scale s (0-dim)."""

    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[n, k] of the block that they update."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def ranks(self) -> tuple[int, int]:
        """(r1, r2)."""
        return self.A.shape[0], self.C.shape[0]

    def to(self, dtype: torch.dtype) -> Factors:
        """The factors in `dtype`; the scale as it is."""
        A, B, C, D = (factor.to(dtype) for factor in self[:4])
        return Factors(A, B, C, D, self.scale)

    def rows(self, start: int, stop: int) -> Factors:
        """The factors of rows start … stop of the block."""
        A, B, C, D, scale = self
        return Factors(A, B[start:stop], C, D[start:stop], scale)

    def columns(self, start: int, stop: int) -> Factors:
        """The factors of columns start … stop of the block."""
        A, B, C, D, scale = self
        return Factors(A[:, start:stop], B, C[:, start:stop], D, scale)


class ParameterGradients(NamedTuple):
    """Where the gradients of a block's parameters go; None where a gradient is not wanted.

    A, B, C, D accumulate, in fp32 or fp64. `weight` [n, k], of W0's dtype, is written.
    """

    A: torch.Tensor | None
    B: torch.Tensor | None
    C: torch.Tensor | None
    D: torch.Tensor | None
    weight: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls, factors: Factors, wanted: Sequence[bool], dtype: torch.dtype, weight: torch.Tensor | None = None
    ) -> ParameterGradients:
        """Zeros for those of A, B, C, D that are wanted; `weight` as it is."""
        A, B, C, D = (
            torch.empty_like(factor, dtype=dtype) if want else None
            for factor, want in zip(factors[:4], wanted, strict=True)
        )
        existing = [target for target in (A, B, C, D) if target is not None]
        if existing:
            torch._foreach_zero_(existing)  # one launch on a GPU, not four
        return cls(A, B, C, D, weight)

    def apart(self) -> ParameterGradients:
        """The same, with zeros of their own for A and C, which other rows contribute to at the same time."""
        A, C = (None if lines is None else torch.zeros_like(lines) for lines in (self.A, self.C))
        return self._replace(A=A, C=C)

    def add(self, part: ParameterGradients) -> None:
        """Add the sums for A and C that `apart` made room for."""
        for total, more in ((self.A, part.A), (self.C, part.C)):
            if total is not None and more is not None:
                total.add_(more)

    def rows(self, start: int, stop: int) -> ParameterGradients:
        """The gradients of rows start … stop of the block."""
        B, D, weight = (None if lines is None else lines[start:stop] for lines in (self.B, self.D, self.weight))
        return ParameterGradients(self.A, B, self.C, D, weight)

    def columns(self, start: int, stop: int) -> ParameterGradients:
        """The gradients of columns start … stop of the block."""
        A, C, weight = (None if lines is None else lines[:, start:stop] for lines in (self.A, self.C, self.weight))
        return ParameterGradients(A, self.B, C, self.D, weight)

    @property
    def magnitude_wanted(self) -> bool:
        """Whether ∂P is needed."""
        return self.A is not None or self.B is not None

    @property
    def direction_wanted(self) -> bool:
        """Whether ∂Q is needed."""
        return self.C is not None or self.D is not None

    @property
    def factors_wanted(self) -> bool:
        """Whether any factor's gradient is to be computed."""
        return self.magnitude_wanted or self.direction_wanted


class Base(Protocol):
    """W0 of one block [n, k], in the form in which it is stored: `DenseBase`, or a kind of `QuantisedWeight`."""

    @property
    def shape(self) -> torch.Size:
        """[n, k]."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W0's numbers, after any dequantisation."""

    @property
    def device(self) -> torch.device:
        """Where W0 is stored."""

    @property
    def dense(self) -> torch.Tensor | None:
        """W0 as a tensor that kernels read where it lies; None where `load` has to compute it."""

    def rows(self, start: int, stop: int) -> Base:
        """Rows start … stop, without a copy."""

    def columns(self, start: int, stop: int) -> Base:
        """Columns start … stop, without a copy."""

    def load(self, out: torch.Tensor) -> None:
        """Write W0 into `out` [n, k], of any dtype and strides, a few rows at a time."""


class DenseBase(NamedTuple):
    """W0 as a plain tensor: backends read it in place and load nothing."""

    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """[n, k]."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """The tensor's device."""
        return self.tensor.device

    @property
    def dense(self) -> torch.Tensor:
        """The tensor itself."""
        return self.tensor

    def rows(self, start: int, stop: int) -> DenseBase:
        """Rows start … stop: a view."""
        return DenseBase(self.tensor[start:stop])

    def columns(self, start: int, stop: int) -> DenseBase:
        """Columns start … stop: a view."""
        return DenseBase(self.tensor[:, start:stop])

    def load(self, out: torch.Tensor) -> None:
        """Copy the tensor into `out`."""
        out.copy_(self.tensor)


def base_of(weight: torch.Tensor | QuantisedWeight | None) -> Base | None:
    """The `Base` that reads a layer's weight; None for a call without W0."""
    return weight if weight is None or isinstance(weight, QuantisedWeight) else DenseBase(weight)


class ReadsBases(Protocol):
    """The part of a `Backend` that `Block.pieces` asks."""

    panel_unit: int

    def reads(self, base: Base) -> bool:
        """Whether the backend's kernels read W0 where it lies, in this form; otherwise it is loaded first."""


class Drawn(NamedTuple):
    """Where the columns of a block were gathered from, and how they count in sums over columns.

    The block's A and C are the sample's columns of these. In ∂B and ∂D column i counts ``sample.weights[i]`` times; its
    ∂A and ∂C are left as they are. A and C are for backends whose bits depend on a column's place.
    """

    A: torch.Tensor
    C: torch.Tensor
    sample: Sample

    def part(self, start: int, stop: int) -> Drawn:
        """Of columns start … stop of the block."""
        return self._replace(sample=self.sample.part(start, stop))


class Block(NamedTuple):
    """One block of W = round(W0 + ΔW), [n, k]: all that its elements' bits depend on.

    `base` is None for the update alone. `row0` and `col0` place the block in the full weight: the dither and the eager
    backend's grid of tiles follow from them. W is rounded to `dtype`, the compute dtype. Of a block whose columns are
    `drawn` from others, they place the block that these are of; only the factors' gradients are computed from it.
    """

    base: Base | None
    factors: Factors
    rounding: str
    dtype: torch.dtype
    row0: int = 0
    col0: int = 0
    drawn: Drawn | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[n, k]."""
        return self.factors.shape

    @property
    def origin(self) -> tuple[int, int]:
        """(row0, col0)."""
        return self.row0, self.col0

    def rows(self, start: int, stop: int) -> Block:
        """Rows start … stop; the block itself where these are all, as in small layers: slices cost host time."""
        if start == 0 and stop == len(self.factors.B):
            return self
        base, factors, rounding, dtype, row0, col0, drawn = self
        base = None if base is None else base.rows(start, stop)
        return Block(base, factors.rows(start, stop), rounding, dtype, row0 + start, col0, drawn)

    def columns(self, start: int, stop: int) -> Block:
        """Columns start … stop; the block itself where these are all."""
        if start == 0 and stop == self.factors.A.shape[1]:
            return self
        base, factors, rounding, dtype, row0, col0, drawn = self
        base = None if base is None else base.columns(start, stop)
        factors = factors.columns(start, stop)
        if drawn is not None:
            return Block(base, factors, rounding, dtype, row0, col0, drawn.part(start, stop))
        return Block(base, factors, rounding, dtype, row0, col0 + start)

    def pieces(
        self, backend: ReadsBases, out: torch.Tensor, budget: int
    ) -> Iterator[tuple[Block, torch.Tensor, tuple[int, int]]]:
        """(block, its part of `out`, where it begins in this block): pieces whose bases the backend's kernels read.

        One piece, the block itself, where they read its base as it is. Otherwise W0 is loaded: into `out`, or, where
        that would round it or change the dtype of the sum, into a buffer of `budget` bytes, piece by piece.
        """
        base = self.base
        if base is None or backend.reads(base):
            yield self, out, (0, 0)
            return
        same_sum = accumulation_dtype(base.dtype) == accumulation_dtype(out.dtype)
        if same_sum and torch.promote_types(base.dtype, out.dtype) == out.dtype:
            base.load(out)
            yield self._replace(base=DenseBase(out)), out, (0, 0)
            return
        (n, k), unit = self.shape, backend.panel_unit
        width = max(unit, budget // (unit * base.dtype.itemsize) // unit * unit)
        height = max(unit, budget // (min(width, k) * base.dtype.itemsize) // unit * unit)
        buffer = torch.empty(min(height, n) * min(width, k), dtype=base.dtype, device=out.device)
        for top, bottom in _cuts(n, height, self.row0 % unit):
            for left, right in _cuts(k, width, self.col0 % unit):
                piece = self.rows(top, bottom).columns(left, right)
                loaded = buffer[: (bottom - top) * (right - left)].view(piece.shape)
                assert piece.base is not None
                piece.base.load(loaded)
                yield piece._replace(base=DenseBase(loaded)), out[top:bottom, left:right], (top, left)

    def loading_bytes(self, backend: ReadsBases, workspace: int) -> int:
        """Bytes of the workspace that `pieces` may take for a buffer: none where the base is read as it is."""
        return 0 if self.base is None or backend.reads(self.base) else workspace // 16

    @property
    def dense_base(self) -> torch.Tensor | None:
        """W0 as a tensor that kernels read where it lies; None without W0, and for other forms of it."""
        return None if self.base is None else self.base.dense


def _cuts(extent: int, step: int, first: int) -> list[tuple[int, int]]:
    """(start, stop) of pieces of at most `step` lines, cut at multiples of it, counted from `first` lines before."""
    edges = [0, *range(step - first, extent, step), extent]
    return list(pairwise(edges))
