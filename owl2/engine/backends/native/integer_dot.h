// Dot products of small integers in the 32-bit lanes of a vector.
//
// A lane contains two 16-bit or four 8-bit values. The instructions differ between CPUs, but all of
// them compute the exact sum.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "simd.h"

// Whether the CPU multiplies four bytes and adds the products in one instruction. Tests define
// OWL2_PORTABLE, a number of lanes, and OWL2_BYTE_DOT to compile the code of other CPUs without their
// instructions.
#if !defined(OWL2_PORTABLE)
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8) || \
    defined(__ARM_FEATURE_DOTPROD)
#define OWL2_BYTE_DOT 1
#else
#define OWL2_BYTE_DOT 0
#endif
#endif

namespace {
// Added to weights of 8 bits for `dot_bytes`. One instruction of ARM has signed operands only.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int BYTE_OFFSET = 0;
#else
constexpr int BYTE_OFFSET = 128;
#endif

inline Ints load_ints(const void* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Ints broadcast(int32_t value) { return Ints{} + value; }
inline Ints broadcast_ints(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return broadcast(value);
}

// a * b + c, with one rounding where the CPU has such an instruction: compilers use it in some loops
// and not in others.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(OWL2_PORTABLE)
  return a * b + c;
#elif defined(__AVX512BW__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// acc + the products of two signed 16-bit values in each lane.
inline Ints dot_words(Ints acc, Ints w, Ints x) {
#if defined(OWL2_PORTABLE)
  return acc + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#elif defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
  return acc + (Ints)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
  return acc + (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
  return acc + (Ints)_mm_madd_epi16((__m128i)w, (__m128i)x);
#elif defined(__ARM_NEON)
  const int16x8_t a = (int16x8_t)w, b = (int16x8_t)x;
  return acc + (Ints)vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
#else
  return acc + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
}

#if OWL2_BYTE_DOT
// acc + the products of four bytes in each lane; w is unsigned, x is signed.
inline Ints dot_bytes(Ints acc, Ints w, Ints x) {
#if defined(OWL2_PORTABLE)
  for (int at = 0; at < 32; at += 8) acc += (w >> at & 255) * (x << (24 - at) >> 24);
  return acc;
#elif defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return (Ints)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, (int8x16_t)x);
#else
  return (Ints)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x);
#endif
}
#endif

// acc + the products of four bytes in each lane, in two 16-bit sums. w is 0 to 15, x is signed, so
// that BYTE_STEPS additions do not overflow: 8 * 2 * 15 * 127 < 2^15. `widened` adds the two sums.
constexpr int BYTE_STEPS = 8;
inline Ints dot_nibbles(Ints acc, Ints w, Ints x) {
#if defined(OWL2_PORTABLE)
#elif defined(__AVX512BW__)
  return (Ints)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
#elif defined(__AVX2__)
  return (Ints)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
#elif defined(__SSSE3__)
  return (Ints)_mm_add_epi16((__m128i)acc, _mm_maddubs_epi16((__m128i)w, (__m128i)x));
#endif
  const auto product = [&](int at) { return (w >> at & 15) * (x << (24 - at) >> 24); };
  const Ints first = (acc << 16 >> 16) + product(0) + product(8);
  const Ints second = (acc >> 16) + product(16) + product(24);
  return (first & 0xffff) | second << 16;
}
inline Ints widened(Ints acc) { return dot_words(Ints{}, acc, broadcast(0x10001)); }
}  // namespace
