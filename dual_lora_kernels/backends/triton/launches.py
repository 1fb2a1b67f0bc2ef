"""From tensors to kernel launches: which kernel, grid, arguments and compile-time constants.

The backend runs a `Launch`; the benchmarks' static report compiles the very same one, built from tensors on the meta
device, for any architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ...precision import accumulation_dtype
from ...quantised.four_bit import FourBitWeight
from ...rounding import is_dithered
from ..block import Base, Block, Factors, ParameterGradients
from ..interface import Estimator
from .architecture import Architecture, is_interpreted
from .arguments import Constants, FactorMatrices, FourBitMatrix, Hashes, SumConstants
from .contraction import add_partials_kernel
from .fused_kernels import token_product_kernel, weight_product_kernel
from .launch import Launch, Plan
from .panel_kernels import effective_weight_kernel, factor_gradients_kernel
from .shapes import BLOCK_RANKS, PanelShape, ProductShape

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
SUM_LINES, SUM_RANKS, SUM_WARPS = 16, 32, 4
"""A tile of partial sums: one 16-byte load a thread, and enough programs for a panel to fill a GPU."""


class RankBlock(NamedTuple):
    """How a rank is cut: into `slices` of `block` ranks each, `masked` where these are more than the rank."""

    block: int
    slices: int
    masked: bool


class SplitSum(NamedTuple):
    """Where programs that share out a product's sum meet: their parts, and how many of each tile have finished."""

    partials: torch.Tensor
    """[parts, M, N], in the accumulation dtype."""
    finished: torch.Tensor
    """int32 zeros, one for each tile at least; zeros again when the kernel ends."""


def rank_block(rank: int) -> RankBlock:
    """The smallest of `BLOCK_RANKS` that holds the rank; a larger rank is cut into slices of the largest block.

    Masked loads fill up what the rank leaves of the last slice.
    """
    block = next((block for block in BLOCK_RANKS if rank <= block), BLOCK_RANKS[-1])
    slices = ceil_div(rank, block)
    return RankBlock(block, slices, slices * block != rank)


def effective_weight(out: torch.Tensor, block: Block, hashes: Hashes, shape: PanelShape, chip: Architecture) -> Launch:
    """W of one block into `out` [rows, columns]; its base is in a form that the kernels read."""
    base = block.base
    weight, packed = _weight_arguments(base)

    def plan() -> Plan:
        rows, columns = out.shape
        tile = (shape.rows, shape.columns)
        constants = _tile_constants(block.factors, block.shape, tile, block.dtype, chip)._replace(
            wide=_is_wide(out, weight, *block.factors[:4]) or _is_wide_base(base),
            **_weight_constants(block, shape.columns, chip),
        )
        grid = (ceil_div(rows, shape.rows) * ceil_div(columns, shape.columns), 1, 1)
        return Plan(grid, constants, shape.warps, shape.stages)

    return Launch(
        effective_weight_kernel,
        (out, out if weight is None else weight, *block.factors[:4]),
        (block.factors.scale, *hashes, *block.origin, *packed),
        _panel_arguments,
        (shape, base_kind(base), block.rounding),
        plan,
    )


def factor_gradients(
    h: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    partials: tuple[torch.Tensor, torch.Tensor],
    shape: PanelShape,
    chip: Architecture,
) -> Launch:
    """Partial factor gradients of one block of H [rows, columns].

    `partials`, in H's dtype: up [column groups, rows, r1 + r2] and down [row tiles, columns, r1 + r2].
    """
    wanted = (gradients.magnitude_wanted, gradients.direction_wanted)
    weights = None if block.drawn is None else block.drawn.sample.weights

    def plan() -> Plan:
        tile = (shape.rows, shape.columns)
        constants = _tile_constants(block.factors, block.shape, tile, block.dtype, chip)
        constants = constants._replace(
            wide=_is_wide(h, *block.factors[:4]),
            **_gradient_constants(estimator, wanted, weights, block.dtype, h.dtype, chip),
        )
        slices = max(ceil_div(rank, constants.block_rank) for rank in block.factors.ranks)
        # Loads of several slices, all fetched ahead, would exceed shared memory: 112 of 99 KiB for rank 130 on sm_89.
        stages = shape.stages if constants.one_slice else 1
        return Plan((ceil_div(h.shape[0], shape.rows), groups, slices), constants, shape.warps, stages)

    groups = partials[0].shape[0]
    column_tiles = ceil_div(ceil_div(h.shape[1], shape.columns), groups)
    scale = block.factors.scale
    others = (scale, scale if weights is None else weights, *partials, column_tiles)
    matrices, choices = (h, *block.factors[:4]), (shape, estimator, wanted, weights is None, block.dtype)
    return Launch(factor_gradients_kernel, matrices, others, _panel_gradient_arguments, choices, plan)


