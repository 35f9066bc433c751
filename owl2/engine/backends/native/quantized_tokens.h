// Tokens as integers, for the products of `quantized.h`.
#pragma once

#include <cstring>

#include "integer_dot.h"
#include "simd.h"
#include "thread_pool.h"
#include "tiles.h"

namespace {
constexpr int GROUP = 64;  // values that share a scale

// Tokens as integers. `sums` are those of the integers of a group. For a panel, the values of all
// tokens are contiguous: in the order of K, many widths would map all of them to the same few lines
// of the CPU cache.
constexpr int PANEL_GROUPS = 8;
struct QuantizedTokens {
  static constexpr int64_t PADDING = 2 * TILE * PANEL_GROUPS * GROUP;  // tiles are read as a whole
  int64_t M;
  Array<int16_t> words;  // (panels, M, PANEL_GROUPS, GROUP)
  Array<int8_t> bytes;      // of 8 bits, or the upper ones of 16 bits
  Array<uint8_t> low_bytes;
  Array<float> scales;  // (panels, M, PANEL_GROUPS)
  Array<int32_t> sums;

  // K is the largest width of the tokens.
  QuantizedTokens(int64_t M, int64_t K, bool with_words, bool with_bytes) : M(M) {
    const int64_t groups = with_words || with_bytes ? M * (K / GROUP + PANEL_GROUPS) : 0;
    const bool is_split = with_words && uses_tiles(M, 16);
    words.resize(with_words && !is_split ? groups * GROUP : 0);
    bytes.resize(with_bytes || is_split ? groups * GROUP + PADDING : 0);
    low_bytes.resize(is_split ? bytes.size() : 0);
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
    Floats maxima = {}, zeros = {};
    for (int i = 0; i < GROUP; i += WIDTH) {
      const Floats v = load(x + i), size = v < 0.f ? -v : v;
      maxima = maxima > size ? maxima : size;
      zeros += v * 0.f;  // NaN if a value is not finite
    }
    const float zero = sum(zeros), largest = maximum(maxima);
    // Values that are not finite make the products NaN.
    scales[g] = largest / limit + zero;
    const float inverse = zero == 0 && largest > 0 ? limit / largest : 0;
    Ints total = {};
    for (int i = 0; i < GROUP; i += WIDTH) {
      const Ints v = inverse == 0 ? Ints{} : rounded(load(x + i) * inverse);
      total += v;
      if (!bytes.empty()) store_bytes(&bytes[g * GROUP + i], low_bytes.empty() ? v : v >> 8);
      if (!low_bytes.empty()) store_bytes(&low_bytes[g * GROUP + i], v);
      if (!words.empty()) store_words(&words[g * GROUP + i], v);
    }
    sums[g] = 0;
    for (int i = 0; i < WIDTH; i++) sums[g] += total[i];
  }

  static void store_bytes(void* out, Ints v) {
    typedef int8_t Values __attribute__((vector_size(WIDTH)));
    const Values values = __builtin_convertvector(v, Values);
    std::memcpy(out, &values, sizeof values);
  }

  // Values 0, 2, 1, 3 of every four.
  static void store_words(int16_t* out, Ints v) {
    typedef int16_t Values __attribute__((vector_size(2 * WIDTH)));
    typedef uint64_t Fours __attribute__((vector_size(2 * WIDTH)));
    const Fours fours = (Fours)__builtin_convertvector(v, Values);
    const Fours mixed = (fours & 0xffff00000000ffff) | (fours >> 16 & 0xffff0000) |
                        (fours << 16 & 0xffff00000000);
    std::memcpy(out, &mixed, sizeof mixed);
  }
};
}  // namespace
