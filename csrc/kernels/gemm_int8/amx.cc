#include "kernels/gemm_int8/amx_body.h"

namespace ktrt {

namespace {

// LoRA as the kernel for few rows adds it.
constexpr GemmKernel kFixed = {"amx_fixed", tile_strip_then_expand<HardwareTiles, AmxInt8Gemm>,
                               expand_rows<Bf16Expand>, 0, true};

}  // namespace

extern const GemmKernel gemm_int8_amx;
const GemmKernel gemm_int8_amx = {
    "amx",  tile_strip<HardwareTiles, AmxInt8Gemm>, expand_rows<Bf16Expand>, 0, true, nullptr, 0,
    &kFixed};

}  // namespace ktrt
