// Attention of tokens over the keys and values of their sequences.
#pragma once

#include <algorithm>

#include "simd.h"
#include "thread_pool.h"

namespace {

// Positions of M tokens, and the keys and values of their rows. Same order as `ops.CacheSlots`.
struct CacheSlots {
  const void *cos, *sin;            // (M, d), of the positions
  const int64_t *rows, *positions;  // (M)
  void *keys, *values;              // (R, h, C, d)
  int64_t M, h, C, d;

  int64_t offset(int64_t b, int64_t head, int64_t position) const {
    return ((rows[b] * h + head) * C + position) * d;
  }
};

// Rotary embedding of x (d); y may be x.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t d) {
  const int64_t half = d / 2;
  int64_t i = 0;
  for (; i + WIDTH <= half; i += WIDTH) {
    const Floats first = load(x + i), second = load(x + i + half);
    store(y + i, first * load(cos + i) - second * load(sin + i));
    store(y + i + half, second * load(cos + i + half) + first * load(sin + i + half));
  }
  for (; i < half; i++) {
    const float first = to_float(x[i]), second = to_float(x[i + half]);
    store(y + i, first * to_float(cos[i]) - second * to_float(sin[i]));
    store(y + i + half, second * to_float(cos[i + half]) + first * to_float(sin[i + half]));
  }
}

// 0 … n in another order: the first half and the second half in turn. Memory is read faster in two
// streams.
inline int64_t in_halves(int64_t i, int64_t n) { return i % 2 ? (n + 1) / 2 + i / 2 : i / 2; }

// Replaces n scores by e to the power of their differences from the largest one; returns their sum.
// n is a multiple of WIDTH.
inline float exponentials(float* scores, int64_t n) {
  Floats maxima = Floats{} - INFINITY, totals = {};
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Floats score = load(scores + i);
    maxima = maxima > score ? maxima : score;
  }
  const float largest = maximum(maxima);
  for (int64_t i = 0; i < n; i += WIDTH) {
    const Floats weights = exponential(load(scores + i) - largest);
    totals += weights;
    store(scores + i, weights);
  }
  return sum(totals);
}

// out (d) = the weighted sum of n values (n, d), times `scale`. The weights are padded with 0 to a
// multiple of WIDTH. The values `ahead` of these are prefetched.
template <class T>
void weighted_sum(const float* weights, const T* values, int64_t n, int64_t d, float scale, T* out,
                  int64_t ahead) {
  constexpr int VECTORS = 8;  // independent sums, so that none waits for another
  int64_t j = 0;
  const auto sum_columns = [&]<int PARTS>() {
    Floats acc[PARTS] = {};
    for (int64_t i = 0; i < n; i++) {
      const int64_t row = in_halves(i, n);
      const T* at = values + row * d + j;
      for (int p = 0; p < PARTS; p++) {
        __builtin_prefetch(at + p * WIDTH + ahead, 0, 2);
        acc[p] += weights[row] * load(at + p * WIDTH);
      }
    }
    for (int p = 0; p < PARTS; p++) store(out + j + p * WIDTH, acc[p] * scale);
    j += PARTS * WIDTH;
  };
  while (j + VECTORS * WIDTH <= d) sum_columns.template operator()<VECTORS>();
  while (j + 2 * WIDTH <= d) sum_columns.template operator()<2>();
  while (j < d) sum_columns.template operator()<1>();
}

#if defined(__AVX512BF16__)
// The sums of the columns that `_mm512_unpacklo_epi16` and `_mm512_unpackhi_epi16` interleave: of
// every eight columns, the first four are in `low`, the others in `high`.
inline void store_unpacked(bf16* out, Floats low, Floats high) {
  store(out, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22,
                                     23));
  store(out + WIDTH, __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15,
                                             28, 29, 30, 31));
}

