// LoRA shrink on AMX tiles: two tiles of rows × two blocks of 16 ranks, one chain per value in
// ascending k. X in tile order or row-major; memory of X holds whole tiles of rows.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "kernels/amx/tile_ops.h"
#include "kernels/kernel_table.h"

namespace ktrt {
namespace {

constexpr int kBlockRanks = 16;
constexpr int kATile = 1024;  // bytes of 32 k × 16 ranks

// Where tiles of rows of X lie, in bytes.
struct XTiles {
  const uint8_t* x;
  int rows;             // of a tile
  int64_t tile_stride;  // from tile to tile of rows
  int64_t row_stride;
  int64_t step;  // to the next 64 bytes of a row
};

inline XTiles x_tiles(const ShrinkArgs& s) {
  const uint8_t* x = reinterpret_cast<const uint8_t*>(s.x);
  if (s.tile_rows > 1 || s.x_step != 0) {
    const int64_t step = s.x_step != 0 ? s.x_step * 2 : 64 * static_cast<int64_t>(s.tile_rows);
    return {x, s.tile_rows, s.x_stride * 2, 64, step};
  }
  const int tiles = (s.rows + kTileRows - 1) / kTileRows;
  const int rows = (s.rows + tiles - 1) / tiles;
  return {x, rows, rows * s.x_stride * 2, s.x_stride * 2, 64};
}

// Writes the rows of one tile that exist: BF16 of c [rows][32].
inline void store_rows(const ShrinkArgs& s, const float* c, int first_row, int rows, int block,
                       int blocks) {
  const int rest = s.rows - first_row;
  for (int r = 0; r < (rest < rows ? rest : rows); ++r) {
    uint16_t* t = s.t + (first_row + r) * s.t_stride + block * kBlockRanks;
    for (int b = 0; b < blocks; ++b) {
      const __m512 sum = _mm512_load_ps(c + r * 2 * kBlockRanks + b * kBlockRanks);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(t + b * kBlockRanks),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
    }
  }
}

template <class Tiles, bool kTwoTiles, bool kTwoBlocks>
void shrink_block(const ShrinkArgs& s, const XTiles& x, int tile, int block) {
  constexpr int64_t kCStride = 2 * kBlockRanks * sizeof(float);
  const uint8_t* a0 =
      reinterpret_cast<const uint8_t*>(s.a) + static_cast<int64_t>(block) * s.k * kBlockRanks * 2;
  const uint8_t* a1 = a0 + static_cast<int64_t>(s.k) * kBlockRanks * 2;
  const uint8_t* x0 = x.x + tile * x.tile_stride;
  Tiles::template zero<0>();
  if constexpr (kTwoBlocks) Tiles::template zero<1>();
  if constexpr (kTwoTiles) Tiles::template zero<2>();
  if constexpr (kTwoTiles && kTwoBlocks) Tiles::template zero<3>();
  for (int k = 0; k < s.k; k += 32, x0 += x.step, a0 += kATile, a1 += kATile) {
    Tiles::template load<4>(x0, x.row_stride);
    Tiles::template load<6>(a0, 64);
    Tiles::template multiply_bf16<0, 4, 6>();
    if constexpr (kTwoTiles) {
      Tiles::template load<5>(x0 + x.tile_stride, x.row_stride);
      Tiles::template multiply_bf16<2, 5, 6>();
    }
    if constexpr (kTwoBlocks) {
      Tiles::template load<7>(a1, 64);
      Tiles::template multiply_bf16<1, 4, 7>();
    }
    if constexpr (kTwoTiles && kTwoBlocks) Tiles::template multiply_bf16<3, 5, 7>();
  }
  alignas(64) float c[2][kTileRows * 2 * kBlockRanks];
  Tiles::template store<0>(c[0], kCStride);
  if constexpr (kTwoBlocks) Tiles::template store<1>(c[0] + kBlockRanks, kCStride);
  if constexpr (kTwoTiles) Tiles::template store<2>(c[1], kCStride);
  if constexpr (kTwoTiles && kTwoBlocks) Tiles::template store<3>(c[1] + kBlockRanks, kCStride);
  const int blocks = kTwoBlocks ? 2 : 1;
  store_rows(s, c[0], tile * x.rows, x.rows, block, blocks);
  if constexpr (kTwoTiles) store_rows(s, c[1], (tile + 1) * x.rows, x.rows, block, blocks);
}

template <class Tiles, bool kTwoTiles>
void shrink_rows(const ShrinkArgs& s, const XTiles& x, int tile) {
  int block = 0;
  for (; block + 2 <= s.blocks; block += 2) {
    shrink_block<Tiles, kTwoTiles, true>(s, x, tile, block);
  }
  if (block < s.blocks) shrink_block<Tiles, kTwoTiles, false>(s, x, tile, block);
}

template <class Tiles>
void tile_shrink(const ShrinkArgs& s) {
  const XTiles x = x_tiles(s);
  const int tiles = (s.rows + x.rows - 1) / x.rows;
  Tiles::configure(x.rows);
  int tile = 0;
  for (; tile + 2 <= tiles; tile += 2) shrink_rows<Tiles, true>(s, x, tile);
  if (tile < tiles) shrink_rows<Tiles, false>(s, x, tile);
  Tiles::release();
}

}  // namespace
}  // namespace ktrt
