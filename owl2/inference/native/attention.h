// One token of each sequence over the keys and values that its sequence has.
#pragma once

#include <algorithm>
#include <vector>

#include "numbers.h"

namespace {

// Where a sequence's keys and values lie: (rows, h, C, d).
template <class T>
struct Cache {
  T *keys, *values;
  int64_t h, C, d;
  int64_t at(int64_t row, int64_t head, int64_t position) const {
    return ((row * h + head) * C + position) * d;
  }
};

template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t d) {
  const int64_t half = d / 2;
  std::vector<float> turned(d);  // y may be x
  for (int64_t i = 0; i < d; i++) {
    const float other = i < half ? -to_float(x[i + half]) : to_float(x[i - half]);
    turned[i] = to_float(x[i]) * to_float(cos[i]) + other * to_float(sin[i]);
  }
  for (int64_t i = 0; i < d; i++) store(y + i, turned[i]);
}

template <class T>
void attend_one(const T* query, const T* keys, const T* values, T* out, int64_t n, int64_t d,
                float scaling, std::vector<float>& scores) {
  constexpr int STEP = Product<T>::STEP;
  scores.resize((n + WIDE - 1) / WIDE * WIDE, -INFINITY);
  float top = -INFINITY;
  for (int64_t i = 0; i < n; i++) {
    Floats acc = {};
    for (int64_t j = 0; j < d; j += STEP) acc = Product<T>::add(acc, keys + i * d + j, query + j);
    scores[i] = sum(acc) * scaling;
    top = std::max(top, scores[i]);
  }
  for (int64_t i = n; i < int64_t(scores.size()); i++) scores[i] = -INFINITY;
  Floats totals = {};
  for (size_t i = 0; i < scores.size(); i += WIDE) {
    const Floats weights = exponential(load(&scores[i]) - top);
    totals += weights;
    store(&scores[i], weights);
  }
  const float total = sum(totals);
  constexpr int AT_ONCE = 4;
  for (int64_t j = 0; j < d; j += AT_ONCE * WIDE) {
    const int parts = int(std::min<int64_t>(AT_ONCE, (d - j) / WIDE));
    Floats acc[AT_ONCE] = {};
    for (int64_t i = 0; i < n; i++)
      for (int p = 0; p < parts; p++) acc[p] += scores[i] * load(values + i * d + j + p * WIDE);
    for (int p = 0; p < parts; p++)
      for (int l = 0; l < WIDE; l++) store(out + j + p * WIDE + l, acc[p][l] / total);
  }
}

// Queries and keys of B tokens are turned to their positions, keys and values kept, and then each
// query attends to all that its sequence, a row of the cache, has up to there. Several tokens may
// be of one sequence.
template <class T>
void attend(T* query, const T* key, const T* value, const T* cos, const T* sin,
            const int64_t* rows, const int64_t* positions, Cache<T> cache, T* out, int64_t B,
            int64_t heads, float scaling, int threads) {
  const int64_t d = cache.d, group = heads / cache.h;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * cache.h; i++) {
      const int64_t b = i / cache.h, at = cache.at(rows[b], i % cache.h, positions[b]);
      rotate(key + i * d, cos + b * d, sin + b * d, cache.keys + at, d);
      std::memcpy(cache.values + at, value + i * d, d * sizeof(T));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * cache.h; i++) {
      const int64_t b = i / cache.h, g = i % cache.h, first = cache.at(rows[b], g, 0);
      for (int64_t e = 0; e < group; e++) {
        const int64_t at = (b * heads + g * group + e) * d;
        rotate(query + at, cos + b * d, sin + b * d, query + at, d);
        attend_one(query + at, cache.keys + first, cache.values + first, out + at,
                   positions[b] + 1, d, scaling, scores);
      }
    }
  }
}
}  // namespace
