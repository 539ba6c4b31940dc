#include "kernels/avx_vnni/products.h"
#include "kernels/avx_vnni/vex.h"

namespace ktrt {

extern const GemmKernel gemm_int4_avx_vnni;
const GemmKernel gemm_int4_avx_vnni = dot_kernel<DotInt4<VexDot>>("avx_vnni");

}  // namespace ktrt
