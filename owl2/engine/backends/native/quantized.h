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
//
// A weight is stored in blocks of BLOCK rows: the first four bytes of each row, then the next four
// bytes of each row, and so on. A vector of bytes is therefore loaded as it is stored.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "integer_dot.h"
#include "quantized_tokens.h"
#include "simd.h"
#include "thread_pool.h"
#include "tiles.h"

namespace {
constexpr int BLOCK = 16;  // rows
static_assert(BLOCK % WIDTH == 0);

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
#if OWL2_TILES
struct Tiles : Bytes {  // the same values, with signed weights
  static_assert(SUMMED == STEPS && GROUP == TILE_BYTES);
  static constexpr int MIN_TOKENS = 5;  // for fewer, `Bytes` is faster
};
#else
struct Tiles {};
#endif

// Whether the products with a weight are those of bytes.
inline bool uses_bytes(int64_t bits, int64_t activation_bits) {
  return activation_bits == 8 && (bits == 4 || (bits == 8 && OWL2_BYTE_DOT));
}

#if OWL2_TILES
// Whether the products of M tokens are those of tiles.
inline bool uses_tiles(int64_t bits, int64_t activation_bits, int64_t M) {
  return uses_bytes(bits, activation_bits) && M >= Tiles::MIN_TOKENS && has_tiles();
}
#endif

// ---------------------------------------------------------------- weights

// Added to the weights in vectors of Dot. 0: bytes are signed.
template <int BITS, class Dot>
constexpr int32_t OFFSET = std::is_same_v<Dot, Tiles> ? 0
                           : BITS == 4                ? 8
                           : Dot::STEPS == 16         ? BYTE_OFFSET
                                                      : 128;

// (N, K) integers in blocks of rows. 8 bits: plus 128, one scale for each row. 4 bits: plus 8; byte i
// of a group has the values i and i + 32. The four bytes of the scale of a group, which are in blocks
// too, are two bfloat16 values: a scale, and a shift that is added to all weights of the group.
struct QuantizedWeight {
  const uint8_t* w;
  const float* scale;
  int64_t bits, N, K;

  // The `unit`-th four bytes of row n in blocks whose rows have `units`; those of the next rows follow.
  static int64_t offset(int64_t n, int64_t unit, int64_t units) {
    return ((n / BLOCK * units + unit) * BLOCK + n % BLOCK) * 4;
  }
  int64_t units() const { return K * bits / 32; }
  int64_t block_size() const { return BLOCK * units() * 4; }  // bytes

  // The `unit`-th four bytes of the WIDTH rows from n on, a multiple of WIDTH.
  Ints load_units(int64_t n, int64_t unit) const { return load_ints(w + offset(n, unit, units())); }

  // Group g of the rows from n on.
  template <int BITS>
  const uint8_t* group(int64_t n, int64_t g) const {
    return w + offset(n, g * (GROUP * BITS / 32), units());
  }

  // Requests a group, also beyond the last group, where the next rows are: the prefetcher of the CPU
  // stops at the end of each page.
  template <int BITS>
  void prefetch(int64_t n, int64_t g) const {
    for (int i = 0; i < GROUP * BITS / 32; i++)
      __builtin_prefetch(group<BITS>(n, g) + i * BLOCK * 4, 0, 3);
  }

  // The scales and the shifts of a group of the WIDTH rows from n on.
  std::pair<Floats, Floats> load_scales(int64_t n, int64_t g) const {
    if (bits == 8) {
      Floats rows = {};
      std::memcpy(&rows, scale + n, 4 * std::min<int64_t>(WIDTH, N - n));
      return {rows, Floats{}};
    }
    const Ints both = load_ints((const char*)scale + offset(n, g, K / GROUP));
    return {(Floats)((Bits)both << 16), (Floats)(both & int32_t(0xffff0000))};
  }

