// AMX tile registers as a policy class, so that one GEMM body runs on hardware tiles and, in tests,
// on emulated ones. Tile map of all bodies, for tiles of r ≤ 16 rows of A:
//
//   tmm0 tmm1   C of the first r rows: output columns 0 … 15 | 16 … 31
//   tmm2 tmm3   C of the next r rows: the same
//   tmm4 tmm5   A: the first r rows | the next r rows, 64 bytes of k each
//   tmm6 tmm7   W: the two halves of one packed tile, 16 k-groups × 64 bytes
#pragma once

#include <stdint.h>
#include <string.h>

#include <immintrin.h>

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
  // inline assembler. "memory": stores must not move past a later load.
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

// The instructions' effect, on AVX-512: tests only.
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
  // Products of even and of odd k are added apart, from zero, one rounding per addition; then both
  // sums to C (Intel SDM, volume 2).
  template <int kC, int kA, int kB>
  static void multiply_bf16() {
    const auto widened = [](__m512i pairs, int v) {
      const __m512i bits = v == 0 ? _mm512_slli_epi32(pairs, 16)
                                  : _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff << 16));
      return _mm512_castsi512_ps(bits);
    };
    State& s = state();
    for (int m = 0; m < s.rows[kC]; ++m) {
      __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int k = 0; k < kTileRows; ++k) {
        const __m512i a = pair_of(s.data[kA][m], k);
        const __m512i b = _mm512_load_si512(s.data[kB][k]);
        for (int v = 0; v < 2; ++v) {
          sums[v] = _mm512_fmadd_ps(widened(a, v), widened(b, v), sums[v]);
        }
      }
      const __m512 c = _mm512_load_ps(s.data[kC][m]);
      _mm512_store_ps(s.data[kC][m], _mm512_add_ps(c, _mm512_add_ps(sums[0], sums[1])));
    }
  }
  template <int kC, int kA, int kB>
  static void multiply_int8() {
    const auto widened = [](__m512i bytes, int v) {
      const __m128i up = _mm_cvtsi32_si128(24 - 8 * v);
      return _mm512_srai_epi32(_mm512_sll_epi32(bytes, up), 24);
    };
    State& s = state();
    for (int m = 0; m < s.rows[kC]; ++m) {
      __m512i sum = _mm512_load_si512(s.data[kC][m]);
      for (int k = 0; k < kTileRows; ++k) {
        const __m512i a = pair_of(s.data[kA][m], k);
        const __m512i b = _mm512_load_si512(s.data[kB][k]);
        for (int v = 0; v < 4; ++v) {
          sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(widened(a, v), widened(b, v)));
        }
      }
      _mm512_store_si512(s.data[kC][m], sum);
    }
  }

 private:
  // 4 bytes of a row of A in every lane.
  static __m512i pair_of(const uint8_t* row, int k) {
    int four;
    memcpy(&four, row + 4 * k, 4);
    return _mm512_set1_epi32(four);
  }
};

}  // namespace
}  // namespace ktrt
