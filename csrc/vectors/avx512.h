// AVX-512F vectors, with products of bf16 pairs where the file is compiled for those. Comparisons with NaN are false, and relu and clamp keep a NaN: min and max return their second
// operand where one is NaN.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

struct F32 {
  using scalar = float;
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  static constexpr int tile_rows = 4, tile_vectors = 3;
  __m512 v;
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  static F32 load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  // table[code] of as many codes as a vector has lanes, two a byte, the first in the upper half.
  static F32 look_up(const float* table, const uint8_t* codes) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), nibble = _mm_set1_epi8(15);
    const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
    const __m512i index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
    return {_mm512_permutexvar_ps(index, _mm512_loadu_ps(table))};
  }
  void store_half(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  F32 nearest_half() const { return {_mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))}; }
  static F32 load_bfloat16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  void store_bfloat16(uint16_t* p) const {
    const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
  }
  F32 nearest_bfloat16() const {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return kept<16>(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))));
  }
  template <int dropped>
  F32 dithered(uint32_t row, const uint32_t* columns) const {
    const __m512i field = _mm512_mullo_epi32(_mm512_set1_epi32(static_cast<int>(row)), _mm512_loadu_si512(columns));
    return kept<dropped>(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_srli_epi32(field, 32 - dropped)));
  }

 private:
  // `bits` without their last ones, or a quiet NaN where this vector has a NaN.
  template <int dropped>
  F32 kept(__m512i bits) const {
    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    const __m512i mask = _mm512_set1_epi32(-(1 << dropped));
    return {_mm512_castsi512_ps(_mm512_mask_and_epi32(_mm512_set1_epi32(0x7FC00000), number, bits, mask))};
  }
};

struct F64 {
  using scalar = double;
  static constexpr int lanes = 8;
  static constexpr int registers = 32;
  static constexpr int tile_rows = 4, tile_vectors = 3;
  __m512d v;
  static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static F64 set(double x) { return {_mm512_set1_pd(x)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }
};

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// After stream(): other threads see what was written.
inline void fence() { _mm_sfence(); }

inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F32 relu(F32 x) { return {_mm512_max_ps(_mm512_setzero_ps(), x.v)}; }
inline F64 relu(F64 x) { return {_mm512_max_pd(_mm512_setzero_pd(), x.v)}; }

// x where q > 0, else −x.
inline F32 signed_by(F32 x, F32 q) {
  const __mmask16 positive = _mm512_cmp_ps_mask(q.v, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512i bits = _mm512_castps_si512(x.v);
  return {_mm512_castsi512_ps(
      _mm512_mask_xor_epi32(bits, static_cast<__mmask16>(~positive), bits, _mm512_set1_epi32(INT32_MIN)))};
}
inline F64 signed_by(F64 x, F64 q) {
  const __mmask8 positive = _mm512_cmp_pd_mask(q.v, _mm512_setzero_pd(), _CMP_GT_OQ);
  const __m512i bits = _mm512_castpd_si512(x.v);
  const __mmask8 negative = static_cast<__mmask8>(~positive);
  return {_mm512_castsi512_pd(_mm512_mask_xor_epi64(bits, negative, bits, _mm512_set1_epi64(INT64_MIN)))};
}

// x where p > 0, else 0.
inline F32 where_positive(F32 p, F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p.v, _mm512_setzero_ps(), _CMP_GT_OQ), x.v)};
}
inline F64 where_positive(F64 p, F64 x) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(p.v, _mm512_setzero_pd(), _CMP_GT_OQ), x.v)};
}

// x where |q| ≤ 1, else 0.
inline F32 where_within_one(F32 q, F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(q.v), _mm512_set1_ps(1), _CMP_LE_OQ), x.v)};
}
inline F64 where_within_one(F64 q, F64 x) {
  return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(_mm512_abs_pd(q.v), _mm512_set1_pd(1), _CMP_LE_OQ), x.v)};
}

// x within [−bound, bound].
inline F32 clamp(F32 x, F32 bound) {
  return {_mm512_min_ps(bound.v, _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), bound.v), x.v))};
}
inline F64 clamp(F64 x, F64 bound) {
  return {_mm512_min_pd(bound.v, _mm512_max_pd(_mm512_sub_pd(_mm512_setzero_pd(), bound.v), x.v))};
}

#if defined(__AVX512BF16__)
// For each lane of an F32, two bf16 numbers next to each other.
struct Pairs {
  __m512bh v;
  static Pairs load(const uint16_t* p) { return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))}; }
  // One pair in all lanes.
  static Pairs set(const uint16_t* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))};
  }
};

// The numbers of two rows' 32 columns, pair by pair: columns 0 … 15 in `low`, the others in `high`.
inline void pair_rows(Pairs first, Pairs second, Pairs& low, Pairs& high) {
  const __m512i a = reinterpret_cast<__m512i>(first.v), b = reinterpret_cast<__m512i>(second.v);
  const __m512i half = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  low.v = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, half, b));
  const __m512i other = _mm512_add_epi16(half, _mm512_set1_epi16(16));
  high.v = reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(a, other, b));
}

// c + a₀·b₀ + a₁·b₁ in each lane.
inline F32 dot(Pairs a, Pairs b, F32 c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }

inline void store_nearest(F32 x, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
#endif

inline float sum(F32 x) { return _mm512_reduce_add_ps(x.v); }
inline double sum(F64 x) { return _mm512_reduce_add_pd(x.v); }

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
