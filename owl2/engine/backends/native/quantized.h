// Matrix products with quantized weights, in integers.
//   x (M, K) tokens   w (N, K) weight of a Linear   y (M, N)   G = K / 64 groups
//
// The values of a token are quantized to 16 or 8 bits, with a scale for every 64 values (a group). 16
// bits are at least as precise as bfloat16. The products of a group are summed exactly in integers;
// the sums of the groups are added in float, in the same order for any number of tokens.
//
// A panel is a part of the weight, PANEL rows by up to PANEL_GROUPS groups, in the CPU cache. Lane i
// of its vectors belongs to row i, so that no sum crosses lanes. A vector has
//   words: for each row two 16-bit values. Of every four values, the first vector has values 0 and 2,
//          the second has 1 and 3: a mask extracts them from bytes. Tokens have the same order.
//   bytes: for each row four 8-bit values.
// For 4 bits, the vectors of the lower halves of a group precede those of the upper halves.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "integer_dot.h"
#include "simd.h"
#include "thread_pool.h"

namespace {
constexpr int GROUP = 64;

// ---------------------------------------------------------------- tokens

// Tokens as integers. `sums` are those of the integers of a group. For a panel, the values of all
// tokens are contiguous: in the order of K, many widths would map all of them to the same few lines
// of the CPU cache.
constexpr int PANEL_GROUPS = 8;
struct QuantizedTokens {
  int64_t M;
  std::vector<int16_t> words;  // (panels, M, PANEL_GROUPS, GROUP)
  std::vector<int8_t> bytes;
  std::vector<float> scales;  // (panels, M, PANEL_GROUPS)
  std::vector<int32_t> sums;

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

// ---------------------------------------------------------------- kinds of products
// STEPS vectors have the values of a group. SUMMED products are added to a Partial sum, which `add`
// then adds to a sum.

struct Words {
  typedef int16_t Value;
  static constexpr int STEPS = 32, SUMMED = 32;
  static Ints dot(Ints acc, Ints w, Ints x) { return dot_words(acc, w, x); }
  static const Value* values(const QuantizedTokens& x) { return x.words.data(); }
};
#if OWL2_BYTE_DOT
struct Bytes {
  typedef int8_t Value;
  static constexpr int STEPS = 16, SUMMED = 16;
  static Ints dot(Ints acc, Ints w, Ints x) { return dot_bytes(acc, w, x); }
  static const Value* values(const QuantizedTokens& x) { return x.bytes.data(); }
};
#else
struct Bytes {  // of weights with 4 bits only
  typedef int8_t Value;
  static constexpr int STEPS = 16, SUMMED = BYTE_STEPS;
  static Ints dot(Ints acc, Ints w, Ints x) { return dot_nibbles(acc, w, x); }
  static const Value* values(const QuantizedTokens& x) { return x.bytes.data(); }
};
#endif

// Whether the products with a weight are those of bytes.
inline bool uses_bytes(int64_t bits, int64_t activation_bits) {
  return activation_bits == 8 && (bits == 4 || (bits == 8 && OWL2_BYTE_DOT));
}

// ---------------------------------------------------------------- weights

// (N, K) integers. 8 bits: plus 128, one scale for each row. 4 bits: plus 8, one scale for each
// group; byte i of a group has the values i and i + 32. With shifts, the four bytes of a scale are two
// bfloat16 values, a scale and what is added to all weights of the group.
struct QuantizedWeight {
  const uint8_t* w;
  const float* scale;
  int64_t bits, has_shifts, N, K;

  int64_t row_bytes() const { return K * bits / 8; }
  const float* row_scales(int64_t n) const { return scale + (bits == 8 ? n : n * (K / GROUP)); }

  // The scale and the shift of four bytes, and those of WIDTH rows.
  std::pair<float, float> split(float both) const {
    if (!has_shifts) return {both, 0.f};
    bf16 halves[2];
    std::memcpy(halves, &both, sizeof halves);
    return {to_float(halves[0]), to_float(halves[1])};
  }
  std::pair<Floats, Floats> split(Ints both) const {
    if (!has_shifts) return {(Floats)both, Floats{}};
    return {(Floats)((Bits)both << 16), (Floats)(both & int32_t(0xffff0000))};
  }

