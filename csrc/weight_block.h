// W = round(W0 + ΔW) of one block of rows: from vectors of P and Q into the output's memory.
#pragma once

#include "formula.h"
#include "products.h"
#include "scratch.h"

namespace {

using dual_lora::kUnitRows;
using dual_lora::WeightJob;

template <class V>
constexpr int64_t padded_cols(int64_t cols) {
  return (cols + V::lanes - 1) / V::lanes * V::lanes;
}

// Whether vectors can be read from and written to a matrix itself.
template <class V>
inline bool is_direct(const Matrix& m, int64_t cols) {
  const Dtype own = sizeof(typename V::scalar) == 4 ? Dtype::float32 : Dtype::float64;
  return m.dtype == own && m.col_stride == 1 && cols % V::lanes == 0;
}

// Takes P and Q of a unit's blocks, kRowBlock rows at a time: begin(), put() for every vector, end(). What cannot be
// read or written directly goes through blocks in scratch.
template <class V>
class WeightBlock {
  using T = typename V::scalar;

 public:
  WeightBlock(Scratch& scratch, const WeightJob& job)
      : job_(job),
        scale_(V::set(static_cast<T>(job.factors.scale))),
        row_hashes_(scratch.take<uint32_t>(kRowBlock)),
        column_hashes_(scratch.take<uint32_t>(kStride)),
        base_block_(scratch.take<T>(kRowBlock * kStride)),
        out_block_(scratch.take<T>(kRowBlock * kStride)),
        // fp32 factors on an fp64 base: the sum is fp64
        sums_(is_widened() ? scratch.take<double>(kRowBlock * kStride) : nullptr) {}

  // The columns of the blocks that follow, as indices in the job's block.
  void set_columns(int64_t col, int64_t cols) {
    col_ = col;
    cols_ = cols;
    if (job_.dithers)
      for (int64_t j = 0; j < cols; ++j) column_hashes_[j] = column_hash(job_.col0 + col + j);
  }

  // Rows of the next block, as indices in the job's block, and where it goes.
  void begin(int64_t row, int64_t rows, const Matrix& out) {
    rows_ = rows;
    out_ = out;
    if (job_.dithers)
      for (int64_t i = 0; i < rows; ++i) row_hashes_[i] = row_hash(job_.row0 + row + i);
    base_stride_ = out_stride_ = kStride;
    base_rows_ = nullptr;
    out_rows_ = out_block_;
    if (!is_widened() && is_direct<V>(out, cols_)) {
      out_rows_ = static_cast<T*>(out.data);
      out_stride_ = out.row_stride;
    }
    if (job_.weight.data == nullptr || is_widened()) {
      if (is_widened()) base_ = at(job_.weight, row, col_);
      return;
    }
    base_ = at(job_.weight, row, col_);
    if (is_direct<V>(base_, cols_)) {
      base_rows_ = static_cast<const T*>(base_.data);
      base_stride_ = base_.row_stride;
    } else {
      load_block<V>(base_, rows, cols_, base_block_, kStride, padded_cols<V>(cols_));
      base_rows_ = base_block_;
    }
  }

  // One vector of the block; W is of the vector's type, not yet rounded.
  void put(int64_t row, int64_t col, V p, V q) {
    V total = update(p, q, scale_);
    if (base_rows_ != nullptr) {
      const T* base = base_rows_ + row * base_stride_ + col;
      // The next block's rows, far apart in memory, one line at a time.
      __builtin_prefetch(base + kRowBlock * base_stride_, 0, 2);
      total = add(V::load(base), total);
    }
    total.store(out_rows_ + row * out_stride_ + col);
  }

  void end() {
    const Field field = job_.dithers ? Field{row_hashes_, column_hashes_} : Field{nullptr, nullptr};
    if (is_widened()) {
      load_block<Lanes<double, 1>>(base_, rows_, cols_, sums_, kStride, cols_);
      for (int64_t i = 0; i < rows_; ++i)
        for (int64_t j = 0; j < cols_; ++j) sums_[i * kStride + j] += out_block_[i * kStride + j];
      store_block(sums_, kStride, out_, rows_, cols_, field);
    } else if (out_rows_ == out_block_) {
      store_block(out_block_, kStride, out_, rows_, cols_, field);
    }
  }

 private:
  bool is_widened() const {
    return sizeof(T) == 4 && job_.weight.data != nullptr && job_.weight.dtype == Dtype::float64;
  }

  const WeightJob& job_;
  V scale_;
  uint32_t* row_hashes_;
  uint32_t* column_hashes_;
  T* base_block_;
  T* out_block_;
  double* sums_;
  int64_t col_ = 0, cols_ = 0, rows_ = 0;
  Matrix base_, out_;
  const T* base_rows_ = nullptr;
  T* out_rows_ = nullptr;
  int64_t base_stride_ = 0, out_stride_ = 0;
};

// Both pairs of a unit in the accumulation type, columns and ranks padded with zeros.
template <class V>
class PackedFactors {
  using T = typename V::scalar;

 public:
  Pair<T> magnitude, direction;

  PackedFactors(Scratch& scratch, const dual_lora::Factors& factors, int64_t unit_rows)
      : magnitude(take(scratch, factors.A.rows, unit_rows)),
        direction(take(scratch, factors.C.rows, unit_rows)),
        rows_(scratch.take<T>(kRowBlock * padded_rank(larger(factors.A.rows, factors.C.rows)))) {}

  void pack_columns(const dual_lora::Factors& factors, int64_t col, int64_t cols) {
    pack_down(factors.A, col, cols, magnitude);
    pack_down(factors.C, col, cols, direction);
  }

  void pack_rows(const dual_lora::Factors& factors, int64_t row, int64_t rows) {
    pack_up(factors.B, row, rows, magnitude);
    pack_up(factors.D, row, rows, direction);
  }

 private:
  static int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

  static Pair<T> take(Scratch& scratch, int64_t rank, int64_t unit_rows) {
    T* down = scratch.take<T>(padded_rank(rank) * kStride);
    return {down, scratch.take<T>(padded_rank(rank) * unit_rows), rank};
  }

  static void pack_down(const Matrix& down, int64_t col, int64_t cols, const Pair<T>& pair) {
    load_block<V>(at(down, 0, col), pair.rank, cols, pair.down, kStride, padded_cols<V>(cols));
    for (int64_t i = pair.rank * kStride; i < padded_rank(pair.rank) * kStride; ++i) pair.down[i] = 0;
  }

  void pack_up(const Matrix& up, int64_t row, int64_t rows, const Pair<T>& pair) {
    const int64_t rank = padded_rank(pair.rank);
    for (int64_t start = 0; start < rows; start += kRowBlock) {
      const int64_t block = smaller(kRowBlock, rows - start);
      load_block<V>(at(up, row + start, 0), block, pair.rank, rows_, rank, rank);
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t i = 0; i < block; ++i) pair.up[start * rank + r * kRowBlock + i] = rows_[i * rank + r];
    }
  }

  T* rows_;
};

}  // namespace
