// The AMX body on emulated tiles, for tests on machines without AMX.
#include "kernels/gemm_int8/amx_body.h"

namespace ktrt {

namespace {

// LoRA as the kernel for few rows adds it.
constexpr GemmKernel kFixed = {"amx_emulated_fixed",
                               tile_strip_then_expand<EmulatedTiles, AmxInt8Gemm>,
                               expand_rows<Bf16Expand>, 0, true};

}  // namespace

extern const GemmKernel gemm_int8_amx_emulated;
const GemmKernel gemm_int8_amx_emulated = {"amx_emulated",
                                           tile_strip<EmulatedTiles, AmxInt8Gemm>,
                                           expand_rows<Bf16Expand>,
                                           0,
                                           true,
                                           nullptr,
                                           0,
                                           &kFixed};

}  // namespace ktrt
