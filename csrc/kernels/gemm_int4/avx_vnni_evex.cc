// For processors with AVX-512 VNNI and without AVX-VNNI, under KTRT_ISA=avx_vnni.
#include "kernels/avx_vnni/evex.h"
#include "kernels/avx_vnni/products.h"

namespace ktrt {

extern const GemmKernel gemm_int4_avx_vnni_evex;
const GemmKernel gemm_int4_avx_vnni_evex = dot_kernel<DotInt4<EvexDot>>("avx_vnni_evex");

}  // namespace ktrt
