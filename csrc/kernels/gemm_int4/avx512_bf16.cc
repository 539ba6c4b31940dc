// VNNI with BF16 dot products (Cooper Lake, Sapphire Rapids, Zen 4 on): LoRA by VDPBF16PS.
#include "kernels/gemm_int4/vnni_body.h"

namespace ktrt {

extern const GemmKernel gemm_int4_avx512_bf16;
const GemmKernel gemm_int4_avx512_bf16 = {"avx512_vnni_bf16",
                                          vnni_strip<Int4Weights, Bf16Expand>,
                                          expand_rows<Bf16Expand>,
                                          kActivationOffset,
                                          false,
                                          int4_side_by_side<Bf16Expand>,
                                          kMaxSideRows};

}  // namespace ktrt
