#include "kernels/gemm_int4/amx_body.h"

namespace ktrt {

extern const GemmKernel gemm_int4_amx;
const GemmKernel gemm_int4_amx = {"amx", tile_strip<HardwareTiles, AmxInt4Gemm>, tile_expand<HardwareTiles, true>, 0, true};

}  // namespace ktrt
