// The arithmetic of one decode step on a CPU: a few tokens through large matrices.
//
// Such a step is limited by how fast weights can be read, and each is read once. So a matrix is
// read row after row, as it lies in memory, by as many threads as torch uses; general libraries,
// made for many tokens, reach a third to a half of the memory's speed here.
//
// Activations are float or bfloat16, weights are of the same type, or whole numbers of 8 or 4 bits
// with a scale (`quantised.py` makes them). Sums are in float. Row-major everywhere.
//   x (M, K) tokens   w (N, K) a Linear's weight   y (M, N)
// Vectors are the compiler's own (vector_size), so that every CPU runs this; the two instructions
// that have no such form, products of bfloat16 and of bytes, are used where the CPU has them.

#include <algorithm>
#include <vector>

#include "attention.h"
#include "numbers.h"

namespace {

// ---------------------------------------------------------------- products

// Rows that are to come, fetched into the cache while others are computed.
template <class T>
struct Ahead {
  const T* w = nullptr;
  int64_t rows = 0;
};

// out[r * M + m] for R rows of w and M tokens, both (.., K).
template <int R, int M, class T>
inline void tile(const T* w, const T* x, int64_t K, Ahead<T> ahead, float* out) {
  constexpr int STEP = Product<T>::STEP;
  constexpr int LANES = R * M == 1 ? 4 : 1;  // a single sum would wait for itself
  Floats acc[R][M][LANES] = {};
  int64_t k = 0;
  for (; k + LANES * STEP <= K; k += LANES * STEP) {
    for (int64_t r = 0; r < ahead.rows; r++) __builtin_prefetch(ahead.w + r * K + k, 0, 2);
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
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      for (int l = 1; l < LANES; l++) acc[r][m][0] += acc[r][m][l];
      out[r * M + m] = sum(acc[r][m][0]);
    }
}

// A token as whole numbers of 16 bits, scaled to its largest value, in two bytes: 256 high + low.
// Bytes multiply with bytes in one instruction, and 16 bits are as fine as bfloat16 where it
// matters.
struct Token {
  std::vector<int8_t> high, low;
  std::vector<int32_t> sums;  // of every 64 numbers
  int64_t sum_high = 0, sum_low = 0;
  float scale;

  template <class T>
  Token(const T* x, int64_t K) : high(K), low(K), sums(K / 64) {
    float top = 0;
    for (int64_t k = 0; k < K; k++) top = std::max(top, std::fabs(to_float(x[k])));
    scale = top / 32512;  // 127 * 256, so that both bytes fit
    const float inverse = top > 0 ? 32512 / top : 0;
    for (int64_t k = 0; k < K; k++) {
      const int32_t whole = int32_t(std::nearbyintf(to_float(x[k]) * inverse));
      const int32_t h = (whole + 128) >> 8, l = whole - 256 * h;
      high[k] = int8_t(h), low[k] = int8_t(l);
      sums[k / 64] += whole, sum_high += h, sum_low += l;
    }
  }
};

// ---------------------------------------------------------------- weights
// Each kind can multiply one row with one token, and write a row out as numbers of type T, whose
// products are then to be multiplied by `factor`.

template <class T>
struct Whole {
  const T* w;
  int64_t K;
  static constexpr bool IN_PLACE = true;
  const T* row(int64_t n) const { return w + n * K; }
  float factor(int64_t) const { return 1; }
};

// 8 bits: (w - 128) * scale[n].
struct Eight {
  const uint8_t* w;
  const float* scale;  // (N)
  int64_t K;
  static constexpr bool IN_PLACE = false;
  float factor(int64_t n) const { return scale[n]; }

  float times(int64_t n, const Token& x) const {
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
  void expand(int64_t n, T* out) const {
    for (int64_t k = 0; k < K; k += WIDE) store(out + k, load(w + n * K + k) - 128);
  }
};

// 4 bits, two a byte: (w - 8) * scale[n, g], in groups of 64. Byte i of a group holds the numbers
// i and i + 32.
struct Four {
  const uint8_t* w;
  const float* scale;  // (N, K / 64)
  int64_t K;
  static constexpr bool IN_PLACE = false;
  float factor(int64_t) const { return 1; }

