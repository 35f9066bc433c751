// Matrix products of a few tokens, with plain or quantized weights.
//   x (M, K) tokens   w (N, K) weight of a Linear   y (M, N)
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

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

// out[r * M + m]: products of R rows of w and M tokens.
template <int R, int M, class T>
inline void tile(const T* w, const T* x, int64_t K, Prefetch<T> prefetch, float* out) {
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

// A token as 16-bit integers, scaled by its largest value, in two bytes: 256 high + low. One
// instruction multiplies bytes, and 16 bits are at least as precise as bfloat16.
struct QuantizedToken {
  std::vector<int8_t> high, low;
  std::vector<int32_t> sums;  // of every 64 values
  int64_t sum_high, sum_low;
  float scale;

  template <class T>
  void quantize(const T* x, int64_t K) {
    high.resize(K), low.resize(K), sums.resize(K / 64);
    Floats maxima = {};
    Ints finite = Ints{} - 1;
    for (int64_t k = 0; k < K; k += WIDTH) {
      const Floats v = load(x + k), size = v < 0.f ? -v : v;
      maxima = maxima > size ? maxima : size;
      finite &= size <= std::numeric_limits<float>::max();
    }
    float maximum = 0;
    bool all_finite = true;
    for (int i = 0; i < WIDTH; i++)
      maximum = std::max(maximum, maxima[i]), all_finite &= finite[i] != 0;
    // 127 * 256, so that both bytes fit. Values that are not finite make the products NaN.
    scale = all_finite ? maximum / 32512 : std::numeric_limits<float>::quiet_NaN();
    const float inverse = all_finite && maximum > 0 ? 32512 / maximum : 0;
    sum_high = sum_low = 0;
    if (!all_finite) {
      std::fill(high.begin(), high.end(), 0), std::fill(low.begin(), low.end(), 0);
      std::fill(sums.begin(), sums.end(), 0);
      return;
    }
    for (int64_t k = 0; k < K; k += 64) {
      Ints value_sum = {}, high_sum = {};
      for (int64_t i = k; i < k + 64; i += WIDTH) {
        const Ints value = rounded(load(x + i) * inverse), h = (value + 128) >> 8;
        store(&high[i], h), store(&low[i], value - 256 * h);
        value_sum += value, high_sum += h;
      }
      sums[k / 64] = int32_t(sum(value_sum));
      sum_high += sum(high_sum);
      sum_low += sums[k / 64] - 256 * sum(high_sum);
    }
  }
};

// ---------------------------------------------------------------- weights
// Each kind multiplies a row with a quantized token, or dequantizes a row to type T; the products
// are then multiplied by `factor`.

template <class T>
struct PlainWeight {
  const T* w;
  int64_t K;
  static constexpr bool IN_PLACE = true;
  const T* row(int64_t n) const { return w + n * K; }
  float factor(int64_t) const { return 1; }
};

// 8 bits: (w - 128) * scale[n].
struct Int8Weight {
  const uint8_t* w;
  const float* scale;  // (N)
  int64_t K;
  static constexpr bool IN_PLACE = false;
  float factor(int64_t n) const { return scale[n]; }

  float times(int64_t n, const QuantizedToken& x) const {
    Ints high[2] = {}, low[2] = {};
    const uint8_t* row = w + n * K;
    for (int64_t k = 0, l = 0; k < K; k += 64, l ^= 1) {
      const Bytes a = bytes(row + k);
      high[l] = add(high[l], a, bytes(&x.high[k])), low[l] = add(low[l], a, bytes(&x.low[k]));
    }
    const int64_t h = sum(high[0] + high[1]) - 128 * x.sum_high;
    const int64_t l = sum(low[0] + low[1]) - 128 * x.sum_low;
    return float(256 * h + l) * x.scale * scale[n];
  }
  template <class T>
  void dequantize(int64_t n, T* out) const {
    for (int64_t k = 0; k < K; k += WIDTH) store(out + k, load(w + n * K + k) - 128);
  }
};

// 4 bits: (w - 8) * scale[n, g], in groups of 64. Byte i of a group has the values i and i + 32.
struct Int4Weight {
  const uint8_t* w;
  const float* scale;  // (N, K / 64)
  int64_t K;
  static constexpr bool IN_PLACE = false;
  float factor(int64_t) const { return 1; }

  float times(int64_t n, const QuantizedToken& x) const {
    const int64_t groups = K / 64;
    const float* scales = scale + n * groups;
    Floats acc = {};
    float offset = 0;
    for (int64_t g = 0; g < groups; g++) {
      const Bytes a = nibbles(w + n * K / 2 + 32 * g);
      const Ints high = add(Ints{}, a, bytes(&x.high[64 * g]));
      const Ints low = add(Ints{}, a, bytes(&x.low[64 * g]));
      acc += __builtin_convertvector(256 * high + low, Floats) * scales[g];
      offset += scales[g] * float(x.sums[g]);
    }
    return (sum(acc) - 8 * offset) * x.scale;
  }
  template <class T>
  void dequantize(int64_t n, T* out) const {
    for (int64_t g = 0; g < K / 64; g++) {
      const Bytes a = nibbles(w + n * K / 2 + 32 * g);
      uint8_t values[64];
      std::memcpy(values, &a, 64);
      for (int i = 0; i < 64; i += WIDTH)
        store(out + 64 * g + i, (load(values + i) - 8) * scale[n * (K / 64) + g]);
    }
  }
};

// ---------------------------------------------------------------- matrices

// Of a tile: the sums fit into the registers, 32 with AVX-512 and on ARM, else 16.
constexpr int ROWS = WIDTH == 8 ? 3 : 6, TOKENS = 4;

// Consecutive rows of a matrix; the pointers are those of the first row.
template <class T>
struct Rows {
  const T* w;
  const float* factors;
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
              out[r * COUNT + j] * rows.factors[r] + (rows.bias ? to_float(rows.bias[r]) : 0));
  };
  int64_t m = 0;
  for (; m + TOKENS <= M; m += TOKENS) store_tile.template operator()<TOKENS>(m);
  if (M - m == 3) store_tile.template operator()<3>(m);
  if (M - m == 2) store_tile.template operator()<2>(m);
  if (M - m == 1) store_tile.template operator()<1>(m);
}

