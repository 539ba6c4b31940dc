// BF16 GEMM on AMX tiles: 32 rows of A × one strip per register block, the LoRA expand in the
// tiles.
#pragma once

#include "kernels/amx/block.h"

namespace ktrt {
namespace {

template <class Tiles>
struct AmxBf16Gemm {
  static constexpr int kBlockBytes = 1792 * 2;

  template <bool kTwoTiles>
  static void block(const GemmArgs& g, int first_row, int rows) {
    zero_c<Tiles, kTwoTiles>();
    multiply_strip<Tiles, MultiplyBf16, kBlockBytes, kTwoTiles>(g, first_row, g.k * 2);
    if (g.lora_b != nullptr) expand_lora<Tiles, kTwoTiles>(g, first_row, rows);
    store_c<Tiles, kTwoTiles>(g.c + static_cast<int64_t>(first_row) * kStripColumns);
  }
};

}  // namespace
}  // namespace ktrt
