// VNNI without BF16 dot products (Cascade Lake, Ice Lake): LoRA by float32 multiply-adds.
#include "kernels/gemm_int8/vnni_body.h"

namespace ktrt {
namespace {

struct Float32Expand {
  static __m512 low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static __m512 high(__m512i pairs) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, mask));
  }
  static __m512 multiply(__m512 sum, __m512i b, __m512i a) {
    return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum));
  }
};

}  // namespace

extern const GemmKernel gemm_int8_avx512_vnni;
const GemmKernel gemm_int8_avx512_vnni = {"avx512_vnni", strip<Float32Expand>, 128};

}  // namespace ktrt
