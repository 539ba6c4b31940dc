// BF16 GEMM on AVX-512 BF16. Register block: up to 14 rows of A × one strip (two zmm of 16 output
// columns): 28 accumulators, 2 vectors of W, 1 broadcast of A. One accumulator chain per output, so
// a row's result does not depend on its neighbours.
#include <immintrin.h>
#include <string.h>

#include "kernels/side_by_side.h"
#include "kernels/strip.h"
#include "kernels/vnni/expand.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 14;
constexpr int kBlockBytes = 1792 * 2;

inline __m512bh load_pairs(const void* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

inline __m512bh broadcast_pair(const uint8_t* p) {
  int pair;
  memcpy(&pair, p, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

template <int kRows>
inline void expand_lora(const GemmArgs& g, const uint16_t* t, __m512 (&acc)[kRows][2]) {
  for (int pair = 0; pair < g.rank_pairs; ++pair) {
    const __m512bh b0 = load_pairs(g.lora_b + pair * 64);
    const __m512bh b1 = load_pairs(g.lora_b + pair * 64 + 32);
    unrolled<kRows>([&](auto i) {
      const __m512bh a =
          broadcast_pair(reinterpret_cast<const uint8_t*>(t + i * g.t_stride + 2 * pair));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], b0, a);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], b1, a);
    });
  }
}

// kFirst: W comes from memory and is prefetched; later row blocks find it in the L2 cache.
template <int kRows>
void row_block(const GemmArgs& g, int first_row, bool first) {
  __m512 acc[kRows][2];
  unrolled<kRows>([&](auto i) { acc[i][0] = acc[i][1] = _mm512_setzero_ps(); });
  const uint8_t* a = g.a + first_row * g.a_stride;
  const int row_bytes = g.k * 2;
  const auto multiply = [&](const uint8_t* w, int byte, const uint8_t* ahead) {
    const uint8_t* x = a + byte;
    for (int pair = 0; pair < 16; ++pair) {
      prefetch_share<kRows>(ahead, pair);
      const __m512bh w0 = load_pairs(w + pair * 64);
      const __m512bh w1 = load_pairs(w + kTileHalf + pair * 64);
      unrolled<kRows>([&](auto i) {
        const __m512bh xi = broadcast_pair(x + i * g.a_stride + pair * 4);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], w0, xi);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], w1, xi);
      });
    }
  };
  for_each_tile_ahead<kBlockBytes>(g, row_bytes, first, multiply);
  if (g.lora_b != nullptr) expand_lora<kRows>(g, g.t + first_row * g.t_stride, acc);
  float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
  unrolled<kRows>([&](auto i) {
    _mm512_storeu_ps(c + i * kStripColumns, acc[i][0]);
    _mm512_storeu_ps(c + i * kStripColumns + 16, acc[i][1]);
  });
}

using RowBlock = void (*)(const GemmArgs&, int, bool);
constexpr RowBlock kRowBlocks[kMaxRows + 1] = {
    nullptr,       row_block<1>,  row_block<2>,  row_block<3>,  row_block<4>,
    row_block<5>,  row_block<6>,  row_block<7>,  row_block<8>,  row_block<9>,
    row_block<10>, row_block<11>, row_block<12>, row_block<13>, row_block<14>};

void strip(const GemmArgs& g) {
  prefetch_expand(g);
  for_each_row_block<kMaxRows>(
      g.rows, [&](int first, int rows) { kRowBlocks[rows](g, first, first == 0); });
}

template <int kRows, int kStrips>
void strips_side_by_side(const GemmArgs* g) {
  __m512 acc[kStrips][kRows][2];
  unrolled<kStrips>([&](auto s) {
    unrolled<kRows>([&](auto i) { acc[s][i][0] = acc[s][i][1] = _mm512_setzero_ps(); });
  });
  for_each_burst<kStrips, kBlockBytes>(
      g, g->k * 2, [&](auto s, auto half, const uint8_t* w, int step) {
        const uint8_t* x = g[s].a + step * 4;
        unrolled<kBurstVectors>([&](auto v) {
          const __m512bh values = load_pairs(w + v * 64);
          unrolled<kRows>([&](auto i) {
            acc[s][i][half] = _mm512_dpbf16_ps(acc[s][i][half], values,
                                               broadcast_pair(x + i * g[s].a_stride + v * 4));
          });
        });
      });
  unrolled<kStrips>([&](auto s) {
    if (g[s].lora_b != nullptr) expand_lora<kRows>(g[s], g[s].t, acc[s]);
    unrolled<kRows>([&](auto i) {
      _mm512_storeu_ps(g[s].c + i * kStripColumns, acc[s][i][0]);
      _mm512_storeu_ps(g[s].c + i * kStripColumns + 16, acc[s][i][1]);
    });
  });
}

void side_by_side(const GemmArgs* strips, int count) {
  for_each_strip_group<kMaxSideRows>(
      strips, count, strip,
      [](auto rows, auto n, const GemmArgs* g) { strips_side_by_side<rows, n>(g); });
}

}  // namespace

extern const GemmKernel gemm_bf16_avx512_bf16;
const GemmKernel gemm_bf16_avx512_bf16 = {
    "avx512_bf16", strip, expand_rows<Bf16Expand>, 0, false, side_by_side, kMaxSideRows};

}  // namespace ktrt
