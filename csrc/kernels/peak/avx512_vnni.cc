#include <immintrin.h>

#include "kernels/peak_loop.h"

namespace ktrt {
namespace {

// So few that GCC unrolls every loop over them and keeps the sums in registers.
constexpr int kChains = 12;

double run(long iterations) noexcept {
  const __m512i x = _mm512_set1_epi8(1);
  __m512i sums[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sums[c] = _mm512_setzero_si512();
  for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      // GCC 12 turns the intrinsic into copies between registers and to the stack.
      asm volatile("vpdpbusd %1, %1, %0" : "+v"(sums[c]) : "v"(x));
    }
  }
  double total = 0;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) {
    int lanes[16];
    _mm512_storeu_si512(lanes, sums[c]);
    for (const int lane : lanes) total += static_cast<double>(lane);
  }
  return total;
}

}  // namespace

extern const PeakLoop peak_avx512_vnni;
const PeakLoop peak_avx512_vnni = {"avx512_vnni", "vpdpbusd zmm", "int8", kChains * 64, run};

}  // namespace ktrt
