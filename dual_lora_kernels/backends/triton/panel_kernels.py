"""Kernels for one panel: write W into a buffer, and contract a panel of H with the factors."""

from __future__ import annotations

import triton
import triton.language as tl

from .contraction import contribute, load_downs, load_ups, slice_products, store_ups
from .tiles import effective_tile, load


@triton.jit(do_not_specialize=["row0", "column0"])
def effective_weight_kernel(out, weight, factors, hashes, row0, column0, T: tl.constexpr):
    """out [rows, columns] = round(W0 + ΔW) of one block; a program writes one tile. `out` may be `weight`."""
    column_tiles = tl.cdiv(out.columns, T.block_columns)
    row = tl.program_id(0) // column_tiles * T.block_rows + tl.arange(0, T.block_rows)
    first_column = tl.program_id(0) % column_tiles * T.block_columns
    column = first_column + tl.arange(0, T.block_columns)
    inside = (row < out.rows)[:, None] & (column < out.columns)[None, :]
    if T.wide:
        row, column = row.to(tl.int64), column.to(tl.int64)
    A, B, C, D, scale_pointer = factors
    scale = tl.load(scale_pointer).to(T.compute)
    own_hashes = (hashes.rows + row0, hashes.columns + column0)
    shape = (out.rows, out.columns)
    dtype: tl.constexpr = out.pointer.dtype.element_ty
    tile = effective_tile(weight, (A, B, C, D), own_hashes, scale, row, column, first_column, shape, dtype, T)
    pointers = out.pointer + row[:, None] * out.row_stride + column[None, :] * out.column_stride
    if T.mask_rows or T.mask_columns:
        tl.store(pointers, tile, mask=inside)
    else:
        tl.store(pointers, tile)


@triton.jit(do_not_specialize=["column_tiles"])
def factor_gradients_kernel(h, factors, column_weights, up_partials, down_partials, column_tiles, T: tl.constexpr):
    """Partial factor gradients from one block of H [rows, columns].

    Program (i, j, z) takes row tile i, `column_tiles` column tiles from j times as many on, and slice z of the ranks.
    Partials, one dtype with H: up [column groups, rows, r1 + r2], down [row tiles, columns, r1 + r2].
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
    scale = tl.load(scale_pointer).to(dtype)
    shape = (h.rows, h.columns)
    ROWS: tl.constexpr = T.block_rows
    RANK: tl.constexpr = T.block_rank
    gradient_B = tl.zeros((ROWS, RANK), dtype=dtype)
    gradient_D = tl.zeros((ROWS, RANK), dtype=dtype)
    ups = load_ups(matrices, row, h.rows, ranks, T)
    first_tile = tl.program_id(1) * column_tiles
    for tile in range(first_tile, tl.minimum(first_tile + column_tiles, tl.cdiv(h.columns, T.block_columns))):
        column = tile * T.block_columns + tl.arange(0, T.block_columns)
        if T.wide:
            column = column.to(tl.int64)
        downs = load_downs(matrices, column, h.columns, ranks, T)
        h_tile = load(h, row, column, h.rows, h.columns, T.mask_rows, T.mask_columns)
        p, q = slice_products(ups, downs, matrices, row, column, shape, T)
        gradient_B, gradient_D = contribute(
            h_tile, p.to(dtype), q.to(dtype), scale, ups, downs, matrices, column_weights, column, h.columns, ranks,
            (gradient_B, gradient_D), down_partials, T,
        )  # fmt: skip
    store_ups(up_partials, (gradient_B, gradient_D), matrices, row, h.rows, ranks, T)