  float times(int64_t n, const Token& x) const {
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
  void expand(int64_t n, T* out) const {
    for (int64_t g = 0; g < K / 64; g++) {
      const Bytes a = nibbles(w + n * K / 2 + 32 * g);
      uint8_t numbers[64];
      std::memcpy(numbers, &a, 64);
      for (int i = 0; i < 64; i += WIDE)
        store(out + 64 * g + i, (load(numbers + i) - 8) * scale[n * (K / 64) + g]);
    }
  }
};

// ---------------------------------------------------------------- all rows, all tokens

constexpr int ROWS = 4, TOKENS = 4;  // at a time: their sums fit into the registers

// Some rows of a matrix with what belongs to them, from the first of them on.
template <class T>
struct Rows {
  const T* w;
  const float* factors;
  const T* bias;
  T* y;
  int64_t N, K;
};

template <int R, int M, class T>
inline void put(const Rows<T>& rows, const T* x, int64_t m, Ahead<T> ahead) {
  float out[R * M];
  tile<R, M>(rows.w, x + m * rows.K, rows.K, ahead, out);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < M; j++)
      store(rows.y + (m + j) * rows.N + r,
            out[r * M + j] * rows.factors[r] + (rows.bias ? to_float(rows.bias[r]) : 0));
}

// All tokens. Each tile fetches its part of the rows to come, so that memory is never idle.
template <int R, class T>
inline void put_all(const Rows<T>& rows, const T* x, int64_t M, const T* next) {
  const int64_t tiles = (M + TOKENS - 1) / TOKENS;
  const auto ahead = [&](int64_t i) {
    const int64_t from = R * i / tiles, to = R * (i + 1) / tiles;
    return next ? Ahead<T>{next + from * rows.K, to - from} : Ahead<T>{};
  };
  int64_t m = 0;
  for (; m + TOKENS <= M; m += TOKENS) put<R, TOKENS>(rows, x, m, ahead(m / TOKENS));
  if (M - m == 3) put<R, 3>(rows, x, m, ahead(tiles - 1));
  if (M - m == 2) put<R, 2>(rows, x, m, ahead(tiles - 1));
  if (M - m == 1) put<R, 1>(rows, x, m, ahead(tiles - 1));
}

template <class Weights, class T>
void multiply(const Weights& weights, const T* x, const T* bias, T* y, int64_t M, int64_t N,
              int64_t K, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> expanded(Weights::IN_PLACE ? 0 : ROWS * K);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < (N + ROWS - 1) / ROWS; i++) {
      const int64_t n = i * ROWS, some = std::min<int64_t>(ROWS, N - n);
      const T *w, *next = nullptr;
      if constexpr (Weights::IN_PLACE) {
        w = weights.row(n);
        if (n + 2 * ROWS <= N) next = weights.row(n + ROWS);
      } else {
        for (int64_t r = 0; r < some; r++) weights.expand(n + r, expanded.data() + r * K);
        w = expanded.data();
      }
      float factors[ROWS];
      for (int64_t r = 0; r < some; r++) factors[r] = weights.factor(n + r);
      const T* b = bias ? bias + n : nullptr;
      if (some == ROWS)
        put_all<ROWS>(Rows<T>{w, factors, b, y + n, N, K}, x, M, next);
      else
        for (int64_t r = 0; r < some; r++)
          put_all<1, T>({w + r * K, factors + r, b ? b + r : b, y + n + r, N, K}, x, M, nullptr);
    }
  }
}

// One token takes the rows one by one: then memory is read as it lies.
template <class Weights, class T>
void multiply_one(const Weights& weights, const T* x, const T* bias, T* y, int64_t N, int64_t K,
                  int threads) {
  const auto each_row = [&](const auto& times) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n++) store(y + n, times(n) + (bias ? to_float(bias[n]) : 0));
  };
  if constexpr (Weights::IN_PLACE) {
    each_row([&](int64_t n) {
      float out;
      tile<1, 1, T>(weights.row(n), x, K, {}, &out);
      return out;
    });
  } else {
    const Token token(x, K);
    each_row([&](int64_t n) { return weights.times(n, token); });
  }
}

// ---------------------------------------------------------------- what stands between matrices

template <class T>
void rms_norm(const T* x, const T* weight, T* y, int64_t M, int64_t D, float epsilon) {
  for (int64_t m = 0; m < M; m++) {
    const T* row = x + m * D;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < D; i++) squares += to_float(row[i]) * to_float(row[i]);
    const float inverse = 1 / std::sqrt(squares / D + epsilon);
    for (int64_t i = 0; i < D; i++) {
      T normed;  // LLaMA's norm rounds before its weight
      store(&normed, to_float(row[i]) * inverse);
      store(y + m * D + i, to_float(normed) * to_float(weight[i]));
    }
  }
}

template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + WIDE <= n; i += WIDE) {
    const Floats g = load(gate + i);
    store(y + i, g / (1 + exponential(-g)) * load(up + i));
  }
  for (; i < n; i++) {
    const float g = to_float(gate[i]);
    store(y + i, g / (1 + std::exp(-g)) * to_float(up[i]));
  }
}

template <class Weights, class T>
void linear(const Weights& weights, const T* x, const T* bias, T* y, int64_t M, int64_t N,
            int64_t K, int threads) {
  if (M == 1)
    multiply_one(weights, x, bias, y, N, K, threads);
  else
    multiply(weights, x, bias, y, M, N, K, threads);
}

