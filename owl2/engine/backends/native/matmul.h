// Matrix products with plain or quantized weights. `PlainProduct` is designed for a few tokens.
//   x (M, K) tokens   w (N, K) weight of a Linear   y (M, N)
#pragma once

#include <algorithm>
#include <initializer_list>

#include "many_tokens.h"
#include "quantized.h"
#include "simd.h"
#include "thread_pool.h"

namespace {

// ---------------------------------------------------------------- products

// The next rows, which are prefetched while others are computed.
template <class T>
struct Prefetch {
  const T* w = nullptr;
  int64_t rows = 0;
};

// out[m * R + r]: products of R rows of w, which are `stride` values apart, and M tokens. The sum of a
// row and a token has the same order in all tiles. If it is inlined, GCC keeps the sums in memory
// instead of registers.
template <int R, int M, class T>
__attribute__((noinline)) void tile(const T* w, int64_t stride, const T* x, int64_t K,
                                    Prefetch<T> prefetch, float* out) {
  Floats acc[M * R] = {};
  for (int64_t k = 0; k < K; k += Product<T>::STEP) {
    for (int64_t r = 0; r < prefetch.rows; r++) __builtin_prefetch(prefetch.w + r * K + k, 0, 2);
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        acc[m * R + r] = Product<T>::add(acc[m * R + r], w + r * stride + k, x + m * K + k);
  }
  store_sums(acc, out);
}

// Of a tile: the sums fit into the registers, 32 with AVX-512 and on ARM, 16 with AVX2. With SSE,
// three rows are faster for float and slower for bfloat16.
constexpr int ROWS = WIDTH == 8 ? 3 : 6, TOKENS = 4;
// Rows that are read at the same time if there is one tile of tokens. They are far apart, because
// memory is read faster in several streams.
constexpr int STREAMS = std::min(ROWS, 4);

// y (M, N) = x (M, K) w^T + bias.
template <class T>
struct PlainProduct {
  const T *w, *x, *bias;
  T* y;
  int64_t M, N, K;

  // The rows n, n + step, ... for COUNT tokens from m on.
  template <int R, int COUNT>
  void store_tile(int64_t n, int64_t step, int64_t m, Prefetch<T> prefetch) const {
    constexpr int SIZE = (R * COUNT + WIDTH - 1) / WIDTH * WIDTH;
    float out[SIZE];
    tile<R, COUNT>(w + n * K, step * K, x + m * K, K, prefetch, out);
    if (bias)
      for (int i = 0; i < R * COUNT; i++) out[i] += to_float(bias[n + i % R * step]);
    T rounded[SIZE];
    for (int i = 0; i < SIZE; i += WIDTH) store(rounded + i, load(out + i));
    for (int j = 0; j < COUNT; j++)
      for (int r = 0; r < R; r++) y[(m + j) * N + n + r * step] = rounded[j * R + r];
  }

  // R rows from n on for all tokens. Each tile prefetches a part of the next rows.
  template <int R>
  void store_rows(int64_t n, bool prefetch) const {
    for_tiles([&]<int COUNT>(int64_t m) {
      const int64_t tiles = (M + TOKENS - 1) / TOKENS, i = m / TOKENS;
      const int64_t from = R * i / tiles, to = R * (i + 1) / tiles;
      const T* next = w + (n + R + from) * K;
      store_tile<R, COUNT>(n, 1, m, prefetch ? Prefetch<T>{next, to - from} : Prefetch<T>{});
    });
  }

  // Calls `tile` with the number of tokens, and the first token, of each tile.
  template <class Tile>
  void for_tiles(const Tile& tile) const {
    int64_t m = 0;
    for (; m + TOKENS <= M; m += TOKENS) tile.template operator()<TOKENS>(m);
    if (M - m == 3) tile.template operator()<3>(m);
    if (M - m == 2) tile.template operator()<2>(m);
    if (M - m == 1) tile.template operator()<1>(m);
  }

  void store_range(Range range) const {
    int64_t n = range.from;
    if (M <= TOKENS) {
      const int64_t step = (range.to - n) / STREAMS, first = n;
      for_tiles([&]<int COUNT>(int64_t m) {
        for (; n < first + step; n++) store_tile<STREAMS, COUNT>(n, step, m, {});
        for (n += (STREAMS - 1) * step; n < range.to; n++) store_tile<1, COUNT>(n, 1, m, {});
      });
      return;
    }
    for (; n + ROWS <= range.to; n += ROWS) store_rows<ROWS>(n, n + 2 * ROWS <= range.to);
    for (; n < range.to; n++) store_rows<1>(n, false);
  }
};

// The rows `range` of a product, of which the first tokens may be in blocks.
template <class T>
void multiply_plain(Range range, PlainProduct<T> product, const PackedTokens& packed) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    if (packed.M) {
      const int64_t end = range.to - (range.to - range.from) % ManyTokensProduct::ROWS;
      const ManyTokensProduct many{product.w, product.bias, packed, product.y, product.N, product.K};
      many.store_range({range.from, end});
      product.store_range({end, range.to});
      product.x += packed.M * product.K, product.y += packed.M * product.N;
      product.M -= packed.M, range.to = end;
    }
#endif
  if (product.M) product.store_range(range);
}

