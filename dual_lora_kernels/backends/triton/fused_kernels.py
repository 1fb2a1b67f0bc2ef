"""Kernels that rebuild W inside the matrix product: Y or ∂X, and H with the factor gradients as its epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from .contraction import contribute, load_downs, load_ups, slice_products, store_ups
from .tiles import dot, effective_tile, load, narrow, sum_parts


@triton.jit
def _store_product(out, bias, total, m, n, inside, T: tl.constexpr):
    if T.has_bias:
        total += tl.load(bias + n, mask=n < out.columns, other=0.0).to(T.product)[None, :]
    pointers = out.pointer + m.to(tl.int64)[:, None] * out.row_stride + n[None, :]
    tl.store(pointers, narrow(total, out.pointer.dtype.element_ty, T.interpreted), mask=inside)


@triton.jit
def weight_product_kernel(out, input, weight, factors, bias, hashes, split_length, partials, finished, T: tl.constexpr):
    """Y = X Wᵀ + b, or ∂X = G W where ``T.transposed``, with W [rows, columns] rebuilt tile by tile.

    Out [M, N] = input [M, K] times W or its transpose, in the words of a matrix product: M tokens, N the weight's axis
    that stays (its rows in the forward pass), K the one that is summed, split-K over the grid's second axis: program
    (i, j) takes tile i, tokens fastest, and part j of the sum, `split_length` long, in whole steps. W's tile is built
    as W lies in memory and is the right operand, through shared memory, in both passes. Built transposed for ∂X it took
    15 % more instructions on sm_90 and twice as many on gfx942; as the left operand, from registers, the forward pass
    took twice as many on gfx942 and within 4 % of the same on sm_90.

    Where the sum is split, the program that finishes a tile last adds the parts, in their order whichever finished when
    (`launches.SplitSum`).
    """
    BLOCK_M: tl.constexpr = T.block_tokens
    BLOCK_N: tl.constexpr = T.block_columns if T.transposed else T.block_rows
    BLOCK_K: tl.constexpr = T.block_rows if T.transposed else T.block_columns
    PRECISION: tl.constexpr = T.product_precision
    MASK_K: tl.constexpr = T.mask_rows if T.transposed else T.mask_columns
    token_tiles = tl.cdiv(out.rows, BLOCK_M)
    m = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(0) // token_tiles * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * split_length
    stop = tl.minimum(start + split_length, input.columns)
    inside = (m < out.rows)[:, None] & (n < out.columns)[None, :]
    if T.wide:
        n, m = n.to(tl.int64), m.to(tl.int64)
    A, B, C, D, scale_pointer = factors
    matrices = (A, B, C, D)  # built anew, as in factor_gradients_kernel
    scale = tl.load(scale_pointer).to(T.compute)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=T.product)
    for position in range(start, stop, BLOCK_K):
        k = position + tl.arange(0, BLOCK_K)
        if T.wide:
            k = k.to(tl.int64)
        x = load(input, m, k, out.rows, stop, T.mask_tokens, MASK_K)
        row, column, first_column, shape = n, k, position, (out.columns, stop)
        if T.transposed:
            row, column, first_column, shape = k, n, first_n, (stop, out.columns)
        dtype: tl.constexpr = input.pointer.dtype.element_ty
        tile = effective_tile(weight, matrices, hashes, scale, row, column, first_column, shape, dtype, T)
        if not T.transposed:
            tile = tl.trans(tile)
        accumulator = dot(x, tile, accumulator, PRECISION, T.interpreted)
    if T.is_split:
        pointers = partials + m.to(tl.int64)[:, None] * out.columns + n[None, :]
        part_stride = tl.full((), 1, tl.int64) * out.rows * out.columns  # sizes of 1 are constants
        tl.store(pointers + tl.program_id(1) * part_stride, accumulator, mask=inside)
        tl.debug_barrier()  # all threads' stores come before the program says that it has finished
        before = tl.atomic_add(finished + tl.program_id(0), 1, sem="acq_rel")
        if before == tl.num_programs(1) - 1:
            total = sum_parts(pointers, part_stride, tl.num_programs(1), inside, tl.zeros_like(accumulator))
            _store_product(out, bias, total, m, n, inside, T)
            tl.store(finished + tl.program_id(0), 0)
    else:
        _store_product(out, bias, accumulator, m, n, inside, T)


@triton.jit
def token_product_kernel(grad, input, factors, column_weights, up_partials, down_partials, T: tl.constexpr):
    """Partial factor gradients from Gᵀ [rows, tokens] and X [tokens, columns]: H = Gᵀ X stays in registers.

    Program (i, j) sums one tile of H over all tokens, as the clipping estimator needs, then contracts it as
    `factor_gradients_kernel` does. Ranks of at most one slice. Partials: up [column tiles, rows, r1 + r2], down
    [row tiles, columns, r1 + r2].
    """
    ROWS: tl.constexpr = T.block_rows
    COLUMNS: tl.constexpr = T.block_columns
    RANK: tl.constexpr = T.block_rank
    PRECISION: tl.constexpr = T.product_precision
    shape = (grad.rows, input.columns)
    A, B, C, D, scale_pointer = factors
    matrices = (A, B, C, D)  # built anew, as in factor_gradients_kernel
    column_tiles = tl.cdiv(input.columns, COLUMNS)
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, T.block_rank)
    if T.wide:
        row, column = row.to(tl.int64), column.to(tl.int64)
    h = tl.zeros((ROWS, COLUMNS), dtype=T.product)
    for position in range(0, input.rows, T.block_tokens):
        token = position + tl.arange(0, T.block_tokens)
        if T.wide:
            token = token.to(tl.int64)
        g = load(grad, row, token, grad.rows, input.rows, T.mask_rows, T.mask_tokens)
        x = load(input, token, column, input.rows, input.columns, T.mask_tokens, T.mask_columns)
        h = dot(g, x, h, PRECISION, T.interpreted)
    if T.mask_rows or T.mask_columns:  # an infinity times a line that was not there is a NaN, which would spread
        h = tl.where((row < grad.rows)[:, None] & (column < input.columns)[None, :], h, 0.0)
    ups = load_ups(matrices, row, grad.rows, ranks, T)
    downs = load_downs(matrices, column, input.columns, ranks, T)
    p, q = slice_products(ups, downs, matrices, row, column, shape, T)
    gradient_B = tl.zeros((ROWS, RANK), dtype=T.product)
    gradient_D = tl.zeros((ROWS, RANK), dtype=T.product)
    both_ranks = A.rows + C.rows
    scale = tl.load(scale_pointer).to(T.product)
    gradient_B, gradient_D = contribute(
        h, p.to(T.product), q.to(T.product), scale, ups, downs, matrices, column_weights, column, input.columns, ranks,
        (gradient_B, gradient_D), down_partials + row_tile.to(tl.int64) * both_ranks * input.columns, T,
    )  # fmt: skip
    up_partials += column_tile.to(tl.int64) * grad.rows * both_ranks
    store_ups(up_partials, (gradient_B, gradient_D), matrices, row, grad.rows, ranks, T)
