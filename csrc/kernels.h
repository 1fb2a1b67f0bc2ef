// The three kernels and their table, `kernels`. An instruction set's file defines two macros and includes this:
// DUAL_LORA_NAMESPACE, and DUAL_LORA_VECTORS, the header of that namespace's vector types F32 and F64.
//
// Every instruction set has a namespace of its own: the same templates are compiled once for each, and the linker would
// merge functions of one name. The anonymous namespace inside it tells the compiler that nothing outside calls them.
// With external linkage GCC 12 inlined less, and W of 4096 × 4096 took 1.1 times as long.
#pragma once

#include <type_traits>

#include "capability.h"
#include "weight_block.h"

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

// ---- W

template <class V>
void weight_kernel(const WeightJob& job, Range range, void* memory) {
  Scratch scratch = {static_cast<char*>(memory)};
  WeightBlock<V> block(scratch, job);
  const PackedFactors<V> packed(job.factors, job.packed);
  const auto magnitude = packed.magnitude(range.row, range.col), direction = packed.direction(range.row, range.col);
  block.set_columns(range.col, range.cols);
  for (int64_t start = 0; start < range.rows; start += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, range.rows - start);
    block.begin(range.row + start, rows, at(job.out, range.row + start, range.col));
    for_each_tile<V>(magnitude, direction, start, rows, 0, padded_cols<V>(range.cols),
                     [&](int64_t row, int64_t col, const auto& p, const auto& q) { block.put(row, col, p, q); });
    block.end();
  }
}

// ---- gradients of the factors

// V: the factors' accumulation type, in which P and Q are computed as in the forward pass. H: that of H and the sums.
template <class V, class H>
struct GradientMemory {
  using T = typename H::scalar;
  static constexpr bool is_mixed = !std::is_same_v<V, H>;

  WeightBlock<V> block;
  T* h;
  T* grad_p;
  T* grad_q;
  T* down;  // sums over the unit's rows: [ranks, kStride]
  T* up;    // sums over columns of one block: [kRowBlock, ranks]
  typename V::scalar* p;
  typename V::scalar* q;
  size_t used;

  GradientMemory(Scratch scratch, const GradientJob& job)
      : block(scratch, job.weight_job),
        h(scratch.take<T>(kRowBlock * kStride)),
        grad_p(scratch.take<T>(kRowBlock * kStride)),
        grad_q(scratch.take<T>(kRowBlock * kStride)),
        down(scratch.take<T>(padded_ranks(job.weight_job.factors) * kStride)),
        up(scratch.take<T>(kRowBlock * padded_ranks(job.weight_job.factors))),
        p(scratch.take<typename V::scalar>(is_mixed ? kRowBlock * kStride : 0)),
        q(scratch.take<typename V::scalar>(is_mixed ? kRowBlock * kStride : 0)),
        used(scratch.used) {}
};

// Columns of a block worked on at a time: their P and Q, gradients and sums stay in a 32 KiB L1 cache at rank 16.
constexpr int64_t kChunk = 96;

template <class V>
DUAL_LORA_INLINE void store_nearest(V x, typename V::scalar* to) {
  x.store(to);
}

// ∂P and ∂Q of one tile, from H, into blocks of To: the accumulation type, or bf16 (uint16_t).
template <class V, int R, int C, class Storage, class To>
DUAL_LORA_INLINE void store_gradients(Storage, const typename Storage::Element* h, int64_t h_stride,
                                      const V (&p)[R][C], const V (&q)[R][C], const GradientJob& job, To* grad_p,
                                      To* grad_q) {
  using T = typename V::scalar;
  const V scale = V::set(static_cast<T>(job.weight_job.factors.scale)),
          bound = V::set(static_cast<T>(job.ste.clip_bound));
  DUAL_LORA_UNROLL(i, R)
    DUAL_LORA_UNROLL(c, C) {
      const auto* from = h + i * h_stride + c * V::lanes;
      __builtin_prefetch(from + kRowBlock * h_stride, 0, 2);
      const auto grads = product_gradients(Storage::load(from), p[i][c], q[i][c], scale, job.ste.estimator, bound);
      store_nearest(grads.p, grad_p + i * kStride + c * V::lanes);
      store_nearest(grads.q, grad_q + i * kStride + c * V::lanes);
    }
}

template <class V, int R, int C>
inline void store_tile(const V (&values)[R][C], typename V::scalar* block) {
  DUAL_LORA_UNROLL(i, R)
    DUAL_LORA_UNROLL(c, C) values[i][c].store(block + i * kStride + c * V::lanes);
}

