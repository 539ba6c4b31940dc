// The AMX body on emulated tiles, for tests on machines without AMX.
#include "kernels/gemm_bf16/amx_body.h"

namespace ktrt {

extern const GemmKernel gemm_bf16_amx_emulated;
const GemmKernel gemm_bf16_amx_emulated = {"amx_emulated", tile_strip<EmulatedTiles, AmxBf16Gemm>, tile_expand<EmulatedTiles, false>, 0, true};

}  // namespace ktrt
