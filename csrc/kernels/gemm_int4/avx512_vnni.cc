// VNNI without BF16 dot products (Cascade Lake, Ice Lake): LoRA by float32 multiply-adds.
#include "kernels/gemm_int4/vnni_body.h"

namespace ktrt {

extern const GemmKernel gemm_int4_avx512_vnni;
const GemmKernel gemm_int4_avx512_vnni = {"avx512_vnni",
                                          vnni_strip<Int4Weights, Float32Expand>,
                                          expand_rows<Float32Expand>,
                                          kActivationOffset,
                                          false,
                                          int4_side_by_side<Float32Expand>,
                                          kMaxSideRows};

}  // namespace ktrt
