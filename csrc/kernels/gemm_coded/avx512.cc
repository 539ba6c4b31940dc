// GEMM of coded weights on AVX-512 by float32 multiply-adds: Skylake-X to Ice Lake.
#include "kernels/gemm_coded/avx512_body.h"

namespace ktrt {

extern const GemmKernel gemm_coded_avx512[kNumCodedFormats];
const GemmKernel gemm_coded_avx512[kNumCodedFormats] = {
    coded_kernel<WeightFormat::kFp8, Float32Expand>("avx512"),
    coded_kernel<WeightFormat::kFp8Channel, Float32Expand>("avx512"),
    coded_kernel<WeightFormat::kInt4G32, Float32Expand>("avx512"),
    coded_kernel<WeightFormat::kInt4G64, Float32Expand>("avx512"),
    coded_kernel<WeightFormat::kInt4G128, Float32Expand>("avx512"),
    coded_kernel<WeightFormat::kMxfp4, Float32Expand>("avx512")};

}  // namespace ktrt
