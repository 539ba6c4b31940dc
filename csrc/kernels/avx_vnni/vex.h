// AVX-VNNI's VPDPBUSD. Included by the kernels' ISA files only.
#pragma once

#include <immintrin.h>

namespace ktrt {
namespace {

struct VexDot {
  static __m256i add(__m256i sum, __m256i a, __m256i w) {
    // With the intrinsic GCC 12 stores all sums of a register block after each step.
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(w));
    return sum;
  }
};

}  // namespace
}  // namespace ktrt
