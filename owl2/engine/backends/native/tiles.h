// Integer products of sixteen tokens and sixteen rows with the tiles of AMX (x86).
//
// A tile register has sixteen rows of 64 bytes. One instruction multiplies the 64 values of a group of
// sixteen tokens with those of sixteen rows of a weight: 16 x 16 sums. The sums are exact, so the
// results equal those of other instructions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__) && !defined(OWL2_PORTABLE)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define OWL2_TILES 1
#elif defined(OWL2_EMULATED_TILES)  // tests on CPUs without AMX define it
#define OWL2_TILES 1
#else
#define OWL2_TILES 0
#endif

namespace {
constexpr int TILE = 16;        // tokens or rows
constexpr int TILE_BYTES = 64;  // of a row of a tile
#if OWL2_TILES

// Whether this process may use tiles. Linux saves them for a process only on request.
inline bool has_tiles() {
#if defined(OWL2_EMULATED_TILES)
  return true;
#else
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool is_permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return is_permitted;
#endif
}

// The shapes of the tile registers of this thread. The former ones return at the end, because torch
// uses tiles too.
class TileShapes {
 public:
#if defined(OWL2_EMULATED_TILES)
  TileShapes() {}
#else
  TileShapes() {
    _tile_storeconfig(&before_);
    Shapes full = {.palette = 1};
    for (int i = 0; i < 8; i++) full.row_bytes[i] = TILE_BYTES, full.rows[i] = TILE;
    asm volatile("" ::"r"(&full) : "memory");  // the compiler does not know that all of it is read
    _tile_loadconfig(&full);
  }
  ~TileShapes() { _tile_loadconfig(&before_); }
  TileShapes(const TileShapes&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Shapes before_;
#endif
};

// Whether the products of M tokens with 16 or 8 bits are those of tiles. For fewer tokens, other
// instructions are faster.
inline bool uses_tiles(int64_t M, int bits) { return M >= (bits == 8 ? 9 : 5) && has_tiles(); }

// sums (COUNT, TILE tokens, 2 * TILE rows): the products of a group for one or two tiles of tokens. A
// tile has 64 values of a token every `stride` bytes. `w` (16, 2 * TILE) has four values of each row.
template <int COUNT, bool IS_SECOND_UNSIGNED>
inline void multiply_tiles(const void* first, const void* second, int64_t stride, const void* w,
                           int32_t* sums) {
  constexpr int64_t PAIR = 2 * TILE_BYTES;
#if defined(OWL2_EMULATED_TILES)
  const int8_t* weights = static_cast<const int8_t*>(w);
  for (int m = 0; m < COUNT * TILE; m++)
    for (int n = 0; n < 2 * TILE; n++) {
      const void* values = static_cast<const int8_t*>(m < TILE ? first : second) + m % TILE * stride;
      int32_t total = 0;
      for (int k = 0; k < TILE_BYTES; k++) {
        const int32_t value = m >= TILE && IS_SECOND_UNSIGNED
                                  ? static_cast<const uint8_t*>(values)[k]
                                  : static_cast<const int8_t*>(values)[k];
        total += value * weights[k / 4 * PAIR + n * 4 + k % 4];
      }
      sums[m * 2 * TILE + n] = total;
    }
#else
  asm volatile("" ::: "memory");  // the compiler does not know what tiles read
  _tile_loadd(6, w, PAIR);
  _tile_loadd(7, static_cast<const uint8_t*>(w) + TILE_BYTES, PAIR);
  _tile_loadd(4, first, stride);
  _tile_zero(0);
  _tile_zero(1);
  _tile_dpbssd(0, 4, 6);
  _tile_dpbssd(1, 4, 7);
  _tile_stored(0, sums, PAIR);
  _tile_stored(1, sums + TILE, PAIR);
  if constexpr (COUNT == 2) {
    _tile_loadd(5, second, stride);
    _tile_zero(2);
    _tile_zero(3);
    if constexpr (IS_SECOND_UNSIGNED) {
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    sums += 2 * TILE * TILE;
    _tile_stored(2, sums, PAIR);
    _tile_stored(3, sums + TILE, PAIR);
  }
#endif
}
#else
struct TileShapes {};
inline bool uses_tiles(int64_t, int) { return false; }
#endif
}  // namespace
