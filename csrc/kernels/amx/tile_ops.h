// AMX tile registers behind a policy, so that one GEMM body runs on hardware tiles and, in tests,
// on emulated ones. Tile map of all bodies, for tiles of r ≤ 16 rows of A:
//
//   tmm0 tmm1   C of the first r rows: output columns 0 … 15 | 16 … 31
//   tmm2 tmm3   C of the next r rows: the same
//   tmm4 tmm5   A: the first r rows | the next r rows, 64 bytes of k each
//   tmm6 tmm7   W: the two halves of one packed tile, 16 k-groups × 64 bytes
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif

namespace ktrt {
namespace {

constexpr int kTileRows = 16;

#if defined(__AMX_TILE__)

// The 64-byte operand of LDTILECFG (Intel SDM, volume 1, table 18-1).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct HardwareTiles {
  // rows: of A and C. Loading a configuration clears the tiles.
  static void configure(int rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileRows);
    }
    _tile_loadconfig(&config);
  }
  static void release() { _tile_release(); }
  // GCC's intrinsics paste their arguments into the register name, so a template parameter needs
  // assembler of our own. "memory": what was stored before a load must have been stored.
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(const void* data, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(stride), "i"(kTile) : "memory");
  }
  // The same for data that is not read again soon.
  template <int kTile>
  static void load_stream(const void* data, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(data), "r"(stride), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static void store(void* data, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(data), "r"(stride), "i"(kTile)
                 : "memory");
  }
  template <int kC, int kA, int kB>
  static void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
  template <int kC, int kA, int kB>
  static void multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

#endif

// What the instructions do, one element at a time: tests only.
struct EmulatedTiles {
  struct State {
    alignas(64) uint8_t data[8][kTileRows][64];
    int rows[8];
  };
  static State& state() {
    static thread_local State state;
    return state;
  }
  static void configure(int rows) {
    State& s = state();
    memset(&s, 0, sizeof(s));
    for (int tile = 0; tile < 8; ++tile) s.rows[tile] = tile < 6 ? rows : kTileRows;
  }
  static void release() { memset(&state(), 0, sizeof(State)); }
  template <int kTile>
  static void zero() {
    memset(state().data[kTile], 0, sizeof(state().data[kTile]));
  }
  template <int kTile>
  static void load(const void* data, int64_t stride) {
    zero<kTile>();
    for (int r = 0; r < state().rows[kTile]; ++r) {
      memcpy(state().data[kTile][r], static_cast<const uint8_t*>(data) + r * stride, 64);
    }
  }
  template <int kTile>
  static void load_stream(const void* data, int64_t stride) {
    load<kTile>(data, stride);
  }
  template <int kTile>
  static void store(void* data, int64_t stride) {
    for (int r = 0; r < state().rows[kTile]; ++r) {
      memcpy(static_cast<uint8_t*>(data) + r * stride, state().data[kTile][r], 64);
    }
  }
  template <int kC, int kA, int kB>
  static void multiply_bf16() {
    multiply<float, kC, kA, kB>([](float sum, const uint8_t* a, const uint8_t* b) {
      for (int v = 0; v < 2; ++v) sum += bf16_at(a + 2 * v) * bf16_at(b + 2 * v);
      return sum;
    });
  }
  template <int kC, int kA, int kB>
  static void multiply_int8() {
    multiply<int32_t, kC, kA, kB>([](int32_t sum, const uint8_t* a, const uint8_t* b) {
      for (int v = 0; v < 4; ++v) sum += static_cast<int8_t>(a[v]) * static_cast<int8_t>(b[v]);
      return sum;
    });
  }

 private:
  static float bf16_at(const uint8_t* p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
  }
  // C[m][n] = dot(C[m][n], 4 bytes of A[m][k], 4 bytes of B[k][n]) for k = 0 … 15.
  template <class Value, int kC, int kA, int kB, class Dot>
  static void multiply(Dot dot) {
    State& s = state();
    for (int m = 0; m < s.rows[kC]; ++m) {
      for (int k = 0; k < kTileRows; ++k) {
        for (int n = 0; n < 16; ++n) {
          Value sum;
          memcpy(&sum, s.data[kC][m] + 4 * n, 4);
          sum = dot(sum, s.data[kA][m] + 4 * k, s.data[kB][k] + 4 * n);
          memcpy(s.data[kC][m] + 4 * n, &sum, 4);
        }
      }
    }
  }
};

}  // namespace
}  // namespace ktrt