  template <class T>
  void dequantize(int64_t n, T* out) const {
    const uint8_t* row = w + n * row_bytes();
    for (int64_t k = 0; k < K; k += WIDTH) {
      uint8_t values[WIDTH];
      const int64_t at = k % GROUP, byte = bits == 8 ? k : k / GROUP * 32 + at % 32;
      for (int i = 0; i < WIDTH; i++)
        values[i] = bits == 8 ? row[byte + i] : row[byte + i] >> (at < 32 ? 0 : 4) & 15;
      const float offset = bits == 8 ? 128 : 8;
      const auto [scale, shift] = split(row_scales(n)[bits == 8 ? 0 : k / GROUP]);
      store(out + k, (load(values) - offset) * scale + shift);
    }
  }
};

// The WIDTH rows from n on, one per lane; rows from `end` on repeat the last one.
struct LaneRows {
  const QuantizedWeight& weight;
  const uint8_t *values[WIDTH], *scales[WIDTH];

  LaneRows(const QuantizedWeight& weight, int64_t n, int64_t end) : weight(weight) {
    for (int i = 0; i < WIDTH; i++) {
      const int64_t row = std::min(n + i, end - 1);
      values[i] = weight.w + row * weight.row_bytes();
      scales[i] = reinterpret_cast<const uint8_t*>(weight.row_scales(row));
    }
  }

  // The scales and shifts of groups g … g + 4, or of fewer at the end.
  template <int BITS>
  void load_scales(int64_t g, int64_t G, Floats (&out)[4], Floats (&shifts)[4]) const {
    Ints columns[4];
    if (BITS == 4 && g + 4 <= G)
      load_columns(scales, 4 * g, columns);
    else
      for (int64_t j = 0; j < std::min<int64_t>(4, G - g); j++)
        for (int i = 0; i < WIDTH; i++)
          std::memcpy((char*)&columns[j] + 4 * i, scales[i] + (BITS == 4 ? 4 * (g + j) : 0), 4);
    for (int j = 0; j < 4; j++) std::tie(out[j], shifts[j]) = weight.split(columns[j]);
  }

  // Calls `use` with the vectors of a group as operands of Dot, and with their indices.
  template <int BITS, class Dot, class Use>
  inline __attribute__((always_inline)) void unpack(int64_t g, const Use& use) const {
    constexpr int BYTES = GROUP * BITS / 8, MASK = (1 << BITS) - 1;
#pragma GCC unroll 4
    for (int at = 0; at < BYTES; at += 16) {
      Ints columns[4];
      load_columns(values, g * BYTES + at, columns);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 8 / BITS; half++) {
          const auto shifted = [&](int bits) { return (Ints)((Bits)columns[i] >> bits); };
          const int first = (half * GROUP / 2 + at + 4 * i) * Dot::STEPS / GROUP;
          if constexpr (Dot::STEPS == 32) {
            use(first, shifted(4 * half) & (MASK | MASK << 16));
            use(first + 1, shifted(4 * half + 8) & (MASK | MASK << 16));
          } else if constexpr (BITS == 4) {
            use(first, shifted(4 * half) & 0x0f0f0f0f);
          } else {
            use(first, BYTE_OFFSET ? columns[i] : columns[i] ^ int32_t(0x80808080));
          }
        }
    }
  }
};

template <int BITS, class Dot>
constexpr int32_t OFFSET = BITS == 4 ? 8 : Dot::STEPS == 16 ? BYTE_OFFSET : 128;

constexpr int VECTORS = WIDTH == 4 ? 4 : 2, PANEL = VECTORS * WIDTH;

template <class Dot>
struct Panel {
  Ints w[PANEL_GROUPS][Dot::STEPS][VECTORS];
  Floats scales[PANEL_GROUPS][VECTORS], shifts[PANEL_GROUPS][VECTORS];

