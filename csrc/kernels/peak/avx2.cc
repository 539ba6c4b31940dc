#include <immintrin.h>

#include "kernels/peak_loop.h"

namespace ktrt {
namespace {

// Two units times a latency of 4 or 5 cycles need ten chains; 16 registers hold no more than 14.
constexpr int kChains = 12;

double run(long iterations) noexcept {
  __m256 x = _mm256_set1_ps(1.0f);
  __m256 sums[kChains];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (long i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(x));
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = _mm256_fmadd_ps(x, x, sums[c]);
  }
  double total = 0;
  for (const __m256& sum : sums) {
    float lanes[8];
    _mm256_storeu_ps(lanes, sum);
    for (const float lane : lanes) total += static_cast<double>(lane);
  }
  return total;
}

}  // namespace

extern const PeakLoop peak_avx2;
const PeakLoop peak_avx2 = {"avx2", "vfmadd231ps ymm", "float32", kChains * 8, run};

}  // namespace ktrt
