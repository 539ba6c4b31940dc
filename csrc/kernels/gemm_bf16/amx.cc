#include "kernels/gemm_bf16/amx_body.h"
#include "kernels/gemm_bf16/amx_one_row.h"

namespace ktrt {

namespace {

void strip(const GemmArgs& g) { tile_strip<HardwareTiles, AmxBf16Gemm>(g); }

// The same bits for one row, and for LoRA, off the tiles.
constexpr GemmKernel kFixed = {"amx_fixed",
                               strip,
                               tile_ordered_expand_rows,
                               0,
                               true,
                               tile_ordered_rows<strip, AmxBf16Gemm::kLayoutBlock>,
                               1};

}  // namespace

extern const GemmKernel gemm_bf16_amx;
const GemmKernel gemm_bf16_amx = {"amx", strip,  expand_rows<Bf16Expand>, 0, true, nullptr,
                                  0,     &kFixed};

}  // namespace ktrt
