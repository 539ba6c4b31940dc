#include <immintrin.h>

#include "kernels/peak_loop.h"

namespace ktrt {
namespace {

constexpr int kChains = 24;

double run(long iterations) noexcept {
  __m512 x = _mm512_set1_ps(1.0f);
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (long i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(x));
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_fmadd_ps(x, x, sums[c]);
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

extern const PeakLoop peak_avx512;
const PeakLoop peak_avx512 = {"avx512", "vfmadd231ps zmm", "float32", kChains * 16, run};

}  // namespace ktrt
