// The three kernels, for the vector types F32 and F64 that an instruction set's file defines before including this.
//
// Everything has internal linkage: the same templates are compiled once per instruction set, and the linker must not
// merge them.
#pragma once

#include "weight_block.h"

namespace {

using dual_lora::Estimator;
using dual_lora::GradientJob;
using dual_lora::kTokenRows;
using dual_lora::kUnitCols;
using dual_lora::padded_ranks;
using dual_lora::Partials;
using dual_lora::Range;
using dual_lora::TokenJob;

// ---- W

template <class V>
struct WeightMemory {
  PackedFactors<V> factors;
  WeightBlock<V> block;
  size_t used;

  WeightMemory(Scratch scratch, const WeightJob& job)
      : factors(scratch, job.factors, kUnitRows), block(scratch, job), used(scratch.used) {}
};

template <class V>
void weight_kernel(const WeightJob& job, Range range, void* memory) {
  WeightMemory<V> work({static_cast<char*>(memory)}, job);
  work.factors.pack_columns(job.factors, range.col, range.cols);
  work.factors.pack_rows(job.factors, range.row, range.rows);
  work.block.set_columns(range.col, range.cols);
  for (int64_t start = 0; start < range.rows; start += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, range.rows - start);
    work.block.begin(range.row + start, rows, at(job.out, range.row + start, range.col));
    for_each_product<V>(work.factors.magnitude, work.factors.direction, start, rows, padded_cols<V>(range.cols),
                        [&](int64_t row, int64_t col, V p, V q) { work.block.put(row, col, p, q); });
    work.block.end();
  }
}

// ---- gradients of the factors

template <class T, class U>
struct is_same {
  static constexpr bool value = false;
};
template <class T>
struct is_same<T, T> {
  static constexpr bool value = true;
};

// V: the factors' accumulation type, in which P and Q are computed as in the forward pass. H: that of H and the sums.
template <class V, class H>
struct GradientMemory {
  using T = typename H::scalar;
  static constexpr bool is_mixed = !is_same<V, H>::value;

  PackedFactors<V> factors;
  WeightBlock<V> block;
  PackedFactors<H> wide_factors;
  T* h;
  T* grad_p;
  T* grad_q;
  T* down;  // sums over the unit's rows: [ranks, kStride]
  T* up;    // sums over columns of one block, lane by lane: [kRowBlock, ranks] vectors
  typename V::scalar* p;
  typename V::scalar* q;
  size_t used;

  GradientMemory(Scratch scratch, const GradientJob& job, int64_t ranks)
      : factors(scratch, job.weight_job.factors, kUnitRows),
        block(scratch, job.weight_job),
        wide_factors(scratch, is_mixed ? job.weight_job.factors : dual_lora::Factors{}, kUnitRows),
        h(scratch.take<T>(kRowBlock * kStride)),
        grad_p(scratch.take<T>(kRowBlock * kStride)),
        grad_q(scratch.take<T>(kRowBlock * kStride)),
        down(scratch.take<T>(ranks * kStride)),
        up(scratch.take<T>(kRowBlock * ranks * H::lanes)),
        p(scratch.take<typename V::scalar>(is_mixed ? kRowBlock * kStride : 0)),
        q(scratch.take<typename V::scalar>(is_mixed ? kRowBlock * kStride : 0)),
        used(scratch.used) {}

  const PackedFactors<H>& contraction_factors() const {
    if constexpr (is_mixed) return wide_factors;
    else return factors;
  }
};

// Adds one block's contribution to the sums of a pair: `down` [rank, kStride], `up` [rows, rank] vectors.
template <class H>
inline void contract(const typename H::scalar* grad, int64_t block, int64_t rows, int64_t cols,
                     const Pair<typename H::scalar>& pair, typename H::scalar* down, typename H::scalar* up,
                     int64_t up_stride) {
  const int64_t rank = padded_rank(pair.rank);
  contract_rows<H>(grad, rows, cols, pair.up_block(block), rank, down);
  contract_columns<H, kRankStep>(grad, rows, cols, pair.down, rank, up, up_stride);
}

