// Matrix products in registers: the two rank products, and the contractions of a block with thin matrices.
//
// Every element is one chain of multiply-adds in a fixed order, so its bits do not depend on the tile that it is
// computed in, nor on what else is computed beside it. Strides are compile-time constants: with variable ones the
// compiler ran out of registers for pointers, and generating W took 1.8 times as long.
#pragma once

#include "elements.h"

namespace {

using dual_lora::kRankStep;
using dual_lora::padded_rank;

// A factor pair of a unit, packed. `down`: [padded rank, kStride]. `up`: [blocks of kRowBlock rows, padded rank,
// kRowBlock], so that a block's column is dense. Blocks of W, H and gradients have rows of kStride too.
template <class T>
struct Pair {
  T* down;
  T* up;
  int64_t rank;

  const T* up_block(int64_t row) const { return up + row * padded_rank(rank); }
};

// product[i][c] = Σ_r up[r, i] · down[r, vector c].
template <class V, int R, int C>
inline void rank_product(const typename V::scalar* up, const typename V::scalar* down, int64_t rank,
                         V (&product)[R][C]) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) product[i][c] = V::set(0);
  for (int64_t start = 0; start < rank; start += kRankStep) {
#pragma GCC unroll 16
    for (int r = 0; r < kRankStep; ++r, up += kRowBlock, down += kStride) {
      V line[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) line[c] = V::load(down + c * V::lanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const V factor = V::set(up[i]);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) product[i][c] = fma(factor, line[c], product[i][c]);
      }
    }
  }
}

// Calls sink(row, col, p, q) for the vectors of one tile of a block.
template <class V, int R, int C, class Sink>
inline void tile(const Pair<typename V::scalar>& magnitude, const Pair<typename V::scalar>& direction, int64_t block,
                 int64_t row, int64_t col, Sink& sink) {
  V p[R][C], q[R][C];
  rank_product<V, R, C>(magnitude.up_block(block) + row, magnitude.down + col, magnitude.rank, p);
  rank_product<V, R, C>(direction.up_block(block) + row, direction.down + col, direction.rank, q);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sink(row + i, col + c * V::lanes, p[i][c], q[i][c]);
}

template <class V, int R, int C, class Sink>
inline void tile_column(const Pair<typename V::scalar>& magnitude, const Pair<typename V::scalar>& direction,
                        int64_t block, int64_t rows, int64_t col, Sink& sink) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) tile<V, R, C>(magnitude, direction, block, i, col, sink);
  for (; i < rows; ++i) tile<V, 1, C>(magnitude, direction, block, i, col, sink);
}

// Calls sink(row, col, p, q) for every vector of the block that begins at the unit's row `block`; `cols` is a multiple
// of V::lanes.
template <class V, class Sink>
inline void for_each_product(const Pair<typename V::scalar>& magnitude, const Pair<typename V::scalar>& direction,
                             int64_t block, int64_t rows, int64_t cols, Sink&& sink) {
  constexpr int R = 4, C = 3;
  int64_t j = 0;
  for (; j + C * V::lanes <= cols && cols - j != 4 * V::lanes; j += C * V::lanes) tile_column<V, R, C>(magnitude, direction, block, rows, j, sink);
  for (; j + 2 * V::lanes <= cols; j += 2 * V::lanes) tile_column<V, R, 2>(magnitude, direction, block, rows, j, sink);
  for (; j < cols; j += V::lanes) tile_column<V, R, 1>(magnitude, direction, block, rows, j, sink);
}

// sums[r, vector c] += Σ_i up[r, i] · block[i, vector c] for R values of r and C vectors.
template <class V, int R, int C>
inline void contract_rows(const typename V::scalar* block, int64_t rows, const typename V::scalar* up,
                          typename V::scalar* sums) {
  V total[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) total[r][c] = V::load(sums + r * kStride + c * V::lanes);
  for (int64_t i = 0; i < rows; ++i, block += kStride, ++up) {
    V line[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) line[c] = V::load(block + c * V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V factor = V::set(up[r * kRowBlock]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) total[r][c] = fma(factor, line[c], total[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) total[r][c].store(sums + r * kStride + c * V::lanes);
}

// The whole of it: block [rows, cols], sums [rank, kStride]; rank a multiple of kRankStep.
template <class V>
inline void contract_rows(const typename V::scalar* block, int64_t rows, int64_t cols, const typename V::scalar* up,
                          int64_t rank, typename V::scalar* sums) {
  constexpr int R = kRankStep, C = 2;
  int64_t j = 0;
  for (; j + C * V::lanes <= cols; j += C * V::lanes) {
    int64_t r = 0;
    for (; r + 2 * R <= rank; r += 2 * R)
      contract_rows<V, 2 * R, C>(block + j, rows, up + r * kRowBlock, sums + r * kStride + j);
    for (; r < rank; r += R) contract_rows<V, R, C>(block + j, rows, up + r * kRowBlock, sums + r * kStride + j);
  }
  for (; j < cols; j += V::lanes)
    for (int64_t r = 0; r < rank; r += R)
      contract_rows<V, R, 1>(block + j, rows, up + r * kRowBlock, sums + r * kStride + j);
}

// sums[i, r] += Σ over vectors of block[i, :] · down[r, :], lane by lane; sums are whole vectors.
template <class V, int I, int R>
inline void contract_columns(const typename V::scalar* block, int64_t cols, const typename V::scalar* down,
                             typename V::scalar* sums, int64_t sums_stride) {
  V total[I][R];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total[i][r] = V::load(sums + i * sums_stride + r * V::lanes);
  for (int64_t j = 0; j < cols; j += V::lanes) {
    V line[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) line[r] = V::load(down + r * kStride + j);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const V values = V::load(block + i * kStride + j);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) total[i][r] = fma(values, line[r], total[i][r]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total[i][r].store(sums + i * sums_stride + r * V::lanes);
}

// The whole of it: block [rows, cols], down [rank, kStride]; sums [rows, sums_stride], rank a multiple of R.
template <class V, int R>
inline void contract_columns(const typename V::scalar* block, int64_t rows, int64_t cols,
                             const typename V::scalar* down, int64_t rank, typename V::scalar* sums,
                             int64_t sums_stride) {
  constexpr int I = 4;
  int64_t i = 0;
  for (; i + I <= rows; i += I)
    for (int64_t r = 0; r < rank; r += R)
      contract_columns<V, I, R>(block + i * kStride, cols, down + r * kStride,
                                sums + i * sums_stride + r * V::lanes, sums_stride);
  for (; i < rows; ++i)
    for (int64_t r = 0; r < rank; r += R)
      contract_columns<V, 1, R>(block + i * kStride, cols, down + r * kStride,
                                sums + i * sums_stride + r * V::lanes, sums_stride);
}

}  // namespace
