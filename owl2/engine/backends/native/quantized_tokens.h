// Tokens as integers, for the products of `quantized.h`.
#pragma once

#include <algorithm>
#include <limits>

#include "integer_dot.h"
#include "simd.h"
#include "thread_pool.h"

namespace {
constexpr int GROUP = 64;  // values that share a scale

// Tokens as integers. `sums` are those of the integers of a group. For a panel, the values of all
// tokens are contiguous: in the order of K, many widths would map all of them to the same few lines
// of the CPU cache.
constexpr int PANEL_GROUPS = 8;
struct QuantizedTokens {
  int64_t M;
  Array<int16_t> words;  // (panels, M, PANEL_GROUPS, GROUP)
  Array<int8_t> bytes;
  Array<float> scales;  // (panels, M, PANEL_GROUPS)
  Array<int32_t> sums;

  // K is the largest width of the tokens.
  QuantizedTokens(int64_t M, int64_t K, bool with_words, bool with_bytes) : M(M) {
    const int64_t groups = with_words || with_bytes ? M * (K / GROUP + PANEL_GROUPS) : 0;
    words.resize(with_words ? groups * GROUP : 0), bytes.resize(with_bytes ? groups * GROUP : 0);
    scales.resize(groups), sums.resize(groups);
  }

  // Where group g of token m is.
  int64_t slot(int64_t m, int64_t g) const {
    return (g / PANEL_GROUPS * M + m) * PANEL_GROUPS + g % PANEL_GROUPS;
  }

  // This thread's part of x (M, K).
  template <class T>
  void quantize(const Worker& worker, const T* x, int64_t K, int bits) {
    const int64_t G = K / GROUP;
    const auto [from, to] = worker.share(M * G, 1);
    for (int64_t i = from; i < to; i++) quantize_group(x + i * GROUP, slot(i / G, i % G), bits);
  }

 private:
  template <class T>
  void quantize_group(const T* x, int64_t g, int bits) {
    const float limit = bits == 8 ? 127 : 32767;
    Floats maxima = {};
    Ints finite = Ints{} - 1;
    for (int i = 0; i < GROUP; i += WIDTH) {
      const Floats v = load(x + i), size = v < 0.f ? -v : v;
      maxima = maxima > size ? maxima : size;
      finite &= size <= std::numeric_limits<float>::max();
    }
    float maximum = 0;
    bool all_finite = true;
    for (int i = 0; i < WIDTH; i++)
      maximum = std::max(maximum, maxima[i]), all_finite &= finite[i] != 0;
    // Values that are not finite make the products NaN.
    scales[g] = all_finite ? maximum / limit : std::numeric_limits<float>::quiet_NaN();
    const float inverse = all_finite && maximum > 0 ? limit / maximum : 0;
    int32_t values[GROUP] = {};
    Ints sum = {};
    for (int i = 0; i < GROUP && inverse != 0; i += WIDTH) {
      const Ints v = rounded(load(x + i) * inverse);
      store_ints(values + i, v);
      sum += v;
    }
    sums[g] = 0;
    for (int i = 0; i < WIDTH; i++) sums[g] += sum[i];
    if (!bytes.empty())
      for (int i = 0; i < GROUP; i++) bytes[g * GROUP + i] = int8_t(values[i]);
    if (!words.empty())
      for (int i = 0; i < GROUP; i += 4) {
        int16_t* out = &words[g * GROUP + i];
        out[0] = int16_t(values[i]), out[1] = int16_t(values[i + 2]);
        out[2] = int16_t(values[i + 1]), out[3] = int16_t(values[i + 3]);
      }
  }
};
}  // namespace
