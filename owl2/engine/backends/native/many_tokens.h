// Products of a bfloat16 weight with many tokens, where the CPU multiplies bfloat16.
//   x (M, K) tokens   w (N, K) weight of a Linear   y (M, N)
//
// Lane i of a vector belongs to token i of a block, so that no sum crosses lanes. Tokens are first copied
// in this order. Weights are read in place: two values of a row at a time are multiplied with
// the same two values of each token. A product has one sum for each token and row, in the order of K.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "simd.h"
#include "thread_pool.h"

namespace {

// Tokens in blocks.
struct PackedTokens {
  static constexpr int64_t BLOCK = 16;
  // `PlainProduct` multiplies up to FEW tokens, as `ops.MAX_TOKENS`, and up to REST after the blocks.
  static constexpr int64_t FEW = 72, REST = 8;
  struct Delete {
    void operator()(int32_t* p) const { CacheLines<int32_t>().deallocate(p, 0); }
  };
  int64_t M;  // tokens in blocks; 0 if none are needed
  std::unique_ptr<int32_t[], Delete> pairs;  // (blocks, K / 2, BLOCK); an Array would be set to 0

  // The first of M tokens of type T; K is the largest width.
  template <class T>
  static PackedTokens of(int64_t M, int64_t K) {
#if defined(__AVX512BF16__)
    const int64_t rest = M % BLOCK <= REST ? M % BLOCK : 0;
    const int64_t packed = std::is_same_v<T, bf16> && M > FEW ? M - rest : 0;
#else
    const int64_t packed = 0;
#endif
    const int64_t size = num_blocks(packed) * BLOCK * K / 2;
    return {packed, {size ? CacheLines<int32_t>().allocate(size) : nullptr, {}}};
  }
  static int64_t num_blocks(int64_t tokens) { return (tokens + BLOCK - 1) / BLOCK; }

  // This thread's part of x (M, K). The last token is repeated to fill its block.
  template <class T>
  void pack(const Worker& worker, const T* x, int64_t K) {
    if constexpr (sizeof(T) == 2) {
      const auto [from, to] = worker.share(num_blocks(M), 1);
      int32_t* out = pairs.get() + from * BLOCK * K / 2;
      for (int64_t m = from * BLOCK; m < to * BLOCK; m += BLOCK) {
        const T* tokens[BLOCK];
        for (int64_t i = 0; i < BLOCK; i++) tokens[i] = x + std::min(m + i, M - 1) * K;
        for (int64_t k = 0; k < K; k += 2, out += BLOCK)
          for (int64_t i = 0; i < BLOCK; i++) std::memcpy(out + i, tokens[i] + k, 4);
      }
    }
  }
};

#if defined(__AVX512BF16__)
// y (M, N) = x (M, K) w^T + bias, for the tokens in blocks.
struct ManyTokensProduct {
  static constexpr int64_t BLOCK = PackedTokens::BLOCK;
  static constexpr int ROWS = 8, BLOCKS = 3;     // of a tile: the sums fit into the registers
  static constexpr int64_t CACHED = 1 << 19;     // bytes of tokens that stay in the second cache
  const bf16 *w, *bias;
  const PackedTokens& x;
  bf16* y;
  int64_t N, K;

  // The products of ROWS rows from n on and COUNT blocks from b on. `next` are the rows to prefetch.
  template <int COUNT>
  __attribute__((noinline)) void store_tile(int64_t n, int64_t b, const bf16* next) const {
    const bf16* rows = w + n * K;
    const int32_t* tokens = x.pairs.get() + b * BLOCK * K / 2;
    __m512 acc[ROWS][COUNT];
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < COUNT; c++) acc[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 2 * WIDTH) {
      if (next)
        for (int r = 0; r < ROWS; r++) __builtin_prefetch(next + r * K + k, 0, 2);
#pragma GCC unroll 4
      for (int64_t i = k; i < k + 2 * WIDTH; i += 2, tokens += BLOCK) {
        __m512bh values[COUNT];
        for (int c = 0; c < COUNT; c++)
          values[c] = (__m512bh)_mm512_loadu_si512(tokens + c * BLOCK * K / 2);
        for (int r = 0; r < ROWS; r++) {
          int32_t pair;
          std::memcpy(&pair, rows + r * K + i, 4);
          for (int c = 0; c < COUNT; c++)
            acc[r][c] = _mm512_dpbf16_ps(acc[r][c], (__m512bh)_mm512_set1_epi32(pair), values[c]);
        }
      }
    }
    for (int c = 0; c < COUNT; c++) {
      Floats block[ROWS];
      for (int r = 0; r < ROWS; r++)
        block[r] = (Floats)acc[r][c] + (bias ? to_float(bias[n + r]) : 0.f);
      store_block(block, n, (b + c) * BLOCK);
    }
  }

  // Rows from n on of the tokens from m on. Two rows become one vector of pairs; the four vectors are
  // transposed, so that the pairs of a token are adjacent.
  void store_block(const Floats (&rows)[ROWS], int64_t n, int64_t m) const {
    const auto bits = [](Floats v) {
      return __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)v), Bits);
    };
    Bits pairs[4], twos[4], fours[4];
    for (int i = 0; i < 4; i++) pairs[i] = bits(rows[2 * i]) | bits(rows[2 * i + 1]) << 16;
    for (int i = 0; i < 4; i += 2) {
      twos[i] = (Bits)_mm512_unpacklo_epi32((__m512i)pairs[i], (__m512i)pairs[i + 1]);
      twos[i + 1] = (Bits)_mm512_unpackhi_epi32((__m512i)pairs[i], (__m512i)pairs[i + 1]);
    }
    for (int i = 0; i < 2; i++) {
      fours[2 * i] = (Bits)_mm512_unpacklo_epi64((__m512i)twos[i], (__m512i)twos[i + 2]);
      fours[2 * i + 1] = (Bits)_mm512_unpackhi_epi64((__m512i)twos[i], (__m512i)twos[i + 2]);
    }
    alignas(64) bf16 columns[4][4][ROWS];  // of token 4 * j + i: [i][j]
    std::memcpy(columns, fours, sizeof columns);
    for (int64_t i = 0; i < std::min(BLOCK, x.M - m); i++)
      std::memcpy(y + (m + i) * N + n, columns[i % 4][i / 4], sizeof *columns[0]);
  }

  // The rows `range`; their number is a multiple of ROWS.
  void store_range(Range range) const {
    const int64_t blocks = PackedTokens::num_blocks(x.M);
    const int64_t fitting = CACHED / (BLOCK * K * sizeof(bf16));
    const int64_t cached = std::max<int64_t>(BLOCKS, fitting / BLOCKS * BLOCKS);
    for (int64_t first = 0; first < blocks; first += cached)
      for (int64_t n = range.from; n < range.to; n += ROWS) {
        const int64_t end = std::min(blocks, first + cached);
        const bf16* next = n + 2 * ROWS <= range.to ? w + (n + ROWS) * K : nullptr;
        for (int64_t b = first; b < end; next = nullptr)
          b += store_blocks(n, b, end - b, next);
      }
  }

  // The products of the next blocks, of `left` ones; returns their number. Four are two and two.
  int64_t store_blocks(int64_t n, int64_t b, int64_t left, const bf16* next) const {
    if (left == 1) return store_tile<1>(n, b, next), 1;
    if (left == 2 || left == 4) return store_tile<2>(n, b, next), 2;
    return store_tile<BLOCKS>(n, b, next), BLOCKS;
  }
};
#endif
}  // namespace
