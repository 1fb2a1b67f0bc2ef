"""From tensors to kernel launches: which kernel, grid, arguments and compile-time constants.

A `Launch` is a value. The backend runs it; `benchmarks.static_report` compiles the very same one, built from tensors on
the meta device, for any architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ...precision import accumulation_dtype
from ...rounding import is_dithered
from ..base import FactorGradients, Factors
from .architecture import Architecture, is_interpreted
from .fused_kernels import token_product_kernel, weight_product_kernel
from .panel_kernels import effective_weight_kernel, factor_gradients_kernel
from .shapes import BLOCK_RANKS, PanelShape, ProductShape

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Contraction to fused multiply-adds is off: where W needs one, it is written out."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch it on the current stream of its tensors' device."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self.kernel[self.grid](
                **self.arguments,
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                enable_fp_fusion=False,
            )


class Hashes(NamedTuple):
    """The dither's vectors, each long enough for the whole weight and a tile more; rows and columns of the weight."""

    rows: torch.Tensor
    columns: torch.Tensor


class RankBlock(NamedTuple):
    """How a rank is cut: `slices` of `block` each, `masked` where that is more than the rank."""

    block: int
    slices: int
    masked: bool


def rank_block(rank: int) -> RankBlock:
    """The least block that holds the rank, or slices of the largest; other ranks are padded by masked loads."""
    block = next((block for block in BLOCK_RANKS if rank <= block), BLOCK_RANKS[-1])
    slices = ceil_div(rank, block)
    return RankBlock(block, slices, slices * block != rank)


def effective_weight(
    out: torch.Tensor,
    weight: torch.Tensor | None,
    factors: Factors,
    row0: int,
    column0: int,
    rounding: str,
    hashes: Hashes,
    shape: PanelShape,
    architecture: Architecture,
) -> Launch:
    """W of one block into `out` [rows, columns]."""
    rows, columns = out.shape
    accumulator = accumulation_dtype(factors.A.dtype)
    return Launch(
        effective_weight_kernel,
        (ceil_div(rows, shape.rows) * ceil_div(columns, shape.columns),),
        dict(
            out=out, weight=out if weight is None else weight, **_factor_tensors(factors),
            row_hashes=hashes.rows, column_hashes=hashes.columns,
            rows=rows, columns=columns, **_ranks(factors), row0=row0, column0=column0,
            out_row_stride=out.stride(0), out_column_stride=out.stride(1),
            weight_row_stride=0 if weight is None else weight.stride(0),
            weight_column_stride=0 if weight is None else weight.stride(1),
            **_factor_strides(factors),
        ),
        dict(
            BLOCK_ROWS=shape.rows, BLOCK_COLUMNS=shape.columns, **_rank_constants(factors),
            MASK_ROWS=rows % shape.rows != 0, MASK_COLUMNS=columns % shape.columns != 0,
            WIDE=_is_wide(out, weight, *factors[:4]),
            HAS_WEIGHT=weight is not None, DITHER=is_dithered(out.dtype, rounding),
            ACCUMULATOR=_TL_DTYPES[accumulator], COMPUTE=_TL_DTYPES[_compute_dtype(accumulator, weight)],
            SPLIT=_splits(factors, out.dtype, architecture),
            CANONICAL_NAN=_has_canonical_nan(accumulator, weight, architecture), INTERPRETED=is_interpreted(),
        ),
        shape.warps,
        shape.stages,
    )  # fmt: skip


def factor_gradients(
    h: torch.Tensor,
    factors: Factors,
    ste: str,
    clip_bound: float,
    gradients: FactorGradients,
    compute_dtype: torch.dtype,
    up_partials: torch.Tensor,
    down_partials: torch.Tensor,
    shape: PanelShape,
    architecture: Architecture,
) -> Launch:
    """Partial factor gradients of one block of H [rows, columns].

    `up_partials` [column groups, rows, r1 + r2] and `down_partials` [row tiles, r1 + r2, columns], in H's dtype.
    """
    rows, columns = h.shape
    blocks = [rank_block(factor.shape[0]) for factor in (factors.A, factors.C)]
    return Launch(
        factor_gradients_kernel,
        (
            ceil_div(rows, shape.rows),
            ceil_div(columns, shape.columns * shape.column_tiles),
            max(ceil_div(f.shape[0], max(b.block for b in blocks)) for f in (factors.A, factors.C)),
        ),
        dict(
            h=h, **_factor_tensors(factors), up_partials=up_partials, down_partials=down_partials,
            rows=rows, columns=columns, **_ranks(factors), h_row_stride=h.stride(0),
            **_factor_strides(factors),
        ),
        dict(
            BLOCK_ROWS=shape.rows, BLOCK_COLUMNS=shape.columns, COLUMN_TILES=shape.column_tiles,
            BLOCK_RANK=max(block.block for block in blocks), **_rank_constants(factors),
            MASK_ROWS=rows % shape.rows != 0, MASK_COLUMNS=columns % shape.columns != 0,
            WIDE=_is_wide(h, *factors[:4]),
            **_estimator_constants(ste, clip_bound, gradients),
            ACCUMULATOR=_TL_DTYPES[accumulation_dtype(factors.A.dtype)],
            SPLIT=_splits(factors, compute_dtype, architecture),
            PRECISION=_contraction_precision(compute_dtype, architecture), INTERPRETED=is_interpreted(),
        ),
        shape.warps,
        shape.stages,
    )  # fmt: skip


