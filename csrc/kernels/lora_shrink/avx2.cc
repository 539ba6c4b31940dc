// LoRA shrink on AVX2: 2 ymm of 8 ranks, two chains over alternating k pairs to hide FMA latency.
#include "kernels/avx2/expand.h"
#include "kernels/scalar_bf16.h"

namespace ktrt {
namespace {

void shrink_row(const ShrinkArgs& s, const uint16_t* a, const uint16_t* x, uint16_t* t) {
  __m256 acc[2][2];
  for (auto& chain : acc) chain[0] = chain[1] = _mm256_setzero_ps();
  for (int k = 0; k < s.k; k += 2) {
    int pair;
    memcpy(&pair, x + k, 4);
    const __m256i both = _mm256_set1_epi32(pair);
    const __m256 low = low_values(both);
    const __m256 high = high_values(both);
    __m256(&chain)[2] = acc[(k / 2) % 2];
    for (int q = 0; q < 2; ++q) {
      const __m256i w = load_256(a + k * 16 + q * 16);
      chain[q] = _mm256_fmadd_ps(low, low_values(w), chain[q]);
      chain[q] = _mm256_fmadd_ps(high, high_values(w), chain[q]);
    }
  }
  float sums[16];
  for (int q = 0; q < 2; ++q) {
    _mm256_storeu_ps(sums + q * 8, _mm256_add_ps(acc[0][q], acc[1][q]));
  }
  for (int n = 0; n < 16; ++n) t[n] = bf16_bits(sums[n]);
}

void run(const ShrinkArgs& s) {
  for (int block = 0; block < s.blocks; ++block) {
    const uint16_t* a = s.a + static_cast<int64_t>(block) * s.k * 16;
    for (int r = 0; r < s.rows; ++r) {
      shrink_row(s, a, s.x + r * s.x_stride, s.t + r * s.t_stride + block * 16);
    }
  }
}

}  // namespace

extern const ShrinkKernel lora_shrink_avx2;
const ShrinkKernel lora_shrink_avx2 = {"avx2", run};

}  // namespace ktrt
