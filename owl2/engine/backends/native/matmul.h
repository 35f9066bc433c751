// Matrix products of a few tokens, with plain or quantized weights.
//   x (M, K) tokens   w (N, K) weight of a Linear   y (M, N)
#pragma once

#include <algorithm>

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

// out[r * M + m]: products of R rows of w and M tokens. If it is inlined, GCC keeps the sums in
// memory instead of registers.
template <int R, int M, class T>
__attribute__((noinline)) void tile(const T* w, const T* x, int64_t K, Prefetch<T> prefetch,
                                    float* out) {
  constexpr int STEP = Product<T>::STEP;
  constexpr int LANES = R * M == 1 ? 4 : 1;  // independent sums, so that none waits for another
  Floats acc[R][M][LANES] = {};
  int64_t k = 0;
  for (; k + LANES * STEP <= K; k += LANES * STEP) {
    for (int64_t r = 0; r < prefetch.rows; r++) __builtin_prefetch(prefetch.w + r * K + k, 0, 2);
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        for (int l = 0; l < LANES; l++) {
          const int64_t at = k + l * STEP;
          acc[r][m][l] = Product<T>::add(acc[r][m][l], w + r * K + at, x + m * K + at);
        }
  }
  for (; k < K; k += STEP)
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        acc[r][m][0] = Product<T>::add(acc[r][m][0], w + r * K + k, x + m * K + k);
  for (int l = 1; l < LANES; l++) acc[0][0][0] += acc[0][0][l];
  int i = 0;
  for (; i + 8 < R * M; i += WIDTH) {  // many sums together
    Floats group[WIDTH] = {};
    for (int j = i; j < std::min(i + WIDTH, R * M); j++) group[j - i] = acc[j / M][j % M][0];
    Floats totals = sums(group);
    std::memcpy(out + i, &totals, sizeof(float) * std::min(WIDTH, R * M - i));
  }
  for (; i < R * M; i++) out[i] = sum(acc[i / M][i % M][0]);
}

// Of a tile: the sums fit into the registers, 32 with AVX-512 and on ARM, 16 with AVX2. With SSE,
// three rows are faster for float and slower for bfloat16.
constexpr int ROWS = WIDTH == 8 ? 3 : 6, TOKENS = 4;

// Consecutive rows of a matrix; the pointers are those of the first row.
template <class T>
struct Rows {
  const T* w;
  const T* bias;
  T* y;
  int64_t N, K;
};

// R rows for all tokens. Each tile prefetches a part of the next rows.
template <int R, class T>
inline void store_rows(const Rows<T>& rows, const T* x, int64_t M, const T* next) {
  const int64_t tiles = (M + TOKENS - 1) / TOKENS;
  const auto store_tile = [&]<int COUNT>(int64_t m) {
    const int64_t i = m / TOKENS, from = R * i / tiles, to = R * (i + 1) / tiles;
    const auto prefetch = next ? Prefetch<T>{next + from * rows.K, to - from} : Prefetch<T>{};
    float out[R * COUNT];
    tile<R, COUNT>(rows.w, x + m * rows.K, rows.K, prefetch, out);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < COUNT; j++)
        store(rows.y + (m + j) * rows.N + r,
              out[r * COUNT + j] + (rows.bias ? to_float(rows.bias[r]) : 0));
  };
  int64_t m = 0;
  for (; m + TOKENS <= M; m += TOKENS) store_tile.template operator()<TOKENS>(m);
  if (M - m == 3) store_tile.template operator()<3>(m);
  if (M - m == 2) store_tile.template operator()<2>(m);
  if (M - m == 1) store_tile.template operator()<1>(m);
}

// The rows `range` of y = x w^T + bias, with a weight of the same type.
template <class T>
void multiply_plain(Range range, const T* weight, const T* x, const T* bias, T* y, int64_t M,
                    int64_t N, int64_t K) {
  for (int64_t n = range.from; n < range.to; n += M == 1 ? 1 : ROWS) {
    const T* w = weight + n * K;
    if (M == 1) {  // row by row, in the order of memory
      float out;
      tile<1, 1, T>(w, x, K, {}, &out);
      store(y + n, out + (bias ? to_float(bias[n]) : 0));
      continue;
    }
    const int64_t count = std::min<int64_t>(ROWS, range.to - n);
    const T *b = bias ? bias + n : nullptr, *next = n + 2 * ROWS <= range.to ? w + ROWS * K : nullptr;
    if (count == ROWS)
      store_rows<ROWS>(Rows<T>{w, b, y + n, N, K}, x, M, next);
    else
      for (int64_t r = 0; r < count; r++)
        store_rows<1, T>({w + r * K, b ? b + r : b, y + n + r, N, K}, x, M, nullptr);
  }
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
    for (int64_t r = range.from; r < range.to; r++)
      for (int64_t i = 0; i < n; i++)
        tile<1, 1, T>(w + r * K, x + tokens[i] * K, K, {}, z + i * R + r);
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

// A Linear; same order as `ops.Matrix`. `bits` is 0 without quantization; see `QuantizedWeight`.
struct Matrix {
  const void* w;
  const float* scale;
  const void* bias;
  int64_t bits, N;
  const Lora* loras;
  int64_t num_loras;

  // A range of y = x w^T + bias. `tokens` is x, quantized, if the weight is quantized.
  template <class T>
  void multiply_range(Range range, const T* x, const QuantizedTokens& tokens, int activation_bits,
                      T* y, int64_t M, int64_t K) const {
    const T* b = static_cast<const T*>(bias);
    if (!bits)
      multiply_plain(range, static_cast<const T*>(w), x, b, y, M, N, K);
    else if (bits == 4 && uses_bytes(bits, activation_bits))
      multiply_quantized<4, Bytes>(range, quantized(K), tokens, b, y);
    else if (bits == 4)
      multiply_quantized<4, Words>(range, quantized(K), tokens, b, y);
#if OWL2_BYTE_DOT
    else if (uses_bytes(bits, activation_bits))
      multiply_quantized<8, Bytes>(range, quantized(K), tokens, b, y);
#endif
    else
      multiply_quantized<8, Words>(range, quantized(K), tokens, b, y);
  }
  QuantizedWeight quantized(int64_t K) const {
    return {static_cast<const uint8_t*>(w), scale, bits, N, K};
  }
};

constexpr int64_t ROW_STEP = 32;  // threads divide rows in multiples of it
static_assert(ROW_STEP % PANEL == 0);
}  // namespace