// ---------------------------------------------------------------- LoRA

// LoRA of one adapter for a Linear: y += scaling * up (down x) for some of the tokens. Same order as
// `ops.Lora`. The weights have the type of the tokens; R is the rank.
struct Lora {
  const void *down, *up;  // (R, K), (N, R)
  const int64_t* tokens;  // (n,) indices
  int64_t n, R;
  float scaling;

  // The columns `range` of z = down x, (n, R).
  template <class T>
  void reduce(Range range, const T* x, int64_t K, float* z) const {
    const T* w = static_cast<const T*>(down);
    float out[WIDTH];
    for (int64_t r = range.from; r < range.to; r++)
      for (int64_t i = 0; i < n; i++) {
        tile<1, 1, T>(w + r * K, K, x + tokens[i] * K, K, {}, out);
        z[i * R + r] = *out;
      }
  }

  // The columns `range` of y (M, N).
  template <class T>
  void add(Range range, const float* z, T* y, int64_t N) const {
    for (int64_t row = range.from; row < range.to; row++) {
      const T* w = static_cast<const T*>(up) + row * R;
      for (int64_t i = 0; i < n; i++) {
        Floats sums = {};
        int64_t r = 0;
        for (; r + WIDTH <= R; r += WIDTH) sums += load(w + r) * load(z + i * R + r);
        float total = sum(sums);
        for (; r < R; r++) total += to_float(w[r]) * z[i * R + r];
        T* out = y + tokens[i] * N + row;
        store(out, to_float(*out) + scaling * total);
      }
    }
  }
};

// ---------------------------------------------------------------- matrices

// Tokens in the other forms that products with some matrices need.
struct PreparedTokens {
  QuantizedTokens quantized;
  PackedTokens packed;
};

// A Linear; same order as `ops.Matrix`. `bits` is 0 without quantization; see `QuantizedWeight`.
struct Matrix {
  const void* w;
  const float* scale;
  const void* bias;
  int64_t bits, N;
  const Lora* loras;
  int64_t num_loras;

  // A range of y = x w^T + bias. `tokens` has been prepared from x.
  template <class T>
  void multiply_range(Range range, const T* x, const PreparedTokens& tokens, int activation_bits,
                      T* y, int64_t M, int64_t K) const {
    const T* b = static_cast<const T*>(bias);
    if (!bits)
      multiply_plain<T>(range, {static_cast<const T*>(w), x, b, y, M, N, K}, tokens.packed);
    else
      (bits == 4 ? multiply_quantized<4, T> : multiply_quantized<8, T>)(
          range, quantized(K), tokens.quantized, activation_bits, b, y);
  }
  QuantizedWeight quantized(int64_t K) const {
    return {static_cast<const uint8_t*>(w), scale, bits, N, K};
  }
};

constexpr int64_t ROW_STEP = 32;  // threads divide rows in multiples of it
static_assert(ROW_STEP % PANEL == 0);

using Matrices = std::initializer_list<const Matrix*>;

// The forms of tokens that products with some matrices need.
struct TokenForms {
  bool words = false, bytes = false, plain = false;

  void add(Matrices matrices, int activation_bits) {
    for (const Matrix* m : matrices)
      (!m->bits ? plain : uses_bytes(m->bits, activation_bits) ? bytes : words) = true;
  }

  // M tokens of type T; K is the largest width.
  template <class T>
  PreparedTokens tokens(int64_t M, int64_t K) const {
    return {{M, K, words, bytes}, PackedTokens::of<T>(plain ? M : 0, K)};
  }
};

// This thread's part of x (M, K), for products with these matrices. Returns whether there is any.
template <class T>
bool prepare(PreparedTokens& tokens, const Worker& worker, const T* x, int64_t K,
             Matrices matrices, int activation_bits) {
  bool quantized = false, packed = false;
  for (const Matrix* matrix : matrices)
    (matrix->bits ? quantized : packed) = true;
  packed &= tokens.packed.M > 0;
  if (quantized) tokens.quantized.quantize(worker, x, K, activation_bits);
  if (packed) tokens.packed.pack(worker, x, K);
  return quantized || packed;
}
}  // namespace