  // Groups g … g + count of the rows from n on.
  template <int BITS>
  __attribute__((noinline)) void load(const QuantizedWeight& weight, int64_t n, int64_t end,
                                      int64_t g, int64_t count) {
    for (int v = 0; v < VECTORS; v++) {
      const LaneRows rows(weight, n + v * WIDTH, end);
      for (int64_t j = 0; j < count; j++) {
        rows.unpack<BITS, Dot>(g + j, [&](int step, Ints x) { w[j][step][v] = x; });
        if (j % 4) continue;
        Floats four[4], added[4];
        rows.load_scales<BITS>(g + j, g + count, four, added);
        for (int64_t i = j; i < std::min(j + 4, count); i++)
          scales[i][v] = four[i - j], shifts[i][v] = added[i - j];
      }
    }
  }
};

// ---------------------------------------------------------------- products

// Adds the products of one group of WIDTH rows to acc. `sum` has the integers, `total` is the sum of
// the token's values.
template <int BITS>
Floats add_group(Floats acc, Ints sum, Floats scale, Floats shift, float token_scale,
                 int32_t total) {
  acc = multiply_add(__builtin_convertvector(sum, Floats), scale * token_scale, acc);
  if constexpr (BITS == 4)
    acc = multiply_add(Floats{} + float(total) * token_scale, shift, acc);
  return acc;
}

// Adds the products of a panel and COUNT tokens to acc (COUNT, PANEL). `first` is the slot of the
// first token; `offset` is that of the weights.
template <int COUNT, int BITS, class Dot>
void multiply_panel(const Panel<Dot>& panel, int64_t groups, const QuantizedTokens& x,
                    int64_t first, int32_t offset, float* acc) {
  constexpr int PER_VECTOR = GROUP / Dot::STEPS, PARTS = Dot::STEPS / Dot::SUMMED;
  for (int64_t j = 0; j < groups; j++) {
    const auto* values = Dot::values(x) + (first + j) * GROUP;
    const int32_t* token_sums = &x.sums[first + j];
    const float* token_scales = &x.scales[first + j];
    Ints sums[COUNT][VECTORS];
    for (int m = 0; m < COUNT; m++)
      for (int v = 0; v < VECTORS; v++)
        sums[m][v] = broadcast(-offset * token_sums[m * PANEL_GROUPS]);
    const auto add_products = [&](const Ints (*w)[VECTORS], Ints (&out)[COUNT][VECTORS]) {
#pragma GCC unroll 8
      for (int s = 0; s < Dot::SUMMED; s++, values += PER_VECTOR)
        for (int m = 0; m < COUNT; m++) {
          const Ints token = broadcast_ints(values + m * PANEL_GROUPS * GROUP);
          for (int v = 0; v < VECTORS; v++) out[m][v] = Dot::dot(out[m][v], w[s][v], token);
        }
    };
    if constexpr (PARTS == 1) add_products(panel.w[j], sums);
    for (int part = 0; part < PARTS && PARTS > 1; part++) {
      Ints partial[COUNT][VECTORS] = {};
      add_products(panel.w[j] + part * Dot::SUMMED, partial);
      for (int m = 0; m < COUNT; m++)
        for (int v = 0; v < VECTORS; v++) sums[m][v] += widened(partial[m][v]);
    }
    for (int m = 0; m < COUNT; m++)
      for (int v = 0; v < VECTORS; v++) {
        float* out = acc + m * PANEL + v * WIDTH;
        const int64_t slot = m * PANEL_GROUPS;
        store(out, add_group<BITS>(load(out), sums[m][v], panel.scales[j][v], panel.shifts[j][v],
                                   token_scales[slot], token_sums[slot]));
      }
  }
}

// The products of WIDTH rows and one token, without a panel; the same values as `multiply_panel`.
template <int BITS, class Dot>
Floats multiply_rows(const QuantizedWeight& weight, int64_t n, int64_t end,
                     const QuantizedTokens& x) {
  constexpr int PARTS = Dot::STEPS / Dot::SUMMED, PER_VECTOR = GROUP / Dot::STEPS;
  constexpr int64_t BYTES = GROUP * BITS / 8;
  const LaneRows rows(weight, n, end);
  const auto* values = Dot::values(x);
  const int64_t G = weight.K / GROUP;
  Floats acc = {}, scales[4], shifts[4];
  for (int64_t g = 0; g < G; g++) {
    if (g % 4 == 0) rows.load_scales<BITS>(g, G, scales, shifts);
    if (n + 2 * WIDTH <= end)  // the next rows, in the order of memory
      for (int64_t i = 0; i < WIDTH * BYTES; i += 64)
        __builtin_prefetch(weight.w + ((n + WIDTH) * G + g * WIDTH) * BYTES + i, 0, 2);
    Ints parts[PARTS] = {};
    rows.unpack<BITS, Dot>(g, [&](int step, Ints w) {
      Ints& part = parts[step / Dot::SUMMED];
      part = Dot::dot(part, w, broadcast_ints(values + g * GROUP + step * PER_VECTOR));
    });
    Ints sum = broadcast(-OFFSET<BITS, Dot> * x.sums[g]);
    for (int i = 0; i < PARTS; i++) sum += PARTS == 1 ? parts[i] : widened(parts[i]);
    acc = add_group<BITS>(acc, sum, scales[g % 4], shifts[g % 4], x.scales[g], x.sums[g]);
  }
  return acc;
}

// Adds the products of all groups of `panels` panels and the tokens m … m + M to sums
// (panels, M, PANEL). A part of the tokens stays in the CPU cache for all panels.
template <int BITS, class Dot>
void multiply_panels(const QuantizedWeight& weight, int64_t n, int64_t end, int64_t panels,
                     const QuantizedTokens& x, int64_t m, int64_t M, float* sums) {
  constexpr int TOKENS = WIDTH == 16 ? 8 : WIDTH == 8 ? 6 : 4;
  const int64_t G = weight.K / GROUP;
  Panel<Dot> panel;
  for (int64_t g = 0; g < G; g += PANEL_GROUPS)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t groups = std::min<int64_t>(PANEL_GROUPS, G - g);
      panel.template load<BITS>(weight, n + p * PANEL, end, g, groups);
      int64_t i = 0;
      const auto multiply = [&]<int COUNT>() {
        multiply_panel<COUNT, BITS>(panel, groups, x, x.slot(m + i, g), OFFSET<BITS, Dot>,
                                    sums + (p * M + i) * PANEL);
        i += COUNT;
      };
      while (i + TOKENS <= M) multiply.template operator()<TOKENS>();
      if (TOKENS > 4 && i + 4 <= M) multiply.template operator()<4>();
      if (i + 2 <= M) multiply.template operator()<2>();
      if (i < M) multiply.template operator()<1>();
    }
}