def add_partials(
    gradients: ParameterGradients, ranks: tuple[int, int], partials: tuple[torch.Tensor, torch.Tensor]
) -> Launch:
    """The factors' gradients that are wanted += the sums of `partials`, as `factor_gradients` leaves them."""
    up, down = partials
    wanted = tuple(each is not None for each in gradients[:4])

    def plan() -> Plan:
        lines = ceil_div(up.shape[1], SUM_LINES) + ceil_div(down.shape[1], SUM_LINES)
        return Plan(
            (lines, ceil_div(up.shape[2], SUM_RANKS), 1), SumConstants(SUM_LINES, SUM_RANKS, *wanted), SUM_WARPS, 1
        )

    matrices = tuple(up[0] if each is None else each for each in gradients[:4])
    return Launch(
        add_partials_kernel, matrices, (up, down, *up.shape[:2], *down.shape[:2], *ranks), _sum_arguments, wanted, plan
    )


def weight_product(
    operation: str,
    out: torch.Tensor,
    input: torch.Tensor,
    block: Block,
    bias: torch.Tensor | None,
    hashes: Hashes,
    shape: ProductShape,
    chip: Architecture,
    split: SplitSum | None = None,
) -> Launch:
    """Y of ``"forward"``, ∂X of ``"input_gradient"`` into `out` [M, N], last dimension contiguous.

    With `split` every tile's sum over K is shared out, and the last of its programs to finish adds the parts.
    """
    (m, n), split_k = out.shape, 1 if split is None else split.partials.shape[0]
    k, precision = input.shape[1], _product_precision(input.dtype, chip)
    weight, packed = _weight_arguments(block.base)

    def plan() -> Plan:
        transposed = operation == "input_gradient"
        tile = (shape.block_k, shape.block_n) if transposed else (shape.block_n, shape.block_k)
        constants = _tile_constants(block.factors, block.shape, tile, block.dtype, chip)._replace(
            wide=_is_wide(out, input, weight, *block.factors[:4]) or _is_wide_base(block.base),
            transposed=transposed, has_bias=bias is not None, is_split=split is not None,
            block_tokens=shape.block_m, mask_tokens=m % shape.block_m != 0,
            product=_TL_DTYPES[accumulation_dtype(input.dtype)], product_precision=precision,
            **_weight_constants(block, tile[1], chip),
        )  # fmt: skip
        grid = (ceil_div(m, shape.block_m) * ceil_div(n, shape.block_n), split_k, 1)
        return Plan(grid, constants, shape.warps, shape.stages)

    return Launch(
        weight_product_kernel,
        (out, input, input if weight is None else weight, *block.factors[:4]),
        (
            block.factors.scale, *hashes, input if bias is None else bias,
            split_length(k, split_k, shape), *((out, out) if split is None else split), *packed,
        ),
        _product_arguments,
        (shape, operation, split_k, base_kind(block.base), bias is None, block.rounding, precision),
        plan,
    )  # fmt: skip


