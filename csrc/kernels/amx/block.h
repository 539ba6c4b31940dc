// What the GEMMs on AMX tiles share: walking a strip over one register block, and the
// LoRA expand. Included by their bodies only.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels/amx/tile_ops.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kTilePairs = 16;  // BF16 pairs of k in a tile

// Adds one tile of W times 64 bytes of k of A's rows to tmm0 … tmm3.
template <class Tiles, class Multiply, bool kTwoTiles>
inline void multiply_tile(const uint8_t* w, const uint8_t* x, int64_t a_stride) {
  Tiles::template load<6>(w, 64);
  Tiles::template load<4>(x, a_stride);
  Multiply::template run<Tiles, 0, 4, 6>();
  Tiles::template load<7>(w + kTileHalf, 64);
  Multiply::template run<Tiles, 1, 4, 7>();
  if constexpr (kTwoTiles) {
    Tiles::template load<5>(x + kTileRows * a_stride, a_stride);
    Multiply::template run<Tiles, 2, 5, 6>();
    Multiply::template run<Tiles, 3, 5, 7>();
  }
}

// Multiplies all tiles of a strip with rows [first_row, first_row + 16 or 32) of A into tmm0 …
// tmm3, which the caller has zeroed. Tiles::configure has been called.
template <class Tiles, class Multiply, int kBlockBytes, bool kTwoTiles>
inline void multiply_strip(const GemmArgs& g, int first_row, int row_bytes) {
  const uint8_t* a = g.a + first_row * g.a_stride;
  for_each_tile<kBlockBytes>(g, row_bytes, first_row == 0, [&](const uint8_t* w, int byte) {
    multiply_tile<Tiles, Multiply, kTwoTiles>(w, a + byte, g.a_stride);
  });
}

struct MultiplyBf16 {
  template <class Tiles, int kC, int kA, int kB>
  static void run() {
    Tiles::template multiply_bf16<kC, kA, kB>();
  }
};

struct MultiplyInt8 {
  template <class Tiles, int kC, int kA, int kB>
  static void run() {
    Tiles::template multiply_int8<kC, kA, kB>();
  }
};

template <class Tiles, bool kTwoTiles>
inline void zero_c() {
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  if constexpr (kTwoTiles) {
    Tiles::template zero<2>();
    Tiles::template zero<3>();
  }
}

template <class Tiles, bool kTwoTiles>
inline void load_c(const float* c) {
  constexpr int64_t kStride = kStripColumns * sizeof(float);
  Tiles::template load<0>(c, kStride);
  Tiles::template load<1>(c + 16, kStride);
  if constexpr (kTwoTiles) {
    Tiles::template load<2>(c + kTileRows * kStripColumns, kStride);
    Tiles::template load<3>(c + kTileRows * kStripColumns + 16, kStride);
  }
}

template <class Tiles, bool kTwoTiles>
inline void store_c(void* c_rows) {
  constexpr int64_t kStride = kStripColumns * sizeof(float);
  uint8_t* c = static_cast<uint8_t*>(c_rows);
  Tiles::template store<0>(c, kStride);
  Tiles::template store<1>(c + 64, kStride);
  if constexpr (kTwoTiles) {
    Tiles::template store<2>(c + kTileRows * kStride, kStride);
    Tiles::template store<3>(c + kTileRows * kStride + 64, kStride);
  }
}

// Adds T · Lᵀ to C, which is in the tiles. Ranks come packed to even counts; a tile takes 32, so
// the missing ones are filled with zeros here, in the L1 cache, rather than in memory, where they
// would triple what decoding with rank 8 reads.
template <class Tiles, bool kTwoTiles>
inline void expand_lora(const GemmArgs& g, int first_row, int rows) {
  alignas(64) uint16_t b[2][kTilePairs * 32];
  alignas(64) uint16_t t[kBlockRows][2 * kTilePairs];
  for (int pair = 0; pair < g.rank_pairs; pair += kTilePairs) {
    const int rest = g.rank_pairs - pair;
    const int count = rest < kTilePairs ? rest : kTilePairs;
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
    for (int p = 0; p < kTilePairs; ++p) {
      for (int half = 0; half < 2; ++half) {
        const uint16_t* source = g.lora_b + (pair + p) * 64 + half * 32;
        const __m512i values = p < count ? _mm512_loadu_si512(source) : _mm512_setzero_si512();
        _mm512_store_si512(b[half] + p * 32, values);
      }
    }
    for (int r = 0; r < (kTwoTiles ? kBlockRows : kTileRows); ++r) {
      const uint16_t* source = g.t + (first_row + r) * g.t_stride + 2 * pair;
      const __m512i values =
          r < rows ? _mm512_maskz_loadu_epi32(mask, source) : _mm512_setzero_si512();
      _mm512_store_si512(t[r], values);
    }
    Tiles::template load<6>(b[0], 64);
    Tiles::template load<7>(b[1], 64);
    Tiles::template load<4>(t[0], 64);
    Tiles::template multiply_bf16<0, 4, 6>();
    Tiles::template multiply_bf16<1, 4, 7>();
    if constexpr (kTwoTiles) {
      Tiles::template load<5>(t[kTileRows], 64);
      Tiles::template multiply_bf16<2, 5, 6>();
      Tiles::template multiply_bf16<3, 5, 7>();
    }
  }
}

// One strip: Gemm::block<two tiles?>(g, first row, rows) for blocks of at most 32 rows, the tiles
// configured for each size.
template <class Tiles, class Gemm>
void tile_strip(const GemmArgs& g) {
  prefetch_expand(g);
  int configured = 0;
  for_each_row_block<kBlockRows>(g.rows, [&](int first, int rows) {
    const int rows0 = rows < kTileRows ? rows : kTileRows;
    if (rows != configured) Tiles::configure(rows0, rows - rows0);
    configured = rows;
    if (rows > kTileRows) {
      Gemm::template block<true>(g, first, rows);
    } else {
      Gemm::template block<false>(g, first, rows);
    }
  });
  Tiles::release();
}

}  // namespace
}  // namespace ktrt
