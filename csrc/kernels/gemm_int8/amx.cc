#include "kernels/gemm_int8/amx_body.h"

namespace ktrt {

extern const GemmKernel gemm_int8_amx;
const GemmKernel gemm_int8_amx = {"amx", tile_strip<HardwareTiles, AmxInt8Gemm>, tile_expand<HardwareTiles, true>, 0, true};

}  // namespace ktrt