// Two values at a time: they are interleaved, so that one instruction multiplies both with their
// weights and adds. Weights are rounded to bfloat16, as in torch.
template <>
void weighted_sum(const float* weights, const bf16* values, int64_t n, int64_t d, float scale,
                  bf16* out, int64_t ahead) {
  constexpr int VECTORS = 2, SETS = 2;  // independent sums, so that none waits for another
  thread_local Array<bf16> rounded;
  rounded.resize((n + WIDTH) / WIDTH * WIDTH);
  for (int64_t i = 0; i < int64_t(rounded.size()); i += WIDTH)
    store(&rounded[i], load(weights + i));
  int64_t j = 0;
  const auto sum_columns = [&]<int PARTS>() {
    Floats low[SETS][PARTS] = {}, high[SETS][PARTS] = {};
    const auto add = [&]<int SET, bool PAIR>(int64_t i) {
      int32_t both;
      std::memcpy(&both, &rounded[i], 4);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
      for (int p = 0; p < PARTS; p++) {
        const bf16* at = values + i * d + j + p * 2 * WIDTH;
        __builtin_prefetch(at + ahead, 0, 2);
        __builtin_prefetch(at + d + ahead, 0, 2);
        const __m512i first = _mm512_loadu_si512(at);
        const __m512i second = PAIR ? _mm512_loadu_si512(at + d) : _mm512_setzero_si512();
        Floats &l = low[SET][p], &h = high[SET][p];
        l = (Floats)_mm512_dpbf16_ps((__m512)l, (__m512bh)_mm512_unpacklo_epi16(first, second),
                                     weight);
        h = (Floats)_mm512_dpbf16_ps((__m512)h, (__m512bh)_mm512_unpackhi_epi16(first, second),
                                     weight);
      }
    };
    const int64_t pairs = n / 2;
    int64_t i = 0;
    for (; i + 2 <= pairs; i += 2) {
      add.template operator()<0, true>(2 * in_halves(i, pairs));
      add.template operator()<1, true>(2 * in_halves(i + 1, pairs));
    }
    if (i < pairs) add.template operator()<0, true>(2 * in_halves(i, pairs));
    if (n % 2) add.template operator()<1, false>(n - 1);
    for (int p = 0; p < PARTS; p++, j += 2 * WIDTH) {
      const Floats l = (low[0][p] + low[1][p]) * scale, h = (high[0][p] + high[1][p]) * scale;
      store_unpacked(out + j, l, h);
    }
  };
  while (j + VECTORS * 2 * WIDTH <= d) sum_columns.template operator()<VECTORS>();
  while (j < d) sum_columns.template operator()<1>();
}
#endif

