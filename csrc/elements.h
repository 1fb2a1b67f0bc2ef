// Elements of any dtype and stride, to and from blocks of the accumulation type; rounding with its dither.
#pragma once

#include <cstring>
#include <type_traits>

#include DUAL_LORA_VECTORS
#include "job.h"
#include "vectors/lanes.h"

// What works in registers must not be left to the compiler's judgement: a call passes vectors through memory.
#define DUAL_LORA_INLINE inline __attribute__((always_inline))
#define DUAL_LORA_INLINE_LAMBDA __attribute__((always_inline))

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- the dither's field (dual_lora_kernels/rounding.py specifies it)

inline uint32_t mix(uint32_t u) {
  u ^= u >> 16;
  u *= 0x21F0AAADu;
  u ^= u >> 15;
  u *= 0x735A2D97u;
  return u ^ (u >> 15);
}

inline uint32_t row_hash(int64_t row) { return mix(static_cast<uint32_t>(row + 1)) | 1u; }
inline uint32_t column_hash(int64_t col) { return mix(static_cast<uint32_t>(col + 0x5BD1E995)) | 1u; }

// ---- one element

inline float bfloat16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// ---- vectors as they are stored: in their own type, or (fp32 vectors) in 16 bits

template <class V>
struct Own {
  using Element = typename V::scalar;
  static V load(const Element* p) { return V::load(p); }
  static void store(const V& x, Element* p) { x.store(p); }
  static void stream(const V& x, Element* p) { x.stream(p); }
};

// What is stored must lie on the 16-bit grid already.
struct Bfloat16 {
  using Element = uint16_t;
  static F32 load(const Element* p) { return F32::load_bfloat16(p); }
  static void store(const F32& x, Element* p) { x.store_bfloat16(p); }
  static void stream(const F32& x, Element* p) { x.store_bfloat16(p); }
};

struct Half {
  using Element = uint16_t;
  static F32 load(const Element* p) { return F32::load_half(p); }
  static void store(const F32& x, Element* p) { x.store_half(p); }
  static void stream(const F32& x, Element* p) { x.store_half(p); }
};

// Calls use(storage) for vectors V stored as `dtype`: V's own, or for fp32 vectors a 16-bit one.
template <class V, class Use>
DUAL_LORA_INLINE void with_storage(Dtype dtype, Use&& use) {
  if constexpr (std::is_same_v<V, F32>) {
    if (dtype == Dtype::bfloat16) return use(Bfloat16{});
    if (dtype == Dtype::float16) return use(Half{});
  }
  use(Own<V>{});
}

// ---- rounding to a dtype's grid, as rounding.round_to; the numbers stay fp32

// The dither of a vector: its row's hash and those of its columns. Without hashes, rounding is to nearest.
struct Dither {
  uint32_t row;
  const uint32_t* columns;
};

// The dither keeps a significand's length, so that below fp16's normal numbers its grid needs a rounding of its own.
DUAL_LORA_INLINE F32 on_grid(F32 x, Dtype grid, Dither dither) {
  const bool dithers = dither.columns != nullptr;
  if (grid == Dtype::bfloat16)
    return dithers ? x.template dithered<16>(dither.row, dither.columns) : x.nearest_bfloat16();
  if (grid == Dtype::float16)
    return dithers ? x.template dithered<13>(dither.row, dither.columns).nearest_half() : x.nearest_half();
  return x;
}

// ---- rows of `count` dense elements

template <class V>
inline void widen_half(const uint16_t* from, typename V::scalar* to, int64_t count) {
  int64_t j = 0;
  float part[F32::lanes];
  for (; j + F32::lanes <= count; j += F32::lanes) {
    F32::load_half(from + j).store(part);
    for (int lane = 0; lane < F32::lanes; ++lane) to[j + lane] = part[lane];
  }
  if (j < count) {
    uint16_t tail[F32::lanes] = {};
    std::memcpy(tail, from + j, static_cast<size_t>(count - j) * sizeof(uint16_t));
    F32::load_half(tail).store(part);
    for (int64_t lane = 0; j + lane < count; ++lane) to[j + lane] = part[lane];
  }
}

template <class V>
inline void widen(const void* from, Dtype dtype, typename V::scalar* to, int64_t count) {
  using T = typename V::scalar;
  if (dtype == Dtype::float32) {
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(static_cast<const float*>(from)[j]);
  } else if (dtype == Dtype::float64) {
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(static_cast<const double*>(from)[j]);
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t j = 0; j < count; ++j) to[j] = bfloat16_to_float(static_cast<const uint16_t*>(from)[j]);
  } else {
    widen_half<V>(static_cast<const uint16_t*>(from), to, count);
  }
}

constexpr int64_t kPiece = 64;  // elements of a row that are gathered at a time, on the stack

