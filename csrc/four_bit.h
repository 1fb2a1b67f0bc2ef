// A block of a quantised W0 into numbers: two codes a byte, an absmax for every `blocksize` elements.
#pragma once

#include "elements.h"

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

// The absmax of one block of elements.
inline float absmax_of(const FourBit& w, int64_t block) {
  if (w.nested == nullptr) return w.absmax[block];
  return w.nested_table[w.nested[block]] * w.nested_absmax[block / w.nested_blocksize] + w.nested_offset;
}

// Rounds to the grid of the dtype that the library dequantises to.
DUAL_LORA_INLINE F32 on_own_grid(F32 x, Dtype dtype) { return on_grid(x, dtype, {0, nullptr}); }

// `count` elements from flat element `first` on.
inline void dequantise_row(const FourBit& w, int64_t first, int64_t count, float* to) {
  using One = Lanes<float, 1>;
  const auto one = [&](int64_t element, float absmax) {
    const uint8_t pair = w.packed[element / 2];
    const float value = w.table[element % 2 == 0 ? pair >> 4 : pair & 15] * absmax;
    const One x = {{value}};
    if (w.dtype == Dtype::bfloat16) return x.nearest_bfloat16().v[0];
    return w.dtype == Dtype::float16 ? x.nearest_half().v[0] : value;
  };
  int64_t j = 0;
  while (j < count) {
    const int64_t block = (first + j) / w.blocksize, stop = smaller(count, (block + 1) * w.blocksize - first);
    const float absmax = absmax_of(w, block);
    const F32 scale = F32::set(absmax);
    if ((first + j) % 2 != 0) {
      to[j] = one(first + j, absmax);
      ++j;
    }
    for (; j + F32::lanes <= stop; j += F32::lanes)
      on_own_grid(mul(F32::look_up(w.table, w.packed + (first + j) / 2), scale), w.dtype).store(to + j);
    for (; j < stop; ++j) to[j] = one(first + j, absmax);
  }
}

// Rows × cols numbers, from (row, col) of the job's block on, into `to` [rows, stride], with zeros in columns `cols` …
// `padded`; at most kUnitCols columns.
template <class V>
inline void dequantise_block(const FourBit& w, int64_t row, int64_t col, int64_t rows, int64_t cols,
                             typename V::scalar* to, int64_t stride, int64_t padded) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = (w.row0 + row + i) * w.row_length + w.col0 + col;
    typename V::scalar* const line = to + i * stride;
    if constexpr (std::is_same_v<typename V::scalar, float>) {
      dequantise_row(w, first, cols, line);
    } else {
      float numbers[kUnitCols];
      dequantise_row(w, first, cols, numbers);
      for (int64_t j = 0; j < cols; ++j) line[j] = numbers[j];
    }
    for (int64_t j = cols; j < padded; ++j) line[j] = 0;
  }
}

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