template <class T>
void linear(int bits, const T* x, const void* w, const float* scale, const T* bias, T* y,
            int64_t M, int64_t N, int64_t K, int threads) {
  const auto* whole = static_cast<const uint8_t*>(w);
  if (bits == 8)
    linear(Eight{whole, scale, K}, x, bias, y, M, N, K, threads);
  else if (bits == 4)
    linear(Four{whole, scale, K}, x, bias, y, M, N, K, threads);
  else
    linear(Whole<T>{static_cast<const T*>(w), K}, x, bias, y, M, N, K, threads);
}

template <class Weights, class T>
void expand(const Weights& weights, T* out, int64_t N, int64_t K, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < N; n++) {
    weights.expand(n, out + n * K);
    const float factor = weights.factor(n);
    if (factor != 1)
      for (int64_t k = 0; k < K; k++) store(out + n * K + k, to_float(out[n * K + k]) * factor);
  }
}

template <class T>
void expand(int bits, const uint8_t* w, const float* scale, T* out, int64_t N, int64_t K,
            int threads) {
  if (bits == 8)
    expand(Eight{w, scale, K}, out, N, K, threads);
  else
    expand(Four{w, scale, K}, out, N, K, threads);
}
}  // namespace

// ---------------------------------------------------------------- a whole layer

// A Linear as Python hands it over: `bits` of whole numbers, else 0.
struct Matrix {
  const void* w;
  const float* scale;
  const void* bias;
  int64_t bits, N;
};

// A decoder layer and where its tokens are. Same order as `ops.Layer`.
struct Layer {
  Matrix query, key, value, output, gate, up, down;
  const void *norm, *second_norm;
  const void *cos, *sin;             // (B, d)
  const int64_t *rows, *positions;   // (B)
  void *keys, *values;               // (rows, h, C, d)
  int64_t B, D, heads, h, C, d;
  float epsilon, second_epsilon, scaling;
  int32_t threads;
};

namespace {

template <class T>
std::vector<T> product(const Matrix& m, const std::vector<T>& x, int64_t B, int threads) {
  std::vector<T> y(B * m.N);
  linear(int(m.bits), x.data(), m.w, m.scale, static_cast<const T*>(m.bias), y.data(), B, m.N,
         int64_t(x.size()) / B, threads);
  return y;
}

template <class T>
void add(T* x, const std::vector<T>& y) {
  for (size_t i = 0; i < y.size(); i++) store(x + i, to_float(x[i]) + to_float(y[i]));
}

// One layer for B tokens, hidden (B, D) in place.
template <class T>
void step(const Layer& l, T* hidden) {
  const auto all = [&](const Matrix& m, const std::vector<T>& x) {
    return product(m, x, l.B, l.threads);
  };
  std::vector<T> normed(l.B * l.D);
  rms_norm(hidden, static_cast<const T*>(l.norm), normed.data(), l.B, l.D, l.epsilon);
  std::vector<T> query = all(l.query, normed);
  const std::vector<T> key = all(l.key, normed), value = all(l.value, normed);
  std::vector<T> attended(query.size());
  attend(query.data(), key.data(), value.data(), static_cast<const T*>(l.cos),
         static_cast<const T*>(l.sin), l.rows, l.positions,
         Cache<T>{static_cast<T*>(l.keys), static_cast<T*>(l.values), l.h, l.C, l.d},
         attended.data(), l.B, l.heads, l.scaling, l.threads);
  add(hidden, all(l.output, attended));
  rms_norm(hidden, static_cast<const T*>(l.second_norm), normed.data(), l.B, l.D,
           l.second_epsilon);
  std::vector<T> gate = all(l.gate, normed);
  const std::vector<T> up = all(l.up, normed);
  swiglu(gate.data(), up.data(), gate.data(), int64_t(gate.size()));
  add(hidden, all(l.down, gate));
}
}  // namespace

// What Python calls: each function once for float and once for bfloat16. `bits`: of whole-number
// weights, else 0. K and d are multiples of what the products take at a time; Python sees to it.
#define EXPORT(T, NAME)                                                                           \
  extern "C" void linear_##NAME(int bits, const T* x, const void* w, const float* scale,          \
                                const T* bias, T* y, int64_t M, int64_t N, int64_t K,             \
                                int threads) {                                                    \
    linear(bits, x, w, scale, bias, y, M, N, K, threads);                                         \
  }                                                                                               \
  extern "C" void expand_##NAME(int bits, const uint8_t* w, const float* scale, T* out, int64_t N, \
                                int64_t K, int threads) {                                         \
    expand(bits, w, scale, out, N, K, threads);                                                   \
  }                                                                                               \
  extern "C" void rms_norm_##NAME(const T* x, const T* weight, T* y, int64_t M, int64_t D,        \
                                  float epsilon) {                                                \
    rms_norm(x, weight, y, M, D, epsilon);                                                        \
  }                                                                                               \
  extern "C" void step_##NAME(const Layer* layer, T* hidden) { step(*layer, hidden); }
EXPORT(float, float32)
EXPORT(bf16, bfloat16)
