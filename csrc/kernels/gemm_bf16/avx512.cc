// BF16 GEMM on AVX-512 by float32 multiply-adds: Skylake-X to Ice Lake, and where they are faster
// than VDPBF16PS (kernels/bf16_arithmetic.h).
#include "kernels/avx512_products.h"
#include "kernels/gemm_bf16/widened_body.h"

namespace ktrt {
namespace {

using Body = WidenedBf16<Bf16Products512, expand_rows<Float32Expand>>;

}  // namespace

extern const GemmKernel gemm_bf16_avx512;
const GemmKernel gemm_bf16_avx512 = {"avx512",    one_strip<Body>, expand_rows<Float32Expand>,
                                     0,           false,           strips_side_by_side<Body>,
                                     kMaxSideRows};

}  // namespace ktrt
