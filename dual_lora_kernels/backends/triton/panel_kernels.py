"""Kernels for one panel: write W into a buffer, and contract a panel of H with the factors."""

# Kernels take a tensor's pointer and strides, which their launcher names; line breaks group what belongs together.
# fmt: off

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, effective_tile, factor_products, load_factor, product_gradient_tiles


@triton.jit(do_not_specialize=["row0", "column0"])
def effective_weight_kernel(
    out, weight, A, B, C, D, scale, row_hashes, column_hashes,
    rows, columns, r1, r2, row0, column0,
    out_row_stride, out_column_stride, weight_row_stride, weight_column_stride,
    A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
    C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_R1: tl.constexpr, SLICES_1: tl.constexpr, MASK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr, SLICES_2: tl.constexpr, MASK_R2: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, DITHER: tl.constexpr,
    ACCUMULATOR: tl.constexpr, COMPUTE: tl.constexpr, SPLIT: tl.constexpr, CANONICAL_NAN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [rows, columns] = round(W0 + ΔW) of one block; a program writes one tile. `out` may be `weight`."""
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = tl.program_id(0) // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    rounded = effective_tile(
        weight, A, B, C, D, tl.load(scale).to(COMPUTE), row_hashes + row0, column_hashes + column0,
        row, column, rows, columns, r1, r2,
        weight_row_stride, weight_column_stride, A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
        C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_R1, SLICES_1, MASK_R1, BLOCK_R2, SLICES_2, MASK_R2,
        MASK_ROWS, MASK_COLUMNS, HAS_WEIGHT, DITHER,
        out.dtype.element_ty, ACCUMULATOR, COMPUTE, SPLIT, CANONICAL_NAN, INTERPRETED,
    )
    pointers = out + row[:, None] * out_row_stride + column[None, :] * out_column_stride
    if MASK_ROWS or MASK_COLUMNS:
        tl.store(pointers, rounded, mask=inside)
    else:
        tl.store(pointers, rounded)


@triton.jit
def contribute_product(
    grad, up_pointer, down_pointer, row, column, rows, columns, rank, ranks, lines,
    row_stride, up_rank_stride, down_rank_stride, column_stride, gradient_up, down_partials,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """One tile's part of the gradients of up @ down, for the ranks of one slice, from the product's gradient `grad`.

    grad downᵀ is added to the accumulator `gradient_up` [rows, ranks], which is returned; upᵀ grad is stored to `lines`
    of `down_partials`.
    """
    down = load_factor(
        down_pointer, ranks, column, rank, columns, down_rank_stride, column_stride, True, MASK_COLUMNS
    )
    up = load_factor(up_pointer, row, ranks, rows, rank, row_stride, up_rank_stride, MASK_ROWS, True)
    gradient_up = dot(grad, tl.trans(down).to(grad.dtype), gradient_up, PRECISION, INTERPRETED)
    part = tl.zeros(down.shape, dtype=grad.dtype)
    part = dot(tl.trans(up).to(grad.dtype), grad, part, PRECISION, INTERPRETED)
    tl.store(
        down_partials + lines[:, None] * columns + column[None, :], part,
        mask=(ranks < rank)[:, None] & (column < columns)[None, :],
    )
    return gradient_up


@triton.jit
def contribute(
    h, p, q, scale,
    A, B, C, D, row, column, rows, columns, r1, r2, ranks,
    A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
    C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
    gradient_B, gradient_D, down_partials,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, STE: tl.constexpr, CLIP_BOUND: tl.constexpr,
    WANT_MAGNITUDE: tl.constexpr, WANT_DIRECTION: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """One tile's part of the factors' gradients, for the ranks of one slice.

    ∂B = ∂P Aᵀ and ∂D = ∂Q Cᵀ are added to the accumulators [rows, ranks], which are returned; ∂A = Bᵀ ∂P and ∂C = Dᵀ ∂Q
    are stored to `down_partials` [r1 + r2, columns], whose sum over blocks of rows the caller takes.
    """
    grad_p, grad_q = product_gradient_tiles(h, p, q, scale, STE, CLIP_BOUND)
    if WANT_MAGNITUDE:
        gradient_B = contribute_product(
            grad_p, B, A, row, column, rows, columns, r1, ranks, ranks,
            B_row_stride, B_rank_stride, A_rank_stride, A_column_stride, gradient_B, down_partials,
            MASK_ROWS, MASK_COLUMNS, PRECISION, INTERPRETED,
        )
    if WANT_DIRECTION:
        gradient_D = contribute_product(
            grad_q, D, C, row, column, rows, columns, r2, ranks, r1 + ranks,
            D_row_stride, D_rank_stride, C_rank_stride, C_column_stride, gradient_D, down_partials,
            MASK_ROWS, MASK_COLUMNS, PRECISION, INTERPRETED,
        )
    return gradient_B, gradient_D


@triton.jit
def store_up(
    up_partials, gradient_B, gradient_D, row, rows, r1, r2, ranks,
    WANT_MAGNITUDE: tl.constexpr, WANT_DIRECTION: tl.constexpr,
):
    """∂B and ∂D of a row block into `up_partials` [rows, r1 + r2]; their sum over column blocks is the caller's."""
    pointers = up_partials + row[:, None] * (r1 + r2) + ranks[None, :]
    if WANT_MAGNITUDE:
        tl.store(pointers, gradient_B, mask=(row < rows)[:, None] & (ranks < r1)[None, :])
    if WANT_DIRECTION:
        tl.store(pointers + r1, gradient_D, mask=(row < rows)[:, None] & (ranks < r2)[None, :])


@triton.jit
def factor_gradients_kernel(
    h, A, B, C, D, scale, up_partials, down_partials,
    rows, columns, r1, r2, h_row_stride,
    A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
    C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, COLUMN_TILES: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_R1: tl.constexpr, SLICES_1: tl.constexpr, MASK_R1: tl.constexpr,
    BLOCK_R2: tl.constexpr, SLICES_2: tl.constexpr, MASK_R2: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    STE: tl.constexpr, CLIP_BOUND: tl.constexpr, WANT_MAGNITUDE: tl.constexpr, WANT_DIRECTION: tl.constexpr,
    ACCUMULATOR: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):
    """Partial factor gradients from one block of H [rows, columns].

    Program (i, j, z) takes row tile i, ``COLUMN_TILES`` column tiles from j on, and slice z of the ranks. Partials, one
    dtype with H: up [column groups, rows, r1 + r2], down [row tiles, r1 + r2, columns].
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ranks = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    if WIDE:
        row, ranks = row.to(tl.int64), ranks.to(tl.int64)
    up_partials += tl.program_id(1).to(tl.int64) * rows * (r1 + r2)
    down_partials += tl.program_id(0).to(tl.int64) * (r1 + r2) * columns
    wide: tl.constexpr = h.dtype.element_ty
    s = tl.load(scale).to(wide)
    gradient_B = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=wide)
    gradient_D = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=wide)
    first_tile = tl.program_id(1) * COLUMN_TILES
    for tile in range(first_tile, tl.minimum(first_tile + COLUMN_TILES, tl.cdiv(columns, BLOCK_COLUMNS))):
        column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        if WIDE:
            column = column.to(tl.int64)
        p, q = factor_products(
            A, B, C, D, row, column, rows, columns, r1, r2,
            A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
            C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_R1, SLICES_1, MASK_R1, BLOCK_R2, SLICES_2, MASK_R2,
            MASK_ROWS, MASK_COLUMNS, ACCUMULATOR, SPLIT, INTERPRETED,
        )
        h_tile = load_factor(h, row, column, rows, columns, h_row_stride, 1, MASK_ROWS, MASK_COLUMNS)
        gradient_B, gradient_D = contribute(
            h_tile, p.to(wide), q.to(wide), s,
            A, B, C, D, row, column, rows, columns, r1, r2, ranks,
            A_rank_stride, A_column_stride, B_row_stride, B_rank_stride,
            C_rank_stride, C_column_stride, D_row_stride, D_rank_stride,
            gradient_B, gradient_D, down_partials,
            MASK_ROWS, MASK_COLUMNS, STE, CLIP_BOUND, WANT_MAGNITUDE, WANT_DIRECTION, PRECISION, INTERPRETED,
        )
    store_up(up_partials, gradient_B, gradient_D, row, rows, r1, r2, ranks, WANT_MAGNITUDE, WANT_DIRECTION)