// To: the type of ∂P and ∂Q in memory, H's or (uint16_t) bf16 for contractions in pairs.
template <class V, class H, class To = typename H::scalar>
void gradient_kernel(const GradientJob& job, Range range, const Partials& partials, void* memory) {
  using T = typename H::scalar;
  constexpr bool is_paired = !std::is_same_v<To, T>;
  using One = Lanes<T, 1>;
  const Factors& factors = job.weight_job.factors;
  const int64_t ranks = padded_ranks(factors), magnitude_rank = padded_rank(factors.A.rows);
  const int64_t cols = padded_cols<V>(range.cols);  // V has as many lanes as H, or twice as many
  const bool writes_weight = job.weight_job.out.data != nullptr;
  GradientMemory<V, H> work({static_cast<char*>(memory)}, job);
  constexpr bool is_mixed = GradientMemory<V, H>::is_mixed;
  const PackedFactors<V> packed(factors, job.weight_job.packed);
  const PackedFactors<H> wide(factors, job.wide_packed);
  const auto magnitude = packed.magnitude(range.row, range.col), direction = packed.direction(range.row, range.col);
  const auto wide_magnitude = wide.magnitude(range.row, range.col),
             wide_direction = wide.direction(range.row, range.col);
  work.block.set_columns(range.col, range.cols);
  for (int64_t r = 0; r < ranks; ++r)
    for (int64_t j = 0; j < cols; ++j) work.down[r * kStride + j] = 0;
  T* up = static_cast<T*>(partials.up);
  To* const grad_p = reinterpret_cast<To*>(work.grad_p);
  To* const grad_q = reinterpret_cast<To*>(work.grad_q);

  for (int64_t start = 0; start < range.rows; start += kRowBlock) {
    const int64_t rows = smaller(kRowBlock, range.rows - start);
    Matrix h = at(job.h, range.row + start, range.col);
    if (is_mixed || !is_direct<H>(h, range.cols)) {
      load_block<H>(h, rows, range.cols, work.h, kStride, cols);
      h = {work.h, sizeof(T) == 4 ? Dtype::float32 : Dtype::float64, rows, cols, kStride, 1};
    }
    for (int64_t i = 0; i < rows * ranks; ++i) work.up[i] = 0;
    if (writes_weight) work.block.begin(range.row + start, rows, at(job.weight_job.out, range.row + start, range.col));
    for (int64_t chunk = 0; chunk < cols; chunk += kChunk) {
      const int64_t stop = smaller(chunk + kChunk, cols);
      for_each_tile<V>(
          magnitude, direction, start, rows, chunk, stop, [&](int64_t row, int64_t col, const auto& p, const auto& q) {
            const int64_t place = row * kStride + col;
            if constexpr (is_mixed) {
              store_tile(p, work.p + place);
              store_tile(q, work.q + place);
            } else {
              with_storage<V>(h.dtype, [&](auto storage) DUAL_LORA_INLINE_LAMBDA {
                const auto* from = static_cast<const typename decltype(storage)::Element*>(h.data);
                store_gradients(storage, from + row * h.row_stride + col, h.row_stride, p, q, job, grad_p + place,
                                grad_q + place);
              });
            }
            if (writes_weight) work.block.put(row, col, p, q);
          });
      if constexpr (is_mixed) {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = chunk; j < stop; ++j) {
            const int64_t place = i * kStride + j;
            const One p[1][1] = {{One::set(work.p[place])}}, q[1][1] = {{One::set(work.q[place])}};
            store_gradients(Own<One>{}, work.h + place, kStride, p, q, job, grad_p + place, grad_q + place);
          }
      }
      // Of the chunk's columns, padded to whole vectors, only `present` are the job's: in the others P may be 0 · ∞.
      const int64_t present = smaller(stop, range.cols) - chunk;
      // Adds the chunk's contribution to the sums of a pair, whose ranks begin at `first` among both pairs'.
      const auto contract = [&](To* grad, const Pair<T>& pair, int64_t first) {
        T* const down = work.down + first * kStride + chunk;
        const int64_t rank = stepped_rank(pair.rank), stride = padded_rank(pair.rank);
        if constexpr (is_paired) {
#if defined(__AVX512BF16__)
          if (rows % 2 != 0)
            for (int64_t j = 0; j < stop - chunk; ++j) grad[rows * kStride + j] = 0;
          sum_over_row_pairs(grad, rows, stop - chunk, pair.up_pairs + start * stride, rank, down);
          if (present % 2 != 0)
            for (int64_t i = 0; i < rows; ++i) grad[i * kStride + present] = 0;
          sum_over_column_pairs(grad, rows, present, pair.down_pairs + chunk * stride, pair.rank, work.up + first, ranks);
#endif
        } else {
          sum_over_rows<H>(grad, rows, stop - chunk, pair.up_block(start), rank, down);
          sum_over_columns<H>(grad, rows, present, pair.down_t + chunk * stride, pair.rank, work.up + first, ranks);
        }
      };
      if (job.magnitude) contract(grad_p + chunk, wide_magnitude, 0);
      if (job.direction) contract(grad_q + chunk, wide_direction, magnitude_rank);
    }
    if (writes_weight) work.block.end();
    for (int64_t i = 0; i < rows * ranks; ++i) up[start * ranks + i] = work.up[i];
  }
  T* down = static_cast<T*>(partials.down);
  for (int64_t r = 0; r < ranks; ++r)
    for (int64_t j = 0; j < range.cols; ++j) down[r * partials.down_stride + j] = work.down[r * kStride + j];
}

