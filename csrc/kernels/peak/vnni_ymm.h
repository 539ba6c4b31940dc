// The loop of VPDPBUSD on 256-bit vectors, for both encodings. Included by the kernels' ISA files
// only.
#pragma once

#include <immintrin.h>

#include "kernels/peak_loop.h"

namespace ktrt {
namespace {

constexpr int kChains = 12;

// multiply_add(sum, x) is the instruction, in assembly: GCC 12 turns the intrinsic into copies.
template <void (*kMultiplyAdd)(__m256i&, __m256i)>
double run(long iterations) noexcept {
  const __m256i x = _mm256_set1_epi8(1);
  __m256i sums[kChains];
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sums[c] = _mm256_setzero_si256();
  for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) kMultiplyAdd(sums[c], x);
  }
  double total = 0;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) {
    int lanes[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums[c]);
    for (const int lane : lanes) total += static_cast<double>(lane);
  }
  return total;
}

}  // namespace
}  // namespace ktrt
