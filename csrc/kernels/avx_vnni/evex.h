// AVX-512 VNNI's VPDPBUSD on 256-bit vectors. Included by the kernels' ISA files only.
#pragma once

#include <immintrin.h>

namespace ktrt {
namespace {

struct EvexDot {
  static __m256i add(__m256i sum, __m256i a, __m256i w) {
    // With the intrinsic GCC 12 stores all sums of a register block after each step.
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(w));
    return sum;
  }
};

}  // namespace
}  // namespace ktrt
