#include "kernels/peak/vnni_ymm.h"

namespace ktrt {
namespace {

inline void multiply_add(__m256i& sum, __m256i x) {
  asm volatile("%{evex%} vpdpbusd %1, %1, %0" : "+x"(sum) : "x"(x));
}

}  // namespace

extern const PeakLoop peak_avx_vnni_evex;
const PeakLoop peak_avx_vnni_evex = {"avx_vnni_evex", "vpdpbusd ymm", "int8", kChains * 32,
                                     run<multiply_add>};

}  // namespace ktrt
