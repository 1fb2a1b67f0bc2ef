// Matrix products in registers: the two rank products, and the contractions of a block with thin matrices.
//
// Every element is one chain of multiply-adds in a fixed order, so its bits do not depend on the tile that it is
// computed in, nor on what else is computed beside it. Strides are compile-time constants: with variable ones the
// compiler ran out of registers for pointers.
#pragma once

#include "elements.h"

// A loop over the vectors of a tile. Unrolled completely, since only then can each vector stay in a register.
#define DUAL_LORA_UNROLL(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); ++i)

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

// A factor pair of a unit, packed. `down`: [padded rank, kStride]; `down_t`: the same, [kUnitCols, padded rank]; `up`:
// [blocks of kRowBlock rows, padded rank, kRowBlock], so that a block's column is dense. Blocks of W, H and gradients
// have rows of kStride too.
// In bf16: `down_pairs` [kUnitCols / 2, padded rank, 2], and `up_pairs` as `up`.
template <class T>
struct Pair {
  T* down;
  T* up;
  T* down_t;
  uint16_t* down_pairs;
  uint16_t* up_pairs;
  int64_t rank;

  const T* up_block(int64_t row) const { return up + row * padded_rank(rank); }
};

// product[i][c] = Σ_r up[r, i] · down[r, vector c].
template <class V, int R, int C>
DUAL_LORA_INLINE void rank_product(const typename V::scalar* up, const typename V::scalar* down, int64_t rank,
                                   V (&product)[R][C]) {
  DUAL_LORA_UNROLL(i, R)
    DUAL_LORA_UNROLL(c, C) product[i][c] = V::set(0);
  for (int64_t start = 0; start < rank; start += kRankStep) {
    DUAL_LORA_UNROLL(r, kRankStep) {
      V line[C];
      DUAL_LORA_UNROLL(c, C) line[c] = V::load(down + c * V::lanes);
      DUAL_LORA_UNROLL(i, R) {
        const V factor = V::set(up[i]);
        DUAL_LORA_UNROLL(c, C) product[i][c] = fma(factor, line[c], product[i][c]);
      }
      up += kRowBlock;
      down += kStride;
    }
  }
}

// Calls sink(row, col, p, q) with the R × C vectors of one tile of a block.
template <class V, int R, int C, class Sink>
DUAL_LORA_INLINE void tile(const Pair<typename V::scalar>& magnitude, const Pair<typename V::scalar>& direction,
                           int64_t block, int64_t row, int64_t col, Sink& sink) {
  V p[R][C], q[R][C];
  rank_product<V, R, C>(magnitude.up_block(block) + row, magnitude.down + col, magnitude.rank, p);
  rank_product<V, R, C>(direction.up_block(block) + row, direction.down + col, direction.rank, q);
  sink(row, col, p, q);
}

template <class V, int R, int C, class Sink>
inline void tile_column(const Pair<typename V::scalar>& magnitude, const Pair<typename V::scalar>& direction,
                        int64_t block, int64_t rows, int64_t col, Sink& sink) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) tile<V, R, C>(magnitude, direction, block, i, col, sink);
  for (; i < rows; ++i) tile<V, 1, C>(magnitude, direction, block, i, col, sink);
}

// Calls `sink` for every tile of columns first … last of the block that begins at the unit's row `block`; both are
// multiples of V::lanes. Four vectors that are left make two tiles of two, rather than one of three and one of one.
template <class V, class Sink>
inline void for_each_tile(const Pair<typename V::scalar>& magnitude, const Pair<typename V::scalar>& direction,
                          int64_t block, int64_t rows, int64_t first, int64_t last, Sink&& sink) {
  constexpr int R = V::tile_rows, C = V::tile_vectors;
  int64_t j = first;
  for (; j + C * V::lanes <= last && (C == 2 || last - j != 4 * V::lanes); j += C * V::lanes)
    tile_column<V, R, C>(magnitude, direction, block, rows, j, sink);
  for (; j + 2 * V::lanes <= last; j += 2 * V::lanes) tile_column<V, R, 2>(magnitude, direction, block, rows, j, sink);
  for (; j < last; j += V::lanes) tile_column<V, R, 1>(magnitude, direction, block, rows, j, sink);
}

