"""Kernels for one panel: write W into a buffer, and contract a panel of H with the factors."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, effective_tile, factor_products, load, product_gradient_tiles


@triton.jit(do_not_specialize=["row0", "column0"])
def effective_weight_kernel(out, weight, factors, hashes, row0, column0, T: tl.constexpr):
    """out [rows, columns] = round(W0 + ΔW) of one block; a program writes one tile. `out` may be `weight`."""
    column_tiles = tl.cdiv(out.columns, T.block_columns)
    row = tl.program_id(0) // column_tiles * T.block_rows + tl.arange(0, T.block_rows)
    column = tl.program_id(0) % column_tiles * T.block_columns + tl.arange(0, T.block_columns)
    inside = (row < out.rows)[:, None] & (column < out.columns)[None, :]
    if T.wide:
        row, column = row.to(tl.int64), column.to(tl.int64)
    A, B, C, D, scale_pointer = factors
    scale = tl.load(scale_pointer).to(T.compute)
    own_hashes = (hashes.rows + row0, hashes.columns + column0)
    shape = (out.rows, out.columns)
    tile = effective_tile(weight, (A, B, C, D), own_hashes, scale, row, column, shape, out.pointer.dtype.element_ty, T)
    pointers = out.pointer + row[:, None] * out.row_stride + column[None, :] * out.column_stride
    if T.mask_rows or T.mask_columns:
        tl.store(pointers, tile, mask=inside)
    else:
        tl.store(pointers, tile)


@triton.jit
def contribute_product(grad, up, down, row, column, shape, ranks, lines, gradient_up, down_partials, T: tl.constexpr):
    """One tile's part of the gradients of up @ down, for the ranks of one slice, from the product's gradient `grad`.

    grad downᵀ is added to the accumulator `gradient_up` [rows, ranks], which is returned; upᵀ grad is stored to `lines`
    of `down_partials`.
    """
    PRECISION: tl.constexpr = T.contraction_precision
    down_tile = load(down, ranks, column, down.rows, shape[1], True, T.mask_columns)
    up_tile = load(up, row, ranks, shape[0], down.rows, T.mask_rows, True)
    gradient_up = dot(grad, tl.trans(down_tile).to(grad.dtype), gradient_up, PRECISION, T.interpreted)
    part = tl.zeros(down_tile.shape, dtype=grad.dtype)
    part = dot(tl.trans(up_tile).to(grad.dtype), grad, part, PRECISION, T.interpreted)
    tl.store(
        down_partials + lines[:, None] * shape[1] + column[None, :],
        part,
        mask=(ranks < down.rows)[:, None] & (column < shape[1])[None, :],
    )
    return gradient_up


@triton.jit
def contribute(h, p, q, scale, factors, row, column, shape, ranks, gradients, down_partials, T: tl.constexpr):
    """One tile's part of the factors' gradients, for the ranks of one slice.

    ∂B = ∂P Aᵀ and ∂D = ∂Q Cᵀ are added to the two accumulators `gradients` [rows, ranks], which are returned. The parts
    of ∂A = Bᵀ ∂P and ∂C = Dᵀ ∂Q are stored to `down_partials` [r1 + r2, columns]; the caller sums them over row blocks.
    """
    grad_p, grad_q = product_gradient_tiles(h, p, q, scale, T)
    gradient_B, gradient_D = gradients
    A, B, C, D = factors
    if T.want_magnitude:
        gradient_B = contribute_product(grad_p, B, A, row, column, shape, ranks, ranks, gradient_B, down_partials, T)
    if T.want_direction:
        lines = A.rows + ranks
        gradient_D = contribute_product(grad_q, D, C, row, column, shape, ranks, lines, gradient_D, down_partials, T)
    return gradient_B, gradient_D


@triton.jit
def store_up(up_partials, gradients, factors, row, rows, ranks, T: tl.constexpr):
    """∂B and ∂D of a row block into `up_partials` [rows, r1 + r2]; the caller sums them over column blocks."""
    gradient_B, gradient_D = gradients
    A, _, C, _ = factors
    r1, r2 = A.rows, C.rows
    inside = (row < rows)[:, None]
    pointers = up_partials + row[:, None] * (r1 + r2) + ranks[None, :]
    if T.want_magnitude:
        tl.store(pointers, gradient_B, mask=inside & (ranks < r1)[None, :])
    if T.want_direction:
        tl.store(pointers + r1, gradient_D, mask=inside & (ranks < r2)[None, :])


@triton.jit
def factor_gradients_kernel(h, factors, up_partials, down_partials, T: tl.constexpr):
    """Partial factor gradients from one block of H [rows, columns].

    Program (i, j, z) takes row tile i, ``T.column_tiles`` column tiles from j on, and slice z of the ranks. Partials,
    one dtype with H: up [column groups, rows, r1 + r2], down [row tiles, r1 + r2, columns].
    """
    row = tl.program_id(0) * T.block_rows + tl.arange(0, T.block_rows)
    ranks = tl.program_id(2) * T.block_rank + tl.arange(0, T.block_rank)
    if T.wide:
        row, ranks = row.to(tl.int64), ranks.to(tl.int64)
    A, B, C, D, scale_pointer = factors
    # Built anew: where a loop copies its variables, Triton 3.6 forgets constants two tuples deep, such as strides of 1.
    matrices = (A, B, C, D)
    both_ranks = A.rows + C.rows
    up_partials += tl.program_id(1).to(tl.int64) * h.rows * both_ranks
    down_partials += tl.program_id(0).to(tl.int64) * both_ranks * h.columns
    dtype: tl.constexpr = h.pointer.dtype.element_ty
    ROWS: tl.constexpr = T.block_rows
    RANK: tl.constexpr = T.block_rank
    scale = tl.load(scale_pointer).to(dtype)
    shape = (h.rows, h.columns)
    gradient_B = tl.zeros((ROWS, RANK), dtype=dtype)
    gradient_D = tl.zeros((ROWS, RANK), dtype=dtype)
    first_tile = tl.program_id(1) * T.column_tiles
    for tile in range(first_tile, tl.minimum(first_tile + T.column_tiles, tl.cdiv(h.columns, T.block_columns))):
        column = tile * T.block_columns + tl.arange(0, T.block_columns)
        if T.wide:
            column = column.to(tl.int64)
        p, q = factor_products(matrices, row, column, shape, T)
        h_tile = load(h, row, column, h.rows, h.columns, T.mask_rows, T.mask_columns)
        gradient_B, gradient_D = contribute(
            h_tile, p.to(dtype), q.to(dtype), scale, matrices, row, column, shape, ranks, (gradient_B, gradient_D),
            down_partials, T,
        )  # fmt: skip
    store_up(up_partials, (gradient_B, gradient_D), matrices, row, h.rows, ranks, T)
