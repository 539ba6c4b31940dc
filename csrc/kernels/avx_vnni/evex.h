// AVX-512 VNNI's VPDPBUSD on 256-bit vectors. Included by the kernels' ISA files only.
#pragma once

#include <immintrin.h>

namespace ktrt {
namespace {

struct EvexDot {
  static __m256i add(__m256i sum, __m256i a, __m256i w) { return _mm256_dpbusd_epi32(sum, a, w); }
};

}  // namespace
}  // namespace ktrt
