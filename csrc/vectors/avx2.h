// AVX2 vectors with FMA and F16C. Comparisons with NaN are false, and relu and clamp keep a NaN: min and max return
// their second operand where one is NaN.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dual_lora::avx2 {
namespace {

struct F32 {
  using scalar = float;
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  static constexpr int tile_rows = 4, tile_vectors = 2;  // 4 × 3 spills (docs/decisions.md)
  __m256 v;
  static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32 set(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  static F32 load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  // table[code] of as many codes as a vector has lanes, two a byte, the first in the upper half.
  static F32 look_up(const float* table, const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    const __m128i bytes = _mm_cvtsi32_si128(four), nibble = _mm_set1_epi8(15);
    const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
    const __m256i index = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));  // its low three bits permute
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index),
                 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))};
  }
  void store_half(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  F32 nearest_half() const { return {_mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))}; }
  static F32 load_bfloat16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  void store_bfloat16(uint16_t* p) const {
    const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
    const __m256i packed = _mm256_packus_epi32(bits, bits);  // within each half
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
  F32 nearest_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return kept<16>(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))));
  }
  template <int dropped>
  F32 dithered(uint32_t row, const uint32_t* columns) const {
    const __m256i hashes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
    const __m256i field = _mm256_mullo_epi32(_mm256_set1_epi32(static_cast<int>(row)), hashes);
    return kept<dropped>(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_srli_epi32(field, 32 - dropped)));
  }

 private:
  // `bits` without their last ones, or a quiet NaN where this vector has a NaN.
  template <int dropped>
  F32 kept(__m256i bits) const {
    const __m256 number = _mm256_cmp_ps(v, v, _CMP_ORD_Q);
    const __m256 cut = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-(1 << dropped))));
    return {_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), cut, number)};
  }
};

struct F64 {
  using scalar = double;
  static constexpr int lanes = 4;
  static constexpr int registers = 16;
  static constexpr int tile_rows = 4, tile_vectors = 2;
  __m256d v;
  static F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static F64 set(double x) { return {_mm256_set1_pd(x)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }
};

constexpr bool kHasPairs = false;

// After stream(): other threads see what was written.
inline void fence() { _mm_sfence(); }

inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F64 mul(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F64 add(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F32 relu(F32 x) { return {_mm256_max_ps(_mm256_setzero_ps(), x.v)}; }
inline F64 relu(F64 x) { return {_mm256_max_pd(_mm256_setzero_pd(), x.v)}; }

// x where q > 0, else −x.
inline F32 signed_by(F32 x, F32 q) {
  const __m256 positive = _mm256_cmp_ps(q.v, _mm256_setzero_ps(), _CMP_GT_OQ);
  return {_mm256_xor_ps(x.v, _mm256_andnot_ps(positive, _mm256_set1_ps(-0.0f)))};
}
inline F64 signed_by(F64 x, F64 q) {
  const __m256d positive = _mm256_cmp_pd(q.v, _mm256_setzero_pd(), _CMP_GT_OQ);
  return {_mm256_xor_pd(x.v, _mm256_andnot_pd(positive, _mm256_set1_pd(-0.0)))};
}

// x where p > 0, else 0.
inline F32 where_positive(F32 p, F32 x) {
  return {_mm256_and_ps(_mm256_cmp_ps(p.v, _mm256_setzero_ps(), _CMP_GT_OQ), x.v)};
}
inline F64 where_positive(F64 p, F64 x) {
  return {_mm256_and_pd(_mm256_cmp_pd(p.v, _mm256_setzero_pd(), _CMP_GT_OQ), x.v)};
}

// x where |q| ≤ 1, else 0.
inline F32 where_within_one(F32 q, F32 x) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), q.v);
  return {_mm256_and_ps(_mm256_cmp_ps(size, _mm256_set1_ps(1), _CMP_LE_OQ), x.v)};
}
inline F64 where_within_one(F64 q, F64 x) {
  const __m256d size = _mm256_andnot_pd(_mm256_set1_pd(-0.0), q.v);
  return {_mm256_and_pd(_mm256_cmp_pd(size, _mm256_set1_pd(1), _CMP_LE_OQ), x.v)};
}

// x within [−bound, bound].
inline F32 clamp(F32 x, F32 bound) {
  return {_mm256_min_ps(bound.v, _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), bound.v), x.v))};
}
inline F64 clamp(F64 x, F64 bound) {
  return {_mm256_min_pd(bound.v, _mm256_max_pd(_mm256_sub_pd(_mm256_setzero_pd(), bound.v), x.v))};
}

inline float sum(F32 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline double sum(F64 x) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}

}  // namespace
}  // namespace dual_lora::avx2
