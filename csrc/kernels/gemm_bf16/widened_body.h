// BF16 GEMM by float32 multiply-adds: the two values of a pair are widened by a shift and a mask.
// One chain per output, the pair's first value first. Included by the kernels' ISA files only.
#pragma once

#include "kernels/chunks.h"
#include "kernels/few_or_many.h"

namespace ktrt {
namespace {

// kExpand adds the LoRA expand to C.
template <class Products, void (*kExpand)(const ExpandArgs&)>
struct WidenedBf16 {
  static constexpr int kBlockBytes = 1792 * 2;
  static constexpr bool kHasScales = false;
  static constexpr int kSideRows = kMaxSideRows;

  template <int kRows, int kStrips>
  static void few(const GemmArgs* g) {
    burst_sums<Products, StepBurst<Products>, kBlockBytes, kRows, kStrips>(g, g->k * 2);
    for (int s = 0; s < kStrips; ++s) {
      if (g[s].lora_b != nullptr) kExpand(g[s]);
    }
  }

  static void many(const GemmArgs& g) {
    chunk_sums<Products, WidenedTiles<Products, kBlockBytes>>(g, g.k * 2);
    if (g.lora_b != nullptr) kExpand(g);
  }
};

}  // namespace
}  // namespace ktrt
