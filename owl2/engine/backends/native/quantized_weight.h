// Quantized weights as vectors of integers, for the products of `quantized.h`.
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
#include <tuple>
#include <utility>

#include "integer_dot.h"
#include "quantized_tokens.h"
#include "simd.h"
#include "tiles.h"

namespace {
constexpr int BLOCK = 16;  // rows
static_assert(BLOCK % WIDTH == 0);

// ---------------------------------------------------------------- kinds of products
// STEPS vectors have the values of a group. The products of SUMMED vectors are one partial sum.

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
// The products of `tiles.h`. Weights are signed bytes; tokens have 8 bits, or the two bytes of 16 bits.
template <bool IS_SPLIT>
struct Tiles : Bytes {
  static_assert(SUMMED == STEPS && GROUP == TILE_BYTES);
  static constexpr int TOKENS = IS_SPLIT ? TILE : 2 * TILE;  // multiplied at once
};
#endif
template <class Dot>
constexpr bool IS_TILES = false;
#if OWL2_TILES
template <bool SPLIT>
constexpr bool IS_TILES<Tiles<SPLIT>> = true;
#endif

// Whether the products with a weight are those of bytes.
inline bool uses_bytes(int64_t bits, int64_t activation_bits) {
  return activation_bits == 8 && (bits == 4 || (bits == 8 && OWL2_BYTE_DOT));
}

// ---------------------------------------------------------------- weights

// Added to the weights in vectors of Dot. 0: bytes are signed.
template <int BITS, class Dot>
constexpr int32_t OFFSET = IS_TILES<Dot> ? 0 : BITS == 4 ? 8 : Dot::STEPS == 16 ? BYTE_OFFSET : 128;

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
}  // namespace
