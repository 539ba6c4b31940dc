#include "kernels/avx_vnni/products.h"
#include "kernels/avx_vnni/vex.h"

namespace ktrt {

extern const GemmKernel gemm_int8_avx_vnni;
const GemmKernel gemm_int8_avx_vnni = dot_kernel<DotInt8<VexDot>>("avx_vnni");

}  // namespace ktrt
