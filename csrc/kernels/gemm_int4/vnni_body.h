// INT4 GEMM on AVX-512 VNNI, for two ways to add LoRA. A nibble becomes the signed byte 16 · code
// by a shift and a mask, or by the mask alone: kt_kernel's scale is that of 16 · code.
#pragma once

#include "kernels/vnni/block.h"

namespace ktrt {
namespace {

struct Int4Weights {
  static constexpr int kBlockBytes = 3584 / 2;
  // Up to this many rows the products of the high nibbles have separate accumulators: one row's
  // two would wait for the last product most of the time.
  static constexpr int kSplitRows = 6;

  template <int kRows>
  static inline __attribute__((always_inline)) void multiply(const GemmArgs& g, const uint8_t* a,
                                                             bool first, __m512i (&acc)[kRows][2]) {
    if constexpr (kRows <= kSplitRows) {
      __m512i high[kRows][2];
      unrolled<kRows>([&](auto i) { high[i][0] = high[i][1] = _mm512_setzero_si512(); });
      add_products<kRows>(g, a, first, acc, high);
      unrolled<kRows>([&](auto i) {
        acc[i][0] = _mm512_add_epi32(acc[i][0], high[i][0]);
        acc[i][1] = _mm512_add_epi32(acc[i][1], high[i][1]);
      });
    } else {
      add_products<kRows>(g, a, first, acc, acc);
    }
  }

 private:
  template <int kRows>
  static inline __attribute__((always_inline)) void add_products(const GemmArgs& g,
                                                                 const uint8_t* a, bool first,
                                                                 __m512i (&low)[kRows][2],
                                                                 __m512i (&high)[kRows][2]) {
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
    const auto multiply = [&](const uint8_t* w, int byte, const uint8_t* ahead) {
      const uint8_t* x = a + 2 * byte;
      for (int group = 0; group < 16; ++group) {
        prefetch_share<kRows>(ahead, group);
        const __m512i w0 = _mm512_loadu_si512(w + group * 64);
        const __m512i w1 = _mm512_loadu_si512(w + kTileHalf + group * 64);
        multiply_group<kRows>(x + group * 4, g.a_stride,
                              _mm512_and_si512(_mm512_slli_epi16(w0, 4), mask),
                              _mm512_and_si512(_mm512_slli_epi16(w1, 4), mask), low);
        multiply_group<kRows>(x + 64 + group * 4, g.a_stride, _mm512_and_si512(w0, mask),
                              _mm512_and_si512(w1, mask), high);
      }
    };
    for_each_tile_ahead<kBlockBytes>(g, g.k / 2, first, multiply);
  }
};

template <class Expand, int kRows, int kStrips>
void strips_side_by_side(const GemmArgs* g) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512i acc[kStrips][kRows][2];
  unrolled<kStrips>([&](auto s) {
    unrolled<kRows>([&](auto i) { acc[s][i][0] = acc[s][i][1] = _mm512_setzero_si512(); });
  });
  for_each_burst<kStrips, Int4Weights::kBlockBytes>(
      g, g->k / 2, [&](auto s, auto half, const uint8_t* w, int step) {
        // A tile has 128 columns.
        const uint8_t* x = g[s].a + step / 16 * 128 + step % 16 * 4;
        unrolled<kBurstVectors>([&](auto v) {
          const __m512i both = _mm512_loadu_si512(w + v * 64);
          const __m512i low = _mm512_and_si512(_mm512_slli_epi16(both, 4), mask);
          const __m512i high = _mm512_and_si512(both, mask);
          unrolled<kRows>([&](auto i) {
            const uint8_t* row = x + i * g[s].a_stride + v * 4;
            acc[s][i][half] = _mm512_dpbusd_epi32(acc[s][i][half], broadcast_word(row), low);
            acc[s][i][half] = _mm512_dpbusd_epi32(acc[s][i][half], broadcast_word(row + 64), high);
          });
        });
      });
  unrolled<kStrips>([&](auto s) { finish<Expand, kRows>(g[s], 0, acc[s]); });
}

template <class Expand>
void int4_side_by_side(const GemmArgs* strips, int count) {
  for (int i = 0; i < count; ++i) prefetch_scales(strips[i]);
  for_each_strip_group<kMaxSideRows>(
      strips, count, vnni_strip<Int4Weights, Expand>,
      [](auto rows, auto n, const GemmArgs* g) { strips_side_by_side<Expand, rows, n>(g); });
}

}  // namespace
}  // namespace ktrt