template <class V, class H>
void gradient_kernel(const GradientJob& job, Range range, const Partials& partials, void* memory) {
  using T = typename H::scalar;
  using One = Lanes<T, 1>;
  const dual_lora::Factors& factors = job.weight_job.factors;
  const int64_t ranks = padded_ranks(factors), magnitude_rank = padded_rank(factors.A.rows);
  const int64_t cols = padded_cols<H>(padded_cols<V>(range.cols));
  const bool writes_weight = job.weight_job.out.data != nullptr;
  GradientMemory<V, H> work({static_cast<char*>(memory)}, job, ranks);
  constexpr bool is_mixed = GradientMemory<V, H>::is_mixed;
  work.factors.pack_columns(factors, range.col, range.cols);
  work.factors.pack_rows(factors, range.row, range.rows);
  if constexpr (is_mixed) {
    work.wide_factors.pack_columns(factors, range.col, range.cols);
    work.wide_factors.pack_rows(factors, range.row, range.rows);
  }
  work.block.set_columns(range.col, range.cols);
  for (int64_t i = 0; i < ranks * kStride; ++i) work.down[i] = 0;
  const T scale = static_cast<T>(factors.scale), bound = static_cast<T>(job.clip_bound);

  for (int64_t start = 0; start < range.rows; start += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, range.rows - start);
    const Matrix h_view = at(job.h, range.row + start, range.col);
    const T* h = static_cast<const T*>(h_view.data);
    int64_t h_stride = h_view.row_stride;
    if (!is_direct<H>(h_view, cols == range.cols ? cols : 1)) {
      load_block<H>(h_view, rows, range.cols, work.h, kStride, cols);
      h = work.h;
      h_stride = kStride;
    }
    if (writes_weight)
      work.block.begin(range.row + start, rows, at(job.weight_job.out, range.row + start, range.col));
    for_each_product<V>(
        work.factors.magnitude, work.factors.direction, start, rows, padded_cols<V>(range.cols),
        [&](int64_t row, int64_t col, V p, V q) {
          const int64_t place = row * kStride + col;
          if constexpr (is_mixed) {
            p.store(work.p + place);
            q.store(work.q + place);
          } else {
            const T* from = h + row * h_stride + col;
            __builtin_prefetch(from + kRowBlock * h_stride, 0, 2);
            const auto grads =
                product_gradients(H::load(from), p, q, H::set(scale), job.estimator, H::set(bound));
            grads.p.store(work.grad_p + place);
            grads.q.store(work.grad_q + place);
          }
          if (writes_weight) work.block.put(row, col, p, q);
        });
    if constexpr (is_mixed) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          const int64_t place = i * kStride + j;
          const bool is_inside = j < range.cols;
          const One p = One::set(is_inside ? work.p[place] : 0), q = One::set(is_inside ? work.q[place] : 0);
          const auto grads = product_gradients(One::load(h + i * h_stride + j), p, q, One::set(scale), job.estimator,
                                               One::set(bound));
          work.grad_p[place] = grads.p.v[0];
          work.grad_q[place] = grads.q.v[0];
        }
    }
    if (writes_weight) work.block.end();

    for (int64_t i = 0; i < rows * ranks * H::lanes; ++i) work.up[i] = 0;
    const PackedFactors<H>& pairs = work.contraction_factors();
    if (job.magnitude)
      contract<H>(work.grad_p, start, rows, cols, pairs.magnitude, work.down, work.up, ranks * H::lanes);
    if (job.direction)
      contract<H>(work.grad_q, start, rows, cols, pairs.direction, work.down + magnitude_rank * kStride,
                  work.up + magnitude_rank * H::lanes, ranks * H::lanes);
    T* up = static_cast<T*>(partials.up) + start * ranks;
    for (int64_t i = 0; i < rows * ranks; ++i) up[i] = sum(H::load(work.up + i * H::lanes));
  }
  T* down = static_cast<T*>(partials.down);
  for (int64_t r = 0; r < ranks; ++r)
    for (int64_t j = 0; j < range.cols; ++j) down[r * partials.down_stride + j] = work.down[r * kStride + j];
}

// ---- few tokens

inline int64_t padded_tokens(int64_t tokens) { return tokens == 1 ? 1 : padded_rank(tokens); }

template <class V>
struct TokenMemory {
  using T = typename V::scalar;
  PackedFactors<V> factors;
  WeightBlock<V> block;
  T* weight;   // W of one block, as numbers on the output dtype's grid
  void* rounded;  // the same in the output dtype, where that is narrower
  T* x;
  T* sums;  // [kTokenRows, tokens] vectors
  T* y;     // [kRowBlock, kTokenRows]
  T* bias;
  size_t used;

  TokenMemory(Scratch scratch, const TokenJob& job)
      : factors(scratch, job.weight_job.factors, kTokenRows),
        block(scratch, job.weight_job),
        weight(scratch.take<T>(kRowBlock * kStride)),
        rounded(scratch.take<T>(kRowBlock * kStride)),
        x(scratch.take<T>(padded_tokens(job.x.rows) * kStride)),
        sums(scratch.take<T>(kTokenRows * padded_tokens(job.x.rows) * V::lanes)),
        y(scratch.take<T>(kTokenRows)),
        bias(scratch.take<T>(kTokenRows)),
        used(scratch.used) {}
};

