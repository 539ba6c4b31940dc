// GEMM of coded weights on AVX-512 with VDPBF16PS: Cooper Lake, Sapphire Rapids, Zen 4 on.
#include "kernels/gemm_coded/avx512_body.h"

namespace ktrt {

extern const GemmKernel gemm_coded_avx512_bf16[kNumCodedFormats];
const GemmKernel gemm_coded_avx512_bf16[kNumCodedFormats] = {
    coded_kernel<WeightFormat::kFp8, Bf16Expand>("avx512_bf16"),
    coded_kernel<WeightFormat::kFp8Channel, Bf16Expand>("avx512_bf16"),
    coded_kernel<WeightFormat::kInt4G32, Bf16Expand>("avx512_bf16"),
    coded_kernel<WeightFormat::kInt4G64, Bf16Expand>("avx512_bf16"),
    coded_kernel<WeightFormat::kInt4G128, Bf16Expand>("avx512_bf16"),
    coded_kernel<WeightFormat::kMxfp4, Bf16Expand>("avx512_bf16")};

}  // namespace ktrt