  // The weights of the WIDTH rows from n on; rows from N on are not written.
  template <class T>
  void dequantize(int64_t n, T* out) const {
    for (int64_t unit = 0; unit < units(); unit++) {
      const int64_t first = bits == 8 ? 4 * unit : unit / 8 * GROUP + unit % 8 * 4;
      const auto [scales, shifts] = load_scales(n, first / GROUP);
      const Ints bytes = load_units(n, unit);
      for (int half = 0; half < 8 / bits; half++)
        for (int i = 0; i < 4; i++) {
          const int at = 8 * i + 4 * half;
          const Ints values = bits == 8 ? (bytes >> at & 255) - 128 : (bytes >> at & 15) - 8;
          const Floats weights = __builtin_convertvector(values, Floats) * scales + shifts;
          for (int row = 0; row < WIDTH && n + row < N; row++)
            store(out + row * K + first + half * GROUP / 2 + i, weights[row]);
        }
    }
  }

  // Calls `use` with the vectors of a group of WIDTH rows as operands of Dot, and with their indices.
  template <int BITS, class Dot, class Use>
  inline __attribute__((always_inline)) void unpack(int64_t n, int64_t g, const Use& use) const {
    constexpr int UNITS = GROUP * BITS / 32, MASK = (1 << BITS) - 1;
#pragma GCC unroll 16
    for (int unit = 0; unit < UNITS; unit++) {
      const Ints bytes = load_units(n, g * UNITS + unit);
#pragma GCC unroll 2
      for (int half = 0; half < 8 / BITS; half++) {
        const auto shifted = [&](int bits) { return (Ints)((Bits)bytes >> bits); };
        const int first = (half * GROUP / 2 + 4 * unit) * Dot::STEPS / GROUP;
        if constexpr (Dot::STEPS == 32) {
          use(first, shifted(4 * half) & (MASK | MASK << 16));
          use(first + 1, shifted(4 * half + 8) & (MASK | MASK << 16));
        } else if constexpr (BITS == 4) {
          const Ints values = shifted(4 * half) & 0x0f0f0f0f;
          typedef int8_t Signed __attribute__((vector_size(sizeof values)));
          use(first, OFFSET<BITS, Dot> ? values : (Ints)((Signed)values - int8_t(8)));
        } else {
          use(first, OFFSET<BITS, Dot> ? bytes : bytes ^ int32_t(0x80808080));
        }
      }
    }
  }
};

constexpr int VECTORS = WIDTH == 4 ? 4 : 2, PANEL = VECTORS * WIDTH;

// Lines of the panel that is multiplied next. They are requested while another panel is multiplied,
// a few at a time: a core waits if it has requested too many.
template <int BITS>
struct NextPanel {
  static constexpr int64_t LINE = 64;
  static constexpr int64_t LINES = BLOCK * GROUP * BITS / 8 / LINE;  // of a group of a block
  const uint8_t* start;
  int64_t block_size;  // bytes
  int64_t from, to;    // of the lines of each group of each block

  void prefetch(int64_t group) const {
    for (int64_t b = 0; b < PANEL / BLOCK; b++)
      for (int64_t i = group * LINES + from; i < group * LINES + to; i++)
        __builtin_prefetch(start + b * block_size + i * LINE, 0, 2);
  }
};

template <int BITS, class Dot>
struct Panel {
  // Whether the vectors are used as they are stored.
  static constexpr bool IS_STORED = BITS == 8 && Dot::STEPS == 16 && OFFSET<BITS, Dot> != 0;
  Ints w[IS_STORED ? 1 : PANEL_GROUPS][Dot::STEPS][VECTORS];
  const uint8_t* stored[VECTORS];
  Floats scales[PANEL_GROUPS][VECTORS], shifts[PANEL_GROUPS][VECTORS];

