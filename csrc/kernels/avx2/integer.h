// The integer sums of a strip in C to scaled float32, and LoRA, on AVX2. Included by the kernels'
// ISA files only.
#pragma once

#include "kernels/avx2/expand.h"
#include "kernels/strip.h"

namespace ktrt {
namespace {

// C [g.rows][32] = scales · ((sum << kShift) - 128 · w_sum), the latter if kUnsigned: activations
// then have an offset of 128. LoRA included.
template <bool kUnsigned, int kShift = 0>
inline void finish_sums(const GemmArgs& g) {
  for (int q = 0; q < kStripColumns; q += 8) {
    const __m256i offset =
        kUnsigned ? _mm256_slli_epi32(load_256(g.w_sum + q), 7) : _mm256_setzero_si256();
    const __m256 w_scale = _mm256_loadu_ps(g.w_scale + q);
    for (int row = 0; row < g.rows; ++row) {
      float* c = g.c + static_cast<int64_t>(row) * kStripColumns + q;
      const __m256i sum = _mm256_sub_epi32(_mm256_slli_epi32(load_256(c), kShift), offset);
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(g.a_scale[row]), w_scale);
      _mm256_storeu_ps(c, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum)));
    }
  }
  if (g.lora_b != nullptr) expand_rows(g);
}

}  // namespace
}  // namespace ktrt
