// BF16 GEMM on AVX-512 without BF16 instructions (Skylake-X to Ice Lake): the two values of each
// pair are widened to float32 by a shift and a mask. Register block: up to 12 rows × one strip (two
// zmm): 24 accumulators, 4 vectors of W, 2 of A.
#include <immintrin.h>
#include <string.h>

#include "kernels/strip.h"
#include "kernels/unrolled.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 12;
constexpr int kBlockBytes = 1792 * 2;

inline __m512 low_values(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
inline __m512 high_values(__m512i pairs) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, mask));
}

// acc[i] (32 outputs) += one k pair: half0 and half1 are 64 bytes each, x points to row 0's pair.
template <int kRows>
inline void multiply_pair(const void* half0, const void* half1, const uint8_t* x, int64_t x_stride,
                          __m512 (&acc)[kRows][2]) {
  const __m512i w0 = _mm512_loadu_si512(half0);
  const __m512i w1 = _mm512_loadu_si512(half1);
  const __m512 low0 = low_values(w0), high0 = high_values(w0);
  const __m512 low1 = low_values(w1), high1 = high_values(w1);
  unrolled<kRows>([&](auto i) {
    int pair;
    memcpy(&pair, x + i * x_stride, 4);
    const __m512i both = _mm512_set1_epi32(pair);
    const __m512 low = low_values(both), high = high_values(both);
    acc[i][0] = _mm512_fmadd_ps(high, high0, _mm512_fmadd_ps(low, low0, acc[i][0]));
    acc[i][1] = _mm512_fmadd_ps(high, high1, _mm512_fmadd_ps(low, low1, acc[i][1]));
  });
}

template <int kRows>
inline void expand_lora(const ExpandArgs& g, int first_row, __m512 (&acc)[kRows][2]) {
  const uint8_t* t = reinterpret_cast<const uint8_t*>(g.t + first_row * g.t_stride);
  for (int pair = 0; pair < g.rank_pairs; ++pair) {
    multiply_pair<kRows>(g.lora_b + pair * 64, g.lora_b + pair * 64 + 32, t + pair * 4,
                         g.t_stride * 2, acc);
  }
}

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
      multiply_pair<kRows>(w + pair * 64, w + kTileHalf + pair * 64, x + pair * 4, g.a_stride, acc);
    }
  };
  for_each_tile_ahead<kBlockBytes>(g, row_bytes, first, multiply);
  if (g.lora_b != nullptr) expand_lora<kRows>(g, first_row, acc);
  float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
  unrolled<kRows>([&](auto i) {
    _mm512_storeu_ps(c + i * kStripColumns, acc[i][0]);
    _mm512_storeu_ps(c + i * kStripColumns + 16, acc[i][1]);
  });
}

using RowBlock = void (*)(const GemmArgs&, int, bool);
constexpr RowBlock kRowBlocks[kMaxRows + 1] = {
    nullptr,       row_block<1>,  row_block<2>, row_block<3>, row_block<4>,
    row_block<5>,  row_block<6>,  row_block<7>, row_block<8>, row_block<9>,
    row_block<10>, row_block<11>, row_block<12>};

template <int kRows>
void expand_block(const ExpandArgs& g, int first_row) {
  float* c = g.c + static_cast<int64_t>(first_row) * kStripColumns;
  __m512 acc[kRows][2];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    acc[i][0] = _mm512_loadu_ps(c + i * kStripColumns);
    acc[i][1] = _mm512_loadu_ps(c + i * kStripColumns + 16);
  }
  expand_lora<kRows>(g, first_row, acc);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    _mm512_storeu_ps(c + i * kStripColumns, acc[i][0]);
    _mm512_storeu_ps(c + i * kStripColumns + 16, acc[i][1]);
  }
}

void expand(const ExpandArgs& g) {
  int row = 0;
  for (; row + 4 <= g.rows; row += 4) expand_block<4>(g, row);
  for (; row < g.rows; ++row) expand_block<1>(g, row);
}

void strip(const GemmArgs& g) {
  prefetch_expand(g);
  for_each_row_block<kMaxRows>(
      g.rows, [&](int first, int rows) { kRowBlocks[rows](g, first, first == 0); });
}

}  // namespace

extern const GemmKernel gemm_bf16_avx512;
const GemmKernel gemm_bf16_avx512 = {"avx512", strip, expand, 0};

}  // namespace ktrt