// ---- few tokens

constexpr int kTokenStep = 4;

inline int64_t padded_tokens(int64_t tokens) {
  return tokens == 1 ? 1 : (tokens + kTokenStep - 1) / kTokenStep * kTokenStep;
}

template <class V>
struct TokenMemory {
  using T = typename V::scalar;
  WeightBlock<V> block;
  T* weight;  // W of one block, as numbers on the grid
  T* x;       // [tokens, kStride]
  T* sums;    // [kTokenRows, tokens] vectors
  T* y;       // [kTokenRows], of one token; so is the bias
  T* bias;
  size_t used;

  TokenMemory(Scratch scratch, const TokenJob& job)
      : block(scratch, job.weight_job),
        weight(scratch.take<T>(kRowBlock * kStride)),
        x(scratch.take<T>(padded_tokens(job.x.rows) * kStride)),
        sums(scratch.take<T>(kTokenRows * padded_tokens(job.x.rows) * V::lanes)),
        y(scratch.take<T>(kTokenRows)),
        bias(scratch.take<T>(kTokenRows)),
        used(scratch.used) {}
};

// sums[i] += W[i, :] · x, lane by lane, for one tile and one token, as token_product does it.
template <class V, int R, int C>
DUAL_LORA_INLINE void add_product(WeightBlock<V>& block, const typename V::scalar* x, typename V::scalar* sums,
                                  int64_t row, int64_t col, const V (&p)[R][C], const V (&q)[R][C]) {
  V weight[R][C];
  block.value(row, col, p, q, weight);
  DUAL_LORA_UNROLL(i, R) {
    V total = V::load(sums + i * V::lanes);
    DUAL_LORA_UNROLL(c, C) total = fma(weight[i][c], V::load(x + c * V::lanes), total);
    total.store(sums + i * V::lanes);
  }
}