  // Groups g … g + count of the rows from n on. Vectors after the last block repeat it.
  __attribute__((noinline)) void load(const QuantizedWeight& weight, int64_t n, int64_t g,
                                      int64_t count) {
    for (int v = 0; v < VECTORS; v++) {
      const int64_t row = std::min(n + v * WIDTH, (weight.N - 1) / WIDTH * WIDTH);
      stored[v] = weight.w + weight.offset(row, g * Dot::STEPS, weight.units());
      for (int64_t j = 0; j < count; j++) {
        if constexpr (!IS_STORED)
          weight.unpack<BITS, Dot>(row, g + j, [&](int step, Ints x) { w[j][step][v] = x; });
        if (BITS == 4) std::tie(scales[j][v], shifts[j][v]) = weight.load_scales(row, g + j);
      }
    }
  }
  Ints vector(int64_t j, int step, int v) const {
    if constexpr (IS_STORED) return load_ints(stored[v] + (j * Dot::STEPS + step) * BLOCK * 4);
    return w[j][step][v];
  }
};

// ---------------------------------------------------------------- products

// Adds the products of one group of WIDTH rows to acc. `sum` has the integers, `total` is the sum of
// the token's values. The scales of rows of 8 bits are not included: see `scaled`.
template <int BITS>
Floats add_group(Floats acc, Ints sum, Floats scale, Floats shift, float token_scale,
                 int32_t total) {
  const Floats products = __builtin_convertvector(sum, Floats);
  if constexpr (BITS == 8) return multiply_add(products, Floats{} + token_scale, acc);
  acc = multiply_add(products, scale * token_scale, acc);
  return multiply_add(Floats{} + float(total) * token_scale, shift, acc);
}

// The factors of the sums of all groups of a panel's rows, and their biases.
struct PanelScales {
  Floats scales[VECTORS], biases[VECTORS];

