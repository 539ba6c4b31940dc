// BF16 pairs times float32 accumulators on AVX2, for the GEMMs and their LoRA expand.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/kernel_table.h"

namespace ktrt {
namespace {

inline __m256 low_values(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
inline __m256 high_values(__m256i pairs) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline __m256i load_256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// acc[i][0..3] (32 outputs) += one k pair: half0 and half1 are 64 bytes of W each, x points to row
// 0's pair, x_stride in bytes.
template <int kRows>
inline void multiply_pairs(const uint8_t* half0, const uint8_t* half1, const uint8_t* x,
                           int64_t x_stride, __m256 (&acc)[kRows][4]) {
  const __m256i w[4] = {load_256(half0), load_256(half0 + 32), load_256(half1),
                        load_256(half1 + 32)};
  for (int i = 0; i < kRows; ++i) {
    int pair;
    memcpy(&pair, x + i * x_stride, 4);
    const __m256i both = _mm256_set1_epi32(pair);
    const __m256 low = low_values(both);
    const __m256 high = high_values(both);
    for (int q = 0; q < 4; ++q) {
      acc[i][q] = _mm256_fmadd_ps(low, low_values(w[q]), acc[i][q]);
      acc[i][q] = _mm256_fmadd_ps(high, high_values(w[q]), acc[i][q]);
    }
  }
}

template <int kRows>
inline void expand_lora(const ExpandArgs& g, int first_row, __m256 (&acc)[kRows][4]) {
  const uint8_t* b = reinterpret_cast<const uint8_t*>(g.lora_b);
  const uint8_t* t = reinterpret_cast<const uint8_t*>(g.t + first_row * g.t_stride);
  for (int pair = 0; pair < g.rank_pairs; ++pair) {
    multiply_pairs<kRows>(b + pair * 128, b + pair * 128 + 64, t + pair * 4, g.t_stride * 2, acc);
  }
}

// c [kRows][32] in the L1 cache += the LoRA expand.
template <int kRows>
inline void add_lora(const ExpandArgs& g, int first_row) {
  float* c = g.c + static_cast<int64_t>(first_row) * 32;
  __m256 acc[kRows][4];
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) acc[i][q] = _mm256_loadu_ps(c + i * 32 + q * 8);
  }
  expand_lora<kRows>(g, first_row, acc);
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 4; ++q) _mm256_storeu_ps(c + i * 32 + q * 8, acc[i][q]);
  }
}

// There are registers for two rows.
inline void expand_rows(const ExpandArgs& g) {
  int row = 0;
  for (; row + 2 <= g.rows; row += 2) add_lora<2>(g, row);
  if (row < g.rows) add_lora<1>(g, row);
}

}  // namespace
}  // namespace ktrt
