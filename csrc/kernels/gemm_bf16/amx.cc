#include "kernels/gemm_bf16/amx_body.h"

namespace ktrt {

extern const GemmKernel gemm_bf16_amx;
const GemmKernel gemm_bf16_amx = {"amx", AmxBf16Gemm<HardwareTiles>::strip, 0};

}  // namespace ktrt
