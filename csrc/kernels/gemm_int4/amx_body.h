// INT4 GEMM on AMX tiles: the nibbles of a tile become two INT8 tiles in the L1 cache, with which
// the INT8 GEMM goes on.
#pragma once

#include "kernels/gemm_int8/amx_body.h"

namespace ktrt {
namespace {

// One packed tile as the two INT8 tiles of its columns 0 … 63 and 64 … 127, bytes 16 · code.
inline void split_nibbles(const uint8_t* w, uint8_t (&tiles)[2][kTileSize]) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
  for (int i = 0; i < kTileSize; i += 64) {
    const __m512i both = _mm512_loadu_si512(w + i);
    _mm512_store_si512(tiles[0] + i, _mm512_and_si512(_mm512_slli_epi16(both, 4), mask));
    _mm512_store_si512(tiles[1] + i, _mm512_and_si512(both, mask));
  }
}

template <class Tiles>
struct AmxInt4Gemm {
  static constexpr int kBlockBytes = 3584 / 2;

  template <bool kTwoTiles>
  static void block(const GemmArgs& g, int first_row, int rows) {
    zero_c<Tiles, kTwoTiles>();
    const uint8_t* a = g.a + first_row * g.a_stride;
    // Two buffers: the next tile is split while the last one is multiplied.
    alignas(64) uint8_t buffers[2][2][kTileSize];
    int next = 0;
    for_each_tile<kBlockBytes>(g, g.k / 2, first_row == 0, [&](const uint8_t* w, int byte) {
      split_nibbles(w, buffers[next]);
      for (int part = 0; part < 2; ++part) {
        multiply_tile<Tiles, MultiplyInt8, kTwoTiles>(buffers[next][part], a + 2 * byte + part * 64,
                                                      g.a_stride);
      }
      next ^= 1;
    });
    AmxInt8Gemm<Tiles>::template finish<kTwoTiles>(g, first_row, rows);
  }
};

}  // namespace
}  // namespace ktrt