// One query (d) over n keys and values (n, d). `next` are the keys of the next query.
template <class T>
void attend_query(const T* query, const T* keys, const T* values, T* out, const T* next, int64_t n,
                  int64_t d, float scaling, Array<float>& scores) {
  constexpr int STEP = Product<T>::STEP, MAX_BYTES = 64 * 1024;
  scores.resize((n + WIDTH) / WIDTH * WIDTH);  // at least n + 1
  // If there are few keys, the processor itself prefetches them too late.
  const int64_t ahead = n * d * int64_t(sizeof(T)) < MAX_BYTES ? next - keys : 0;
  const int64_t blocks = int64_t(scores.size()) / WIDTH;
  for (int64_t block = 0; block < blocks; block++) {
    Floats products[WIDTH] = {};
    const int64_t i = in_halves(block, blocks) * WIDTH, some = std::min<int64_t>(WIDTH, n - i);
    for (int64_t s = 0; s < WIDTH * d; s += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(keys + i * d + s + ahead, 0, 2);
    const auto add = [&](int64_t count) {
      for (int64_t s = 0; s < count; s++)
        for (int64_t j = 0; j < d; j += STEP)
          products[s] = Product<T>::add(products[s], keys + (i + s) * d + j, query + j);
    };
    if (some == WIDTH)
      add(WIDTH);  // a constant: the sums stay in registers
    else
      add(some);
    Floats score = sums(products) * scaling;
    for (int64_t s = some; s < WIDTH; s++) score[s] = -INFINITY;
    store(&scores[i], score);
  }
  const float total = exponentials(scores.data(), int64_t(scores.size()));
  weighted_sum(scores.data(), values, n, d, 1 / total, out, ahead);
}

// ---------------------------------------------------------------- prompts

// How many queries of a row read its keys and values together, and how many keys they read at once.
// Their products fill the vectors of `sums`.
constexpr int KEYS = 4, QUERIES = WIDTH / KEYS;

struct QueryWeights {
  Array<float> values;  // (QUERIES, size), 0 from the length of a query on
  int64_t size;
  int64_t lengths[QUERIES];  // the keys of each query
  float scales[QUERIES];     // 1 / the sum of the weights of each query

  const float* of(int q) const { return &values[q * size]; }
  int64_t shortest() const { return *std::min_element(lengths, lengths + QUERIES); }
  int64_t longest() const { return *std::max_element(lengths, lengths + QUERIES); }
};

// out[q] (d) = the weighted sums of values (n, d). Values after the length of a query are not
// multiplied with its weights, which are 0: they may be infinite or NaN.
template <class T>
void weighted_sums(const QueryWeights& weights, const T* values, int64_t d, T* const* out) {
  const int64_t shared = weights.shortest(), n = weights.longest();
  int64_t j = 0;
  const auto sum_columns = [&]<int PARTS>() {
    Floats acc[QUERIES][PARTS] = {};
    const auto add = [&]<bool ALL>(int64_t i) {
      for (int p = 0; p < PARTS; p++) {
        const Floats column = load(values + i * d + j + p * WIDTH);
        for (int q = 0; q < QUERIES; q++)
          if (ALL || i < weights.lengths[q]) acc[q][p] += weights.of(q)[i] * column;
      }
    };
    for (int64_t i = 0; i < shared; i++) add.template operator()<true>(i);
    for (int64_t i = shared; i < n; i++) add.template operator()<false>(i);
    for (int q = 0; q < QUERIES; q++)
      for (int p = 0; p < PARTS; p++) store(out[q] + j + p * WIDTH, acc[q][p] * weights.scales[q]);
    j += PARTS * WIDTH;
  };
  while (j + 4 * WIDTH <= d) sum_columns.template operator()<4>();
  while (j < d) sum_columns.template operator()<1>();
}

#if defined(__AVX512BF16__)
template <>
void weighted_sums(const QueryWeights& weights, const bf16* values, int64_t d, bf16* const* out) {
  const int64_t shared = weights.shortest() / 2 * 2, n = weights.longest();
  thread_local Array<bf16> rounded;
  rounded.resize(weights.values.size());
  for (size_t i = 0; i < rounded.size(); i += WIDTH) store(&rounded[i], load(&weights.values[i]));
  int64_t j = 0;
  const auto sum_columns = [&]<int PARTS>() {
    Floats low[QUERIES][PARTS] = {}, high[QUERIES][PARTS] = {};
    // Two values, of which a query has the first `lengths[q] - i`.
    const auto add = [&]<bool ALL>(int64_t i) {
      __m512i firsts[PARTS], seconds[PARTS];
      for (int p = 0; p < PARTS; p++) {
        const bf16* at = values + i * d + j + p * 2 * WIDTH;
        firsts[p] = _mm512_loadu_si512(at);
        seconds[p] = ALL || i + 1 < n ? _mm512_loadu_si512(at + d) : _mm512_setzero_si512();
      }
      for (int q = 0; q < QUERIES; q++) {
        const int64_t left = weights.lengths[q] - i;
        if (!ALL && left < 1) continue;
        int32_t both;
        std::memcpy(&both, &rounded[q * weights.size + i], 4);
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
        for (int p = 0; p < PARTS; p++) {
          const __m512i second = ALL || left > 1 ? seconds[p] : _mm512_setzero_si512();
          const __m512i l = _mm512_unpacklo_epi16(firsts[p], second);
          const __m512i h = _mm512_unpackhi_epi16(firsts[p], second);
          low[q][p] = (Floats)_mm512_dpbf16_ps((__m512)low[q][p], (__m512bh)l, weight);
          high[q][p] = (Floats)_mm512_dpbf16_ps((__m512)high[q][p], (__m512bh)h, weight);
        }
      }
    };
    for (int64_t i = 0; i < shared; i += 2) add.template operator()<true>(i);
    for (int64_t i = shared; i < n; i += 2) add.template operator()<false>(i);
    for (int q = 0; q < QUERIES; q++)
      for (int p = 0; p < PARTS; p++)
        store_unpacked(out[q] + j + p * 2 * WIDTH, low[q][p] * weights.scales[q],
                       high[q][p] * weights.scales[q]);
    j += PARTS * 2 * WIDTH;
  };
  while (j + 4 * WIDTH <= d) sum_columns.template operator()<2>();
  while (j < d) sum_columns.template operator()<1>();
}
#endif

// Queries (QUERIES, d) over the first `weights.lengths` keys and values of their row. The result of a
// query does not depend on the others.
template <class T>
void attend_queries(const T* const* queries, const T* keys, const T* values, int64_t d,
                    float scaling, T* const* out, QueryWeights& weights) {
  const int64_t n = weights.longest();
  weights.size = (n + WIDTH) / WIDTH * WIDTH;  // at least n + 1
  weights.values.resize(QUERIES * weights.size);
  for (int64_t i = 0; i < n; i += KEYS) {
    const T* key[KEYS];
    for (int k = 0; k < KEYS; k++) key[k] = keys + std::min(i + k, n - 1) * d;
    Floats products[WIDTH] = {};
    for (int64_t j = 0; j < d; j += Product<T>::STEP)
      for (int q = 0; q < QUERIES; q++)
        for (int k = 0; k < KEYS; k++) {
          Floats& product = products[q * KEYS + k];
          product = Product<T>::add(product, key[k] + j, queries[q] + j);
        }
    float scores[WIDTH];
    store(scores, sums(products) * scaling);
    for (int q = 0; q < QUERIES; q++)
      std::memcpy(&weights.values[q * weights.size + i], scores + q * KEYS, KEYS * sizeof(float));
  }
  for (int q = 0; q < QUERIES; q++) {
    float* row = &weights.values[q * weights.size];
    std::fill(row + weights.lengths[q], row + weights.size, -INFINITY);
    weights.scales[q] = 1 / exponentials(row, weights.size);
  }
  weighted_sums(weights, values, d, out);
}

// Rotates queries (M, heads, d) and keys (M, h, d) to their positions, and writes keys and values to
// the cache. Each query attends to its row up to its position. Several tokens may be in the same
// row.
template <class T>
void attention(Worker& worker, const CacheSlots& slots, const T* key, const T* value, T* query,
               T* out, int64_t heads, float scaling) {
  thread_local QueryWeights weights;
  const int64_t d = slots.d, group = heads / slots.h;
  const auto [from, to] = worker.share(slots.M * slots.h, 1);
  for (int64_t i = from; i < to; i++) {
    const int64_t b = i / slots.h, at = slots.offset(b, i % slots.h, slots.positions[b]);
    rotate(key + i * d, static_cast<const T*>(slots.cos) + b * d,
           static_cast<const T*>(slots.sin) + b * d, static_cast<T*>(slots.keys) + at, d);
    std::memcpy(static_cast<T*>(slots.values) + at, value + i * d, d * sizeof(T));
  }
  worker.wait();
  const auto is_same_row = [&](int64_t a, int64_t b) {
    return b >= 0 && b < slots.M && slots.rows[a] == slots.rows[b];
  };
  // Head by head, so that keys and values stay in the CPU cache from token to token.
  worker.for_each_part(slots.M * slots.h, [&](int64_t from, int64_t to) {
    for (int64_t i = from, count; i < to; i += count) {
      const int64_t b = i % slots.M, g = i / slots.M, first = slots.offset(b, g, 0);
      const T* keys = static_cast<const T*>(slots.keys) + first;
      const T* values = static_cast<const T*>(slots.values) + first;
      const int64_t next = std::min(i + 1, slots.M * slots.h - 1);
      const int64_t after = slots.offset(next % slots.M, next / slots.M, 0);
      count = 1;
      while (count < QUERIES && i + count < to && is_same_row(b, b + count)) count++;
      for (int64_t e = 0; e < group; e++) {
        // The last query again in place of those that are missing.
        T *queries[QUERIES], *outs[QUERIES];
        for (int64_t q = 0; q < QUERIES; q++) {
          const int64_t token = b + std::min(q, count - 1);
          const int64_t at = (token * heads + g * group + e) * d;
          queries[q] = query + at, outs[q] = out + at;
          weights.lengths[q] = slots.positions[token] + 1;
          if (q < count)
            rotate(query + at, static_cast<const T*>(slots.cos) + token * d,
                   static_cast<const T*>(slots.sin) + token * d, query + at, d);
        }
        if (count > 1 || is_same_row(b, b - 1) || is_same_row(b, b + 1))
          attend_queries(queries, keys, values, d, scaling, outs, weights);
        else
          attend_query(*queries, keys, values, *outs, static_cast<const T*>(slots.keys) + after,
                       *weights.lengths, d, scaling, weights.values);
      }
    }
  });
}
}  // namespace
