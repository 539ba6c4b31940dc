// One row times several strips side by side, and the LoRA expand of some rows, on AVX-512 with the
// bits of the tiles: a core reads eight streams faster than the single one of a tile kernel
// (kernels/side_by_side.h), and a run of rows rarely fills a tile.
//
// TDPBF16PS adds the products of even and of odd k of a tile apart, from zero, and then their sum
// to C (Intel SDM, volume 2). VDPBF16PS with one value of each pair of A zero is one such step;
// both flush denormal numbers.
#pragma once

#include <immintrin.h>

#include "kernels/side_by_side.h"
#include "kernels/strip.h"
#include "kernels/vnni/expand.h"

namespace ktrt {
namespace {

// One row's sums over the pairs of a tile, of 16 outputs.
struct TileSums {
  __m512 even = _mm512_setzero_ps();
  __m512 odd = _mm512_setzero_ps();

  // pair: of A; w: 16 outputs of the same pair of W.
  KTRT_INLINE void add(const void* pair, const void* w) {
    const uint16_t* x = static_cast<const uint16_t*>(pair);
    const __m512bh pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
    const __m512i x0 = _mm512_maskz_set1_epi16(0x55555555u, static_cast<short>(x[0]));
    const __m512i x1 = _mm512_maskz_set1_epi16(0xaaaaaaaau, static_cast<short>(x[1]));
    even = _mm512_dpbf16_ps(even, pairs, reinterpret_cast<__m512bh>(x0));
    odd = _mm512_dpbf16_ps(odd, pairs, reinterpret_cast<__m512bh>(x1));
  }
  KTRT_INLINE __m512 added_to(__m512 c) const { return _mm512_add_ps(c, _mm512_add_ps(even, odd)); }
};

// C of 16 outputs += their LoRA expand, for the row of `t`.
inline __m512 tile_ordered_expand(const ExpandArgs& g, const uint16_t* t, int half, __m512 c) {
  for (int first = 0; first < g.rank_pairs; first += 16) {
    TileSums sums;
    for (int pair = first; pair < g.rank_pairs && pair < first + 16; ++pair) {
      sums.add(t + 2 * pair, g.lora_b + pair * 64 + half * 32);
    }
    c = sums.added_to(c);
  }
  return c;
}

inline void tile_ordered_expand_rows(const ExpandArgs& g) {
  for (int row = 0; row < g.rows; ++row) {
    float* c = g.c + static_cast<int64_t>(row) * kStripColumns;
    for (int half = 0; half < 2; ++half) {
      const __m512 sum = _mm512_loadu_ps(c + half * 16);
      const __m512 all = tile_ordered_expand(g, g.t + row * g.t_stride, half, sum);
      _mm512_storeu_ps(c + half * 16, all);
    }
  }
}

template <int kStrips, int kBlock>
void tile_ordered_row(const GemmArgs* g) {
  __m512 c[kStrips][2];
  unrolled<kStrips>([&](auto s) { c[s][0] = c[s][1] = _mm512_setzero_ps(); });
  const int row_bytes = g->k * 2;
  for (int first = 0; first < row_bytes; first += kBlock) {
    const uint8_t* w[kStrips];
    unrolled<kStrips>([&](auto s) { w[s] = chunk_start<kBlock>(g[s], row_bytes, first); });
    const int rest = row_bytes - first;
    const int tiles = (rest < kBlock ? rest : kBlock) / 64;
    for (int tile = 0; tile < tiles; ++tile) {
      const int x = first + tile * 64;
      unrolled<2>([&](auto half) {
        TileSums sums[kStrips];
        for (int vector = 0; vector < 16; vector += kBurstVectors) {
          const int offset = tile * kTileSize + half * kTileHalf + vector * 64;
          unrolled<kStrips>([&](auto s) {
            unrolled<kBurstVectors>([&](auto i) {
              sums[s].add(g[s].a + x + (vector + i) * 4, w[s] + offset + i * 64);
            });
          });
        }
        unrolled<kStrips>([&](auto s) { c[s][half] = sums[s].added_to(c[s][half]); });
      });
    }
  }
  unrolled<kStrips>([&](auto s) {
    unrolled<2>([&](auto half) {
      if (g[s].lora_b != nullptr) c[s][half] = tile_ordered_expand(g[s], g[s].t, half, c[s][half]);
      _mm512_storeu_ps(g[s].c + half * 16, c[s][half]);
    });
  });
}

// kStrip: the tile kernel.
template <void (*kStrip)(const GemmArgs&), int kBlock>
void tile_ordered_rows(const GemmArgs* strips, int count) {
  for_each_strip_group<1>(strips, count, kStrip,
                          [](auto, auto n, const GemmArgs* g) { tile_ordered_row<n, kBlock>(g); });
}

}  // namespace
}  // namespace ktrt
