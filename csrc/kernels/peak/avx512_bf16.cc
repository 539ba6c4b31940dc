#include <immintrin.h>

#include "kernels/peak_loop.h"

namespace ktrt {
namespace {

constexpr int kChains = 24;

double run(long iterations) noexcept {
  __m512 x = _mm512_castsi512_ps(_mm512_set1_epi16(0x3f80));
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (long i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(x));
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], (__m512bh)x, (__m512bh)x);
  }
  double total = 0;
  for (const __m512& sum : sums) {
    float lanes[16];
    _mm512_storeu_ps(lanes, sum);
    for (const float lane : lanes) total += static_cast<double>(lane);
  }
  return total;
}

}  // namespace

extern const PeakLoop peak_avx512_bf16;
const PeakLoop peak_avx512_bf16 = {"avx512_bf16", "vdpbf16ps zmm", "bf16", kChains * 32, run};

}  // namespace ktrt