def weight_product(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    factors: Factors,
    bias: torch.Tensor | None,
    rounding: str,
    transposed: bool,
    hashes: Hashes,
    shape: ProductShape,
    architecture: Architecture,
) -> Launch:
    """Y (or ∂X where `transposed`) into `out` [splits, tokens, first], last dimension contiguous.

    Split i sums its part of the second dimension. The bias is added only where there is one split.
    """
    splits, tokens, first = out.shape
    rows, columns = factors.B.shape[0], factors.A.shape[1]
    second = input.shape[1]
    accumulator = accumulation_dtype(factors.A.dtype)
    return Launch(
        weight_product_kernel,
        (ceil_div(tokens, shape.tokens) * ceil_div(first, shape.first), splits),
        dict(
            out=out, input=input, weight=input if weight is None else weight, **_factor_tensors(factors),
            bias=input if bias is None else bias, row_hashes=hashes.rows, column_hashes=hashes.columns,
            tokens=tokens, rows=rows, columns=columns, **_ranks(factors),
            split_length=split_length(second, splits, shape),
            out_split_stride=out.stride(0), out_token_stride=out.stride(1),
            input_token_stride=input.stride(0), input_stride=input.stride(1),
            weight_row_stride=0 if weight is None else weight.stride(0),
            weight_column_stride=0 if weight is None else weight.stride(1),
            **_factor_strides(factors),
        ),
        dict(
            BLOCK_TOKENS=shape.tokens, BLOCK_FIRST=shape.first, BLOCK_SECOND=shape.second, **_rank_constants(factors),
            MASK_TOKENS=tokens % shape.tokens != 0, MASK_FIRST=first % shape.first != 0,
            MASK_SECOND=second % shape.second != 0,
            WIDE=_is_wide(out, input, weight, *factors[:4]),
            TRANSPOSED=transposed, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None and splits == 1,
            DITHER=is_dithered(input.dtype, rounding),
            ACCUMULATOR=_TL_DTYPES[accumulator], COMPUTE=_TL_DTYPES[_compute_dtype(accumulator, weight)],
            PRODUCT=_TL_DTYPES[accumulation_dtype(input.dtype)],
            SPLIT=_splits(factors, input.dtype, architecture),
            PRECISION=_product_precision(input.dtype, architecture),
            CANONICAL_NAN=_has_canonical_nan(accumulator, weight, architecture), INTERPRETED=is_interpreted(),
        ),
        shape.warps,
        shape.stages,
    )  # fmt: skip


def token_product(
    grad: torch.Tensor,
    input: torch.Tensor,
    factors: Factors,
    ste: str,
    clip_bound: float,
    gradients: FactorGradients,
    up_partials: torch.Tensor,
    down_partials: torch.Tensor,
    shape: ProductShape,
    architecture: Architecture,
) -> Launch:
    """Partial factor gradients of G [tokens, rows] and X [tokens, columns]; partials as in `factor_gradients`."""
    tokens, rows = grad.shape
    columns = input.shape[1]
    return Launch(
        token_product_kernel,
        (ceil_div(rows, shape.first) * ceil_div(columns, shape.second),),
        dict(
            grad=grad, input=input, **_factor_tensors(factors), up_partials=up_partials, down_partials=down_partials,
            tokens=tokens, rows=rows, columns=columns, **_ranks(factors),
            grad_token_stride=grad.stride(0), grad_row_stride=grad.stride(1),
            input_token_stride=input.stride(0), input_column_stride=input.stride(1),
            **_factor_strides(factors),
        ),
        dict(
            BLOCK_ROWS=shape.first, BLOCK_COLUMNS=shape.second, BLOCK_TOKENS=shape.tokens,
            BLOCK_RANK=max(rank_block(factor.shape[0]).block for factor in (factors.A, factors.C)),
            **_rank_constants(factors),
            MASK_ROWS=rows % shape.first != 0, MASK_COLUMNS=columns % shape.second != 0,
            MASK_TOKENS=tokens % shape.tokens != 0, WIDE=_is_wide(grad, input, *factors[:4]),
            **_estimator_constants(ste, clip_bound, gradients),
            ACCUMULATOR=_TL_DTYPES[accumulation_dtype(factors.A.dtype)],
            PRODUCT=_TL_DTYPES[up_partials.dtype],
            SPLIT=_splits(factors, input.dtype, architecture),
            PRODUCT_PRECISION=_product_precision(input.dtype, architecture),
            PRECISION=_contraction_precision(input.dtype, architecture), INTERPRETED=is_interpreted(),
        ),
        shape.warps,
        shape.stages,
    )  # fmt: skip


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)


