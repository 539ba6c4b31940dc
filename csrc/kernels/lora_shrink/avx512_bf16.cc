// LoRA shrink on AVX-512 BF16: one zmm of 16 ranks per row and chain. Two chains over alternating k
// pairs for every row count, so that a row's bits do not depend on the rows beside it; up to 8 rows
// share each load of A.
#include <immintrin.h>
#include <string.h>

#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 8;

inline __m512bh load_pairs(const void* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

inline __m512bh broadcast_pair(const uint16_t* p) {
  int pair;
  memcpy(&pair, p, 4);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

template <int kRows>
void row_block(const ShrinkArgs& s, const uint16_t* a, int block, int first_row) {
  __m512 acc[kRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
  const uint16_t* x = s.x + first_row * s.x_stride;
  int k = 0;
  for (; k + 4 <= s.k; k += 4) {
    const __m512bh a0 = load_pairs(a + k * 16);
    const __m512bh a1 = load_pairs(a + k * 16 + 32);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a0, broadcast_pair(x + i * s.x_stride + k));
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a1, broadcast_pair(x + i * s.x_stride + k + 2));
    }
  }
  if (k < s.k) {
    const __m512bh a0 = load_pairs(a + k * 16);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a0, broadcast_pair(x + i * s.x_stride + k));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const __m256bh t = _mm512_cvtneps_pbh(_mm512_add_ps(acc[i][0], acc[i][1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.t + (first_row + i) * s.t_stride + block * 16),
                        reinterpret_cast<__m256i>(t));
  }
}

using RowBlock = void (*)(const ShrinkArgs&, const uint16_t*, int, int);
constexpr RowBlock kRowBlocks[kMaxRows + 1] = {nullptr,      row_block<1>, row_block<2>,
                                               row_block<3>, row_block<4>, row_block<5>,
                                               row_block<6>, row_block<7>, row_block<8>};

void run(const ShrinkArgs& s) {
  for (int block = 0; block < s.blocks; ++block) {
    const uint16_t* a = s.a + static_cast<int64_t>(block) * s.k * 16;
    for_each_row_block<kMaxRows>(
        s.rows, [&](int first, int rows) { kRowBlocks[rows](s, a, block, first); });
  }
}

}  // namespace

extern const ShrinkKernel lora_shrink_avx512_bf16;
const ShrinkKernel lora_shrink_avx512_bf16 = {"avx512_bf16", run};

}  // namespace ktrt