def token_product(
    grad: torch.Tensor,
    input: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    partials: tuple[torch.Tensor, torch.Tensor],
    shape: ProductShape,
    chip: Architecture,
) -> Launch:
    """Partial factor gradients of G [tokens, rows] and X [tokens, columns]; partials as in `factor_gradients`."""
    wanted = (gradients.magnitude_wanted, gradients.direction_wanted)
    precision = _product_precision(input.dtype, chip)
    factors, weights = block.factors, None if block.drawn is None else block.drawn.sample.weights

    def plan() -> Plan:
        (tokens, rows), columns = grad.shape, input.shape[1]
        constants = _tile_constants(factors, (rows, columns), (shape.block_m, shape.block_n), input.dtype, chip)
        constants = constants._replace(
            wide=_is_wide(grad, input, *factors[:4]),
            block_tokens=shape.block_k, mask_tokens=tokens % shape.block_k != 0,
            product=_TL_DTYPES[partials[0].dtype], product_precision=precision,
            **_gradient_constants(estimator, wanted, weights, input.dtype, partials[0].dtype, chip),
        )  # fmt: skip
        grid = (ceil_div(rows, shape.block_m) * ceil_div(columns, shape.block_n), 1, 1)
        return Plan(grid, constants, shape.warps, shape.stages)

    others = (factors.scale, factors.scale if weights is None else weights, *partials)
    matrices, choices = (grad.t(), input, *factors[:4]), (shape, estimator, wanted, weights is None, precision)
    return Launch(token_product_kernel, matrices, others, _token_arguments, choices, plan)


def _panel_arguments(matrices: Sequence[Any], others: tuple[Any, ...]) -> tuple[Any, ...]:
    out, weight, A, B, C, D = matrices
    scale, row_hashes, column_hashes, row0, column0, *packed = others
    base = FourBitMatrix(*packed) if packed else weight
    return (out, base, FactorMatrices(A, B, C, D, scale), Hashes(row_hashes, column_hashes), row0, column0)


def _panel_gradient_arguments(matrices: Sequence[Any], others: tuple[Any, ...]) -> tuple[Any, ...]:
    h, A, B, C, D = matrices
    scale, weights, *partials = others
    return (h, FactorMatrices(A, B, C, D, scale), weights, *partials)


def _sum_arguments(matrices: Sequence[Any], others: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*matrices, *others)


def _product_arguments(matrices: Sequence[Any], others: tuple[Any, ...]) -> tuple[Any, ...]:
    out, input, weight, A, B, C, D = matrices
    scale, row_hashes, column_hashes, bias, length, partials, finished, *packed = others
    base, hashes = FourBitMatrix(*packed) if packed else weight, Hashes(row_hashes, column_hashes)
    return (out, input, base, FactorMatrices(A, B, C, D, scale), bias, hashes, length, partials, finished)


def _token_arguments(matrices: Sequence[Any], others: tuple[Any, ...]) -> tuple[Any, ...]:
    grad, input, A, B, C, D = matrices
    scale, weights, *partials = others
    return (grad, input, FactorMatrices(A, B, C, D, scale), weights, *partials)


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)


def split_length(count: int, split_k: int, shape: ProductShape) -> int:
    """The part of a sum over `count` that one of `split_k` programs takes: whole steps."""
    return ceil_div(ceil_div(count, split_k), shape.block_k) * shape.block_k


def _tile_constants(
    factors: Factors, shape: tuple[int, int], tile: tuple[int, int], compute_dtype: torch.dtype, chip: Architecture
) -> Constants:
    """What tiles of P and Q are compiled for, in a block of `shape`."""
    (rows, columns), (block_rows, block_columns) = shape, tile
    first, second = (rank_block(rank) for rank in factors.ranks)
    return Constants(
        block_rows, block_columns, rows % block_rows != 0, columns % block_columns != 0, *first, *second, wide=False,
        block_rank=max(first.block, second.block),
        one_slice=first.slices == second.slices == 1 and first.block == second.block,
        accumulator=_TL_DTYPES[accumulation_dtype(factors.A.dtype)],
        split_fp32=_splits_fp32(factors, compute_dtype, chip), interpreted=is_interpreted(),
    )  # fmt: skip


def _weight_arguments(base: Base | None) -> tuple[torch.Tensor | None, tuple[Any, ...]]:
    """(a dense W0, the fields of a `FourBitMatrix`): one of the two."""
    if base is None or base.dense is not None:
        return None if base is None else base.dense, ()
    assert isinstance(base, FourBitWeight), base
    packed, table, absmax, *nested = base.tensors
    layout = base.layout
    first = layout.row0 * layout.row_length + layout.col0
    return None, (packed, table, absmax, *(nested or (table, table, table)), first, layout.row_length)


