// Matrix products with quantized weights, in integers.
//   x (M, K) tokens   w (N, K) weight of a Linear   y (M, N)   G = K / 64 groups
//
// The values of a token are quantized to 16 or 8 bits, with a scale for every 64 values (a group). 16
// bits are at least as precise as bfloat16. The products of a group are summed exactly in integers;
// the sums of the groups are added in float, in the same order for any number of tokens.
#pragma once

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "quantized_tokens.h"
#include "quantized_weight.h"
#include "simd.h"
#include "thread_pool.h"
#include "tiles.h"

namespace {

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

// Adds the products of a panel and COUNT tokens, see `multiply_panel`.
template <int COUNT, int BITS, class Dot>
void multiply_tokens(const Panel<BITS, Dot>& panel, int64_t groups, const QuantizedTokens& x,
                     int64_t first, int64_t, const NextPanel<BITS>& next, float* acc) {
  multiply_panel<COUNT>(panel, groups, x, first, OFFSET<BITS, Dot>, next, acc);
}

#if OWL2_TILES
// The same with tiles for COUNT tokens, of which the first M exist.
template <int COUNT, int BITS, bool IS_SPLIT>
void multiply_tokens(const Panel<BITS, Tiles<IS_SPLIT>>& panel, int64_t groups,
                     const QuantizedTokens& x, int64_t first, int64_t M,
                     const NextPanel<BITS>& next, float* acc) {
  static_assert(PANEL == 2 * TILE);
  constexpr int64_t PART = 4;  // groups whose sums stay in the first cache
  constexpr int64_t STRIDE = PANEL_GROUPS * GROUP;
  alignas(64) int32_t sums[PART][2 * TILE * PANEL];
  for (int64_t from = 0; from < groups; from += PART) {
    const int64_t to = std::min(groups, from + PART);
    for (int64_t j = from; j < to; j++) {
      next.prefetch(j);
      const int8_t* bytes = &x.bytes[(first + j) * GROUP];
      const void* second = bytes + TILE * STRIDE;
      if (IS_SPLIT) second = &x.low_bytes[(first + j) * GROUP];
      constexpr int TILES = IS_SPLIT ? 2 : COUNT / TILE;
      multiply_tiles<TILES, IS_SPLIT>(bytes, second, STRIDE, panel.w[j], sums[j - from]);
    }
    for (int64_t m = 0; m < M; m++) {
      Floats totals[VECTORS];
      for (int v = 0; v < VECTORS; v++) totals[v] = load(acc + m * PANEL + v * WIDTH);
      for (int64_t j = from; j < to; j++)
        for (int v = 0; v < VECTORS; v++) {
          const int64_t slot = first + m * PANEL_GROUPS + j;
          const int32_t* values = sums[j - from] + m * PANEL + v * WIDTH;
          Ints sum = load_ints(values);
          if (IS_SPLIT) sum = (sum << 8) + load_ints(values + TILE * PANEL);
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
        multiply_tokens<COUNT>(panel, groups, x, first, count, next, acc);
        i += count;
      };
      if constexpr (IS_TILES<Dot>) {
        while (i + TILE < M) multiply.template operator()<Dot::TOKENS>();
        if (i < M) multiply.template operator()<TILE>();
        continue;
      }
      while (i + TOKENS <= M) multiply.template operator()<TOKENS>();
      if (TOKENS > 4 && i + 4 <= M) multiply.template operator()<4>();
      if (i + 2 <= M) multiply.template operator()<2>();
      if (i < M) multiply.template operator()<1>();
    }
}

// The rows `range` of y = x w^T + bias.
template <int BITS, class Dot, class T>
void multiply_with(Range range, const QuantizedWeight& weight, const QuantizedTokens& x,
                        const T* bias, T* y) {
  constexpr int64_t FEW = 64, MANY = 256;  // tokens
  thread_local Array<float> workspace;
  const int64_t max_panels = x.M > FEW ? 8 : 1;
  workspace.resize(std::min(x.M, MANY) * max_panels * PANEL);
  float* const sums = workspace.data();
  [[maybe_unused]] const std::conditional_t<IS_TILES<Dot>, TileShapes, bool> shapes{};
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

// The same, with the products for these tokens.
template <int BITS, class T>
void multiply_quantized(Range range, const QuantizedWeight& weight, const QuantizedTokens& x,
                        int activation_bits, const T* bias, T* y) {
  const bool has_bytes = uses_bytes(BITS, activation_bits);
#if OWL2_TILES
  if (uses_tiles(x.M, has_bytes ? 8 : 16))
    return has_bytes ? multiply_with<BITS, Tiles<false>>(range, weight, x, bias, y)
                     : multiply_with<BITS, Tiles<true>>(range, weight, x, bias, y);
#endif
  if constexpr (BITS == 4 || OWL2_BYTE_DOT)
    if (has_bytes) return multiply_with<BITS, Bytes>(range, weight, x, bias, y);
  multiply_with<BITS, Words>(range, weight, x, bias, y);
}
}  // namespace