// The rows `range` of y = x w^T + bias.
template <int BITS, class Dot, class T>
void multiply_quantized(Range range, const QuantizedWeight& weight, const QuantizedTokens& x,
                        const T* bias, T* y) {
  constexpr int64_t FEW = 64, MANY = 256;  // tokens
  thread_local std::vector<float> workspace;
  const int64_t max_panels = x.M > FEW ? 8 : 1;
  workspace.resize(std::min(x.M, MANY) * max_panels * PANEL);
  float* const sums = workspace.data();
  for (int64_t m = 0; m < x.M; m += MANY)
    for (int64_t n = range.from; n < range.to; n += max_panels * PANEL) {
      const int64_t M = std::min(x.M - m, MANY);
      const int64_t panels = std::min(max_panels, (range.to - n + PANEL - 1) / PANEL);
      if (x.M == 1) {
        for (int v = 0; v < VECTORS; v++)
          store(sums + v * WIDTH, multiply_rows<BITS, Dot>(weight, n + v * WIDTH, range.to, x));
      } else {
        std::fill_n(sums, panels * M * PANEL, 0.f);
        multiply_panels<BITS, Dot>(weight, n, range.to, panels, x, m, M, sums);
      }
      for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < M; i++)
          for (int64_t row = n + p * PANEL, r = 0; r < PANEL && row + r < range.to; r++)
            store(y + (m + i) * weight.N + row + r,
                  sums[(p * M + i) * PANEL + r] + (bias ? to_float(bias[row + r]) : 0));
    }
}
}  // namespace
