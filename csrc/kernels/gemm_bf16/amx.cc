#include "kernels/gemm_bf16/amx_body.h"

namespace ktrt {

extern const GemmKernel gemm_bf16_amx;
const GemmKernel gemm_bf16_amx = {"amx", tile_strip<HardwareTiles, AmxBf16Gemm>, tile_expand<HardwareTiles, false>, 0, true};

}  // namespace ktrt