// sums[r, vector c] += Σ_i up[r, i] · block[i, vector c] for R values of r and C vectors.
template <class V, int R, int C>
inline void sum_over_rows(const typename V::scalar* block, int64_t rows, const typename V::scalar* up,
                          typename V::scalar* sums) {
  V total[R][C];
  DUAL_LORA_UNROLL(r, R)
    DUAL_LORA_UNROLL(c, C) total[r][c] = V::load(sums + r * kStride + c * V::lanes);
  for (int64_t i = 0; i < rows; ++i, block += kStride, ++up) {
    V line[C];
    DUAL_LORA_UNROLL(c, C) line[c] = V::load(block + c * V::lanes);
    DUAL_LORA_UNROLL(r, R) {
      const V factor = V::set(up[r * kRowBlock]);
      DUAL_LORA_UNROLL(c, C) total[r][c] = fma(factor, line[c], total[r][c]);
    }
  }
  DUAL_LORA_UNROLL(r, R)
    DUAL_LORA_UNROLL(c, C) total[r][c].store(sums + r * kStride + c * V::lanes);
}

template <class V, int C>
inline void sum_over_rows(const typename V::scalar* block, int64_t rows, const typename V::scalar* up, int64_t rank,
                          typename V::scalar* sums) {
  constexpr int R = V::registers / 4;
  int64_t r = 0;
  for (; r + R <= rank; r += R) sum_over_rows<V, R, C>(block, rows, up + r * kRowBlock, sums + r * kStride);
  for (; r < rank; r += kRankStep) sum_over_rows<V, kRankStep, C>(block, rows, up + r * kRowBlock, sums + r * kStride);
}

// The whole of it: block [rows, cols], sums [rank, kStride]; rank a multiple of kRankStep.
template <class V>
inline void sum_over_rows(const typename V::scalar* block, int64_t rows, int64_t cols, const typename V::scalar* up,
                          int64_t rank, typename V::scalar* sums) {
  int64_t j = 0;
  for (; j + 3 * V::lanes <= cols; j += 3 * V::lanes) sum_over_rows<V, 3>(block + j, rows, up, rank, sums + j);
  for (; j < cols; j += V::lanes) sum_over_rows<V, 1>(block + j, rows, up, rank, sums + j);
}

// sums[i, vector of r] += Σ_j block[i, j] · down_t[j, vector of r] for I rows.
template <class V, int I>
inline void sum_over_columns(const typename V::scalar* block, int64_t cols, const typename V::scalar* down_t,
                             int64_t rank_stride, typename V::scalar* sums, int64_t sums_stride) {
  V total[I];
  DUAL_LORA_UNROLL(i, I) total[i] = V::load(sums + i * sums_stride);
  for (int64_t j = 0; j < cols; ++j, down_t += rank_stride) {
    const V line = V::load(down_t);
    DUAL_LORA_UNROLL(i, I) total[i] = fma(V::set(block[i * kStride + j]), line, total[i]);
  }
  DUAL_LORA_UNROLL(i, I) total[i].store(sums + i * sums_stride);
}

// The whole of it: block [rows, cols], down_t [cols, padded rank], sums [rows, sums_stride].
template <class V>
inline void sum_over_columns(const typename V::scalar* block, int64_t rows, int64_t cols,
                             const typename V::scalar* down_t, int64_t rank, typename V::scalar* sums,
                             int64_t sums_stride) {
  constexpr int I = V::registers / 2;
  for (int64_t r = 0; r < rank; r += V::lanes) {
    int64_t i = 0;
    for (; i + I <= rows; i += I)
      sum_over_columns<V, I>(block + i * kStride, cols, down_t + r, padded_rank(rank), sums + i * sums_stride + r,
                             sums_stride);
    for (; i < rows; ++i)
      sum_over_columns<V, 1>(block + i * kStride, cols, down_t + r, padded_rank(rank), sums + i * sums_stride + r,
                             sums_stride);
  }
}

#if defined(__AVX512BF16__)
// ---- the same contractions of a block in bf16, two products at a time, summed in fp32

// sums[r, 2 vectors] += Σ_i up[r, i] · block[i, 2 vectors] for R values of r; `pairs` pairs of rows.
template <int R>
inline void sum_over_row_pairs(const uint16_t* block, int64_t pairs, const uint16_t* up, float* sums) {
  F32 total[R][2];
  DUAL_LORA_UNROLL(r, R)
    DUAL_LORA_UNROLL(c, 2) total[r][c] = F32::load(sums + r * kStride + c * F32::lanes);
  for (int64_t pair = 0; pair < pairs; ++pair, block += 2 * kStride, up += 2) {
    Pairs low, high;
    pair_rows(Pairs::load(block), Pairs::load(block + kStride), low, high);
    DUAL_LORA_UNROLL(r, R) {
      const Pairs factor = Pairs::set(up + r * kRowBlock);
      total[r][0] = dot(factor, low, total[r][0]);
      total[r][1] = dot(factor, high, total[r][1]);
    }
  }
  DUAL_LORA_UNROLL(r, R)
    DUAL_LORA_UNROLL(c, 2) total[r][c].store(sums + r * kStride + c * F32::lanes);
}