// One rounding of `from` to the grid of `grid`, stored as `dtype`: wider types go through fp32 to 16 bits, as PyTorch's
// conversions do.
template <class T>
inline void round_row(const T* from, void* to, Dtype dtype, Dtype grid, int64_t count, Dither dither) {
  const bool is_rounded = grid == Dtype::bfloat16 || grid == Dtype::float16;
  if (!is_rounded && dtype == Dtype::float32) {
    for (int64_t j = 0; j < count; ++j) static_cast<float*>(to)[j] = static_cast<float>(from[j]);
    return;
  }
  if (!is_rounded && dtype == Dtype::float64) {
    for (int64_t j = 0; j < count; ++j) static_cast<double*>(to)[j] = static_cast<double>(from[j]);
    return;
  }
  with_storage<F32>(dtype, [&](auto storage) {
    using Element = typename decltype(storage)::Element;
    Element* out = static_cast<Element*>(to);
    for (int64_t j = 0; j < count; j += F32::lanes) {
      const int64_t piece = smaller(F32::lanes, count - j);
      float values[F32::lanes] = {};
      Element rounded[F32::lanes];
      for (int64_t lane = 0; lane < piece; ++lane) values[lane] = static_cast<float>(from[j + lane]);
      const Dither near = {dither.row, dither.columns == nullptr ? nullptr : dither.columns + j};
      storage.store(on_grid(F32::load(values), grid, near), rounded);
      std::memcpy(out + j, rounded, static_cast<size_t>(piece) * sizeof(Element));
    }
  });
}

// ---- blocks

inline size_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The view of `m` that begins at (row, col).
inline Matrix at(Matrix m, int64_t row, int64_t col) {
  const int64_t offset = row * m.row_stride + col * m.col_stride;
  m.data = static_cast<char*>(m.data) + offset * static_cast<int64_t>(size_of(m.dtype));
  return m;
}

// Strided elements into rows of kPiece dense ones, or back; at most kRowBlock rows and kPiece columns. Down the
// columns: transposed weights have those in memory. Copied as bytes, since the elements are numbers elsewhere.
template <size_t size, bool into_matrix>
inline void transfer(const Matrix& m, int64_t rows, int64_t cols, unsigned char* dense) {
  unsigned char* const data = static_cast<unsigned char*>(m.data);
  const int64_t width = static_cast<int64_t>(size), row_stride = m.row_stride * width,
                col_stride = m.col_stride * width;
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      unsigned char* inside = data + i * row_stride + j * col_stride;
      unsigned char* outside = dense + (i * kPiece + j) * width;
      std::memcpy(into_matrix ? inside : outside, into_matrix ? outside : inside, size);
    }
  }
}

template <bool into_matrix>
inline void transfer(const Matrix& m, int64_t rows, int64_t cols, unsigned char* dense) {
  if (size_of(m.dtype) == 8) transfer<8, into_matrix>(m, rows, cols, dense);
  else if (size_of(m.dtype) == 4) transfer<4, into_matrix>(m, rows, cols, dense);
  else transfer<2, into_matrix>(m, rows, cols, dense);
}

inline bool has_dense_rows(const Matrix& m, int64_t cols) { return m.col_stride == 1 || cols == 1; }

// The first rows × cols of `m` into `to` [rows, stride], with zeros in columns `cols` … `padded`.
template <class V>
inline void load_block(const Matrix& m, int64_t rows, int64_t cols, typename V::scalar* to, int64_t stride,
                       int64_t padded) {
  const int64_t size = static_cast<int64_t>(size_of(m.dtype));
  if (has_dense_rows(m, cols)) {
    for (int64_t i = 0; i < rows; ++i) widen<V>(at(m, i, 0).data, m.dtype, to + i * stride, cols);
  } else {
    alignas(8) unsigned char dense[kRowBlock * kPiece * 8];
    for (int64_t start = 0; start < rows; start += kRowBlock) {
      const int64_t block = smaller(kRowBlock, rows - start);
      for (int64_t j = 0; j < cols; j += kPiece) {
        const int64_t piece = smaller(kPiece, cols - j);
        transfer<false>(at(m, start, j), block, piece, dense);
        for (int64_t i = 0; i < block; ++i)
          widen<V>(dense + i * kPiece * size, m.dtype, to + (start + i) * stride + j, piece);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = cols; j < padded; ++j) to[i * stride + j] = 0;
}

// Hashes of a block's rows and columns; null pointers for rounding to nearest.
struct Field {
  const uint32_t* rows;
  const uint32_t* columns;

  Dither row(int64_t i, int64_t j) const { return rows == nullptr ? Dither{0, nullptr} : Dither{rows[i], columns + j}; }
};

// Rounds `from` [rows, stride], at most kRowBlock rows, to the grid of `grid` into the first rows × cols of `m`.
template <class T>
inline void store_block(const T* from, int64_t stride, const Matrix& m, Dtype grid, int64_t rows, int64_t cols,
                        Field field) {
  const int64_t size = static_cast<int64_t>(size_of(m.dtype));
  if (has_dense_rows(m, cols)) {
    for (int64_t i = 0; i < rows; ++i)
      round_row(from + i * stride, at(m, i, 0).data, m.dtype, grid, cols, field.row(i, 0));
    return;
  }
  alignas(8) unsigned char dense[kRowBlock * kPiece * 8];
  for (int64_t j = 0; j < cols; j += kPiece) {
    const int64_t piece = smaller(kPiece, cols - j);
    for (int64_t i = 0; i < rows; ++i)
      round_row(from + i * stride + j, dense + i * kPiece * size, m.dtype, grid, piece, field.row(i, j));
    transfer<true>(at(m, 0, j), rows, piece, dense);
  }
}

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
