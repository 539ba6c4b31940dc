// LoRA shrink on AVX-512 BF16: one zmm of 16 ranks per row and chain. Four chains, each over a
// quarter of k, hide the latency of VDPBF16PS for a single row, and read A as four streams, which
// the memory serves faster than one (kernels/side_by_side.h). They are four for every row count, so
// that a row's bits do not depend on its neighbours. Up to 6 rows share each load of A.
#include <immintrin.h>
#include <string.h>

#include "kernels/strip.h"

namespace ktrt {
namespace {

constexpr int kMaxRows = 6;
constexpr int kChains = 4;
// Distance of the prefetch of A, in elements, per chain: 1 KB.
constexpr int kAhead = 512;

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
  __m512 acc[kRows][kChains];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) acc[i][chain] = _mm512_setzero_ps();
  }
  const uint16_t* x = s.x + first_row * s.x_stride;
  const int quarter = s.k / kChains;  // even: k is a multiple of 32
  for (int k = 0; k < quarter; k += 2) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const uint16_t* line = a + (chain * quarter + k) * 16;
      const __m512bh pairs = load_pairs(line);
      if (kRows <= 2) __builtin_prefetch(line + kAhead, 0, 3);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const __m512bh xi = broadcast_pair(x + i * s.x_stride + chain * quarter + k);
        acc[i][chain] = _mm512_dpbf16_ps(acc[i][chain], pairs, xi);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    const __m512 sum =
        _mm512_add_ps(_mm512_add_ps(acc[i][0], acc[i][1]), _mm512_add_ps(acc[i][2], acc[i][3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.t + (first_row + i) * s.t_stride + block * 16),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  }
}

using RowBlock = void (*)(const ShrinkArgs&, const uint16_t*, int, int);
constexpr RowBlock kRowBlocks[kMaxRows + 1] = {
    nullptr, row_block<1>, row_block<2>, row_block<3>, row_block<4>, row_block<5>, row_block<6>};

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
