"""The factors' gradients from tiles of H: each tile's part of them, and the partial sums that programs leave behind.

A program takes one slice of the ranks. `factors` are A, B, C, D, `ups` its slice of B and D [rows, ranks], `downs` that
of A and C [ranks, columns].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot, factor_products, load, narrow, product_gradient_tiles, rank_product, sum_parts


@triton.jit
def load_ups(factors, row, rows, ranks, T: tl.constexpr):
    """B and D of a slice."""
    A, B, C, D = factors
    B_tile = load(B, row, ranks, rows, A.rows, T.mask_rows, T.mask_r1 or not T.one_slice)
    D_tile = load(D, row, ranks, rows, C.rows, T.mask_rows, T.mask_r2 or not T.one_slice)
    return B_tile, D_tile


@triton.jit
def load_downs(factors, column, columns, ranks, T: tl.constexpr):
    """A and C of a slice."""
    A, _, C, _ = factors
    A_tile = load(A, ranks, column, A.rows, columns, T.mask_r1 or not T.one_slice, T.mask_columns)
    C_tile = load(C, ranks, column, C.rows, columns, T.mask_r2 or not T.one_slice, T.mask_columns)
    return A_tile, C_tile


@triton.jit
def slice_products(ups, downs, factors, row, column, shape, T: tl.constexpr):
    """(P, Q) on a tile, from the tiles at hand where the slice holds all ranks; else from all slices, loaded anew."""
    if T.one_slice:
        ROWS: tl.constexpr = T.block_rows
        COLUMNS: tl.constexpr = T.block_columns
        zeros = tl.zeros((ROWS, COLUMNS), dtype=T.accumulator)
        p = rank_product(ups[0], downs[0], zeros, T.split_fp32, T.interpreted)
        q = rank_product(ups[1], downs[1], zeros, T.split_fp32, T.interpreted)
    else:
        p, q = factor_products(factors, row, column, shape, T)
    return p, q


@triton.jit
def contract(grad, up, down, weights, gradient_up, down_pointers, down_mask, T: tl.constexpr):
    """One tile's part of the gradients of up @ down, from the product's gradient `grad`.

    grad downᵀ is added to the accumulator `gradient_up` [rows, ranks], which is returned, with ``T.weighted`` each
    column times its weight; gradᵀ up [columns, ranks] is stored. That one is transposed since matrix units take 16 rows
    at least and 64 at best, and ranks are fewer: on sm_90 and gfx942 the other way round computes rows that nobody
    needs.
    """
    PRECISION: tl.constexpr = T.contraction_precision
    operand = narrow(grad, T.contraction, T.interpreted)
    if T.weighted:
        down = down.to(gradient_up.dtype) * weights[None, :]
    down = narrow(down, T.contraction, T.interpreted)
    gradient_up = dot(operand, tl.trans(down), gradient_up, PRECISION, T.interpreted)
    COLUMNS: tl.constexpr = T.block_columns
    RANK: tl.constexpr = T.block_rank
    part = tl.zeros((COLUMNS, RANK), dtype=gradient_up.dtype)
    part = dot(tl.trans(operand), narrow(up, T.contraction, T.interpreted), part, PRECISION, T.interpreted)
    tl.store(down_pointers, part, mask=down_mask)
    return gradient_up


@triton.jit
def contribute(
    h, p, q, scale, ups, downs, factors, column_weights, column, columns, ranks, gradients, down_partials,
    T: tl.constexpr,
):  # fmt: skip
    """One tile's part of the factors' gradients, for the ranks of one slice.

    ∂B = ∂P Aᵀ and ∂D = ∂Q Cᵀ are added to the two accumulators `gradients` [rows, ranks], which are returned. The parts
    of ∂A = Bᵀ ∂P and ∂C = Dᵀ ∂Q are stored to `down_partials` [columns, r1 + r2]. `column_weights`: see `block.Drawn`.
    """
    grad_p, grad_q = product_gradient_tiles(h, p, q, scale, T)
    gradient_B, gradient_D = gradients
    A, _, C, _ = factors
    pointers = down_partials + column[:, None] * (A.rows + C.rows) + ranks[None, :]
    inside = (column < columns)[:, None]
    weights = scale
    if T.weighted:
        weights = tl.load(column_weights + column, mask=column < columns, other=0.0).to(gradient_B.dtype)
    if T.want_magnitude:
        gradient_B = contract(
            grad_p, ups[0], downs[0], weights, gradient_B, pointers, inside & (ranks < A.rows)[None, :], T
        )
    if T.want_direction:
        pointers += A.rows
        gradient_D = contract(
            grad_q, ups[1], downs[1], weights, gradient_D, pointers, inside & (ranks < C.rows)[None, :], T
        )
    return gradient_B, gradient_D


@triton.jit
def store_ups(up_partials, gradients, factors, row, rows, ranks, T: tl.constexpr):
    """∂B and ∂D of a row block into `up_partials` [rows, r1 + r2]."""
    gradient_B, gradient_D = gradients
    A, _, C, _ = factors
    pointers = up_partials + row[:, None] * (A.rows + C.rows) + ranks[None, :]
    inside = (row < rows)[:, None]
    if T.want_magnitude:
        tl.store(pointers, gradient_B, mask=inside & (ranks < A.rows)[None, :])
    if T.want_direction:
        tl.store(pointers + A.rows, gradient_D, mask=inside & (ranks < C.rows)[None, :])


@triton.jit
def _add_to(gradient, line, rank, values, inside, TRANSPOSED: tl.constexpr):
    """gradient [lines, ranks], or [ranks, lines], += values."""
    row, column = line[:, None], rank[None, :].to(tl.int64)
    if TRANSPOSED:
        pointers = gradient.pointer + row * gradient.column_stride + column * gradient.row_stride
    else:
        pointers = gradient.pointer + row * gradient.row_stride + column * gradient.column_stride
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + values, mask=inside)


@triton.jit
def _add_sums(
    first, second, partials, parts, lines, ranks, tile,
    WANT_FIRST: tl.constexpr, WANT_SECOND: tl.constexpr, TRANSPOSED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradients of one product's and of the other's lines += sums of partials, on a tile of lines and ranks."""
    LINES: tl.constexpr = T.block_lines
    RANK: tl.constexpr = T.block_rank
    r1, r2 = ranks
    line = tile.to(tl.int64) * LINES + tl.arange(0, LINES)
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    is_first = (line < lines)[:, None] & (rank < (r1 if WANT_FIRST else 0))[None, :]
    is_second = (line < lines)[:, None] & ((rank >= r1) & (rank < (r1 + r2 if WANT_SECOND else r1)))[None, :]
    pointers = partials + line[:, None] * (r1 + r2) + rank[None, :]
    total = tl.zeros((LINES, RANK), dtype=partials.dtype.element_ty)
    total = sum_parts(pointers, lines.to(tl.int64) * (r1 + r2), parts, is_first | is_second, total)
    if WANT_FIRST:
        _add_to(first, line, rank, total, is_first, TRANSPOSED)
    if WANT_SECOND:
        _add_to(second, line, rank - r1, total, is_second, TRANSPOSED)


@triton.jit(do_not_specialize=["up_parts", "rows", "down_parts", "columns"])
def add_partials_kernel(
    A, B, C, D, up_partials, down_partials, up_parts, rows, down_parts, columns, r1, r2, T: tl.constexpr
):
    """The factors' gradients A, B, C, D += partial sums, in their order.

    up [parts, rows, r1 + r2], down [parts, columns, r1 + r2]. Program (i, j) takes a tile of ``T.block_lines`` rows of
    B and D, or beyond their last as many columns of A and C, and of ``T.block_rank`` ranks of both kinds. (Selecting
    pointers instead of branching would halve the code, but Triton 3.6 does not compile that for AMD.)
    """
    row_tiles = tl.cdiv(rows, T.block_lines)
    tile = tl.program_id(0)
    if tile < row_tiles:
        _add_sums(B, D, up_partials, up_parts, rows, (r1, r2), tile, T.want_B, T.want_D, False, T)
    else:
        tile -= row_tiles
        _add_sums(A, C, down_partials, down_parts, columns, (r1, r2), tile, T.want_A, T.want_C, True, T)
