// BF16 GEMM on AMX tiles, the LoRA expand in the tiles.
#pragma once

#include "kernels/amx/block.h"

namespace ktrt {
namespace {

class AmxBf16Gemm {
 public:
  static constexpr int kLayoutBlock = 1792 * 2;
  using WeightTiles = TilesInPlace;
  using Multiply = MultiplyBf16;
  static int row_bytes(const GemmArgs& g) { return g.k * 2; }

  explicit AmxBf16Gemm(const GemmArgs& g) : g_(g) {
    if (g.lora_b != nullptr) expand_.build(g);
  }

  template <class Tiles, bool kTwoTiles>
  float* finish(int first_tile) {
    const int first_row = first_tile * g_.tile_rows;
    if (g_.lora_b != nullptr) expand_.multiply<Tiles, kTwoTiles>(g_, first_row, nullptr);
    return g_.c + static_cast<int64_t>(first_row) * kStripColumns;
  }
  void stored() {}
  struct Steps {
    void step() {}
  };
  Steps steps(int) { return {}; }
  void stepped(const Steps&) {}
  void flush() {}

 private:
  const GemmArgs& g_;
  ExpandTiles expand_;
};

}  // namespace
}  // namespace ktrt
