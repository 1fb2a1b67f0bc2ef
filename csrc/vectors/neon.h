// AArch64 vectors. Comparisons with NaN are false, and FMAX and FMIN keep a NaN.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace dual_lora::neon {
namespace {

struct F32 {
  using scalar = float;
  static constexpr int lanes = 4;
  static constexpr int registers = 32;
  static constexpr int tile_rows = 4, tile_vectors = 3;
  float32x4_t v;
  static F32 load(const float* p) { return {vld1q_f32(p)}; }
  static F32 set(float x) { return {vdupq_n_f32(x)}; }
  void store(float* p) const { vst1q_f32(p, v); }
  void stream(float* p) const { store(p); }
  static F32 load_half(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
  // table[code] of as many codes as a vector has lanes, two a byte, the first in the upper half.
  static F32 look_up(const float* table, const uint8_t* codes) {
    const float numbers[] = {table[codes[0] >> 4], table[codes[0] & 15], table[codes[1] >> 4], table[codes[1] & 15]};
    return load(numbers);
  }
  void store_half(uint16_t* p) const { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  F32 nearest_half() const { return {vcvt_f32_f16(vcvt_f16_f32(v))}; }
  static F32 load_bfloat16(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
  void store_bfloat16(uint16_t* p) const { vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(v), 16)); }
  F32 nearest_bfloat16() const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return kept<16>(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))));
  }
  template <int dropped>
  F32 dithered(uint32_t row, const uint32_t* columns) const {
    const uint32x4_t field = vmulq_u32(vdupq_n_u32(row), vld1q_u32(columns));
    return kept<dropped>(vaddq_u32(vreinterpretq_u32_f32(v), vshrq_n_u32(field, 32 - dropped)));
  }

 private:
  // `bits` without their last ones, or a quiet NaN where this vector has a NaN.
  template <int dropped>
  F32 kept(uint32x4_t bits) const {
    const uint32x4_t cut = vandq_u32(bits, vdupq_n_u32(~((1u << dropped) - 1)));
    return {vreinterpretq_f32_u32(vbslq_u32(vceqq_f32(v, v), cut, vdupq_n_u32(0x7FC00000u)))};
  }
};

struct F64 {
  using scalar = double;
  static constexpr int lanes = 2;
  static constexpr int registers = 32;
  static constexpr int tile_rows = 4, tile_vectors = 3;
  float64x2_t v;
  static F64 load(const double* p) { return {vld1q_f64(p)}; }
  static F64 set(double x) { return {vdupq_n_f64(x)}; }
  void store(double* p) const { vst1q_f64(p, v); }
  void stream(double* p) const { store(p); }
};

constexpr bool kHasPairs = false;

inline void fence() {}

inline F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
inline F64 mul(F64 a, F64 b) { return {vmulq_f64(a.v, b.v)}; }
inline F32 add(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
inline F64 add(F64 a, F64 b) { return {vaddq_f64(a.v, b.v)}; }
inline F32 relu(F32 x) { return {vmaxq_f32(x.v, vdupq_n_f32(0))}; }
inline F64 relu(F64 x) { return {vmaxq_f64(x.v, vdupq_n_f64(0))}; }

// x where q > 0, else −x.
inline F32 signed_by(F32 x, F32 q) { return {vbslq_f32(vcgtzq_f32(q.v), x.v, vnegq_f32(x.v))}; }
inline F64 signed_by(F64 x, F64 q) { return {vbslq_f64(vcgtzq_f64(q.v), x.v, vnegq_f64(x.v))}; }

// x where p > 0, else 0.
inline F32 where_positive(F32 p, F32 x) { return {vbslq_f32(vcgtzq_f32(p.v), x.v, vdupq_n_f32(0))}; }
inline F64 where_positive(F64 p, F64 x) { return {vbslq_f64(vcgtzq_f64(p.v), x.v, vdupq_n_f64(0))}; }

// x where |q| ≤ 1, else 0.
inline F32 where_within_one(F32 q, F32 x) {
  return {vbslq_f32(vcleq_f32(vabsq_f32(q.v), vdupq_n_f32(1)), x.v, vdupq_n_f32(0))};
}
inline F64 where_within_one(F64 q, F64 x) {
  return {vbslq_f64(vcleq_f64(vabsq_f64(q.v), vdupq_n_f64(1)), x.v, vdupq_n_f64(0))};
}

// x within [−bound, bound].
inline F32 clamp(F32 x, F32 bound) { return {vminq_f32(bound.v, vmaxq_f32(vnegq_f32(bound.v), x.v))}; }
inline F64 clamp(F64 x, F64 bound) { return {vminq_f64(bound.v, vmaxq_f64(vnegq_f64(bound.v), x.v))}; }

inline float sum(F32 x) { return vaddvq_f32(x.v); }
inline double sum(F64 x) { return vaddvq_f64(x.v); }

}  // namespace
}  // namespace dual_lora::neon
