// The factors in the layout that the products read: made once a call, in the accumulation type, padded with zeros.
#pragma once

#include "products.h"

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

template <class V>
constexpr int64_t padded_cols(int64_t cols) {
  return (cols + V::lanes - 1) / V::lanes * V::lanes;
}

// A view of the memory that a job's Packed points to.
template <class V>
class PackedFactors {
  using T = typename V::scalar;

 public:
  PackedFactors(const Factors& factors, const Packed& packed) : factors_(factors), packed_(packed) {}

  // Packs the columns of one strip.
  void pack_strip(int64_t strip) const {
    pack_strip(strip, factors_.A, packed_.magnitude, factors_.column_weights);
    pack_strip(strip, factors_.C, packed_.direction, factors_.column_weights);
  }

  // Packs one block of rows.
  void pack_block(int64_t block) const {
    pack_block(block, factors_.B, packed_.magnitude);
    pack_block(block, factors_.D, packed_.direction);
  }

  // The pairs as seen from a unit, whose first row is a multiple of kRowBlock and which lies within one strip.
  Pair<T> magnitude(int64_t row, int64_t col) const { return pair(factors_.A.rows, packed_.magnitude, row, col); }
  Pair<T> direction(int64_t row, int64_t col) const { return pair(factors_.C.rows, packed_.direction, row, col); }

 private:
  static Pair<T> pair(int64_t rank, const PackedPair& packed, int64_t row, int64_t col) {
    T* down = static_cast<T*>(packed.down) + col / kUnitCols * padded_rank(rank) * kStride + col % kUnitCols;
    T* up = static_cast<T*>(packed.up) + row * padded_rank(rank);
    Pair<T> pair = {down, up, nullptr, nullptr, nullptr, rank};
    if (packed.down_t != nullptr) pair.down_t = static_cast<T*>(packed.down_t) + col * padded_rank(rank);
    if (packed.down_pairs != nullptr) pair.down_pairs = packed.down_pairs + col * padded_rank(rank);
    if (packed.up_pairs != nullptr) pair.up_pairs = packed.up_pairs + row * padded_rank(rank);
    return pair;
  }

  // Weights are for the contraction alone: P and Q are those of every other call.
  static void pack_strip(int64_t strip, const Matrix& matrix, const PackedPair& packed, const float* weights) {
    const int64_t col = strip * kUnitCols, cols = smaller(kUnitCols, matrix.cols - col),
                  rank = padded_rank(matrix.rows);
    const int64_t padded = padded_cols<V>(cols);
    const Pair<T> to = pair(matrix.rows, packed, 0, col);
    load_block<V>(at(matrix, 0, col), matrix.rows, cols, to.down, kStride, padded);
    for (int64_t i = matrix.rows * kStride; i < rank * kStride; ++i) to.down[i] = 0;
    if (to.down_t != nullptr) {
      for (int64_t start = 0; start < padded; start += V::lanes)
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t j = start; j < start + V::lanes; ++j) to.down_t[j * rank + r] = to.down[r * kStride + j];
      if (weights != nullptr)
        for (int64_t j = 0; j < cols; ++j)
          for (int64_t r = 0; r < rank; ++r) to.down_t[j * rank + r] *= weights[col + j];
    }
    if constexpr (kHasPairs && std::is_same_v<V, F32>) {
      uint16_t rounded[kUnitCols];
      if (to.down_pairs != nullptr)
        for (int64_t r = 0; r < rank; ++r) {
          T line[kUnitCols];
          for (int64_t j = 0; j < padded; ++j) line[j] = to.down[r * kStride + j];
          if (weights != nullptr)
            for (int64_t j = 0; j < cols; ++j) line[j] *= weights[col + j];
          for (int64_t j = 0; j < padded; j += V::lanes) store_nearest(V::load(line + j), rounded + j);
          for (int64_t j = 0; j < padded; ++j) to.down_pairs[j / 2 * 2 * rank + 2 * r + j % 2] = rounded[j];
        }
    }
  }

  static void pack_block(int64_t block, const Matrix& matrix, const PackedPair& packed) {
    const int64_t row = block * kRowBlock, rows = smaller(kRowBlock, matrix.rows - row),
                  rank = padded_rank(matrix.cols);
    const Pair<T> to = pair(matrix.cols, packed, row, 0);
    T dense[kRowBlock * kPiece];
    for (int64_t start = 0; start < rank; start += kPiece) {
      const int64_t piece = smaller(kPiece, rank - start), present = smaller(piece, matrix.cols - start);
      load_block<V>(at(matrix, row, start), rows, present, dense, kPiece, piece);
      for (int64_t r = 0; r < piece; ++r)
        for (int64_t i = 0; i < rows; ++i) to.up[(start + r) * kRowBlock + i] = dense[i * kPiece + r];
    }
    if constexpr (kHasPairs && std::is_same_v<V, F32>) {
      if (to.up_pairs == nullptr) return;
      for (int64_t r = 0; r < rank; ++r) {
        T line[kRowBlock] = {};  // zeros for rows that the block does not have
        for (int64_t i = 0; i < rows; ++i) line[i] = to.up[r * kRowBlock + i];
        for (int64_t i = 0; i < kRowBlock; i += V::lanes)
          store_nearest(V::load(line + i), to.up_pairs + r * kRowBlock + i);
      }
    }
  }

  const Factors& factors_;
  const Packed& packed_;
};

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