template <class V>
void token_kernel(const TokenJob& job, int64_t row, int64_t rows, void* memory) {
  using T = typename V::scalar;
  const dual_lora::Factors& factors = job.weight_job.factors;
  const int64_t tokens = padded_tokens(job.x.rows), in_features = factors.A.cols;
  TokenMemory<V> work({static_cast<char*>(memory)}, job);
  const Dtype dtype = job.weight_job.out.dtype;
  const bool is_wide = dtype == (sizeof(T) == 4 ? Dtype::float32 : Dtype::float64);
  const Matrix rounded = {is_wide ? work.weight : work.rounded, dtype, kRowBlock, kStride, kStride, 1};
  work.factors.pack_rows(factors, row, rows);
  for (int64_t i = 0; i < rows * tokens * V::lanes; ++i) work.sums[i] = 0;
  for (int64_t col = 0; col < in_features; col += kUnitCols) {
    const int64_t cols = smaller(kUnitCols, in_features - col), padded = padded_cols<V>(cols);
    work.factors.pack_columns(factors, col, cols);
    load_block<V>(at(job.x, 0, col), job.x.rows, cols, work.x, kStride, padded);
    for (int64_t i = job.x.rows * kStride; i < tokens * kStride; ++i) work.x[i] = 0;
    work.block.set_columns(col, cols);
    for (int64_t start = 0; start < rows; start += kRowBlock) {
      const int64_t block = smaller(kRowBlock, rows - start);
      work.block.begin(row + start, block, rounded);
      for_each_product<V>(work.factors.magnitude, work.factors.direction, start, block, padded,
                          [&](int64_t i, int64_t j, V p, V q) { work.block.put(i, j, p, q); });
      work.block.end();
      if (!is_wide || cols < padded) load_block<V>(rounded, block, cols, work.weight, kStride, padded);
      T* sums = work.sums + start * tokens * V::lanes;
      if (tokens == 1)
        contract_columns<V, 1>(work.weight, block, padded, work.x, tokens, sums, tokens * V::lanes);
      else
        contract_columns<V, kRankStep>(work.weight, block, padded, work.x, tokens, sums, tokens * V::lanes);
    }
  }
  if (job.bias.data != nullptr) load_block<V>(at(job.bias, 0, row), 1, rows, work.bias, kTokenRows, rows);
  for (int64_t token = 0; token < job.x.rows; ++token) {
    for (int64_t i = 0; i < rows; ++i) {
      const T product = sum(V::load(work.sums + (i * tokens + token) * V::lanes));
      work.y[i] = job.bias.data == nullptr ? product : product + work.bias[i];
    }
    store_block(work.y, kTokenRows, at(job.y, token, row), 1, rows, {nullptr, nullptr});
  }
}

// ---- the table: which accumulation types a job needs

inline bool is_wide(Dtype dtype) { return dtype == Dtype::float64; }

inline size_t weight_scratch(const WeightJob& job) {
  return is_wide(job.factors.A.dtype) ? WeightMemory<F64>({nullptr}, job).used : WeightMemory<F32>({nullptr}, job).used;
}

inline void weight(const WeightJob& job, Range range, void* scratch) {
  is_wide(job.factors.A.dtype) ? weight_kernel<F64>(job, range, scratch) : weight_kernel<F32>(job, range, scratch);
}

inline size_t gradient_scratch(const GradientJob& job) {
  const int64_t ranks = padded_ranks(job.weight_job.factors);
  if (is_wide(job.weight_job.factors.A.dtype)) return GradientMemory<F64, F64>({nullptr}, job, ranks).used;
  if (is_wide(job.h.dtype)) return GradientMemory<F32, F64>({nullptr}, job, ranks).used;
  return GradientMemory<F32, F32>({nullptr}, job, ranks).used;
}

inline void gradient(const GradientJob& job, Range range, const Partials& partials, void* scratch) {
  if (is_wide(job.weight_job.factors.A.dtype)) gradient_kernel<F64, F64>(job, range, partials, scratch);
  else if (is_wide(job.h.dtype)) gradient_kernel<F32, F64>(job, range, partials, scratch);
  else gradient_kernel<F32, F32>(job, range, partials, scratch);
}

inline size_t token_scratch(const TokenJob& job) {
  return is_wide(job.x.dtype) ? TokenMemory<F64>({nullptr}, job).used : TokenMemory<F32>({nullptr}, job).used;
}

inline void token(const TokenJob& job, int64_t row, int64_t rows, void* scratch) {
  is_wide(job.x.dtype) ? token_kernel<F64>(job, row, rows, scratch) : token_kernel<F32>(job, row, rows, scratch);
}

}  // namespace

// Defines an instruction set's table, `name()` in namespace dual_lora.
#define DUAL_LORA_KERNEL_TABLE(table)                                                                       \
  namespace dual_lora {                                                                                     \
  const KernelTable& table() {                                                                              \
    static const KernelTable kernels = {#table, weight_scratch, weight, gradient_scratch, gradient,         \
                                        token_scratch, token};                                              \
    return kernels;                                                                                         \
  }                                                                                                         \
  }
