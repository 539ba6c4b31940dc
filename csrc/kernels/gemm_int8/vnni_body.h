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
    const auto multiply = [&](const uint8_t* w, int byte, const uint8_t* ahead) {
      const uint8_t* x = a + byte;
      for (int group = 0; group < 16; ++group) {
        prefetch_share<kRows>(ahead, group);
        const __m512i w0 = _mm512_loadu_si512(w + group * 64);
        const __m512i w1 = _mm512_loadu_si512(w + kTileHalf + group * 64);
        multiply_group<kRows>(x + group * 4, g.a_stride, w0, w1, acc);
      }
    };
    for_each_tile_ahead<kBlockBytes>(g, g.k, first, multiply);
  }
};

template <class Expand, int kRows, int kStrips>
void strips_side_by_side(const GemmArgs* g) {
  __m512i acc[kStrips][kRows][2];
  unrolled<kStrips>([&](auto s) {
    unrolled<kRows>([&](auto i) { acc[s][i][0] = acc[s][i][1] = _mm512_setzero_si512(); });
  });
  for_each_burst<kStrips, Int8Weights::kBlockBytes>(
      g, g->k, [&](auto s, auto half, const uint8_t* w, int step) {
        const uint8_t* x = g[s].a + step * 4;
        unrolled<kBurstVectors>([&](auto v) {
          const __m512i codes = _mm512_loadu_si512(w + v * 64);
          unrolled<kRows>([&](auto i) {
            acc[s][i][half] = _mm512_dpbusd_epi32(
                acc[s][i][half], broadcast_word(x + i * g[s].a_stride + v * 4), codes);
          });
        });
      });
  unrolled<kStrips>([&](auto s) { finish<Expand, kRows>(g[s], 0, acc[s]); });
}

template <class Expand>
void int8_side_by_side(const GemmArgs* strips, int count) {
  for (int i = 0; i < count; ++i) prefetch_scales(strips[i]);
  for_each_strip_group<kMaxSideRows>(
      strips, count, vnni_strip<Int8Weights, Expand>,
      [](auto rows, auto n, const GemmArgs* g) { strips_side_by_side<Expand, rows, n>(g); });
}

}  // namespace
}  // namespace ktrt
