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

template <class Expand, int kStrips>
void strips_of_one_row(const GemmArgs* g) {
  __m512i acc[kStrips][1][2];
  unrolled<kStrips>([&](auto s) { acc[s][0][0] = acc[s][0][1] = _mm512_setzero_si512(); });
  for_each_burst<kStrips, Int8Weights::kBlockBytes>(
      g, g->k, [&](auto s, auto half, const uint8_t* w, int step) {
        const uint8_t* x = g[s].a + step * 4;
        unrolled<kBurstVectors>([&](auto i) {
          acc[s][0][half] = _mm512_dpbusd_epi32(acc[s][0][half], broadcast_word(x + i * 4),
                                                _mm512_loadu_si512(w + i * 64));
        });
      });
  unrolled<kStrips>([&](auto s) { finish<Expand, 1>(g[s], 0, acc[s]); });
}

template <class Expand>
void int8_one_row(const GemmArgs* strips, int count) {
  for (int i = 0; i < count; ++i) prefetch_scales(strips[i]);
  for_each_strip_group(strips, count, vnni_strip<Int8Weights, Expand>,
                       [](auto n, const GemmArgs* g) { strips_of_one_row<Expand, n>(g); });
}

}  // namespace
}  // namespace ktrt
