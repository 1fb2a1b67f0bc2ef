// Elements of any dtype and stride, to and from blocks of the accumulation type; rounding with its dither.
#pragma once

#include <cmath>
#include <cstring>

#include DUAL_LORA_VECTORS
#include "job.h"
#include "vectors/lanes.h"

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

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

constexpr uint32_t kQuietNan = 0x7FC00000u;

inline float bfloat16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// To nearest even; selects instead of branches, so that the loop over a row becomes vector code.
inline uint16_t bfloat16_nearest(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? kQuietNan >> 16 : rounded);
}

// The field's top bits added under the kept significand, then cut off. A NaN's bits could wrap, so it is replaced.
template <int dropped>
inline uint32_t dithered_bits(float x, uint32_t field) {
  const uint32_t bits = (bits_of(x) + (field >> (32 - dropped))) & ~((1u << dropped) - 1);
  return x != x ? kQuietNan : bits;
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

inline void narrow_to_half(const float* from, uint16_t* to, int64_t count) {
  int64_t j = 0;
  for (; j + F32::lanes <= count; j += F32::lanes) F32::load(from + j).store_half(to + j);
  if (j < count) {
    float tail[F32::lanes] = {};
    uint16_t part[F32::lanes];
    std::memcpy(tail, from + j, static_cast<size_t>(count - j) * sizeof(float));
    F32::load(tail).store_half(part);
    std::memcpy(to + j, part, static_cast<size_t>(count - j) * sizeof(uint16_t));
  }
}

constexpr int64_t kPiece = 64;  // elements of a row that are rounded or gathered at a time, on the stack

// The dither of one row: its hash and those of the columns. Without hashes, rounding is to nearest.
struct Dither {
  uint32_t row;
  const uint32_t* columns;
};

// One rounding of `from` to `dtype`, as rounding.round_to: wider types go through fp32, as PyTorch's conversions do.
template <class T>
inline void round_row(const T* from, void* to, Dtype dtype, int64_t count, Dither dither) {
  if (dtype == Dtype::float32) {
    for (int64_t j = 0; j < count; ++j) static_cast<float*>(to)[j] = static_cast<float>(from[j]);
    return;
  }
  if (dtype == Dtype::float64) {
    for (int64_t j = 0; j < count; ++j) static_cast<double*>(to)[j] = static_cast<double>(from[j]);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t start = 0; start < count; start += kPiece) {
    const int64_t piece = smaller(kPiece, count - start);
    float values[kPiece];
    for (int64_t j = 0; j < piece; ++j) values[j] = static_cast<float>(from[start + j]);
    const uint32_t* columns = dither.columns == nullptr ? nullptr : dither.columns + start;
    if (dtype == Dtype::bfloat16 && columns == nullptr) {
      for (int64_t j = 0; j < piece; ++j) out[start + j] = bfloat16_nearest(values[j]);
    } else if (dtype == Dtype::bfloat16) {
      for (int64_t j = 0; j < piece; ++j)
        out[start + j] = static_cast<uint16_t>(dithered_bits<16>(values[j], dither.row * columns[j]) >> 16);
    } else {
      if (columns != nullptr)
        for (int64_t j = 0; j < piece; ++j) values[j] = float_of(dithered_bits<13>(values[j], dither.row * columns[j]));
      narrow_to_half(values, out + start, piece);
    }
  }
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

// Rounds `from` [rows, stride], at most kRowBlock rows, into the first rows × cols of `m`.
template <class T>
inline void store_block(const T* from, int64_t stride, const Matrix& m, int64_t rows, int64_t cols, Field field) {
  const int64_t size = static_cast<int64_t>(size_of(m.dtype));
  if (has_dense_rows(m, cols)) {
    for (int64_t i = 0; i < rows; ++i) round_row(from + i * stride, at(m, i, 0).data, m.dtype, cols, field.row(i, 0));
    return;
  }
  alignas(8) unsigned char dense[kRowBlock * kPiece * 8];
  for (int64_t j = 0; j < cols; j += kPiece) {
    const int64_t piece = smaller(kPiece, cols - j);
    for (int64_t i = 0; i < rows; ++i)
      round_row(from + i * stride + j, dense + i * kPiece * size, m.dtype, piece, field.row(i, j));
    transfer<true>(at(m, 0, j), rows, piece, dense);
  }
}

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
