// SIMD vectors of floats and integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Floats in a vector, which is one register for integers too: compilers split larger ones badly.
#if defined(OWL2_PORTABLE)  // for tests, see integer_dot.h
constexpr int WIDTH = OWL2_PORTABLE;
#elif defined(__AVX512BW__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t Octets __attribute__((vector_size(WIDTH)));

// Arrays that start at a cache line: a vector in two lines takes twice as long to load.
template <class T>
struct CacheLines {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
  void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
  bool operator==(const CacheLines&) const { return true; }
  static constexpr std::align_val_t LINE{64};
};
template <class T>
using Array = std::vector<T, CacheLines<T>>;

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* p, float x) { *p = x; }
inline void store(bf16* p, float x) {  // rounds to nearest, ties to even, as in torch
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Floats load(const bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Bits) << 16);
}
inline Floats load(const uint8_t* p) {
  Octets o;
  std::memcpy(&o, p, sizeof o);
  const Bits wide = __builtin_convertvector(__builtin_convertvector(o, Halves), Bits);
  return __builtin_convertvector((Ints)wide, Floats);
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Bits bits = (Bits)v, whole = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves h = __builtin_convertvector(v != v ? Bits{} + 0x7fc0 : whole, Halves);
  std::memcpy(p, &h, sizeof h);
#endif
}

#if defined(__AVX512BW__)
inline float maximum(Floats v) { return _mm512_reduce_max_ps((__m512)v); }
inline float sum(Floats v) {  // in halves: a sequential sum has longer latency
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of vectors, one per lane: adds halves of pairs, then quarters, and so on.
inline Floats sums(const Floats (&v)[WIDTH]) {
  Floats eights[8], fours[4], twos[2];
  for (int i = 0; i < 8; i++) {
    const Floats a = v[2 * i], b = v[2 * i + 1];
    eights[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 4; i++) {
    const Floats a = eights[2 * i], b = eights[2 * i + 1];
    fours[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; i++) {
    const Floats a = fours[2 * i], b = fours[2 * i + 1];
    twos[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
              __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  const Floats a = twos[0], b = twos[1];
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#else
inline float maximum(Floats v) {
  float largest = v[0];
  for (int i = 1; i < WIDTH; i++) largest = std::max(largest, v[i]);
  return largest;
}
inline float sum(Floats v) {
  float parts[WIDTH];
  store(parts, v);
  for (int n = WIDTH / 2; n; n /= 2)
    for (int i = 0; i < n; i++) parts[i] += parts[i + n];
  return parts[0];
}
#if defined(__AVX2__) && !defined(OWL2_PORTABLE)
inline Floats sums(const Floats (&v)[WIDTH]) {  // adds neighbors, then pairs, then halves
  const auto add = [](Floats a, Floats b) { return (Floats)_mm256_hadd_ps((__m256)a, (__m256)b); };
  const Floats a = add(add(v[0], v[1]), add(v[2], v[3])), b = add(add(v[4], v[5]), add(v[6], v[7]));
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
#else
inline Floats sums(const Floats (&v)[WIDTH]) {
  Floats totals;
  for (int i = 0; i < WIDTH; i++) totals[i] = sum(v[i]);
  return totals;
}
#endif
#endif

// out[i] = the sum of v[i]; `out` has room for a multiple of WIDTH. Without loops, because GCC would
// keep the vectors in memory.
template <int FROM = 0, int N>
inline void store_sums(const Floats (&v)[N], float* out) {
  if constexpr (FROM < N) {
    const auto take = [&]<int... I>(std::integer_sequence<int, I...>) {
      const Floats group[WIDTH] = {FROM + I < N ? v[std::min(FROM + I, N - 1)] : Floats{}...};
      store(out + FROM, sums(group));
    };
    take(std::make_integer_sequence<int, WIDTH>{});
    store_sums<FROM + WIDTH>(v, out);
  }
}

// Rounds values below 2^22 to the nearest integer: 1.5 * 2^23 leaves no bits for fractions.
inline Ints rounded(Floats v) { return (Ints)(v + 12582912.f) - 0x4b400000; }

// e^x except for the last bits: 2^n times a power series of the rest r, |r| < 0.35. The result is 0
// below -87; x is at most 88.
inline Floats exponential(Floats x) {
  const Ints small = x < -87.f, large = x > 88.f;
  x = large ? Floats{} + 88.f : small ? Floats{} - 87.f : x;
  const Floats shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer
  const Floats whole = shifted - 12582912.f;
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  Floats series = r * (1 / 720.f) + 1 / 120.f;
  series = series * r + 1 / 24.f;
  series = series * r + 1 / 6.f;
  series = series * r + 0.5f;
  series = series * r + 1.f;
  series = series * r + 1.f;
  const Ints power = (((Ints)shifted - 0x4b400000) + 127) << 23;  // the bits of 2^n
  const Floats result = series * (Floats)power;
  return small ? Floats{} : result;
}

// Products of T, STEP at a time, summed into 16 lanes.
template <class T>
struct Product {
  static constexpr int STEP = WIDTH;
  static Floats add(Floats acc, const T* w, const T* x) { return acc + load(w) * load(x); }
};
#if defined(__AVX512BF16__)
template <>
struct Product<bf16> {
  static constexpr int STEP = 2 * WIDTH;
  static Floats add(Floats acc, const bf16* w, const bf16* x) {
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w),
                                    (__m512bh)_mm512_loadu_si512(x));
  }
};
#endif
}  // namespace