template <class V>
void token_kernel(const TokenJob& job, int64_t row, int64_t rows, void* memory) {
  using T = typename V::scalar;
  const Factors& factors = job.weight_job.factors;
  const int64_t tokens = padded_tokens(job.x.rows), in_features = factors.A.cols;
  TokenMemory<V> work({static_cast<char*>(memory)}, job);
  const Matrix weight = {work.weight, sizeof(T) == 4 ? Dtype::float32 : Dtype::float64, kRowBlock, kStride, kStride, 1};
  const PackedFactors<V> packed(factors, job.weight_job.packed);
  for (int64_t i = 0; i < rows * tokens * V::lanes; ++i) work.sums[i] = 0;
  for (int64_t col = 0; col < in_features; col += kUnitCols) {
    const int64_t cols = smaller(kUnitCols, in_features - col), padded = padded_cols<V>(cols);
    const auto magnitude = packed.magnitude(row, col), direction = packed.direction(row, col);
    load_block<V>(at(job.x, 0, col), job.x.rows, cols, work.x, kStride, padded);
    for (int64_t i = job.x.rows * kStride; i < tokens * kStride; ++i) work.x[i] = 0;
    work.block.set_columns(col, cols);
    for (int64_t start = 0; start < rows; start += kRowBlock) {
      const int64_t block = smaller(kRowBlock, rows - start);
      work.block.begin(row + start, block, weight);
      T* sums = work.sums + start * tokens * V::lanes;
      if (tokens == 1 && work.block.is_final()) {  // from register to register
        for_each_tile<V>(magnitude, direction, start, block, 0, padded,
                         [&](int64_t i, int64_t j, const auto& p, const auto& q) DUAL_LORA_INLINE_LAMBDA {
                           add_product(work.block, work.x + j, sums + i * V::lanes, i, j, p, q);
                         });
        continue;
      }
      for_each_tile<V>(magnitude, direction, start, block, 0, padded,
                       [&](int64_t i, int64_t j, const auto& p, const auto& q) { work.block.put(i, j, p, q); });
      work.block.end();
      for (int64_t i = 0; i < block; ++i)
        for (int64_t j = cols; j < padded; ++j) work.weight[i * kStride + j] = 0;
      if (tokens == 1) token_product<V, 1>(work.weight, block, padded, work.x, tokens, sums);
      else token_product<V, kTokenStep>(work.weight, block, padded, work.x, tokens, sums);
    }
  }
  if (job.bias.data != nullptr) load_block<V>(at(job.bias, 0, row), 1, rows, work.bias, kTokenRows, rows);
  for (int64_t token = 0; token < job.x.rows; ++token) {
    for (int64_t i = 0; i < rows; ++i) {
      const T product = sum(V::load(work.sums + (i * tokens + token) * V::lanes));
      work.y[i] = job.bias.data == nullptr ? product : product + work.bias[i];
    }
    store_block(work.y, kTokenRows, at(job.y, token, row), job.y.dtype, 1, rows, {nullptr, nullptr});
  }
}

// ---- the table: which accumulation types a job needs

inline bool is_wide(Dtype dtype) { return dtype == Dtype::float64; }

inline void pack_strip(const Factors& factors, bool wide, int64_t strip, const Packed& packed) {
  wide ? PackedFactors<F64>(factors, packed).pack_strip(strip) : PackedFactors<F32>(factors, packed).pack_strip(strip);
}

inline void pack_block(const Factors& factors, bool wide, int64_t block, const Packed& packed) {
  wide ? PackedFactors<F64>(factors, packed).pack_block(block) : PackedFactors<F32>(factors, packed).pack_block(block);
}

template <class V>
size_t block_scratch(const WeightJob& job) {
  Scratch scratch = {nullptr};
  WeightBlock<V> block(scratch, job);
  return scratch.used;
}

inline size_t weight_scratch(const WeightJob& job) {
  return is_wide(job.factors.A.dtype) ? block_scratch<F64>(job) : block_scratch<F32>(job);
}

inline void weight(const WeightJob& job, Range range, void* scratch) {
  is_wide(job.factors.A.dtype) ? weight_kernel<F64>(job, range, scratch) : weight_kernel<F32>(job, range, scratch);
}

inline size_t gradient_scratch(const GradientJob& job) {
  if (is_wide(job.weight_job.factors.A.dtype)) return GradientMemory<F64, F64>({nullptr}, job).used;
  if (job.is_wide) return GradientMemory<F32, F64>({nullptr}, job).used;
  return GradientMemory<F32, F32>({nullptr}, job).used;
}

inline void gradient(const GradientJob& job, Range range, const Partials& partials, void* scratch) {
  if constexpr (kHasPairs) {
    if (job.in_pairs) return gradient_kernel<F32, F32, uint16_t>(job, range, partials, scratch);
  }
  if (is_wide(job.weight_job.factors.A.dtype)) gradient_kernel<F64, F64>(job, range, partials, scratch);
  else if (job.is_wide) gradient_kernel<F32, F64>(job, range, partials, scratch);
  else gradient_kernel<F32, F32>(job, range, partials, scratch);
}

inline size_t token_scratch(const TokenJob& job) {
  return is_wide(job.x.dtype) ? TokenMemory<F64>({nullptr}, job).used : TokenMemory<F32>({nullptr}, job).used;
}

inline void token(const TokenJob& job, int64_t row, int64_t rows, void* scratch) {
  is_wide(job.x.dtype) ? token_kernel<F64>(job, row, rows, scratch) : token_kernel<F32>(job, row, rows, scratch);
}

}  // namespace

const KernelTable kernels = {kHasPairs,        pack_strip, pack_block,    weight_scratch, weight,
                             gradient_scratch, gradient,   token_scratch, token};

}  // namespace dual_lora::DUAL_LORA_NAMESPACE
