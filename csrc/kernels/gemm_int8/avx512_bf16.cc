// VNNI with BF16 dot products (Cooper Lake, Sapphire Rapids, Zen 4 on): LoRA by VDPBF16PS.
#include "kernels/gemm_int8/vnni_body.h"

namespace ktrt {
namespace {

struct Bf16Expand {
  static __m512 multiply(__m512 sum, __m512i b, __m512i a) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
  }
};

}  // namespace

extern const GemmKernel gemm_int8_avx512_bf16;
const GemmKernel gemm_int8_avx512_bf16 = {"avx512_vnni_bf16", strip<Bf16Expand>, 128};

}  // namespace ktrt
