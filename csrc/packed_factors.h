// The factors in the layout that the products read: made once a call, in the accumulation type, padded with zeros.
#pragma once

#include "products.h"

namespace {

using dual_lora::kUnitCols;

template <class V>
constexpr int64_t padded_cols(int64_t cols) {
  return (cols + V::lanes - 1) / V::lanes * V::lanes;
}

// A view of memory of `size()` elements. Each pair: `down` strip by strip, then `up` block by block, then `down_t`.
template <class V>
class PackedFactors {
  using T = typename V::scalar;

 public:
  PackedFactors(const dual_lora::Factors& factors, T* memory) : factors_(factors), memory_(memory) {}

  int64_t size() const { return pair_size(factors_.A.rows) + pair_size(factors_.C.rows); }

  // Packs the columns of one strip.
  void pack_strip(int64_t strip) const {
    pack_strip(strip, factors_.A, 0);
    pack_strip(strip, factors_.C, pair_size(factors_.A.rows));
  }

  // Packs one block of rows.
  void pack_block(int64_t block) const {
    pack_block(block, factors_.B, 0);
    pack_block(block, factors_.D, pair_size(factors_.A.rows));
  }

  // The pairs as seen from a unit, whose first row is a multiple of kRowBlock and which lies within one strip.
  Pair<T> magnitude(int64_t row, int64_t col) const { return pair(factors_.A.rows, 0, row, col); }
  Pair<T> direction(int64_t row, int64_t col) const {
    return pair(factors_.C.rows, pair_size(factors_.A.rows), row, col);
  }

 private:
  int64_t strips() const { return (factors_.A.cols + kUnitCols - 1) / kUnitCols; }
  int64_t blocks() const { return (factors_.B.rows + kRowBlock - 1) / kRowBlock; }
  int64_t down_size(int64_t rank) const { return strips() * padded_rank(rank) * kStride; }
  int64_t up_size(int64_t rank) const { return blocks() * padded_rank(rank) * kRowBlock; }
  int64_t pair_size(int64_t rank) const {
    return down_size(rank) + up_size(rank) + strips() * kUnitCols * padded_rank(rank);
  }

  Pair<T> pair(int64_t rank, int64_t offset, int64_t row, int64_t col) const {
    T* base = memory_ + offset;
    T* down = base + col / kUnitCols * padded_rank(rank) * kStride + col % kUnitCols;
    T* up = base + down_size(rank) + row * padded_rank(rank);
    T* down_t = base + down_size(rank) + up_size(rank) + col * padded_rank(rank);
    return {down, down_t, up, rank};
  }

  void pack_strip(int64_t strip, const Matrix& matrix, int64_t offset) const {
    const int64_t col = strip * kUnitCols, cols = smaller(kUnitCols, matrix.cols - col), rank = padded_rank(matrix.rows);
    const int64_t padded = padded_cols<V>(cols);
    const Pair<T> to = pair(matrix.rows, offset, 0, col);
    load_block<V>(at(matrix, 0, col), matrix.rows, cols, to.down, kStride, padded);
    for (int64_t i = matrix.rows * kStride; i < rank * kStride; ++i) to.down[i] = 0;
    for (int64_t start = 0; start < padded; start += V::lanes)
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t j = start; j < start + V::lanes; ++j) to.down_t[j * rank + r] = to.down[r * kStride + j];
  }

  void pack_block(int64_t block, const Matrix& matrix, int64_t offset) const {
    const int64_t row = block * kRowBlock, rows = smaller(kRowBlock, matrix.rows - row), rank = padded_rank(matrix.cols);
    const Pair<T> to = pair(matrix.cols, offset, row, 0);
    T dense[kRowBlock * kPiece];
    for (int64_t start = 0; start < rank; start += kPiece) {
      const int64_t piece = smaller(kPiece, rank - start), present = smaller(piece, matrix.cols - start);
      load_block<V>(at(matrix, row, start), rows, present, dense, kPiece, piece);
      for (int64_t r = 0; r < piece; ++r)
        for (int64_t i = 0; i < rows; ++i) to.up[(start + r) * kRowBlock + i] = dense[i * kPiece + r];
    }
  }

  const dual_lora::Factors& factors_;
  T* memory_;
};

}  // namespace
