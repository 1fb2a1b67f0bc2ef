// W = round(W0 + ΔW) of one block of rows: from vectors of P and Q into the output's memory.
#pragma once

#include "formula.h"
#include "four_bit.h"
#include "packed_factors.h"
#include "scratch.h"

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

// Whether vectors can be read from and written to a matrix itself.
template <class V>
inline bool is_direct(const Matrix& m, int64_t cols) {
  constexpr bool is_wide = sizeof(typename V::scalar) == 8;
  return (m.dtype == Dtype::float64) == is_wide && m.col_stride == 1 && cols % V::lanes == 0;
}

// Whether every vector of dense rows begins at a multiple of its size, as streaming stores need.
template <class V>
inline bool is_aligned(const Matrix& m) {
  const size_t bytes = V::lanes * sizeof(typename V::scalar);
  return reinterpret_cast<uintptr_t>(m.data) % bytes == 0 && static_cast<size_t>(m.row_stride) % V::lanes == 0;
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
    target_ = out_ = out;
    if (job_.dithers)
      for (int64_t i = 0; i < rows; ++i) row_hashes_[i] = row_hash(job_.row0 + row + i);
    is_direct_ = !is_widened() && is_direct<V>(out, cols_);
    if (!is_direct_) out_ = block(out_block_);
    streams_ = is_direct_ && job_.streams && size_of(out.dtype) == sizeof(T) && is_aligned<V>(out);
    base_ = Matrix{};
    if (job_.four_bit.packed != nullptr) {
      dequantise_block<V>(job_.four_bit, row, col_, rows, cols_, base_block_, kStride, padded_cols<V>(cols_));
      base_ = block(base_block_);
      return;
    }
    if (job_.weight.data == nullptr) return;
    base_ = at(job_.weight, row, col_);
    if (is_widened() || is_direct<V>(base_, cols_)) return;
    load_block<V>(base_, rows, cols_, base_block_, kStride, padded_cols<V>(cols_));
    base_ = block(base_block_);
  }

  // Whether `value` gives W itself: not yet where W0 is fp64 and the factors are not, or vectors reach past the columns.
  bool is_final() const { return is_direct_; }

  // W of one tile of the block; final as `is_final` says.
  template <int R, int C>
  DUAL_LORA_INLINE void value(int64_t row, int64_t col, const V (&p)[R][C], const V (&q)[R][C], V (&total)[R][C]) {
    DUAL_LORA_UNROLL(i, R)
      DUAL_LORA_UNROLL(c, C) total[i][c] = update(p[i][c], q[i][c], scale_);
    if (base_.data != nullptr && !is_widened()) {
      with_storage<V>(base_.dtype, [&](auto storage) DUAL_LORA_INLINE_LAMBDA {
        using Element = typename decltype(storage)::Element;
        const Element* base = static_cast<const Element*>(base_.data) + row * base_.row_stride + col;
        DUAL_LORA_UNROLL(i, R)
          DUAL_LORA_UNROLL(c, C) {
            const Element* from = base + i * base_.row_stride + c * V::lanes;
            // The next block's rows, far apart in memory, one line at a time.
            __builtin_prefetch(from + kRowBlock * base_.row_stride, 0, 2);
            total[i][c] = add(storage.load(from), total[i][c]);
          }
      });
    }
    if constexpr (std::is_same_v<V, F32>) {
      if (is_direct_ && size_of(job_.grid) == 2) {
        DUAL_LORA_UNROLL(i, R)
          DUAL_LORA_UNROLL(c, C)
            total[i][c] = on_grid(total[i][c], job_.grid, field().row(row + i, col + c * V::lanes));
      }
    }
  }

  // Writes one tile of the block. All loads come before the stores: rows of W0 and of the output tend to be multiples of
  // 4 KiB apart, and a load that follows such a store waits for it.
  template <int R, int C>
  DUAL_LORA_INLINE void put(int64_t row, int64_t col, const V (&p)[R][C], const V (&q)[R][C]) {
    V total[R][C];
    value(row, col, p, q, total);
    with_storage<V>(out_.dtype, [&](auto storage) DUAL_LORA_INLINE_LAMBDA {
      auto* out = static_cast<typename decltype(storage)::Element*>(out_.data) + row * out_.row_stride + col;
      if (streams_) {
        DUAL_LORA_UNROLL(i, R)
          DUAL_LORA_UNROLL(c, C) storage.stream(total[i][c], out + i * out_.row_stride + c * V::lanes);
      } else {
        DUAL_LORA_UNROLL(i, R)
          DUAL_LORA_UNROLL(c, C) storage.store(total[i][c], out + i * out_.row_stride + c * V::lanes);
      }
    });
  }

  void end() {
    if (streams_) fence();
    if (is_widened()) {
      load_block<Lanes<double, 1>>(base_, rows_, cols_, sums_, kStride, cols_);
      for (int64_t i = 0; i < rows_; ++i)
        for (int64_t j = 0; j < cols_; ++j) sums_[i * kStride + j] += out_block_[i * kStride + j];
      store_block(sums_, kStride, target_, job_.grid, rows_, cols_, field());
    } else if (!is_direct_) {
      store_block(out_block_, kStride, target_, job_.grid, rows_, cols_, field());
    }
  }

 private:
  bool is_widened() const {
    return sizeof(T) == 4 && job_.weight.data != nullptr && job_.weight.dtype == Dtype::float64;
  }

  Field field() const { return job_.dithers ? Field{row_hashes_, column_hashes_} : Field{nullptr, nullptr}; }

  // One of the blocks in scratch.
  static Matrix block(T* data) {
    return {data, sizeof(T) == 4 ? Dtype::float32 : Dtype::float64, kRowBlock, kStride, kStride, 1};
  }

  const WeightJob& job_;
  V scale_;
  uint32_t* row_hashes_;
  uint32_t* column_hashes_;
  T* base_block_;
  T* out_block_;
  double* sums_;
  int64_t col_ = 0, cols_ = 0, rows_ = 0;
  Matrix base_, out_;   // where tiles are read and written: the job's matrices, or blocks in scratch
  Matrix target_;       // the output
  bool is_direct_ = false, streams_ = false;
};

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