def base_kind(base: Base | None) -> object:
    """What of W0 decides a kernel, besides the tensors of `_weight_arguments`."""
    if not isinstance(base, FourBitWeight):
        return None if base is None else "dense"
    return base.layout.blocksize, base.layout.nested_blocksize, base.layout.dtype


def _is_wide_base(base: Base | None) -> bool:
    """Whether a number of an element of a quantised W0 needs 64 bits."""
    return isinstance(base, FourBitWeight) and 2 * base.tensors[0].numel() >= 2**31


def _weight_constants(block: Block, tile_columns: int, chip: Architecture) -> dict[str, Any]:
    base = block.base
    accumulator, own = accumulation_dtype(block.factors.A.dtype), None if base is None else base.dtype
    constants = dict(
        has_weight=base is not None, dither=is_dithered(block.dtype, block.rounding),
        compute=_TL_DTYPES[_compute_dtype(accumulator, own)],
        canonical_nan=_has_canonical_nan(accumulator, own, chip),
    )  # fmt: skip
    if isinstance(base, FourBitWeight):
        layout = base.layout
        constants |= dict(
            block_shift=layout.blocksize.bit_length() - 1,
            nested_shift=max(0, layout.nested_blocksize.bit_length() - 1), base=_TL_DTYPES[layout.dtype],
            block_in_row=layout.row_length % layout.blocksize == 0
            and layout.blocksize % tile_columns == layout.col0 % tile_columns == 0,
        )  # fmt: skip
    return constants


def _gradient_constants(
    estimator: Estimator,
    wanted: tuple[bool, bool],
    weights: torch.Tensor | None,
    dtype: torch.dtype,
    h_dtype: torch.dtype,
    chip: Architecture,
) -> dict[str, Any]:
    in_bf16 = dtype == torch.bfloat16 and h_dtype == torch.float32
    # The bound as a constant: as an argument Triton would make it fp32, in fp64 layers too.
    return dict(
        contraction=tl.bfloat16 if in_bf16 else _TL_DTYPES[h_dtype],
        contraction_precision=_contraction_precision(dtype, h_dtype, chip),
        ste=estimator.kind, clip_bound=estimator.bound,
        want_magnitude=wanted[0], want_direction=wanted[1], weighted=weights is not None,
    )  # fmt: skip


def _compute_dtype(accumulator: torch.dtype, base: torch.dtype | None) -> torch.dtype:
    """The dtype of W0 + ΔW before rounding: fp64 if a factor or W0 (of dtype `base`) is, else fp32."""
    return accumulator if base is None else torch.promote_types(accumulator, accumulation_dtype(base))


def _splits_fp32(factors: Factors, compute_dtype: torch.dtype, chip: Architecture) -> bool:
    """Whether fp32 factors multiply as three TF32 products: 2⁻²² is far below bf16's and fp16's rounding of W.

    An fp32 layer keeps fp32 multiplications, so that its error stays at the reference's.
    """
    return chip.is_nvidia and factors.A.dtype == torch.float32 and compute_dtype.itemsize == 2


def _has_canonical_nan(accumulator: torch.dtype, base: torch.dtype | None, chip: Architecture) -> bool:
    """Whether every NaN in W0 + ΔW is 0x7FFFFFFF: NVIDIA's fp32 arithmetic makes them so; others keep payloads."""
    is_fp32 = _compute_dtype(accumulator, base) == torch.float32
    return chip.is_nvidia and is_fp32 and not is_interpreted()


def _product_precision(dtype: torch.dtype, chip: Architecture) -> str:
    """Of the large products: for fp32, what the user allows torch.mm on this device."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and chip.is_nvidia else "ieee"


def _contraction_precision(compute_dtype: torch.dtype, h_dtype: torch.dtype, chip: Architecture) -> str:
    """Of the products with ∂P and ∂Q: no sign hangs on them, so TF32 does for fp16, whose range ∂P may exceed.

    A bf16 layer's are products of bf16 operands: the layer's own error is larger (docs/decisions.md).
    """
    return "tf32" if chip.is_nvidia and compute_dtype == torch.float16 and h_dtype == torch.float32 else "ieee"


def _is_wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an element's offset in some tensor needs 64 bits."""
    return any(_reach(tensor.shape, tensor.stride()) >= 2**31 for tensor in tensors if tensor is not None)


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