// The whole of it: block [rows, cols] with a row of zeros after an odd number, sums [rank, kStride].
inline void sum_over_row_pairs(const uint16_t* block, int64_t rows, int64_t cols, const uint16_t* up, int64_t rank,
                               float* sums) {
  constexpr int R = 12;
  const int64_t pairs = (rows + 1) / 2;
  for (int64_t j = 0; j < cols; j += 2 * F32::lanes) {
    int64_t r = 0;
    for (; r + R <= rank; r += R) sum_over_row_pairs<R>(block + j, pairs, up + r * kRowBlock, sums + r * kStride + j);
    for (; r < rank; r += kRankStep)
      sum_over_row_pairs<kRankStep>(block + j, pairs, up + r * kRowBlock, sums + r * kStride + j);
  }
}

// sums[i, vector of r] += Σ_j block[i, j] · down[j, vector of r] for I rows; `pairs` pairs of columns.
template <int I>
inline void sum_over_column_pairs(const uint16_t* block, int64_t pairs, const uint16_t* down, int64_t rank_stride,
                                  float* sums, int64_t sums_stride) {
  F32 total[I];
  DUAL_LORA_UNROLL(i, I) total[i] = F32::load(sums + i * sums_stride);
  for (int64_t pair = 0; pair < pairs; ++pair, block += 2, down += 2 * rank_stride) {
    const Pairs line = Pairs::load(down);
    DUAL_LORA_UNROLL(i, I) total[i] = dot(Pairs::set(block + i * kStride), line, total[i]);
  }
  DUAL_LORA_UNROLL(i, I) total[i].store(sums + i * sums_stride);
}

// The whole of it: block [rows, cols] with a column of zeros after an odd number, sums [rows, sums_stride].
inline void sum_over_column_pairs(const uint16_t* block, int64_t rows, int64_t cols, const uint16_t* down, int64_t rank,
                                  float* sums, int64_t sums_stride) {
  constexpr int I = kRowBlock;
  const int64_t pairs = (cols + 1) / 2, stride = padded_rank(rank);
  for (int64_t r = 0; r < rank; r += F32::lanes) {
    if (rows == I) {
      sum_over_column_pairs<I>(block, pairs, down + 2 * r, stride, sums + r, sums_stride);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        sum_over_column_pairs<1>(block + i * kStride, pairs, down + 2 * r, stride, sums + i * sums_stride + r,
                                 sums_stride);
    }
  }
}
#endif

// sums[i, t] += block[i, :] · x[t, :], lane by lane, for I rows and X tokens; sums are whole vectors.
template <class V, int I, int X>
inline void token_product(const typename V::scalar* block, int64_t cols, const typename V::scalar* x,
                          typename V::scalar* sums, int64_t sums_stride) {
  V total[I][X];
  DUAL_LORA_UNROLL(i, I)
    DUAL_LORA_UNROLL(t, X) total[i][t] = V::load(sums + i * sums_stride + t * V::lanes);
  for (int64_t j = 0; j < cols; j += V::lanes) {
    V line[X];
    DUAL_LORA_UNROLL(t, X) line[t] = V::load(x + t * kStride + j);
    DUAL_LORA_UNROLL(i, I) {
      const V values = V::load(block + i * kStride + j);
      DUAL_LORA_UNROLL(t, X) total[i][t] = fma(values, line[t], total[i][t]);
    }
  }
  DUAL_LORA_UNROLL(i, I)
    DUAL_LORA_UNROLL(t, X) total[i][t].store(sums + i * sums_stride + t * V::lanes);
}

// The whole of it: block [rows, cols], x [tokens, kStride], sums [rows, tokens] vectors; tokens a multiple of X.
template <class V, int X>
inline void token_product(const typename V::scalar* block, int64_t rows, int64_t cols, const typename V::scalar* x,
                          int64_t tokens, typename V::scalar* sums) {
  constexpr int I = 4;
  const int64_t sums_stride = tokens * V::lanes;
  int64_t i = 0;
  for (; i + I <= rows; i += I)
    for (int64_t t = 0; t < tokens; t += X)
      token_product<V, I, X>(block + i * kStride, cols, x + t * kStride, sums + i * sums_stride + t * V::lanes,
                             sums_stride);
  for (; i < rows; ++i)
    for (int64_t t = 0; t < tokens; t += X)
      token_product<V, 1, X>(block + i * kStride, cols, x + t * kStride, sums + i * sums_stride + t * V::lanes,
                             sums_stride);
}

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
