// Vectors as arrays, for processors without kernels of their own, and single elements (n = 1) for all.
//
// The compiler turns the loops into whatever the machine has. Without a fused multiply-add, the rank products round
// twice a step: the bits of P and Q differ from those of the other instruction sets, as they do from a vendor's
// library.
#pragma once

#include <cstdint>
#include <cstring>

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

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

template <class T, int n>
struct Lanes {
  using scalar = T;
  static constexpr int lanes = n;
  static constexpr int registers = 16;
  static constexpr int tile_rows = 4, tile_vectors = 3;
  T v[n];
  static Lanes load(const T* p) {
    Lanes x;
    for (int i = 0; i < n; ++i) x.v[i] = p[i];
    return x;
  }
  static Lanes set(T value) {
    Lanes x;
    for (int i = 0; i < n; ++i) x.v[i] = value;
    return x;
  }
  void store(T* p) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  void stream(T* p) const { store(p); }
  static Lanes load_half(const uint16_t* p) {
    Lanes x;
    for (int i = 0; i < n; ++i) x.v[i] = half_to_float(p[i]);
    return x;
  }
  // table[code] of n codes, two a byte, the first in the upper half.
  static Lanes look_up(const float* table, const uint8_t* codes) {
    Lanes x;
    for (int i = 0; i < n; ++i) x.v[i] = table[(i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2]) & 15];
    return x;
  }
  void store_half(uint16_t* p) const {
    for (int i = 0; i < n; ++i) p[i] = half_nearest(v[i]);
  }

  Lanes nearest_half() const {
    Lanes x;
    for (int i = 0; i < n; ++i) x.v[i] = half_to_float(half_nearest(v[i]));
    return x;
  }
  static Lanes load_bfloat16(const uint16_t* p) {
    Lanes x;
    for (int i = 0; i < n; ++i) x.v[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
    return x;
  }
  void store_bfloat16(uint16_t* p) const {
    for (int i = 0; i < n; ++i) p[i] = static_cast<uint16_t>(bits_of(v[i]) >> 16);
  }
  Lanes nearest_bfloat16() const {
    Lanes x;
    for (int i = 0; i < n; ++i) {
      const uint32_t bits = bits_of(v[i]);
      x.v[i] = kept<16>(bits + 0x7FFFu + ((bits >> 16) & 1u), i);
    }
    return x;
  }
  template <int dropped>
  Lanes dithered(uint32_t row, const uint32_t* columns) const {
    Lanes x;
    for (int i = 0; i < n; ++i) x.v[i] = kept<dropped>(bits_of(v[i]) + ((row * columns[i]) >> (32 - dropped)), i);
    return x;
  }

  // `bits` without their last ones, or a quiet NaN where element i is a NaN.
  template <int dropped>
  float kept(uint32_t bits, int i) const {
    return float_of(v[i] != v[i] ? 0x7FC00000u : bits & ~((1u << dropped) - 1));
  }

  // IEEE binary16. A half's exponent and significand, shifted into an fp32's place, are off by a power of two, which a
  // multiplication mends for subnormal numbers too.
  static float half_to_float(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFFu;
    uint32_t bits = magnitude << 13;
    if (magnitude >= 0x7C00u) {
      bits |= 0x7F800000u;
    } else {
      float value;
      std::memcpy(&value, &bits, sizeof value);
      value *= 0x1p112f;
      std::memcpy(&bits, &value, sizeof bits);
    }
    bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  static uint16_t half_nearest(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above round to infinity
    if (bits < 0x38800000u) {                                               // below 2⁻¹⁴: subnormal
      float magnitude;
      std::memcpy(&magnitude, &bits, sizeof magnitude);
      magnitude += 0.5f;  // an ulp of 0.5 is 2⁻²⁴, a half's smallest step: this addition rounds as it should
      std::memcpy(&bits, &magnitude, sizeof bits);
      return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
    }
    bits += 0xFFFu + ((bits >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
  }
};

template <class T, int n, class F>
inline Lanes<T, n> map(F function) {
  Lanes<T, n> x;
  for (int i = 0; i < n; ++i) x.v[i] = function(i);
  return x;
}

template <class T, int n>
inline Lanes<T, n> fma(Lanes<T, n> a, Lanes<T, n> b, Lanes<T, n> c) {
  return map<T, n>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
template <class T, int n>
inline Lanes<T, n> mul(Lanes<T, n> a, Lanes<T, n> b) {
  return map<T, n>([&](int i) { return a.v[i] * b.v[i]; });
}
template <class T, int n>
inline Lanes<T, n> add(Lanes<T, n> a, Lanes<T, n> b) {
  return map<T, n>([&](int i) { return a.v[i] + b.v[i]; });
}
template <class T, int n>
inline Lanes<T, n> relu(Lanes<T, n> x) {
  return map<T, n>([&](int i) { return x.v[i] < 0 ? T(0) : x.v[i]; });
}

// x where q > 0, else −x.
template <class T, int n>
inline Lanes<T, n> signed_by(Lanes<T, n> x, Lanes<T, n> q) {
  return map<T, n>([&](int i) { return q.v[i] > 0 ? x.v[i] : -x.v[i]; });
}

// x where p > 0, else 0.
template <class T, int n>
inline Lanes<T, n> where_positive(Lanes<T, n> p, Lanes<T, n> x) {
  return map<T, n>([&](int i) { return p.v[i] > 0 ? x.v[i] : T(0); });
}

// x where |q| ≤ 1, else 0.
template <class T, int n>
inline Lanes<T, n> where_within_one(Lanes<T, n> q, Lanes<T, n> x) {
  return map<T, n>([&](int i) { return q.v[i] >= -1 && q.v[i] <= 1 ? x.v[i] : T(0); });
}

// x within [−bound, bound].
template <class T, int n>
inline Lanes<T, n> clamp(Lanes<T, n> x, Lanes<T, n> bound) {
  return map<T, n>([&](int i) {
    return x.v[i] < -bound.v[i] ? -bound.v[i] : x.v[i] > bound.v[i] ? bound.v[i] : x.v[i];
  });
}

template <class T, int n>
inline T sum(Lanes<T, n> x) {
  T total = x.v[0];
  for (int i = 1; i < n; ++i) total += x.v[i];
  return total;
}

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