  template <class T>
  PanelScales(const QuantizedWeight& weight, int64_t n, const T* bias) {
    for (int v = 0; v < VECTORS; v++) {
      const int64_t row = n + v * WIDTH, count = std::min<int64_t>(WIDTH, weight.N - row);
      const bool is_one = weight.bits == 4 || count <= 0;
      scales[v] = is_one ? Floats{} + 1.f : weight.load_scales(row, 0).first;
      biases[v] = Floats{};
      for (int64_t i = 0; i < count && bias; i++) biases[v][i] = to_float(bias[row + i]);
    }
  }
};

// Adds the products of a panel and COUNT tokens to acc (COUNT, PANEL), and prefetches a part of the
// next panel. `first` is the slot of the first token; `offset` is that of the weights.
template <int COUNT, int BITS, class Dot>
void multiply_panel(const Panel<BITS, Dot>& panel, int64_t groups, const QuantizedTokens& x,
                    int64_t first, int32_t offset, const NextPanel<BITS>& next, float* acc) {
  constexpr int PER_VECTOR = GROUP / Dot::STEPS, PARTS = Dot::STEPS / Dot::SUMMED;
  Floats totals[COUNT][VECTORS];
  for (int m = 0; m < COUNT; m++)
    for (int v = 0; v < VECTORS; v++) totals[m][v] = load(acc + m * PANEL + v * WIDTH);
  for (int64_t j = 0; j < groups; j++) {
    next.prefetch(j);
    const auto* values = Dot::values(x) + (first + j) * GROUP;
    const int32_t* token_sums = &x.sums[first + j];
    const float* token_scales = &x.scales[first + j];
    Ints sums[COUNT][VECTORS];
    for (int m = 0; m < COUNT; m++)
      for (int v = 0; v < VECTORS; v++)
        sums[m][v] = broadcast(-offset * token_sums[m * PANEL_GROUPS]);
    const auto add_products = [&](int first, Ints (&out)[COUNT][VECTORS]) {
#pragma GCC unroll 8
      for (int s = 0; s < Dot::SUMMED; s++, values += PER_VECTOR) {
        Ints w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = panel.vector(j, first + s, v);
        for (int m = 0; m < COUNT; m++) {
          const Ints token = broadcast_ints(values + m * PANEL_GROUPS * GROUP);
          for (int v = 0; v < VECTORS; v++) out[m][v] = Dot::dot(out[m][v], w[v], token);
        }
      }
    };
    if constexpr (PARTS == 1) add_products(0, sums);
    for (int part = 0; part < PARTS && PARTS > 1; part++) {
      Ints partial[COUNT][VECTORS] = {};
      add_products(part * Dot::SUMMED, partial);
      for (int m = 0; m < COUNT; m++)
        for (int v = 0; v < VECTORS; v++) sums[m][v] += widened(partial[m][v]);
    }
    for (int m = 0; m < COUNT; m++)
      for (int v = 0; v < VECTORS; v++) {
        const int64_t slot = m * PANEL_GROUPS;
        totals[m][v] = add_group<BITS>(totals[m][v], sums[m][v], panel.scales[j][v],
                                       panel.shifts[j][v], token_scales[slot], token_sums[slot]);
      }
  }
  for (int m = 0; m < COUNT; m++)
    for (int v = 0; v < VECTORS; v++) store(acc + m * PANEL + v * WIDTH, totals[m][v]);
}

#if OWL2_TILES
// The same as `multiply_panel` for COUNT tiles, of which the first M tokens exist.
template <int COUNT, int BITS>
void multiply_panel_tiles(const Panel<BITS, Tiles>& panel, int64_t groups, const QuantizedTokens& x,
                          int64_t first, int64_t M, const NextPanel<BITS>& next, float* acc) {
  static_assert(PANEL == 2 * TILE);
  constexpr int64_t PART = 4;  // groups whose sums stay in the first cache
  alignas(64) int32_t sums[PART][COUNT * TILE * PANEL];
  for (int64_t from = 0; from < groups; from += PART) {
    const int64_t to = std::min(groups, from + PART);
    for (int64_t j = from; j < to; j++) {
      next.prefetch(j);
      multiply_tiles<COUNT>(&x.bytes[(first + j) * GROUP], PANEL_GROUPS * GROUP, panel.w[j],
                            sums[j - from]);
    }
    for (int64_t m = 0; m < M; m++) {
      Floats totals[VECTORS];
      for (int v = 0; v < VECTORS; v++) totals[v] = load(acc + m * PANEL + v * WIDTH);
      for (int64_t j = from; j < to; j++)
        for (int v = 0; v < VECTORS; v++) {
          const int64_t slot = first + m * PANEL_GROUPS + j;
          const Ints sum = load_ints(sums[j - from] + m * PANEL + v * WIDTH);
          totals[v] = add_group<BITS>(totals[v], sum, panel.scales[j][v], panel.shifts[j][v],
                                      x.scales[slot], x.sums[slot]);
        }
      for (int v = 0; v < VECTORS; v++) store(acc + m * PANEL + v * WIDTH, totals[v]);
    }
  }
}
#endif

// The products of WIDTH rows and one token, without a panel; the same values as `multiply_panel`.
template <int BITS, class Dot>
Floats multiply_rows(const QuantizedWeight& weight, int64_t n, const QuantizedTokens& x) {
  constexpr int PARTS = Dot::STEPS / Dot::SUMMED, PER_VECTOR = GROUP / Dot::STEPS;
  constexpr int AHEAD = 4;  // groups
  const auto* values = Dot::values(x);
  Floats acc = {};
  for (int64_t g = 0; g < weight.K / GROUP; g++) {
    Ints parts[PARTS] = {};
    weight.prefetch<BITS>(n, g + AHEAD);
    weight.unpack<BITS, Dot>(n, g, [&](int step, Ints w) {
      Ints& part = parts[step / Dot::SUMMED];
      part = Dot::dot(part, w, broadcast_ints(values + g * GROUP + step * PER_VECTOR));
    });
    Ints sum = broadcast(-OFFSET<BITS, Dot> * x.sums[g]);
    for (int i = 0; i < PARTS; i++) sum += PARTS == 1 ? parts[i] : widened(parts[i]);
    Floats scales = {}, shifts = {};
    if (BITS == 4) std::tie(scales, shifts) = weight.load_scales(n, g);
    acc = add_group<BITS>(acc, sum, scales, shifts, x.scales[g], x.sums[g]);
  }
  return acc;
}

// Adds the products of all groups of `panels` panels and the tokens m … m + M to sums
// (panels, M, PANEL). A part of the tokens stays in the CPU cache for all panels.
template <int BITS, class Dot>
void multiply_panels(const QuantizedWeight& weight, int64_t n, int64_t panels,
                     const QuantizedTokens& x, int64_t m, int64_t M, float* sums) {
  constexpr int TOKENS = WIDTH == 16 ? 6 : 4;  // so that the sums stay in registers
  const int64_t G = weight.K / GROUP;
  Panel<BITS, Dot> panel;
  for (int64_t g = 0; g < G; g += PANEL_GROUPS)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t groups = std::min<int64_t>(PANEL_GROUPS, G - g);
      panel.load(weight, n + p * PANEL, g, groups);
      const uint8_t* start = p + 1 < panels ? weight.group<BITS>(n + (p + 1) * PANEL, g)
                             : g + groups < G ? weight.group<BITS>(n, g + groups)
                                            : weight.group<BITS>(n + panels * PANEL, 0);
      int64_t i = 0;
      const auto multiply = [&]<int COUNT>() {
        // The tokens of each call prefetch their share.
        constexpr int64_t LINES = NextPanel<BITS>::LINES;
        const int64_t count = std::min<int64_t>(COUNT, M - i);
        const int64_t from = LINES * i / M, to = LINES * (i + count) / M;
        const NextPanel<BITS> next{start, weight.block_size(), from, to};
        const int64_t first = x.slot(m + i, g);
        float* const acc = sums + (p * M + i) * PANEL;
#if OWL2_TILES
        if constexpr (std::is_same_v<Dot, Tiles>)
          multiply_panel_tiles<COUNT / TILE, BITS>(panel, groups, x, first, count, next, acc);
        else
#endif
          multiply_panel<COUNT, BITS>(panel, groups, x, first, OFFSET<BITS, Dot>, next, acc);
        i += count;
      };
#if OWL2_TILES
      if constexpr (std::is_same_v<Dot, Tiles>) {
        while (i + TILE < M) multiply.template operator()<2 * TILE>();
        if (i < M) multiply.template operator()<TILE>();
        continue;
      }
#endif
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
  thread_local Array<float> workspace;
  const int64_t max_panels = x.M > FEW ? 8 : 1;
  workspace.resize(std::min(x.M, MANY) * max_panels * PANEL);
  float* const sums = workspace.data();
#if OWL2_TILES
  std::optional<TileShapes> shapes;
  if constexpr (std::is_same_v<Dot, Tiles>) shapes.emplace();
#endif
  for (int64_t m = 0; m < x.M; m += MANY)
    for (int64_t n = range.from; n < range.to; n += max_panels * PANEL) {
      const int64_t M = std::min(x.M - m, MANY);
      const int64_t panels = std::min(max_panels, (range.to - n + PANEL - 1) / PANEL);
      if (x.M == 1) {
        for (int v = 0; v < VECTORS && n + v * WIDTH < weight.N; v++)
          store(sums + v * WIDTH, multiply_rows<BITS, Dot>(weight, n + v * WIDTH, x));
      } else {
        std::fill_n(sums, panels * M * PANEL, 0.f);
        multiply_panels<BITS, Dot>(weight, n, panels, x, m, M, sums);
      }
      for (int64_t p = 0; p < panels; p++) {
        const int64_t first = n + p * PANEL;
        const PanelScales panel(weight, first, bias);
        for (int64_t i = 0; i < M; i++)
          for (int v = 0; v < VECTORS && first + v * WIDTH < range.to; v++) {
            const int64_t row = first + v * WIDTH;
            T* out = y + (m + i) * weight.N + row;
            const Floats total = load(sums + (p * M + i) * PANEL + v * WIDTH);
            const Floats result = multiply_add(total, panel.scales[v], panel.biases[v]);
            if (row + WIDTH <= weight.N)
              store(out, result);
            else
              for (int64_t r = 0; row + r < weight.N; r++) store(out + r, result[r]);
          }
      }
    }
}
}  // namespace
