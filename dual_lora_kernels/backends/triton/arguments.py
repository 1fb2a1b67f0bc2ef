"""What kernels take: tensors as named tuples, which Triton passes on field by field, and one tuple of constants."""

from __future__ import annotations

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """A matrix in memory. Fields are a tensor and integers on the host, a pointer and scalars in a kernel."""

    pointer: Any
    rows: Any
    columns: Any
    row_stride: Any
    column_stride: Any


class FactorMatrices(NamedTuple):
    """A [r1, k], B [n, r1], C [r2, k], D [n, r2], and a pointer to the scale."""

    A: Any
    B: Any
    C: Any
    D: Any
    scale: Any


class Hashes(NamedTuple):
    """The dither's vectors, each long enough for the whole weight and a tile more; rows and columns of the weight."""

    rows: Any
    columns: Any


class FourBitMatrix(NamedTuple):
    """W0 as `quantised.four_bit` keeps it: pointers to its tensors, and which block it is.

    Element (i, j) is number first + i · row_length + j of the flattened matrix; both numbers are even. Without double
    quantisation the last four pointers are not read.
    """

    packed: Any
    table: Any
    absmax: Any
    nested_table: Any
    nested_absmax: Any
    offset: Any
    first: Any
    row_length: Any


class Constants(NamedTuple):
    """What a kernel is compiled for. Fields are flat, because Triton 3.6 does not compile nested ones.

    A tile of W or H is `block_rows` × `block_columns`. Kernels ignore the fields below that do not concern them.
    """

    block_rows: int
    block_columns: int
    mask_rows: bool
    mask_columns: bool
    block_r1: int
    slices_r1: int
    mask_r1: bool
    block_r2: int
    slices_r2: int
    mask_r2: bool
    wide: bool
    """Offsets in some tensor need 64 bits."""
    accumulator: Any
    """The type in which rank products accumulate."""
    split_fp32: bool
    """fp32 factors multiply as three TF32 products."""
    interpreted: bool
    block_rank: int
    """The larger of the two blocks of ranks."""
    one_slice: bool
    """A slice of `block_rank` ranks holds all ranks of both products, in blocks of that size."""
    # W: `effective_tile`
    has_weight: bool = False
    dither: bool = False
    compute: Any = None
    """The type of W0 + ΔW before rounding."""
    canonical_nan: bool = False
    block_shift: int = 0
    """Blocks of a `FourBitMatrix` have 2 to this power of elements; 0 for a dense W0."""
    nested_shift: int = 0
    """The same of blocks of absmax; 0 where that is not quantised."""
    block_in_row: bool = False
    """A row of a tile lies within one block of a `FourBitMatrix`, and so has one absmax."""
    base: Any = None
    """The type that a `FourBitMatrix` is dequantised to."""
    # Products with the tokens: Y, ∂X, H
    block_tokens: int = 0
    mask_tokens: bool = False
    product: Any = None
    """The type in which the product accumulates."""
    product_precision: str = "ieee"
    transposed: bool = False
    has_bias: bool = False
    is_split: bool = False
    """Several programs share out the sum of each tile."""
    # The factors' gradients
    contraction: Any = None
    """The type of the operands of products with ∂P and ∂Q."""
    ste: str = ""
    clip_bound: float = 0.0
    want_magnitude: bool = False
    want_direction: bool = False
    contraction_precision: str = "ieee"
    weighted: bool = False
    """Columns count by weights in the gradients of B and D."""


class SumConstants(NamedTuple):
    """What the sum of partial gradients is compiled for: a tile of rows or columns and ranks, and what is wanted."""

    block_lines: int
    block_rank: int
    want_A: bool
    want_B: bool
    want_C: bool
    want_D: bool