template <class Weights, class T>
void multiply(Range range, const Weights& weights, const T* x, const T* bias, T* y, int64_t M,
              int64_t N, int64_t K) {
  thread_local std::vector<T> dequantized;
  if (!Weights::IN_PLACE) dequantized.resize(ROWS * K);
  for (int64_t n = range.from; n < range.to; n += ROWS) {
    const int64_t count = std::min<int64_t>(ROWS, range.to - n);
    const T *w, *next = nullptr;
    if constexpr (Weights::IN_PLACE) {
      w = weights.row(n);
      if (n + 2 * ROWS <= range.to) next = weights.row(n + ROWS);
    } else {
      for (int64_t r = 0; r < count; r++) weights.dequantize(n + r, dequantized.data() + r * K);
      w = dequantized.data();
    }
    float factors[ROWS];
    for (int64_t r = 0; r < count; r++) factors[r] = weights.factor(n + r);
    const T* b = bias ? bias + n : nullptr;
    if (count == ROWS)
      store_rows<ROWS>(Rows<T>{w, factors, b, y + n, N, K}, x, M, next);
    else
      for (int64_t r = 0; r < count; r++)
        store_rows<1, T>({w + r * K, factors + r, b ? b + r : b, y + n + r, N, K}, x, M, nullptr);
  }
}

// One token: row by row, in the order of memory.
template <class Weights, class T>
void multiply_one(Range range, const Weights& weights, const T* x, const QuantizedToken& token,
                  const T* bias, T* y, int64_t K) {
  for (int64_t n = range.from; n < range.to; n++) {
    float out;
    if constexpr (Weights::IN_PLACE)
      tile<1, 1, T>(weights.row(n), x, K, {}, &out);
    else
      out = weights.times(n, token);
    store(y + n, out + (bias ? to_float(bias[n]) : 0));
  }
}

// A Linear; same order as `ops.Matrix`. `bits` is 0 without quantization.
struct Matrix {
  const void* w;
  const float* scale;
  const void* bias;
  int64_t bits, N;

  // A range of y = x w^T + bias. `token` is the quantized x if M is 1 and the weight is quantized.
  template <class T>
  void multiply_range(Range range, const T* x, const QuantizedToken& token, T* y, int64_t M,
                      int64_t K) const {
    const auto* bytes = static_cast<const uint8_t*>(w);
    if (bits == 8)
      multiply_range(range, Int8Weight{bytes, scale, K}, x, token, y, M, K);
    else if (bits == 4)
      multiply_range(range, Int4Weight{bytes, scale, K}, x, token, y, M, K);
    else
      multiply_range(range, PlainWeight<T>{static_cast<const T*>(w), K}, x, token, y, M, K);
  }

 private:
  template <class Weights, class T>
  void multiply_range(Range range, const Weights& weights, const T* x,
                      const QuantizedToken& token, T* y, int64_t M, int64_t K) const {
    const T* b = static_cast<const T*>(bias);
    if (M == 1)
      multiply_one(range, weights, x, token, b, y, K);
    else
      multiply(range, weights, x, b, y, M, N, K);
  }
};

constexpr int64_t ROW_STEP = 16;  // threads divide rows in multiples of it
}  // namespace
