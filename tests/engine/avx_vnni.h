// The instructions of AVX-VNNI by their equivalents in AVX-512, for a CPU that has only those.
#pragma once

#include <immintrin.h>

#define __AVXVNNI__ 1

__attribute__((target("avx512vnni,avx512vl"), noinline)) static __m256i dot_bytes_of_avx512(
    __m256i sums, __m256i a, __m256i b) {
  return _mm256_dpbusd_epi32(sums, a, b);
}
__attribute__((target("avx512vnni,avx512vl"), noinline)) static __m256i dot_words_of_avx512(
    __m256i sums, __m256i a, __m256i b) {
  return _mm256_dpwssd_epi32(sums, a, b);
}
#define _mm256_dpbusd_avx_epi32 dot_bytes_of_avx512
#define _mm256_dpwssd_avx_epi32 dot_words_of_avx512