def split_length(count: int, splits: int, shape: ProductShape) -> int:
    """The part of a sum over `count` that one of `splits` programs takes: whole steps."""
    return ceil_div(ceil_div(count, splits), shape.second) * shape.second


def _factor_tensors(factors: Factors) -> dict[str, torch.Tensor]:
    return dict(A=factors.A, B=factors.B, C=factors.C, D=factors.D, scale=factors.scale)


def _factor_strides(factors: Factors) -> dict[str, int]:
    A, B, C, D, _ = factors
    return dict(
        A_rank_stride=A.stride(0), A_column_stride=A.stride(1), B_row_stride=B.stride(0), B_rank_stride=B.stride(1),
        C_rank_stride=C.stride(0), C_column_stride=C.stride(1), D_row_stride=D.stride(0), D_rank_stride=D.stride(1),
    )  # fmt: skip


def _ranks(factors: Factors) -> dict[str, int]:
    return dict(r1=factors.A.shape[0], r2=factors.C.shape[0])


def _rank_constants(factors: Factors) -> dict[str, Any]:
    first, second = (rank_block(factor.shape[0]) for factor in (factors.A, factors.C))
    return dict(
        BLOCK_R1=first.block, SLICES_1=first.slices, MASK_R1=first.masked,
        BLOCK_R2=second.block, SLICES_2=second.slices, MASK_R2=second.masked,
    )  # fmt: skip


def _estimator_constants(ste: str, clip_bound: float, gradients: FactorGradients) -> dict[str, Any]:
    # The bound as a constant: as an argument Triton would make it fp32, in fp64 layers too.
    return dict(
        STE=ste, CLIP_BOUND=clip_bound,
        WANT_MAGNITUDE=gradients.magnitude_wanted, WANT_DIRECTION=gradients.direction_wanted,
    )  # fmt: skip


def _compute_dtype(accumulator: torch.dtype, weight: torch.Tensor | None) -> torch.dtype:
    """The dtype of W0 + ΔW before rounding: fp64 if a factor or W0 is, else fp32."""
    return accumulator if weight is None else torch.promote_types(accumulator, accumulation_dtype(weight.dtype))


def _splits(factors: Factors, compute_dtype: torch.dtype, architecture: Architecture) -> bool:
    """Whether fp32 factors multiply as three TF32 products: 2⁻²² is far below bf16's and fp16's rounding of W.

    An fp32 layer keeps fp32 multiplications, so that its error stays at the reference's.
    """
    return architecture.is_nvidia and factors.A.dtype == torch.float32 and compute_dtype.itemsize == 2


def _has_canonical_nan(accumulator: torch.dtype, weight: torch.Tensor | None, architecture: Architecture) -> bool:
    """Whether every NaN in W0 + ΔW is 0x7FFFFFFF: NVIDIA's fp32 arithmetic makes them so; others keep payloads."""
    is_fp32 = _compute_dtype(accumulator, weight) == torch.float32
    return architecture.is_nvidia and is_fp32 and not is_interpreted()


def _product_precision(dtype: torch.dtype, architecture: Architecture) -> str:
    """Of the large products: for fp32, what the user allows torch.mm on this device."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and architecture.is_nvidia else "ieee"


def _contraction_precision(compute_dtype: torch.dtype, architecture: Architecture) -> str:
    """Of the products with ∂P and ∂Q: no sign hangs on them, so TF32 does for a layer that computes in 16 bits."""
    return "tf32" if architecture.is_nvidia and compute_dtype.itemsize == 2 else "ieee"


def _is_wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an element's offset in some tensor needs 64 bits."""
    return any(_reach(tensor.shape, tensor.stride()) >= 2**31 for tensor in tensors if tensor is not None)


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
