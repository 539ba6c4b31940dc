// INT8 GEMM on AVX-512 VNNI, for two ways to add LoRA.
#pragma once

#include "kernels/vnni/block.h"

namespace ktrt {
namespace {

struct Int8Weights {
  static constexpr int kBlockBytes = 3584;

  template <int kRows>
  static inline __attribute__((always_inline)) void multiply(const GemmArgs& g, const uint8_t* a,
                                                             bool first, __m512i (&acc)[kRows][2]) {
    for_each_tile<kBlockBytes>(g, g.k, first, [&](const uint8_t* w, int byte) {
      const uint8_t* x = a + byte;
      for (int group = 0; group < 16; ++group) {
        const __m512i w0 = _mm512_loadu_si512(w + group * 64);
        const __m512i w1 = _mm512_loadu_si512(w + kTileHalf + group * 64);
        multiply_group<kRows>(x + group * 4, g.a_stride, w0, w1, acc);
      }
    });
  }
};

}  // namespace
}  // namespace ktrt
